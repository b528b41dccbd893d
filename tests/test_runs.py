"""Runs of the three scripts: settings, folders, resume after a kill, evaluation, refusals."""

import argparse
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import CACHE, QUICK, checkpoint, each_script, interrupted, photos, read, refused, run

import common
import data
import prograd
import proreg
import vpt
from data import UserError

SHORT = {  # flags that make a run of seconds
    prograd: "--dataset toy_fillshapes_sketch --epochs 6 --batch-size 16 --lr 0.005",
    vpt: "--dataset toy_fillshapes_sketch --epochs 3 --batch-size 8 --samples 3",
    proreg: "--dataset toy_shapes_biased --epochs 3 --shots 8 --batch-size 32 --lr 1e-4 "
    "--test-part val",
}
SHORT = {script: flags.split() for script, flags in SHORT.items()}


@pytest.fixture
def half(trained) -> Path:
    """A run that is trained on half of the classes."""
    return trained(prograd, *SHORT[prograd], "--no-compare")


def figures(folder) -> dict:
    """Of result.json what a run that was killed must hold, too."""
    result = read(folder)
    del result["seconds"], result["settings"], result["training"]["run"]
    return result


def same(one, other) -> None:
    """Two run folders hold the same, to the last bit."""
    assert figures(one) == figures(other)
    for file in ("metrics.jsonl", "checkpoint.safetensors"):
        assert Path(one, file).read_bytes() == Path(other, file).read_bytes(), file
    arrays, others = (np.load(f"{folder}/predictions.npz") for folder in (one, other))
    assert all(np.array_equal(arrays[key], others[key]) for key in arrays.files)


def ends(status: int, script, *flags) -> str:
    """A run ends with this exit status, and with one line on stderr → the line."""
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        pytest.raises(SystemExit) as stopped,
    ):
        data.run(lambda: run(script, *flags))
    line = err.getvalue()
    assert stopped.value.code == status and line.count("\n") == 1, line
    return line


# What a run writes and prints ---------------------------------------------------------------------
@each_script
def test_a_run(script, capsys):
    flags = [*SHORT[script], "--test-part", "test", "--compare", "--cache-dir", CACHE.name]
    result = script.main([*flags, "--out-dir", "here"])
    lines = capsys.readouterr().out.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith(" "))
    assert table <= 5 and all(len(line) <= 100 for line in lines[:table])
    assert lines[-3:-1] == ["written to here; try next:", "    python tools/page.py here"]
    wanted = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "predictions.npz"}
    wanted |= {"result.json", "baseline"}
    assert {path.name for path in Path("here").iterdir()} - {".lock"} == wanted
    assert json.loads(json.dumps(result)) == read("here")
    assert len(result["tests"]) == (3 if script is proreg else 2)
    for test in result["tests"]:
        for kind in ("zero_shot", "baseline", "tuned"):
            assert set(test[kind]) == {"accuracy", "mean_class_accuracy", "nll", "ece"}
            assert all(map(math.isfinite, test[kind].values()))
    assert result["harmonic_mean"].keys() >= {"zero_shot", "baseline", "tuned"}
    epochs = [line["epoch"] for line in common.read_metrics(Path("here"))]
    assert epochs == list(range(result["settings"]["epochs"]))


