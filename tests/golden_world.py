"""What the golden tests share: the recordings, the small CLIPs they were made with, and how close is close enough.

Nothing here knows a class name, a shape or a number of steps: all are read from the files.
"""

import copy
import dataclasses
import functools
import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch

import common

HERE = Path(__file__).resolve().parent


def golden_folder() -> Path:
    """The recordings to replay: the folder that GOLDEN_DIR names, else those that come with the repository."""
    return Path(os.environ.get("GOLDEN_DIR") or HERE / "golden")


FOLDER = golden_folder()


class Recording:
    """One file: recording[key] → a tensor (of a .npz) or a JSON value, and notes that the key was touched.

    Keys of a JSON file are those of its outermost object; a JSON list has one key, "".
    """

    def __init__(self, path: Path):
        self.name, self.touched = path.name, set()
        if path.suffix == ".npz":
            with np.load(path) as file:
                self.values = {key: torch.from_numpy(file[key]) for key in file.files}
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.values = content if isinstance(content, dict) else {"": content}

    def __getitem__(self, key: str):
        self.touched.add(key)
        return self.values[key]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def keys(self) -> list[str]:
        return list(self.values)

    def untouched(self, skip: dict[str, str]) -> list[str]:
        """Keys that were neither read nor named in `skip`, {"file-pattern:key-pattern": reason}."""
        named = [key for key in self.values if any(fnmatch(f"{self.name}:{key}", pattern) for pattern in skip)]
        return sorted(set(self.values) - self.touched - set(named))


class GoldenWorld:
    """The inputs that all recordings of one folder share."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = Path(folder)

    def recording(self, name: str) -> Recording:
        return Recording(self.folder / name)

    def json(self, name: str):
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    @functools.cached_property
    def classnames(self) -> list[str]:
        return self.json("classnames.json")

    @functools.cached_property
    def images(self) -> Recording:
        return self.recording("images.npz")

    @property
    def images32(self) -> torch.Tensor:
        return self.images["images32"]  # [NB, B, 3, 32, 32]

    @property
    def images64(self) -> torch.Tensor:
        return self.images["images64"]  # [NB, B, 3, 64, 64]

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.recording("weights_tiny_openai.npz").values

    @functools.cached_property
    def weights_rn(self) -> dict[str, torch.Tensor]:
        """The ResNet's visual tower with the ViT file's text tower."""
        visual = self.recording("weights_tiny_rn_visual_openai.npz").values
        return visual | {key: value for key, value in self.weights.items() if not key.startswith("visual.")}

    def clip(self) -> common.Clip:
        """The small ViT, fp32, QuickGELU, through load_clip. Loaded once: a test that writes to it copies it first."""
        return self._vit

    def clip_rn(self) -> common.Clip:
        """The small ResNet with the same text tower."""
        return self._resnet

    @functools.cached_property
    def _vit(self) -> common.Clip:
        return load(self.weights)

    @functools.cached_property
    def _resnet(self) -> common.Clip:
        return load(self.weights_rn)

    def clip64(self) -> common.Clip:
        """The small ViT in float64. What it gives is off from a recording by the recording's rounding alone."""
        return self._vit64

    @functools.cached_property
    def _vit64(self) -> common.Clip:
        return dataclasses.replace(self._vit, model=copy.deepcopy(self._vit.model).double())


@functools.cache
def world(folder: Path = FOLDER) -> GoldenWorld:
    """One GoldenWorld for each folder, so that the models are loaded once."""
    return GoldenWorld(folder)


def load(weights: dict[str, torch.Tensor]) -> common.Clip:
    """load_clip of OpenAI-named weights: the model's sizes follow from the tensors' shapes, heads are width / 64."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"golden{Path(folder).name.strip('_')}-quickgelu"
        config, file = Path(folder, f"{name}.json"), Path(folder, "weights.safetensors")
        config.write_text(json.dumps(config_of(weights)), encoding="utf-8")
        open_clip.add_model_config(config)
        safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, file)
        clip = common.load_clip(name, str(file))
    assert clip.activation == "quickgelu"
    return clip


def config_of(weights: dict[str, torch.Tensor]) -> dict:
    """The open_clip configuration of OpenAI-named weights, as OpenAI's build_model derives it."""

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})

    context_length, width = weights["positional_embedding"].shape
    text = {"context_length": context_length, "vocab_size": len(weights["token_embedding.weight"]), "width": width}
    text |= {"heads": width // 64, "layers": layers("transformer.resblocks.")}
    if "visual.proj" in weights:
        width, _, _, patch = weights["visual.conv1.weight"].shape
        side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
        vision = {"image_size": side * patch, "patch_size": patch, "width": width, "head_width": 64}
        vision["layers"] = layers("visual.transformer.resblocks.")
    else:
        side = round((len(weights["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        vision = {"image_size": side * 32, "width": len(weights["visual.layer1.0.conv1.weight"]), "head_width": 64}
        vision |= {"layers": [layers(f"visual.layer{i}.") for i in (1, 2, 3, 4)], "patch_size": None}
    embed_dim = weights["text_projection"].shape[1]
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def tensor(value) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu()


def deviation(ours, recorded) -> float:
    """‖ours - recorded‖ / ‖recorded‖ in float64; nan or inf are never close."""
    ours, recorded = tensor(ours), tensor(recorded)
    assert ours.shape == recorded.shape, f"shape {tuple(ours.shape)} instead of {tuple(recorded.shape)}"
    difference, size = (ours - recorded).norm().item(), recorded.norm().item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def close(ours, recorded, rel: float, what: str = "") -> None:
    """Assert that the relative L2 deviation is at most `rel`."""
    off = deviation(ours, recorded)
    assert off <= rel, f"{what}: off by {off:.2e} (relative L2), {rel:.0e} allowed"


def update_close(before, after, recorded_after, rel: float, what: str = "") -> None:
    """Assert that the *update* is right: ‖Δ - Δ_ref‖ / ‖Δ_ref‖ at most `rel`, with Δ = after - before."""
    close(tensor(after) - tensor(before), tensor(recorded_after) - tensor(before), rel, what)
