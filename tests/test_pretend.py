"""The scripts as if on a GPU (tests/pretend.py): nothing mixes places, no step waits for the
device, and the figures are the CPU's."""

import contextlib
import inspect
import io
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pretend
import pytest
import torch
from conftest import REPO, SCRIPTS, interrupted

import common
import data

sys.path.insert(0, str(REPO / "tools"))
import use  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(for .* meta|Converting a)")  # copied all the same
SHORT = "--epochs 2 --shots 8 --batch-size 4 --workers 0 --cache-dir none --precision fp32"
CASES = [
    "prograd --compare --augment crop --views 2 --eval-every 1",
    "prograd --no-compare --csc --augment crop --views 0 --memory-gb 1e-3",
    "prograd --no-compare --rule add --init random",
    "vpt --compare --samples 3 --augment crop --views 2",
    "vpt --compare --posterior image --samples 2 --bound elbo --memory-gb 3e-3",
    "proreg --no-compare --accumulate 2 --select val --ensemble 0.5 --wise-ft 0.5 --augment crop",
    "proreg --no-compare --loss kd --views 2 --train head --classes base --memory-gb 1e-3",
    "proreg --no-compare --head mlp",
]
MUTANTS = [  # what fails on a GPU, or makes it wait in every step; "file.function", right, wrong
    ("vpt.noise", "to(start.device, start.dtype, ", "to(start.dtype, "),
    ("common.pack", "mask=mask.to(table)", "mask=mask"),
    ("prograd.train", "batch.to(x.device, non_blocking=True)", "batch"),
    ("vpt.train", "batch.to(x.device, non_blocking=True)", "batch.to(x.device)"),
    ("prograd.step", "return torch.stack", "loss_ce.item(); return torch.stack"),
    ("vpt.step", "return torch.stack", "kl.item(); return torch.stack"),
    ("proreg.step", "return loss,", "w.tolist(); return loss,"),
]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Of every toy set four classes alone, two images of each but in training."""
    whole = data.world.task_items

    def few(name):
        names, sets, *rest = whole(name)
        sets = {key: [item for item in sets[key] if item[1] < 4] for key in sets}
        return names[:4], {key: sets[key][: 32 if key[0] == "train" else 8] for key in sets}, *rest

    monkeypatch.setattr(data.world, "task_items", few)


def run(case: str, where: str, device="cpu", steps=4) -> Counter:
    """A short run of "SCRIPT FLAG ..", silently → how often each line waited, if as on a GPU."""
    name, *flags = f"{case} {where} --max-steps {steps} --device {device}".split()
    place = pretend.pretended() if device == "cuda" else contextlib.nullcontext(Counter())
    with contextlib.redirect_stdout(io.StringIO()), place as reads:
        SCRIPTS[name].main([*SHORT.split(), *flags])
        return reads.copy()


def same_figures(one: str, other: str) -> None:
    """Losses and predictions of two runs."""
    for a, b in zip(common.read_metrics(Path(one)), common.read_metrics(Path(other)), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    a, b = (np.load(f"{folder}/predictions.npz") for folder in (one, other))
    assert set(a) == set(b)
    for key in a:
        if a[key].dtype.kind == "U":  # class names
            assert a[key].tolist() == b[key].tolist()
        else:
            np.testing.assert_allclose(a[key], b[key], atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_run(case):
    """The CPU's figures; and twice as many steps wait no more often, on any line."""
    run(case, "--out-dir cpu")
    reads = run(case, "--out-dir cuda", "cuda")
    same_figures("cpu", "cuda")
    assert reads and run(case, "--out-dir short", "cuda", steps=2) == reads


@pytest.mark.parametrize("case", ["prograd", "vpt --samples 2", "proreg --train head"])
def test_what_follows_a_run(case, capsys):
    """--resume, --eval, and each action of tools/use.py."""
    case += " --no-compare"
    run(case, "--out-dir cpu")
    with interrupted(epoch=2, saved=False):
        run(case, "--out-dir cuda", "cuda")
    run(case, "--resume cuda", "cuda")
    same_figures("cpu", "cuda")
    data.read_image("toy:toy_fillshapes_sketch/test/0").save("photo.png")
    actions = [["predict", "photo.png"], ["export", "weights"], ["export", "--features", "f.npz"]]
    actions += [["words"]] if "proreg" not in case else []
    for device, place in ("cpu", contextlib.nullcontext()), ("cuda", pretend.pretended()):
        run(case, f"--eval cpu --test-part val --out-dir eval_{device}", device)
        with place:
            for action, *rest in actions:
                use.main([action, "cpu", *rest, "--device", device])
    same_figures("eval_cpu", "eval_cuda")
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :]


def test_page():
    page = pytest.importorskip("page", exc_type=ImportError)  # tools/page.py needs matplotlib
    run("prograd", "--out-dir cuda", "cuda")
    page.main(["cuda", "page.html"])
    assert "</html>" in Path("page.html").read_text()


@pytest.mark.parametrize("layers", [1, 9])
def test_an_epochs_end_waits_a_few_times(layers):
    """However many tensors are learned."""
    with pretend.pretended() as reads:
        parts = [torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)]
        learner = torch.nn.Sequential(*parts * layers).to("cuda")
        optimizer = torch.optim.AdamW(learner.parameters(), fused=True)
        learner(torch.ones(2, 3).to("cuda")).sum().backward()
        optimizer.step()
        reads.clear()
        line = {"lr": 0.1, "loss": torch.ones((), device="cuda")}
        common.end_epoch(Path("run"), 0, learner, optimizer, line)
        assert reads.total() <= 3  # of the line; of the checkpoint, for each of two types


@pytest.mark.parametrize(("place", "right", "wrong"), MUTANTS)
def test_a_fault_is_found(place, right, wrong, monkeypatch):
    file, name = place.split(".")
    module = SCRIPTS.get(file, common)
    source = inspect.getsource(getattr(module, name))
    assert source.count(right) == 1
    scope = dict(vars(module))
    exec(source.replace(right, wrong), scope)
    monkeypatch.setattr(module, name, scope[name])
    case = f"{file.replace('common', 'prograd')} --epochs 1 --no-compare"
    try:
        few, many = (run(case, f"--out-dir {k}", "cuda", k).total() for k in (2, 4))
        assert many > few
    except RuntimeError as error:
        assert "same device" in str(error)
