"""tools/use.py on runs of all three scripts."""

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors
import torch
import torch.nn.functional as F

import common
import data
import prograd
import proreg
import vpt
from data import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import use  # noqa: E402

FLAGS = ["--epochs", "2", "--no-compare", "--shots", "2", "--test-part", "val"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One short run of each kind, and pictures."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {
        "prograd": (prograd, []),
        "vpt": (vpt, ["--samples", "3", "--batch-size", "8"]),
        "image": (vpt, ["--posterior", "image", "--samples", "2", "--batch-size", "8"]),
        "proreg": (proreg, ["--lr", "1e-3"]),
        "csc": (prograd, ["--csc"]),
        "mean": (vpt, ["--posterior", "image", "--samples", "0", "--batch-size", "8"]),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (script, more) in kinds.items():
            script.main([*FLAGS, *more, "--out-dir", str(root / name), "--cache-dir", "none"])
    (root / "photos").mkdir()
    for i in range(3):
        picture = data.read_image(f"toy:toy_fillshapes_sketch/test/{i}")
        picture.save(root / "photos" / f"{i}.png")
    return root


@pytest.mark.parametrize("name", ["prograd", "vpt", "image", "proreg"])
def test_predict(name, runs, capsys):
    use.main(["predict", str(runs / name), str(runs / "photos"), "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].endswith("photos/0.png")
    assert lines[1].startswith("  zero-shot") and lines[2].startswith("  tuned")
    assert all(line.count("%") == 2 for line in lines if line.startswith("  "))


def test_predict_among_other_classes(runs, capsys):
    classes = ["red circle", "blue star"]
    use.main(["predict", str(runs / "prograd"), str(runs / "photos/0.png"), "--classes", *classes])
    out = capsys.readouterr().out
    shares = [float(part.split()[-2]) for part in out.splitlines()[2].split(",")]
    assert abs(sum(shares) - 100) < 0.2


def test_exported_classifier_with_plain_open_clip(runs, tmp_path, capsys):
    """The lines of the docstring give the predictions of the run."""
    folder = runs / "prograd"
    use.main(["export", str(folder), "classifier.safetensors"])
    assert "classifier [12, 64]" in capsys.readouterr().out
    with safetensors.safe_open("classifier.safetensors", "pt") as file:
        note, W = file.metadata(), file.get_tensor("classifier")
    quick = note["activation"] == "QuickGELU"  # open_clip takes GELU for "ViT-B-16", "openai"
    net = open_clip.create_model(note["model"], note["pretrained"], force_quick_gelu=quick).eval()
    result = json.loads((folder / "result.json").read_text())
    items = data.load_task(argparse_of(result)).tests[0].items[:20]
    clip = common.load_clip()
    images = torch.stack([clip.preprocess(data.read_image(address)) for address, _ in items])
    with torch.no_grad():
        x = F.normalize(net.encode_image(images), dim=-1)
    p = (float(note["scale"]) * x @ W.T).softmax(dim=-1)
    kept = np.load(folder / "predictions.npz")["0/tuned"][:20]
    assert np.abs(p.numpy() - kept.astype(np.float32)).max() < 2e-3
    assert (
        json.loads(note["classnames"])
        == json.loads((folder / "config.json").read_text())["classnames"]
    )


def argparse_of(result: dict):
    import argparse

    return argparse.Namespace(**result["settings"])


def test_other_exports(runs, capsys):
    use.main(["export", str(runs / "vpt"), "vpt.safetensors"])
    use.main(["export", str(runs / "proreg"), "proreg.safetensors"])
    out = capsys.readouterr().out
    assert "samples [3, 12, 64]" in out and "classifier [12, 64]" in out
    with safetensors.safe_open("proreg.safetensors", "pt") as file:
        assert any(key.startswith("visual/") for key in file.keys())
    with pytest.raises(UserError, match="a classifier for each image: nothing to export"):
        use.main(["export", str(runs / "image"), "x.safetensors"])
    assert not Path("x.safetensors").exists()


@pytest.mark.parametrize("name", ["prograd", "proreg"])
def test_features(name, runs):
    use.main(["export", str(runs / name), "--features", "f.npz"])
    found = np.load("f.npz")
    n = len(found["labels"])
    assert found["x"].shape == found["x_tuned"].shape == (n, 64)
    assert np.allclose(np.linalg.norm(found["x"], axis=1), 1, atol=1e-5)
    kept = np.load(runs / name / "predictions.npz")
    same = found["predicted_tuned"] == kept["0/tuned"].argmax(1)
    assert same.mean() > 0.99 and (found["labels"] == kept["0/labels"]).all()
    assert (name == "proreg") != np.allclose(found["x"], found["x_tuned"])


def test_words(runs, capsys):
    use.main(["words", str(runs / "prograd")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and [line.split()[4] for line in lines[-4:]] == [
        "a",
        "photo",
        "of",
        "a",
    ]
    use.main(["words", str(runs / "prograd"), "--top", "1000000"])  # more than there are
    with pytest.raises(UserError, match="has no context"):
        use.main(["words", str(runs / "proreg")])


def test_mistakes(runs, capsys):
    for flags, text in (
        (["predict", "nothing", "x.png"], "nothing is no run folder"),
        (["predict", str(runs / "prograd"), "x.png"], "x.png: there is no such file"),
        (["predict", str(runs / "prograd")], "predict needs images"),
        (["export", str(runs / "prograd")], "export needs a file"),
        (["export", str(runs / "mean"), "x"], "nothing to export"),  # μ(x) is each image's own
        (["predict", str(runs / "csc"), "x.png", "--classes", "red circle"], "their own classes"),
        (["words", str(runs / "prograd"), "--device", "gpu"], "--device gpu: here it can be cpu"),
    ):
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda flags=flags: use.main(flags))
        assert stopped.value.code == 2 and text in capsys.readouterr().err
