"""Every figure says what it came from: which training, which CLIP, which images; and nothing that
is read back makes it say something else. And what else a run says."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from conftest import QUICK, each_script, photos, read, refused, run
from test_runs import SHORT

import common
import data
import prograd
import proreg
import vpt


# Where it came from -------------------------------------------------------------------------------
def test_evaluation_speaks_of_no_training(tmp_path, capsys):
    flags = photos(tmp_path / "a")
    run(prograd, *flags, "--out-dir", "run", "--shots", "2")
    photos(tmp_path / "b", n=3)
    result = prograd.main(["--eval", "run", "--dataset", f"folder:{tmp_path}/b"])
    out = capsys.readouterr().out
    assert "try next:\n    python" in out and "--seed" not in out
    assert result["tests"][0]["n"] == 6  # all: nothing is held out where nothing is trained
    assert result["notes"] == ["all its 6 images are tested on"]


def test_where_a_figure_came_from(tmp_path):
    flags = photos(tmp_path / "a")
    trained = run(prograd, *flags, "--out-dir", "run", "--seed", 3, "--shots", 2)
    again = run(prograd, "--eval", "run", "--out-dir", "again")
    config = read("run", "config.json")
    for result in (trained, again):
        assert result["clip"] == config["weights"] and result["name"] == "ProGrad"
        training = result["training"]
        assert (
            training["run"] == os.path.abspath("run")
            and training["split"] == config["training"]["split"]
        )
        assert (training["seed"], training["shots"]) == (3, 2)
        assert [test["images"] for test in result["tests"]] == config["tests"]
    other = run(prograd, *flags, "--out-dir", "other", "--seed", 4, "--shots", 2)
    assert other["training"]["split"] != config["training"]["split"]
    assert [test["images"] for test in other["tests"]] == config["tests"]
    (tmp_path / "a").rename(tmp_path / "moved")  # paths below the root
    moved = run(prograd, "--eval", "run", "--dataset", f"folder:{tmp_path}/moved")
    assert moved["tests"][0]["n"] == 24 and moved["training"]["dataset"] == flags[1]


def test_weights_that_changed(tmp_path):
    """Moved weights are named anew; other weights are refused."""
    file, moved = tmp_path / "w.safetensors", tmp_path / "moved.safetensors"
    shutil.copyfile(common.TOYCLIP / "weights.safetensors", file)
    result = run(prograd, *QUICK, "--out-dir", "here", "--pretrained", file)
    file.rename(moved)
    refused("cannot load toyclip .*w.safetensors", prograd, "--eval", "here")
    again = run(prograd, "--eval", "here", "--pretrained", moved)
    assert again["tests"] == result["tests"]
    tensors = safetensors.torch.load_file(moved)
    tensors["text_projection"] *= 2
    safetensors.torch.save_file(tensors, moved)
    refused("here had other CLIP weights", prograd, "--eval", "here", "--pretrained", moved)


@each_script
def test_predictions_give_back_every_figure(script, trained):
    folder = trained(script, *SHORT[script], "--compare")
    tests = read(folder)["tests"]
    for part, column, kind in (
        ("", "zero_shot", "zero_shot"),
        ("", "tuned", "tuned"),
        ("baseline", "baseline", "tuned"),
    ):
        arrays = np.load(folder / part / "predictions.npz")
        for i, test in enumerate(tests):
            labels, probabilities = arrays[f"{i}/labels"], arrays[f"{i}/{kind}"]
            predicted = arrays[f"{i}/{kind}_predicted"]
            sure, nll = arrays[f"{i}/{kind}_confidence"], arrays[f"{i}/{kind}_nll"]
            right = predicted == labels
            classes = [right[labels == c].mean() for c in np.unique(labels)]
            bins = np.clip((sure * 15).astype(int), 0, 14)
            gaps = np.bincount(bins, right - sure.astype(float), 15)
            found = test[column]
            assert len(labels) == test["n"]
            assert abs(100 * right.mean() - found["accuracy"]) < 1e-3
            assert abs(100 * np.mean(classes) - found["mean_class_accuracy"]) < 1e-3
            assert abs(nll.mean(dtype=float) - found["nll"]) < 1e-5
            assert abs(100 * np.abs(gaps).sum() / len(labels) - found["ece"]) < 1e-3
            # The probabilities themselves, as float16 and never 0: two may be rounded to one.
            assert probabilities.dtype == np.float16 and probabilities.min() > 0
            assert (probabilities.argmax(axis=1) == predicted).mean() > 0.995


def test_a_run_of_no_steps():
    """Zero-shot CLIP and the untrained start, in seconds."""
    flags = ["--epochs", "0", "--no-compare", "--out-dir", "run"]
    assert run(prograd, *flags)["name"] == "untrained"
    assert not Path("run/checkpoint.safetensors").exists()
    refused("run is in use, or holds a run", prograd, *flags)


# What is said -------------------------------------------------------------------------------------
RATE = "the first epoch's rate is 1e-5: more than --lr, or (--epochs 1) the only one"


@pytest.mark.parametrize(
    ("script", "flags", "notes"),
    [
        (prograd, "", []),
        (prograd, "--epochs 1", [RATE]),
        (vpt, "--lr 1e-6", [RATE]),
        (proreg, "--shots 2 --test-part val", ["2 steps are too few for --warmup 0.1"]),
        (
            prograd,
            "--template {} --test-on toy_colorfills_dark",
            ["toy_colorfills_dark: its template is 'a photo of a {}.'"],
        ),
    ],
)
def test_notes(script, flags, notes):
    """On rates that nobody means, and on what a flag does beside what is meant."""
    found = run(script, *QUICK, *flags.split())["notes"]
    assert [note for note in found if not note.startswith("mean residual")] == notes


def test_progress_where_no_terminal_is(monkeypatch, capsys):
    """A line about every minute."""
    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    for _ in data.progress(range(30), "run"):
        clock[0] += 30.0
    err = capsys.readouterr().err
    assert "run: 2 of 30 after 01:00" in err and "to go" in err
    assert 10 <= err.count(" of 30 after ") <= 16
