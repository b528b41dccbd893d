"""What the golden tests share: the recordings, and the small CLIPs they were made with, in float64.

Nothing here knows a class name, a shape or a number of steps: all are read from the files.
"""

import functools
import json
import math
import os
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch

import common

OWN = Path(__file__).resolve().parent / "golden"
FOLDER = Path(os.environ.get("GOLDEN_DIR") or OWN).resolve()
TOLERANCE = 1e-9  # relative, by norms: |ours - recorded| <= 1e-9 |recorded|


def deviation(ours, recorded, absolute: bool = False) -> float:
    """|ours - recorded| / |recorded| in float64; infinite for another shape and for NaN."""
    ours, recorded = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, recorded))
    if ours.shape != recorded.shape:
        return math.inf
    off = (ours - recorded).norm().item()
    size = 1.0 if absolute else recorded.norm().item()
    if off < 1e-290:  # below it float64 has fewer digits
        return 0.0
    return off / size if size > 0 and not math.isnan(off) else math.inf


class Recording:
    """One file. recording[key] → a tensor (floats as float64) or a JSON value (of a list the key is
    ""). `compare` and `compare_rows` note how far ours is off, where there is such a key: not every
    case has every one."""

    def __init__(self, path: Path):
        self.name = path.name
        self.read = set()
        self.off = {}  # {what: relative deviation}
        if path.suffix == ".npz":
            with np.load(path) as file:
                self.values = {key: torch.from_numpy(file[key]) for key in file.files}
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.values = content if isinstance(content, dict) else {"": content}

    def __getitem__(self, key: str):
        self.read.add(key)
        value = self.values[key]
        return value.double() if torch.is_tensor(value) and value.is_floating_point() else value

    def keys(self, pattern: str = "*") -> list[str]:
        return [key for key in self.values if fnmatch(key, pattern)]

    def cases(self, pattern: str) -> list[str]:
        """What stands before the last "/" of the keys that fit, each once."""
        return list(dict.fromkeys(key.rpartition("/")[0] for key in self.keys(pattern)))

    def compare(self, key: str, ours, note: str = "", absolute: bool = False) -> None:
        if key in self.values:
            self.off[key + note] = deviation(ours, self[key], absolute)

    def compare_rows(self, key: str, ours, since=None) -> None:
        """Each entry of the first axis by itself, so that none hides behind the others; and its
        change, `since` the start (where little has changed, the last bit may show beside it). Of
        some parameters the last entry alone is recorded."""
        if key not in self.values:
            return
        recorded = self[key]
        if since is not None and recorded.dim() == since.dim():
            recorded, ours = recorded[None], ours[-1:]
        for i, (mine, theirs) in enumerate(zip(ours, recorded, strict=True)):
            self.off[f"{key}[{i}]"] = deviation(mine, theirs)
            if since is not None:
                last_bit = 2**-52 * theirs.norm().item() / (theirs - since).norm().item()
                off = deviation(mine - since, theirs - since) - last_bit
                self.off[f"{key}[{i}] change"] = off


class GoldenWorld:
    """The inputs that all recordings of one folder share."""

    def __init__(self, folder: Path):
        self.folder = folder

    def recording(self, name: str) -> Recording:
        return Recording(self.folder / name)

    def names(self, pattern: str = "*") -> list[str]:
        """The files that fit, but for the text about them."""
        found = sorted(path.name for path in self.folder.glob(pattern))
        return [name for name in found if not name.endswith(".md")]

    @functools.cached_property
    def classnames(self) -> list[str]:
        return self.recording("classnames.json")[""]

    @functools.cached_property
    def clips(self) -> dict[str, common.Clip]:
        """{file of weights: CLIP}. A file without a text tower takes that of the one with it."""
        files = {name: self.recording(name).values for name in self.names("weights_*.npz")}
        whole = next(value for value in files.values() if "token_embedding.weight" in value)
        text = {key: value for key, value in whole.items() if not key.startswith("visual.")}
        return {name: load(text | value) for name, value in files.items()}

    @property
    def clip(self) -> common.Clip:
        """The one with a ViT."""
        return next(c for c in self.clips.values() if hasattr(c.model.visual, "transformer"))

    def images(self, clip: common.Clip) -> torch.Tensor:
        """[NB, B, 3, H, W] of the size that the tower takes."""
        size = clip.model.visual.image_size
        return self.recording("images.npz")[f"images{size if isinstance(size, int) else size[0]}"]

    @torch.no_grad()
    def features(self, clip: common.Clip) -> torch.Tensor:
        """Image features [NB, B, D], unnormalised."""
        images = self.images(clip)
        return clip.model.encode_image(images.flatten(0, 1)).unflatten(0, images.shape[:2])


@functools.cache  # so that the models are loaded once
def world(folder: Path = FOLDER) -> GoldenWorld:
    return GoldenWorld(folder)


def load(weights: dict[str, torch.Tensor]) -> common.Clip:
    """load_clip of these weights, then float64. Sizes follow from their shapes, by open_clip's copy
    of OpenAI's build_model."""
    # No cast_dtype: LayerNorms compute in what they are given.
    net = open_clip.model.build_model_from_openai_state_dict(dict(weights), cast_dtype=None)
    net.visual.preprocess_cfg = {}  # the images are preprocessed
    with mock.patch.object(common, "build_model", lambda *_: net):
        clip = common.load_clip("ViT-B-32", "golden")  # whose tokeniser all CLIPs share
    clip.model.double()
    return clip
