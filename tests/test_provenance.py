"""Every figure says what it came from: which training, which CLIP, which images; and nothing that
is read back, or typed anew, makes it say something else."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import make_data
import numpy as np
import pytest
import safetensors.torch
import torch

import common
import data
import prograd
import proreg
import vpt
from data import UserError

REPO = Path(__file__).resolve().parent.parent
TINY = ["--epochs", "2", "--max-steps", "1", "--no-compare"]


def quiet(script, *flags: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main([*map(str, flags)])


def photos(root: Path, classes=("red circle", "blue heart"), n: int = 12) -> list[str]:
    for shade, cls in enumerate(classes):
        for i in range(n):
            make_data.image(root / cls / f"{shade}{i}.png")
    return ["--dataset", f"folder:{root}", "--model", "toyclip", "--augment", "none", *TINY]


# What an evaluation may be told ------------------------------------------------------------------
def test_what_was_decided_in_training_is_not_typed_anew():
    quiet(prograd, *TINY, "--classes", "all", "--out-dir", "all")
    quiet(prograd, *TINY, "--out-dir", "half")
    for flags, text in (
        (["--seed", "2"], "all has --seed 1: leave --seed out"),
        (["--shots", "16"], "all has --shots 4: leave --shots out"),
        (["--lr", "1"], "all has --lr 0.01: leave --lr out"),
        (["--classes", "base"], "all was not trained on half of these classes"),
    ):
        with pytest.raises(UserError, match=text):
            prograd.main(["--eval", "all", *flags])
    other = ["--eval", "half", "--dataset", "toy_colorfills_dark"]
    with pytest.raises(UserError, match="half was not trained on half of these classes"):
        prograd.main([*other, "--classes", "base"])  # all of them are new to it
    elsewhere = quiet(prograd, *other)
    assert [test["classes"] for test in elsewhere["tests"]] == ["all"]
    assert elsewhere["harmonic_mean"] == {}
    assert [test["classes"] for test in quiet(prograd, "--eval", "half")["tests"]] == [
        "base",
        "new",
    ]
    whole = quiet(prograd, "--eval", "half", "--classes", "all")
    assert [test["classes"] for test in whole["tests"]] == ["all"] and not whole["harmonic_mean"]


def test_evaluation_speaks_of_no_training(tmp_path, capsys):
    flags = photos(tmp_path / "a")
    prograd.main([*flags, "--out-dir", "run", "--shots", "2"])
    assert "another --seed" in capsys.readouterr().out
    photos(tmp_path / "b", n=3)
    result = prograd.main(["--eval", "run", "--dataset", f"folder:{tmp_path}/b"])
    out = capsys.readouterr().out
    assert "try next:\n    python" in out and "--seed" not in out
    assert result["tests"][0]["n"] == 6  # all: nothing is held out where nothing is trained
    assert result["notes"] == ["all its 6 images are tested on"]


def test_where_a_figure_came_from(tmp_path):
    flags = photos(tmp_path / "a")
    trained = quiet(prograd, *flags, "--out-dir", "run", "--seed", 3, "--shots", 2)
    again = quiet(prograd, "--eval", "run", "--out-dir", "again")
    config = json.loads(Path("run/config.json").read_text())
    for result in (trained, again):
        assert result["clip"] == config["weights"] and result["name"] == "ProGrad"
        training = result["training"]
        assert training["run"] == os.path.abspath("run") and training["split"] == config["split"]
        assert (training["seed"], training["shots"]) == (3, 2)
        assert [test["images"] for test in result["tests"]] == config["tests"]
    quiet(prograd, *flags, "--out-dir", "other", "--seed", 4, "--shots", 2)
    other = json.loads(Path("other/result.json").read_text())
    assert other["training"]["split"] != config["split"]
    assert [test["images"] for test in other["tests"]] == config["tests"]
    (tmp_path / "a").rename(tmp_path / "moved")  # paths below the root
    moved = quiet(prograd, "--eval", "run", "--dataset", f"folder:{tmp_path}/moved")
    assert moved["tests"][0]["n"] == 24 and moved["training"]["dataset"] == flags[1]
    baseline = quiet(vpt, *TINY, "--compare", "--out-dir", "both")
    assert (baseline["name"], baseline["baseline_name"]) == ("VPT", "CoOp")


def test_resume_keeps_its_test_images(tmp_path, monkeypatch):
    """A baseline that is finished, images removed: both were not tested on the same."""
    flags = [*photos(tmp_path / "a"), "--compare"]
    kept = prograd.fit

    def stop(*args, **more):
        if more or len(args) > 6:  # the second of the two
            raise KeyboardInterrupt
        return kept(*args)

    monkeypatch.setattr(prograd, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(prograd, *flags, "--out-dir", "run")
    monkeypatch.setattr(prograd, "fit", kept)
    args = common.settle(prograd.build_parser(), flags, "prograd", prograd.defaults)
    tested = data.load_task(args).tests[0].items[0][0]
    hidden = Path(tested).rename(tmp_path / "hidden.png")
    with pytest.raises(UserError, match="run was begun with other"):
        quiet(prograd, "--resume", "run")
    hidden.rename(tested)
    result = quiet(prograd, "--resume", "run")
    assert result["tests"][0]["baseline"] and result["tests"][0]["n"] == 8
    Path(tested).rename(hidden)
    with pytest.raises(UserError, match="run was begun with other"):  # finished: no other table
        quiet(prograd, "--resume", "run")


def test_other_programs_folders(tmp_path):
    for text in ('{"architectures": ["CLIPModel"]}', '{"settings": {}}', "[]"):
        Path("foreign").mkdir(exist_ok=True)
        Path("foreign/config.json").write_text(text)
        for flag in ("--eval", "--resume"):
            with pytest.raises(UserError, match="foreign.config.json"):
                prograd.main([flag, "foreign"])


# Figures ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [prograd, vpt, proreg])
def test_predictions_give_back_every_figure(script):
    result = quiet(script, *TINY, "--compare", "--out-dir", "run")
    files = {"": ("zero_shot", "tuned"), "/baseline": ("tuned",)}
    for folder, kinds in files.items():
        arrays = np.load(f"run{folder}/predictions.npz")
        for i, test in enumerate(result["tests"]):
            labels = arrays[f"{i}/labels"]
            for kind in kinds:
                predicted, sure, nll = (
                    arrays[f"{i}/{kind}_{what}"] for what in ("predicted", "confidence", "nll")
                )
                right = predicted == labels
                bins = np.clip((sure * 15).astype(int), 0, 14)
                gaps = np.bincount(bins, right - sure.astype(float), 15)
                classes = [right[labels == c].mean() for c in np.unique(labels)]
                found = test["baseline" if folder else kind]
                assert f"{100 * right.mean():.1f}" == f"{found['accuracy']:.1f}"
                assert f"{100 * np.mean(classes):.1f}" == f"{found['mean_class_accuracy']:.1f}"
                assert abs(nll.mean(dtype=float) - found["nll"]) < 1e-5
                assert abs(100 * np.abs(gaps).sum() / len(labels) - found["ece"]) < 1e-3
                shares = arrays[f"{i}/{kind}"][np.arange(len(labels)), labels]
                assert np.isfinite(np.log(shares.astype(float))).all()


def test_columns_belong_to_classes_not_to_names(toyclip):
    """Two classes of one name: ImageNet has two "missile" and two "sunglasses"."""
    names = ["circle", "heart", "circle", "star"]
    learner = proreg.PromptedClassifier(toyclip, names, "a {}.")
    torch.manual_seed(0)
    learner.text_features.data += torch.randn_like(learner.text_features)
    x = torch.randn(5, learner.text_features.shape[1])
    whole = learner(x)

    def columns(asked):
        return proreg.class_logits(learner, toyclip, asked, x, "a {}.")

    assert torch.equal(columns(names), whole)
    assert torch.equal(columns(["star", "circle", "circle"]), whole[:, [3, 0, 2]])
    assert torch.equal(columns(["heart", "circle"]), whole[:, [1, 0]])
    prompts = learner(x, common.prompt_features(toyclip, ["circle"] * 3, "a {}."))
    assert torch.equal(columns(["circle"] * 3), prompts)  # there are not three of them


def test_harmonic_mean_of_what_it_says():
    def test(classes: str, domain: str, accuracy: float, dataset: str = "own") -> dict:
        found = {"accuracy": accuracy}
        about = {"dataset": dataset, "classes": classes, "domain": domain, "extra": {}}
        return about | {"zero_shot": found, "tuned": found, "baseline": None}

    rows = [test("base", "", 80.0), test("base", "art", 60.0), test("new", "art", 20.0)]
    assert common.harmonic_means(rows)["tuned"] == pytest.approx(2 * 80 * 60 / 140)
    new = [*rows, test("new", "", 40.0)]
    assert common.harmonic_means(new)["tuned"] == pytest.approx(2 * 80 * 40 / 120)
    assert common.harmonic_means([rows[0], test("all", "art", 9.0, "other")]) == {}


# Folders and files --------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [prograd, proreg])
def test_finished_runs_keep_what_was_learned_alone(script, monkeypatch):
    flags = ["--epochs", "3", "--max-steps", "1", "--no-compare", "--out-dir", "run"]
    kept = common.save_checkpoint
    seen = []

    def look(out, *args, **note):
        kept(out, *args, **note)
        tensors = safetensors.torch.load_file(out / "checkpoint.safetensors")
        seen.append(any(name.startswith("optimizer/") for name in tensors))

    monkeypatch.setattr(common, "save_checkpoint", look)
    result = quiet(script, *flags)
    assert seen == [True, True, False]
    assert quiet(script, "--resume", "run") == json.loads(json.dumps(result))
    Path("run/result.json").unlink()  # killed before the last line
    assert quiet(script, "--resume", "run")["tests"] == result["tests"]


def test_a_run_of_no_steps():
    """Zero-shot CLIP and the untrained start, in seconds."""
    result = quiet(prograd, "--epochs", "0", "--no-compare", "--shots", "1", "--out-dir", "run")
    assert result["name"] == "untrained" and not Path("run/checkpoint.safetensors").exists()
    with pytest.raises(UserError, match="run holds a run"):
        quiet(prograd, "--epochs", "0", "--out-dir", "run")


# What is said -------------------------------------------------------------------------------------
def test_notes_on_rates_that_nobody_means():
    assert "rate is 1e-5" in quiet(prograd, "--epochs", "1", "--max-steps", "1")["notes"][0]
    assert "--lr is less" in quiet(vpt, *TINY, "--lr", "1e-6")["notes"][0]
    assert "too few for --warmup" in quiet(proreg, "--epochs", "1", "--shots", "2")["notes"][0]
    assert quiet(prograd, *TINY)["notes"] == []


def test_template_of_further_test_sets():
    flags = ["--template", "a photo of a {}.", "--test-on", "toy_colorfills_dark"]
    notes = quiet(prograd, *TINY, *flags)["notes"]
    assert notes == ["toy_colorfills_dark: its template is 'a photo of a {}.'"]


def test_progress_where_no_terminal_is(monkeypatch, capsys):
    """A line about every minute, and after the first epoch about how long the rest takes."""
    clock = [0.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    args = prograd.build_parser().parse_args(["--epochs", "30", "--views", "10"])
    args.augment = "crop"

    def views(epoch):
        clock[0] += 20.0 if epoch < 10 else 0.0
        return epoch

    for epoch, found in common.epochs(args, 0, views, "run"):
        assert found == epoch
        clock[0] += 10.0
    err = capsys.readouterr().err
    # After the first epoch 29 are left, 10 s each, and 9 views of 20 s.
    assert f"about {(29 * 10 + 9 * 20) / 60:.0f} minutes" in err
    assert 6 <= err.count(" of 30 after ") <= 9  # 480 s in all, each 60 s or more apart
    assert "run: 2 of 30 after 01:00" in err


def test_several_processes(monkeypatch):
    """One line each: prompts learn in one process; nobody to meet; a partner that never comes."""
    alone = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": str(REPO)}
    meeting = alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}
    patient = "import datetime, common, proreg; proreg.PATIENCE = datetime.timedelta(seconds=2); "
    for script, env, text in (
        ("prograd", alone, "prograd.py runs in one process"),
        ("proreg", alone, "the processes did not meet"),
        ("proreg", meeting, "the processes did not meet"),
    ):
        code = f"{patient}import {script}; common.run({script}.main)"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and text in lines[0], done.stderr
        assert "Traceback" not in done.stderr


def test_finiteness_is_read_once(monkeypatch):
    """Of hundreds of tensors one number comes back; which it was is asked only if one is not."""
    module = torch.nn.Linear(2, 2)
    reads = []
    kept = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or kept(self))
    line = {"lr": 0.1, "loss": torch.tensor(0.5)}
    common.end_epoch(Path("run"), 0, module, None, line)
    assert len(reads) == 1 and common.read_metrics(Path("run"))[0] == line | {"epoch": 0}
    module.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="weight is not finite in epoch 2"):
        common.end_epoch(Path("run"), 1, module, None, line)
