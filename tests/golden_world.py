"""What the golden tests share: the recordings, the small CLIPs they were made with, in float64.

Nothing here knows a class name, a shape or a number of steps: all are read from the files.
"""

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
TOLERANCE = 1e-9  # relative, by norms: |ours - recorded| <= 1e-9 |recorded|
FOLDER = Path(os.environ.get("GOLDEN_DIR") or HERE / "golden")


class Recording:
    """One file: recording[key] → a tensor (of a .npz; floats as float64) or a JSON value, and a
    note that the key was touched. A JSON list has one key, ""."""

    def __init__(self, path: Path):
        self.name = path.name
        self.touched = set()
        if path.suffix == ".npz":
            with np.load(path) as file:
                self.values = {key: torch.from_numpy(file[key]) for key in file.files}
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.values = content if isinstance(content, dict) else {"": content}

    def __getitem__(self, key: str):
        self.touched.add(key)
        value = self.values[key]
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def keys(self) -> list[str]:
        return list(self.values)

    def cases(self, pattern: str) -> list[str]:
        """What stands before the last "/" of the keys that fit, each once."""
        found = [key.rpartition("/")[0] for key in self.values if fnmatch(key, pattern)]
        return list(dict.fromkeys(found))

    def untouched(self, skip: dict[str, str]) -> list[str]:
        """Keys neither read nor named in `skip`, {"file-pattern:key-pattern": reason}."""
        left = set(self.values) - self.touched
        named = [key for key in left if any(fnmatch(f"{self.name}:{key}", p) for p in skip)]
        return sorted(left - set(named))


class GoldenWorld:
    """The inputs that all recordings of one folder share."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = Path(folder)

    def recording(self, name: str) -> Recording:
        return Recording(self.folder / name)

    def names(self, pattern: str) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if fnmatch(path.name, pattern))

    @functools.cached_property
    def classnames(self) -> list[str]:
        return self.recording("classnames.json")[""]

    @functools.cached_property
    def images(self) -> Recording:
        return self.recording("images.npz")

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.recording("weights_tiny_openai.npz").values

    @functools.cached_property
    def clip(self) -> common.Clip:
        """The small ViT in float64. A test that writes to it copies it first."""
        return load(self.weights)

    @functools.cached_property
    def clip_rn(self) -> common.Clip:
        """The small ResNet, with the ViT file's text tower."""
        visual = self.recording("weights_tiny_rn_visual_openai.npz").values
        text = {k: v for k, v in self.weights.items() if not k.startswith("visual.")}
        return load(visual | text)

    @torch.no_grad()
    def features(self, clip: common.Clip) -> torch.Tensor:
        """Image features [NB, B, D], unnormalised, of the images that fit this CLIP."""
        size = clip.model.visual.image_size
        size = size if isinstance(size, int) else size[0]
        images = self.images[f"images{size}"]
        return clip.model.encode_image(images.flatten(0, 1)).unflatten(0, images.shape[:2])


@functools.cache
def world(folder: Path = FOLDER) -> GoldenWorld:
    """One GoldenWorld for each folder, so that the models are loaded once."""
    return GoldenWorld(folder)


def load(weights: dict[str, torch.Tensor], quick_gelu: bool = True) -> common.Clip:
    """load_clip of OpenAI-named weights, then float64. Sizes follow from the tensors' shapes."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"golden{Path(folder).name.strip('_')}"
        config = Path(folder, f"{name}.json")
        config.write_text(json.dumps(config_of(weights) | {"quick_gelu": quick_gelu}))
        open_clip.add_model_config(config)
        file = Path(folder, "weights.safetensors")
        safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, file)
        clip = common.load_clip(name, str(file))
    clip.model.double()
    return clip


def config_of(weights: dict[str, torch.Tensor]) -> dict:
    """open_clip's configuration of OpenAI-named weights, as OpenAI's build_model derives it."""

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})

    length, width = weights["positional_embedding"].shape
    text = {"context_length": length, "vocab_size": len(weights["token_embedding.weight"])}
    text |= {"width": width, "heads": width // 64, "layers": layers("transformer.resblocks.")}
    if "visual.proj" in weights:
        width, _, _, patch = weights["visual.conv1.weight"].shape
        side = round((len(weights["visual.positional_embedding"]) - 1) ** 0.5)
        vision = {"image_size": side * patch, "patch_size": patch, "width": width}
        vision["layers"] = layers("visual.transformer.resblocks.")
    else:
        side = round((len(weights["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        vision = {"image_size": side * 32, "width": len(weights["visual.layer1.0.conv1.weight"])}
        vision["layers"] = [layers(f"visual.layer{i}.") for i in (1, 2, 3, 4)]
        vision["patch_size"] = None
    vision["head_width"] = 64
    embed_dim = weights["text_projection"].shape[1]
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}


def deviation(ours, recorded) -> float:
    """|ours - recorded| / |recorded|; NaN and infinity are never close."""
    ours = torch.as_tensor(ours, dtype=torch.float64).detach()
    recorded = torch.as_tensor(recorded, dtype=torch.float64).detach()
    assert ours.shape == recorded.shape, f"shape {list(ours.shape)}, not {list(recorded.shape)}"
    difference, size = (ours - recorded).norm().item(), recorded.norm().item()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def close(ours, recorded, what: str, tolerance: float = TOLERANCE) -> None:
    """Assert that the relative deviation is within the tolerance."""
    off = deviation(ours, recorded)
    assert off <= tolerance, f"{what}: off by {off:.1e}, {tolerance:.0e} allowed"
