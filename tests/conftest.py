"""What several tests share: small CLIPs with random weights, and runs of the scripts."""

import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import make_data
import open_clip
import pytest
import safetensors.torch
import torch

import common
import prograd
import proreg
import vpt
from data import UserError

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
each_script = pytest.mark.parametrize("script", SCRIPTS.values(), ids=list(SCRIPTS))
QUICK = "--epochs 2 --max-steps 1 --no-compare".split()  # a run of two steps
CACHE = tempfile.TemporaryDirectory(prefix="features")  # every test set is encoded once a session

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


def tiny_clip(name: str = "tiny", double: bool = False, config: dict = CONFIG) -> common.Clip:
    model = tiny_model(name, config=config).requires_grad_(False)
    model = model.double() if double else model
    clip = common.Clip(model, lambda image: image, open_clip.get_tokenizer(name), name)
    clip.scale = model.logit_scale.double().exp().item()
    return clip


def run(script, *flags) -> dict:
    """main() of a script, silently → its result."""
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main(["--cache-dir", CACHE.name, "--workers", "0", *map(str, flags)])


def refused(text: str, script, *flags) -> None:
    """It ends in an error for the user that says `text`, a regular expression."""
    with pytest.raises(UserError, match=text):
        run(script, *flags)


@contextlib.contextmanager
def interrupted(epoch: int, saved: bool = True):
    """Ctrl-C at the end of this epoch, counted from 1: after its checkpoint, or just before it."""
    save = common.save_checkpoint

    def stop(out, module, epochs, optimizer):
        if saved or epochs < epoch:
            save(out, module, epochs, optimizer)
        if epochs == epoch:
            raise KeyboardInterrupt

    with mock.patch.object(common, "save_checkpoint", stop), pytest.raises(KeyboardInterrupt):
        yield


def photos(root: Path, n: int = 12) -> list[str]:
    """A user's folder of two classes with n images each → the flags of a quick run on it."""
    for shade, cls in enumerate(("red circle", "blue heart")):
        for i in range(n):
            make_data.image(root / cls / f"{shade}{i}.png")
    return ["--dataset", f"folder:{root}", "--model", "toyclip", "--augment", "none", *QUICK]


def read(folder, file: str = "result.json") -> dict:
    """A JSON file of a run folder."""
    return json.loads(Path(folder, file).read_text(encoding="utf-8"))


def checkpoint(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder, "checkpoint.safetensors"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """trained(script, *flags) → the folder of a finished run with these flags, which is made once
    for all tests. A test that changes it copies it first."""

    @functools.cache
    def train(script, *flags) -> Path:
        folder = tmp_path_factory.mktemp("trained") / script.__name__
        run(script, *flags, "--out-dir", folder)
        return folder

    return train


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