@each_script
def test_help_fits_on_two_screens(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert len(out.splitlines()) <= 80 and max(map(len, out.splitlines())) <= 110
    own = out.index({prograd: "ProGrad (", vpt: "VPT (", proreg: "ProReg ("}[script])
    assert own < out.index("data:") < out.index("run:")
    assert " on toy data, else " in out


@each_script
def test_flags(script):
    """None has a default in argparse, each gets a value, and each is read somewhere."""
    parser = script.build_parser()
    assert vars(parser.parse_args([])) == {}
    settled = common.settle(parser, [], script.__name__, script.defaults)
    source = "".join(map(inspect.getsource, (script, common, data)))
    for action in parser._actions[1:]:  # after --help
        assert action.dest in vars(settled)
        named = re.findall(rf'args\.{action.dest}\b|"{action.dest}"', source)
        assert len(named) >= 2 or f"args.{action.dest}" in named, action.dest


PAPER = [  # script, dataset, further flags, what --paper makes of them
    (prograd, "dtd", {"shots": 16}, {"lam": 0.8, "epochs": 200}),
    (prograd, "dtd", {"shots": 8}, {"lam": 0.8, "epochs": 200}),
    (prograd, "dtd", {"shots": 4}, {"lam": 1.0, "epochs": 100}),
    (prograd, "dtd", {"shots": 2}, {"lam": 1.0, "epochs": 100}),
    (prograd, "dtd", {"shots": 1}, {"lam": 1.0, "epochs": 50}),
    (prograd, "dtd", {"shots": 16, "paper": False}, {"lam": 1.0, "epochs": 200}),
    (prograd, "imagenet", {}, {"epochs": 50}),
    (vpt, "eurosat", {}, {"samples": 20, "epochs": 60, "batch_size": 1, "lr": 0.002}),
    (proreg, "bar", {"loss": "proreg"}, {"alpha": 1.0}),
    (proreg, "pacs", {"loss": "proreg"}, {"alpha": 2.0}),
    (proreg, "nico_animal", {"loss": "kd"}, {"alpha": 0.9}),
    (proreg, "dtd", {"loss": "ce"}, {"alpha": 0.0}),
]


@pytest.mark.parametrize(("script", "dataset", "flags", "settings"), PAPER)
def test_paper_settings(script, dataset, flags, settings):
    found = script.defaults({"dataset": dataset, "paper": True} | flags)
    assert found.items() >= settings.items()


# Interrupted runs ---------------------------------------------------------------------------------
@each_script
def test_killed_and_resumed(script, trained):
    """SIGKILL at several moments, and the same bytes in the end."""
    whole = trained(script, *SHORT[script], "--compare")
    flags = [*SHORT[script], "--cache-dir", CACHE.name, "--compare", "--resume", "killed"]
    for epoch in (1, 2):
        command = [sys.executable, script.__file__, *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.time() + 60
        while time.time() < end and process.poll() is None:
            if len(common.read_metrics(Path("killed/baseline"))) >= epoch:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(script, "--resume", "killed")
    same(whole, "killed")
    same(whole / "baseline", "killed/baseline")
    assert run(script, "--resume", "killed") == read("killed")  # a finished run


@each_script
@pytest.mark.parametrize("saved", [True, False])
def test_stopped_between_epochs(script, saved, trained):
    """After a checkpoint, or before it, when the line is there already and is done again. Only the
    last checkpoint lacks the optimiser's state, which is most of its size."""
    whole = trained(script, *SHORT[script], "--no-compare")
    with interrupted(epoch=2, saved=saved):
        run(script, *SHORT[script], "--no-compare", "--resume", "stopped")
    assert any(name.startswith("optimizer/") for name in checkpoint("stopped"))
    run(script, "--resume", "stopped")
    same(whole, "stopped")
    assert not any(name.startswith("optimizer/") for name in checkpoint("stopped"))
    Path("stopped/result.json").unlink()  # killed before the last line
    run(script, "--resume", "stopped")
    same(whole, "stopped")


@each_script
def test_numbers_that_are_not_finite(script):
    """The last good checkpoint stays, exit status 1, one line; and the run goes on from there."""
    optimizer = torch.optim.AdamW if script is proreg else torch.optim.SGD
    steps = itertools.count(1)

    def poison(self, *args, kept=optimizer.step):
        if next(steps) > 7:
            self.param_groups[0]["params"][0].data.fill_(math.nan)
        return kept(self, *args)

    with mock.patch.object(optimizer, "step", poison):
        line = ends(1, script, *SHORT[script], "--out-dir", "bad", "--no-compare")
    assert "not finite in epoch" in line and "--lr" in line
    assert all(value.isfinite().all() for value in checkpoint("bad").values())
    assert not Path("bad/result.json").exists()
    assert run(script, "--resume", "bad")["tests"]


def test_full_disk():
    def full(path, content, kept=Path.write_bytes):
        if "checkpoint" in path.name:
            kept(path, content[:10])
            raise OSError(28, "No space left on device")
        return kept(path, content)

    with mock.patch.object(Path, "write_bytes", full):
        line = ends(1, prograd, *QUICK, "--out-dir", "full")
    assert "checkpoint.safetensors: No space left" in line
    assert not list(Path("full").glob("*checkpoint*"))


# Settings of an earlier run -----------------------------------------------------------------------
REFUSED = [  # flags; the error. Two runs are there, trained on half of the classes and on all
    ("--resume half --lr 0.1", "half has --lr 0.005: leave it out"),
    ("--resume half --shots 2", "half has --shots 4: leave it out"),
    ("--resume half --csc", "half has --csc False: leave it out"),
    ("--resume half --out-dir x", "leave out --eval and --out-dir"),
    ("--out-dir half", "half is in use, or holds a run to --resume: name another --out-dir"),
    (
        "--resume heer --workers 0",
        "heer/config.json is missing.*; a new run needs --dataset",
    ),
    ("--resume heer --lr 0.1", "heer/config.json is missing.*; a new run needs --dataset"),
    ("--eval nothing", "nothing/config.json is missing, or not ours"),
    ("--eval half --n-ctx 4", "half has --n-ctx 16: leave it out"),
    ("--eval half --lr 1", "half has --lr 0.005: leave it out"),
    ("--eval all --seed 2", "all has --seed 1: leave it out"),
    ("--eval all --shots 16", "all has --shots 4: leave it out"),
    ("--eval all --classes base", "all was not trained on half of these classes"),
    ("--eval half --dataset toy_colorfills_dark --classes base", "half was not trained on half"),
]


@pytest.mark.parametrize(("flags", "text"), REFUSED)
def test_what_was_decided_is_not_typed_anew(flags, text, half, trained):
    Path("half").symlink_to(half)
    Path("all").symlink_to(trained(prograd, *QUICK, "--classes", "all"))
    refused(text, prograd, *flags.split())
    assert not Path("heer").exists()


def test_folders_that_are_no_run_of_a_script(half):
    refused("config.json is missing", prograd, "--eval", "")  # --eval "$NOT_SET"
    refused("is no vpt training", vpt, "--resume", half)
    Path("foreign").mkdir()
    for text in ('{"architectures": ["CLIPModel"]}', '{"settings": {}}', "[]"):
        Path("foreign/config.json").write_text(text)
        for flag in ("--eval", "--resume", "--out-dir"):
            refused("foreign.config.json", prograd, *QUICK, flag, "foreign")


def test_a_run_that_stopped_before_its_first_epoch():
    """--resume takes its settings all the same; --out-dir may begin another in its folder."""
    there = ["--resume", "there", "--dataset", "toy_fillshapes_sketch"]
    refused("use --n-ctx 4 or more", prograd, *QUICK, *there, "--n-ctx", "2")
    refused("there has --n-ctx 2: leave it out", prograd, *QUICK, *there, "--n-ctx", "4")
    refused("use --n-ctx 4 or more", prograd, *there)
    run(prograd, *QUICK, "--out-dir", "there")


@each_script
def test_evaluation_gives_the_figures_of_training(script, trained):
    folder = trained(script, *SHORT[script], "--no-compare")
    result = run(script, "--eval", folder)
    assert [t["tuned"] for t in result["tests"]] == [t["tuned"] for t in read(folder)["tests"]]


def test_evaluation_inherits_what_was_learned_and_not_how(half):
    shutil.copytree(half, "here")
    config = read("here", "config.json")
    how = {"precision": "fp16", "device": "cuda", "memory_gb": 40.0}
    config["settings"] |= how
    Path("here/config.json").write_text(json.dumps(config))
    result = run(prograd, "--eval", "here")
    found = [result["settings"][key] for key in how]
    assert found == ["fp32", "cpu", 4.0]
    on = run(prograd, "--eval", "here", "--test-on", "toy_shapes_biased")
    assert len(on["tests"]) == 5 and on["harmonic_mean"] == result["harmonic_mean"]
    Path("here/result.json").unlink()
    refused("here has not finished training: --resume it", prograd, "--eval", "here")


@pytest.mark.parametrize(
    ("flags", "classes"),
    [
        ("--dataset toy_fillshapes_sketch", ["base", "new"]),
        ("--dataset toy_fillshapes_sketch --classes all", ["all"]),
        ("--dataset toy_colorfills_dark", ["all"]),  # all of them are new
    ],
)
def test_evaluation_on_other_classes(flags, classes, half):
    result = run(prograd, "--eval", half, *flags.split())
    assert {test["dataset"] for test in result["tests"]} == {flags.split()[1]}
    assert [test["classes"] for test in result["tests"]] == classes
    assert bool(result["harmonic_mean"]) == (len(classes) == 2)


def test_data_that_changed(tmp_path):
    """A run, interrupted or finished, goes on with the classes and images it began with."""
    flags = [*photos(tmp_path / "photos"), "--compare"]
    run(prograd, *flags, "--out-dir", "here")
    for file in ("result.json", "metrics.jsonl", "checkpoint.safetensors"):
        Path("here", file).unlink()  # as if killed after the baseline's training
    args = common.settle(prograd.build_parser(), flags, "prograd", prograd.defaults)
    task = data.load_task(args)
    changes = [
        (Path(task.train[0][0]), tmp_path / "photos/red circle/zz.png"),
        (Path(task.tests[0].items[0][0]), tmp_path / "hidden.png"),
        (tmp_path / "photos/red circle", tmp_path / "photos/green star"),
    ]
    for _ in "interrupted", "finished":
        for old, new in changes:
            old.rename(new)
            refused("here was begun with other", prograd, "--resume", "here")
            new.rename(old)
        result = run(prograd, "--resume", "here")
        assert result["tests"][0]["baseline"] and result["tests"][0]["n"] == 8


def test_images_that_were_trained_on_are_noted(tmp_path):
    flags = photos(tmp_path / "photos")
    run(prograd, *flags, "--out-dir", "here")
    notes = run(prograd, "--eval", "here", "--test-part", "val")["notes"]
    assert not any("trained on" in note for note in notes)
    args = common.settle(prograd.build_parser(), flags, "prograd", prograd.defaults)
    tested = data.load_task(args).tests[0].items[:2]
    config = read("here", "config.json")
    config["train"] += [f"{data.below(path, str(tmp_path / 'photos'))}\t0" for path, _ in tested]
    Path("here/config.json").write_text(json.dumps(config))
    notes = run(prograd, "--eval", "here")["notes"]
    assert any(note.startswith("2 test images are trained on, as ") for note in notes)


# What is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "flags", "text"),
    [
        (prograd, "--lr -1", "--lr -1.0: it must be from 1e-09"),
        (prograd, "--lr nan", "--lr nan: it must be"),
        (prograd, "--shots 0", "--shots 0: it must be from 1 to"),
        (prograd, "--seed -1", "--seed -1: it must be from 0 to"),
        (prograd, "--momentum 2", "--momentum 2.0: it must be from 0 to 1"),
        (prograd, "--device gpu", "--device gpu: here it can be cpu"),
        (prograd, "--device cuda:99", "--device cuda:99: here it can be"),
        (prograd, "--device cpu --precision fp16", "--precision fp16 needs a GPU"),
        (prograd, "--csc --classes base", "--csc has no context for other classes"),
        (prograd, "--n-ctx 2", "'a photo of a {}.' has 4 tokens: use --n-ctx 4 or more"),
        (prograd, "--model RN51", "cannot load RN51"),
        (prograd, "--cache-dir afile", "afile: File exists"),
        (prograd, "--eval-every 1 --dataset imagenet_a", "no images in data/imagenet-adversarial"),
        (vpt, "--ctx-init=", "--ctx-init is empty"),
        (proreg, "--loss kd --alpha 2", "--alpha of --loss kd is a share: 1 at most"),
        (proreg, "--head mlp --wise-ft 0.5", "--head mlp has no prompt"),
        (proreg, "--head mlp --classes base", "--head mlp has no prompt"),
        (proreg, "--head mlp --test-on toy_fillshapes_sketch", "--head mlp has no prompt"),
        *[(prograd, flag, "--help") for flag in ("--no-such", "--eval-only", "--lr x")],
    ],
)
def test_bad_flags_are_one_line(script, flags, text):
    Path("afile").write_text("")
    assert text in ends(2, script, *flags.split())


def test_broken_image_is_named(tmp_path):
    """As a user starts it: one line on stderr, exit status 2, nothing written."""
    flags = photos(tmp_path / "photos")
    for name in ("red circle/03.png", "blue heart/15.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    flags += ["--shots", "all", "--cache-dir", "none"]
    command = [sys.executable, prograd.__file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "broken images, mend or remove them" in done.stderr and "Traceback" not in done.stderr
    assert "03.png" in done.stderr or "15.png" in done.stderr


def test_home_folder_is_expanded():
    parser = prograd.build_parser()
    for flag in ("--out-dir", "--resume", "--eval", "--cache-dir", "--pretrained"):
        (found,) = vars(parser.parse_args([flag, "~/x"])).values()
        assert found == os.path.expanduser("~/x")


def test_folders_are_claimed():
    """Of two commands that start at once each gets its own; one that was killed leaves its own
    free, and so does one that trained nothing."""
    flags = {"resume": None, "out_dir": None, "method": "m"}
    args = argparse.Namespace(**flags, dataset="folder:./a/", shots=4, seed=1)
    code = f"import common, sys; from argparse import *; print(common.claim_folder({args}), "
    code += "flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": os.path.dirname(common.__file__)}
    other = subprocess.Popen([sys.executable, "-c", code], **pipes, env=env)
    name = other.stdout.readline().strip()
    assert name == "runs/m-a-4shot-seed1"
    assert str(common.claim_folder(args)) == f"{name}-2"
    named = argparse.Namespace(**vars(args) | {"out_dir": name})
    with pytest.raises(UserError, match=f"{name} is in use, or holds a run"):
        common.claim_folder(named)
    other.kill()
    other.wait()
    assert str(common.claim_folder(named)) == str(common.claim_folder(args)) == name
    for _ in range(11):
        folder = common.claim_folder(args)
        Path(folder, "result.json").touch()
    assert str(folder) == f"{name}-11"
    refused("use --n-ctx 4 or more", prograd, *QUICK, "--n-ctx", "2", "--out-dir", "here")
    run(prograd, *QUICK, "--n-ctx", "4", "--out-dir", "here")


def test_probabilities_compress():
    """50,000 images of 1,000 classes stay under 50 MB each: here a fiftieth of it."""
    logits, labels = 100 * (0.2 + 0.04 * torch.randn(1000, 1000)), torch.zeros(1000, dtype=int)
    test = data.Test("toy", "", "all", ["a"], "{}", [("", 0)])
    task = data.Task("toy", ["a"], "{}", "{}", [], [], [test], [], training={"split": ""})
    task.training["dataset"] = "toy"
    args, clip = argparse.Namespace(eval=None, method=""), argparse.Namespace(weights="")
    encoded = [common.EncodedTest(test, None, labels, logits)]
    common.write_result(Path("run"), "", args, clip, task, encoded, [{"tuned": logits}], 0)
    assert Path("run/predictions.npz").stat().st_size * 50 < 2 * 50e6
    kept = np.load("run/predictions.npz")["0/tuned"].astype(float)
    assert abs(kept - logits.softmax(1).numpy()).max() < 3e-4 and kept.min() > 6e-5
