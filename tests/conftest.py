"""What several tests share: small CLIPs with random weights, and runs of the scripts."""

import json
import tempfile
from pathlib import Path

import open_clip
import pytest
import torch

import common

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
CONFIG = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}


def tiny_model(name: str, seed: int = 0, config: dict = CONFIG) -> torch.nn.Module:
    """An open_clip model of this configuration, registered under `name`, with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.json")
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
    torch.manual_seed(seed)
    return open_clip.create_model(name).eval()


def tiny_clip(name: str = "tiny", double: bool = False) -> common.Clip:
    model = tiny_model(name).requires_grad_(False)
    model = model.double() if double else model
    clip = common.Clip(model, lambda image: image, open_clip.get_tokenizer(name), name)
    clip.scale = model.logit_scale.double().exp().item()
    return clip


@pytest.fixture(scope="session")
def clip64() -> common.Clip:
    """A small CLIP with random weights, in float64."""
    return tiny_clip("tiny64", double=True)


@pytest.fixture(scope="session")
def toyclip() -> common.Clip:
    return common.load_clip()


@pytest.fixture(autouse=True)
def one_thread_and_a_folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with one thread."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
