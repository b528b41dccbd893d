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
import torch
from conftest import CONFIG, tiny_model

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


def classify(file: Path, photos: list[str], weights: Path, config: Path):
    """classify.py, in its own folder, and nothing of this repository on the way."""
    flags = ["--pretrained", str(weights), "--config", str(config)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-I", "classify.py", file.name, *photos, *flags],
        cwd=file.parent, env=clean, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["prograd", "vpt", "proreg", "gelu"])
def test_an_exported_classifier_runs_elsewhere(name, runs, odd_photos, tmp_path):
    """It predicts what the run predicts, of every kind of image."""
    weights, config = common.TOYCLIP / "weights.safetensors", common.TOYCLIP / "toyclip.json"
    if name == "gelu":  # a transformer with another activation, from a weights file
        weights, config = tmp_path / "gelu.safetensors", tmp_path / "geluclip.json"
        config.write_text(json.dumps(CONFIG))
        safetensors.torch.save_file(tiny_model("geluclip").state_dict(), weights)
        flags = ["--model", "geluclip", "--pretrained", str(weights), "--cache-dir", "none"]
        prograd.main([*FLAGS, *flags, "--n-ctx", "4", "--out-dir", str(runs / name)])
    rows = predictions(runs / name, odd_photos)
    assert len(rows) == 5
    there = tmp_path / "elsewhere"
    use.main(["export", str(runs / name), str(there / "c.safetensors")])
    done = classify(there / "c.safetensors", [row[0] for row in rows], weights, config)
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        path, first, *_ = line.split("\t")
        assert path == row[0] and first.rpartition(" ")[0] == row[3]
        assert abs(float(first.split()[-1]) - float(row[4])) < 1e-5
    if name == "gelu":  # other weights than the run's are refused, in a line
        torch.manual_seed(1)
        safetensors.torch.save_file(tiny_model("geluclip", seed=1).state_dict(), weights)
        done = classify(there / "c.safetensors", [rows[0][0]], weights, config)
        assert done.returncode == 1 and done.stderr.startswith("error: name the weights")


def test_classify_py_of_others_stays(runs, tmp_path):
    (tmp_path / "classify.py").write_text("mine")
    for file in ("c.safetensors", "classify.py"):
        with pytest.raises(UserError, match="classify.py is another file"):
            use.main(["export", str(runs / "prograd"), file])
    assert [path.name for path in tmp_path.iterdir()] == ["classify.py"]


def test_folders_called_as_classes(runs, odd_photos, capsys, monkeypatch):
    """The scores are those of the written rows, whatever the blocks are."""
    rows = predictions(runs / "prograd", odd_photos)
    names = [Path(path).parent.name.replace("_", " ") for path, *_ in rows]
    monkeypatch.setattr(use, "BLOCK", 2)
    use.main(["predict", str(runs / "prograd"), str(odd_photos), "--top", "1"])
    out = capsys.readouterr().out
    assert "in folders of 2 classes: 3 of 5 images" in out and "note:" in out
    assert "hidden files" in out and out.count("turned.jpg") == 1
    known = [(name, row[3]) for name, row in zip(names, rows) if name.endswith("circle")]
    right = {name: [n == p for n, p in known if n == name] for name, _ in known}
    mean = np.mean([np.mean(of) for of in right.values()])
    share = np.mean([n == p for n, p in known])
    assert f"tuned      accuracy {100 * share:.1f} %, class mean {100 * mean:.1f} %" in out
    wrong = [pair for pair in known if pair[0] != pair[1]]
    assert all(f"{name} as {guess} {wrong.count((name, guess))}" in out for name, guess in wrong)


def test_a_class_by_its_training_folder():
    """As of ImageNet's WordNet ids; what two classes are called is nobody's."""
    lines = ["train/n01/a.jpg\t0", "train/n02/b.jpg\t1", "train/n03/deep/c.jpg\t2"]
    found = use.folder_labels(["missile", "cup_of coffee", "missile"], lines)
    assert found == {"cup of coffee": 1, "n01": 0, "n02": 1, "n03": 2, "deep": 2}


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
    nearest = [line.split()[4] for line in lines]
    assert nearest == ["zero"] * 12 + ["a", "photo", "of", "a"]
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
        (["export", str(runs / "prograd"), "x", "--features", "y"], "export needs a file"),
        (["predict", str(runs / "prograd"), "x.png", "--classes", "a"], "two names or more"),
        (["predict", str(runs / "vpt"), "x.png", "--classes", "a_b", "A b"], "each of them once"),
        (["predict", str(runs / "csc"), "x.png", "--classes", "red circle"], "their own classes"),
        (["words", str(runs / "prograd"), "--device", "gpu"], "--device gpu: here it can be cpu"),
    ):
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda flags=flags: use.main(flags))
        assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_one_line_for_runs_that_cannot_be_used(runs, tmp_path, capsys):
    """Unfinished, of another program, of a script that is elsewhere or incomplete."""
    shutil.copytree(runs / "prograd", "half")
    Path("half/result.json").unlink()
    photo = str(runs / "photos/0.png")
    use.main(["predict", "half", "--top", "1", photo])
    assert "note: half has not finished training" in capsys.readouterr().out
    Path("half/checkpoint.safetensors").unlink()
    config = json.loads(Path("half/config.json").read_text())
    configs = {
        "half": config,
        "foreign": {"model_type": "clip"},
        "empty": {"settings": {}},
        "own": config | {"method": "mymethod"},
        "evil": config | {"method": "../../evil"},
    }
    for name, content in configs.items():
        Path(name).mkdir(exist_ok=True)
        Path(name, "config.json").write_text(json.dumps(content))
    for name in ("own", "evil"):
        Path(name, "result.json").write_text("{}")
    Path("bare.py").write_text("")
    Path("evil.py").write_text("raise SystemExit(99)")
    for flags, text in (
        (["half"], "half has not finished training, and has no checkpoint yet"),
        (["foreign"], "config.json"),
        (["empty"], "config.json"),
        (["own"], "name the script of the run, "),
        (["evil"], "name the script of the run, "),
        (["own", "--script", "bare.py"], "bare.py must define read_learner(folder, args, clip)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda flags=flags: use.main(["predict", *flags, photo]))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and text in err and err.count("\n") == 1, err


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
