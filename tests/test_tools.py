"""tools/use.py on runs of all three scripts."""

import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from conftest import tiny_model

import data
import prograd
import proreg
import vpt

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
    use.main(["predict", str(runs / name), "--top", "2", str(runs / "photos")])
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


@pytest.fixture(scope="module")
def odd_photos(runs) -> Path:
    """Images that a reader can get wrong: turned by EXIF data, a palette with and without
    transparency, grey, in no class's folder; and what is no image."""
    root = runs / "odd"
    picture = data.read_image("toy:toy_fillshapes_sketch/test/40").resize((60, 40))
    for folder in ("hollow_circle", "striped circle", "other", "odd.jpg"):
        (root / folder).mkdir(parents=True)
    turned = picture.getexif()
    turned[0x0112] = 6
    picture.save(root / "hollow_circle" / "turned.jpg", exif=turned)
    picture.quantize(8).save(root / "hollow_circle" / "palette.png")
    picture.quantize(8).save(root / "striped circle" / "clear.png", transparency=3)
    picture.convert("L").save(root / "odd.jpg" / "grey.png")
    picture.convert("LA").save(root / "other" / "grey.png")
    (root / "._a.jpg").write_text("no image")
    return root


def predictions(run: Path, photos: Path, *flags) -> list[list[str]]:
    """The rows that --csv writes."""
    with contextlib.redirect_stdout(io.StringIO()):
        use.main(["predict", str(run), str(photos), "--csv", "out.csv", *flags])
    return list(csv.reader(Path("out.csv").open(encoding="utf-8")))[1:]


def classify(file: Path, photos: list[str]):
    """classify.py, in its own folder, and nothing of this repository on the way."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-I", "classify.py", file.name, *photos],
        cwd=file.parent, env=clean, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["prograd", "vpt", "proreg", "gelu"])
def test_an_exported_classifier_runs_elsewhere(name, runs, odd_photos, tmp_path):
    """It predicts what the run predicts, of every kind of image, without the CLIP's weights."""
    if name == "gelu":  # a transformer with another activation, from a weights file
        safetensors.torch.save_file(tiny_model("geluclip").state_dict(), "gelu.safetensors")
        flags = ["--model", "geluclip", "--pretrained", "gelu.safetensors", "--cache-dir", "none"]
        prograd.main([*FLAGS, *flags, "--n-ctx", "4", "--out-dir", str(runs / name)])
    rows = predictions(runs / name, odd_photos)
    assert len(rows) == 5
    there = tmp_path / "elsewhere"
    use.main(["export", str(runs / name), str(there / "c.safetensors")])
    done = classify(there / "c.safetensors", [row[0] for row in rows])
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        path, first, *_ = line.split("\t")
        assert path == row[0] and first.rpartition(" ")[0] == row[3]
        assert abs(float(first.split()[-1]) - float(row[4])) < 1e-5
    done = classify(there / "c.safetensors", ["nothing.jpg"])
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "nothing.jpg" in done.stderr


def test_exports(runs):
    """Of VPT's samples; a classify.py of your own stays."""
    export = ["export", str(runs / "vpt"), "vpt.safetensors"]
    Path("classify.py").write_text("mine")
    with pytest.raises(data.UserError, match="classify.py is another program"):
        use.main(export)
    assert Path("classify.py").read_text() == "mine" and not Path("vpt.safetensors").exists()
    Path("classify.py").unlink()
    for _ in range(2):  # over an earlier export
        use.main(export)
    exported = safetensors.torch.load_file("vpt.safetensors")
    assert exported["classifier"].shape == (3, 12, 64)


@pytest.mark.parametrize("name", ["prograd", "proreg"])
def test_features(name, runs):
    use.main(["export", str(runs / name), "--features", "f.npz"])
    found = np.load("f.npz")
    n = len(found["labels"])
    assert found["x"].shape == found["x_tuned"].shape == (n, 64)
    assert np.allclose(np.linalg.norm(found["x"], axis=1), 1, atol=1e-5)
    kept = np.load(runs / name / "predictions.npz")
    predicted = (found["x_tuned"] @ found["text_tuned"].T).argmax(axis=1)
    assert (predicted == kept["0/tuned_predicted"]).mean() > 0.99
    predicted = (found["x"] @ found["text_zero_shot"].T).argmax(axis=1)
    assert (predicted == kept["0/zero_shot_predicted"]).mean() > 0.99
    assert (found["labels"] == kept["0/labels"]).all()
    assert (name == "proreg") != np.allclose(found["x"], found["x_tuned"])


def test_words(runs, capsys):
    use.main(["words", str(runs / "prograd")])
    lines = capsys.readouterr().out.splitlines()
    nearest = [line.split()[4] for line in lines]
    assert nearest == ["zero"] * 12 + ["a", "photo", "of", "a"]
    use.main(["words", str(runs / "prograd"), "--top", "1000000"])  # more than there are


def test_mistakes(runs, capsys):
    """Each is one line; among them runs that are unfinished, of another program, of a script that
    is elsewhere or incomplete."""
    shutil.copytree(runs / "prograd", "half")
    Path("half/result.json").unlink()
    photo = str(runs / "photos/0.png")
    use.main(["predict", "half", "--top", "1", photo])
    assert "note: half has not finished training" in capsys.readouterr().out
    Path("half/checkpoint.safetensors").unlink()
    config = json.loads(Path("half/config.json").read_text())
    configs = {
        "foreign": {"model_type": "clip"},
        "empty": {"settings": {}},
        "own": config | {"method": "mymethod"},
        "evil": config | {"method": "../../evil"},
    }
    for name, content in configs.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(content))
    Path("bare.py").write_text("")
    Path("evil.py").write_text("raise SystemExit(99)")
    run = str(runs / "prograd")
    for flags, text in (
        (["predict", "nothing", photo], "nothing/config.json is missing"),
        (["predict", "half", photo], "half/checkpoint.safetensors cannot be read"),
        (["predict", "foreign", photo], "config.json"),
        (["predict", "empty", photo], "config.json"),
        (["predict", "own", photo], "name the script of the run by --script"),
        (["predict", "evil", photo], "name the script of the run by --script"),
        (["predict", "own", "--script", "bare.py", photo],
         "bare.py must define read_learner(folder, args, clip)"),
        (["predict", run, "x.png"], "x.png: [Errno 2] No such file"),
        (["predict", run], "predict needs images"),
        (["predict", run, photo, "--classes", "a"], "two names or more"),
        (["predict", run, photo, "--classes", "a_b", "A b"], "each of them once"),
        (["predict", str(runs / "csc"), photo, "--classes", "a", "b"], "their own classes"),
        (["export", run], "export needs a file"),
        (["export", run, "x", "--features", "y"], "export needs a file"),
        (["export", str(runs / "image"), "x"], "a classifier for each image: nothing to export"),
        (["words", str(runs / "proreg")], "has no context"),
        (["words", run, "--device", "gpu"], "--device gpu: here it can be cpu"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda flags=flags: use.main(flags))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and text in err and err.count("\n") == 1, err
    assert not Path("x").exists()


def test_a_script_of_your_own(runs, capsys):
    """A learner with an encode_image has its own encoder, whatever its script is called."""
    shutil.copytree(runs / "proreg", "mine")
    path = Path("mine/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "mymethod"}))
    Path("mymethod.py").write_text("from proreg import *  # noqa: F403")
    flags = ["--script", "mymethod.py"]
    rows = predictions(Path("mine"), runs / "photos", *flags)
    assert rows == predictions(runs / "proreg", runs / "photos")
    assert any(row[2] != row[4] for row in rows)
