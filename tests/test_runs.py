"""A run from the command line's point of view: folder, files, resume, evaluation, refusals. CPU, offline, toy data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import prograd
import runs
from data import UserError

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--shots", "2", "--epochs", "3", "--checkpoint-seconds", "0"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def figures(result: dict) -> dict:
    """What must be equal between two runs of one command: everything that is a number about predictions."""
    return {key: result[key] for key in ("split", "tests", "harmonic_mean", "classes", "seed")}


def call(*flags: str, script: str = "prograd.py") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True, env=environment)


def test_no_flags_show_three_methods_on_base_and_new_classes():
    done = call("--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where stderr is no terminal
    header = next(line for line in done.stdout.splitlines() if "zero-shot" in line)
    assert header.split() == ["images", "zero-shot", "CoOp", "ProGrad"]
    assert [line.split()[0] for line in done.stdout.splitlines() if "accuracy %" in line] == ["base", "new"]


def test_run_folder_holds_what_design_says():
    result = prograd.main(QUICK)
    out = Path("runs/prograd-toy_fillshapes_sketch-2shot-seed1")
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "predictions.npz", "result.json", "baseline"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert result["settings"]["lr"] and result["commit"]
    assert torch.__version__.startswith(result["versions"]["torch"])
    assert set(result["seconds"]) == {"load", "encode", "train", "evaluate"}
    baseline = json.loads((out / "baseline/result.json").read_text())
    assert baseline["settings"]["lam"] == 0.0
    assert result["tests"][0]["baseline"] == baseline["tests"][0]["tuned"]
    stored = np.load(out / "predictions.npz")
    for i, test in enumerate(result["tests"]):
        right = (stored[f"{i}/tuned"].argmax(axis=1) == stored[f"{i}/labels"]).mean()
        assert test["tuned"]["accuracy"] == pytest.approx(100 * right)
        assert stored[f"{i}/zero_shot"].sum(axis=1) == pytest.approx(1, abs=1e-5)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert list(state["tensors"]) == ["context"] and "optimizer" not in state


def test_same_command_same_figures_and_other_seed_other_figures():
    first, again, other = (prograd.main([*QUICK, "--no-compare", "--seed", seed]) for seed in ("1", "1", "2"))
    assert figures(first) == figures(again)
    assert first["split"] != other["split"] and first["tests"] != other["tests"]
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "prograd-toy_fillshapes_sketch-2shot-seed1", "prograd-toy_fillshapes_sketch-2shot-seed1-2",
        "prograd-toy_fillshapes_sketch-2shot-seed2"]  # fmt: skip


def test_lambda_zero_is_the_same_under_either_rule_and_has_no_baseline():
    project, add = (prograd.main([*QUICK, "--lam", "0", "--rule", rule]) for rule in ("project", "add"))
    assert figures(project) == figures(add)
    assert project["tests"][0]["baseline"] is None


@pytest.mark.parametrize("cut_at", [2, 5])
def test_interrupted_run_resumes_to_the_same_figures(monkeypatch, cut_at):
    """Cut in the baseline's second epoch, or in ProGrad's: one batch an epoch, three epochs each."""
    whole = prograd.main([*QUICK, "--out-dir", "whole"])
    step, calls = prograd.project_gradient, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == cut_at:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prograd, "project_gradient", interrupt)
        prograd.main([*QUICK, "--out-dir", "cut"])
    with pytest.raises(UserError, match="--resume"):
        prograd.main([*QUICK, "--out-dir", "cut"])
    resumed = prograd.main(["--resume", "--out-dir", "cut"])  # the settings come from config.json
    assert figures(resumed) == figures(whole)
    for name in ("checkpoint.pt", "baseline/checkpoint.pt"):
        pair = [torch.load(Path(out, name), weights_only=True)["tensors"]["context"] for out in ("whole", "cut")]
        assert torch.equal(*pair)
    for name in ("metrics.jsonl", "baseline/metrics.jsonl"):
        assert Path("whole", name).read_text() == Path("cut", name).read_text()


def test_resume_leaves_a_finished_run_alone_and_starts_one_that_never_began():
    first = prograd.main([*QUICK, "--out-dir", "new", "--resume"])
    before = Path("new/result.json").read_bytes()
    assert prograd.main(["--resume", "--out-dir", "new"])["tests"] == json.loads(json.dumps(first))["tests"]
    assert Path("new/result.json").read_bytes() == before


def test_killed_process_resumes(tmp_path):
    flags = ["--shots", "4", "--epochs", "60", "--checkpoint-seconds", "0", "--no-compare"]
    whole = prograd.main([*flags, "--out-dir", "whole"])
    command = [sys.executable, str(ROOT / "prograd.py"), *flags, "--out-dir", "killed"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not Path("killed/checkpoint.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("killed/result.json").exists()
    done = call("--resume", "--out-dir", "killed")
    assert done.returncode == 0 and "going on after epoch" in done.stdout
    resumed = json.loads(Path("killed/result.json").read_text())
    assert resumed["tests"] == json.loads(json.dumps(whole["tests"]))


def test_ctrl_c_leaves_a_resumable_folder_and_status_130():
    command = [
        sys.executable,
        str(ROOT / "prograd.py"),
        "--epochs",
        "2000",
        "--checkpoint-seconds",
        "0",
        "--out-dir",
        "c",
    ]
    # Where the tests themselves run in the background, SIGINT is ignored and a child inherits that: undo it.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **listen)
    deadline = time.time() + 60
    while not Path("c/baseline/checkpoint.pt").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(stderr.strip().splitlines()) == 1 and "--resume" in stderr


def test_eval_only_repeats_the_figures_and_reads_other_classes():
    trained = prograd.main([*QUICK, "--out-dir", "run"])
    again = prograd.main(["--eval-only", "--checkpoint", "run"])
    assert again["tests"] == trained["tests"] and again["harmonic_mean"] == trained["harmonic_mean"]
    other = prograd.main(["--eval-only", "--checkpoint", "run/checkpoint.pt", "--classes", "all"])
    assert [test["classes"] for test in other["tests"]] == ["all"]
    assert other["tests"][0]["n"] == sum(test["n"] for test in trained["tests"])
    with pytest.raises(UserError, match="--n-ctx 8"):
        prograd.main(["--eval-only", "--checkpoint", "run", "--n-ctx", "8"])


def test_non_finite_gradient_stops_with_status_1_and_keeps_the_checkpoint(monkeypatch, capsys):
    calls = []

    def poison(g_d, g_g, lam):
        calls.append(1)
        return g_d * float("nan") if len(calls) == 2 else g_d

    monkeypatch.setattr(prograd, "project_gradient", poison)
    with pytest.raises(SystemExit) as stop:
        runs.run(lambda: prograd.main([*QUICK, "--no-compare", "--out-dir", "bad"]))
    assert stop.value.code == 1
    line = capsys.readouterr().err.strip()
    assert "gradient is not finite in epoch 1, step 0" in line and "\n" not in line
    assert torch.load("bad/checkpoint.pt", weights_only=True)["epoch"] == 1


def test_eval_every_writes_validation_accuracy_and_changes_nothing():
    plain = prograd.main([*QUICK, "--no-compare", "--out-dir", "plain"])
    curve = prograd.main([*QUICK, "--no-compare", "--out-dir", "curve", "--eval-every", "2"])
    assert figures(plain) == figures(curve)
    lines = [json.loads(line) for line in Path("curve/metrics.jsonl").read_text().splitlines()]
    assert ["val_accuracy" in line for line in lines] == [False, True, False]


def test_max_steps_stops_early():
    result = prograd.main(["--max-steps", "8", "--no-compare", "--out-dir", "short"])  # six steps an epoch
    assert len(Path("short/metrics.jsonl").read_text().splitlines()) == 2
    assert result["settings"]["max_steps"] == 8


REFUSED = {
    "--lamb 1": "--lamb",  # no abbreviation is guessed
    "--lam -1": "--lam",
    "--epochs 0": "--epochs",
    "--csc": "--classes base",
    "--dataset no_such": "no_such",
    "--dataset folder:/no/such": "/no/such",
    "--model no-such-model": "no-such-model",
    "--model ViT-B-16 --pretrained no_tag": "no_tag",
    "--resume": "--out-dir",
    "--eval-only": "--checkpoint",
    "--eval-only --checkpoint nowhere": "nowhere",
    "--precision fp16": "fp16",
    "--device cuda:9": "cuda:9",
    "--toy-bias 0.5": "toy_shapes_biased",
    "--n-ctx 2": "--n-ctx 4",
    "--n-ctx 100": "--n-ctx",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_mistake_is_one_line_and_status_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        runs.run(lambda: prograd.main(flags.split()))
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line
    assert line.startswith("error: ") and REFUSED[flags] in line


def test_finished_run_is_never_overwritten():
    prograd.main([*QUICK, "--no-compare", "--out-dir", "mine"])
    with pytest.raises(UserError, match="finished run"):
        prograd.main([*QUICK, "--no-compare", "--out-dir", "mine"])


def test_resume_refuses_other_settings():
    prograd.main([*QUICK, "--no-compare", "--out-dir", "mine"])
    with pytest.raises(UserError, match="--lr"):
        prograd.main(["--resume", "--out-dir", "mine", "--lr", "0.5"])


@pytest.mark.parametrize("script", ["prograd.py"])
def test_help_names_every_flag_with_its_default(script):
    done = call("--help", script=script)
    assert done.returncode == 0 and "--lam" in done.stdout and "[toy:" in done.stdout


def test_paper_exceptions_and_defaults_by_shots():
    def settled(*flags):
        return runs.settle(prograd.build_parser(), list(flags), "prograd", prograd.DEFAULTS, prograd.paper_exceptions)

    assert [settled("--dataset", "dtd", "--shots", k).epochs for k in ("1", "2", "4", "8", "16")] == [
        50,
        100,
        100,
        200,
        200,
    ]
    assert settled("--dataset", "dtd", "--shots", "16").lam == 1.0
    assert settled("--dataset", "dtd", "--shots", "16", "--paper").lam == 0.8
    assert settled("--dataset", "dtd", "--shots", "4", "--paper").lam == 1.0
    assert settled("--dataset", "dtd", "--shots", "16", "--paper", "--lam", "0.5").lam == 0.5
    assert settled("--dataset", "imagenet", "--paper").epochs == 50
    args = settled("--dataset", "dtd", "--shots", "16", "--paper")
    assert args.sources["lam"] == "the paper's exception" and args.sources["lr"] == "paper default"
    assert (args.model, args.pretrained, args.lr, args.batch_size, args.n_ctx, args.views) == (
        "RN50",
        "openai",
        0.002,
        32,
        16,
        0,
    )


CHOICES = """--csc --classes all, --class-position front, --init random, --teacher ensemble, --rule add, --n-ctx 4,
--temperature 2, --precision bf16, --label-noise 0.3, --augment crop --views 2, --augment crop --views 0,
--cache-dir none, --memory-gb 0.001, --test-on toy_shapes_biased, --shots all --max-steps 2"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in CHOICES.split(",")])
def test_each_choice_runs_and_gives_finite_figures(flags):
    result = prograd.main([*QUICK, "--no-compare", *flags.split()])
    for test in result["tests"]:
        assert 0 <= test["tuned"]["accuracy"] <= 100 and np.isfinite(test["tuned"]["nll"])
