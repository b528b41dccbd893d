"""What each script does beside the recorded steps: variants, evaluation, several processes."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_clip

import common
import data
import prograd
import proreg
import vpt
from data import UserError

REPO = Path(__file__).resolve().parent.parent
QUICK = ["--epochs", "2", "--no-compare"]


def run(script, *flags: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        return script.main([*QUICK, *flags])


def tuned(result: dict) -> list[float]:
    return [test["tuned"]["nll"] for test in result["tests"]]


def checkpoint(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/checkpoint.safetensors")


# prograd.py ---------------------------------------------------------------------------------------
def test_prograd_variants():
    """Each variant learns something else; CoOp's is what λ = 0 gives under either rule."""
    found = {}
    for name, flags in {
        "ProGrad": [],
        "half": ["--lam", "0.5"],
        "add": ["--rule", "add"],
        "ensemble": ["--teacher", "ensemble", "--rule", "add"],
        "random": ["--init", "random"],
        "short": ["--n-ctx", "4"],
        "coop": ["--lam", "0"],
        "coop too": ["--lam", "0", "--rule", "add"],
    }.items():
        found[name] = run(prograd, "--lr", "0.1", "--epochs", "4", "--out-dir", name, *flags)
    assert found["coop"]["tests"] == found["coop too"]["tests"]
    values = [tuple(tuned(result)) for name, result in found.items() if name != "coop too"]
    assert len(set(values)) >= 6  # without a conflict in these few steps λ changes nothing
    assert checkpoint("short")["model/context"].shape == (4, 64)


def test_logged_conflicts_are_those_that_are_projected(toyclip):
    torch.manual_seed(1)
    learner = prograd.PromptLearner(toyclip, 0.02 * torch.randn(4, 64))
    names = learner.names(NAMES)
    teacher = common.zero_shot_classifier(toyclip, NAMES, ["a photo of a {}."])
    seen = set()
    for _ in range(12):
        batch = F.normalize(torch.randn(2, 64), dim=-1), torch.randint(0, 3, (2,))
        gradients = []
        for lam in (0.0, 1.0):
            args = argparse.Namespace(temperature=1.0, rule="project", lam=lam)
            conflict = prograd.step(learner, names, teacher, *batch, args)[3].item()
            gradients.append(learner.context.grad)
        assert conflict == (not torch.equal(*gradients))
        seen.add(conflict)
    assert seen == {0.0, 1.0}


def test_csc():
    result = run(prograd, "--csc", "--out-dir", "csc", "--shots", "1")
    assert checkpoint("csc")["model/context"].shape == (24, 16, 64)
    again = run(prograd, "--eval", "csc")
    assert again["tests"] == result["tests"]
    with pytest.raises(UserError, match="csc has contexts for its own classes"):
        run(prograd, "--eval", "csc", "--dataset", "toy_colorfills_dark")


@pytest.mark.parametrize("script", [prograd, vpt, proreg])
def test_eval_every(script):
    flags = ["--eval-every", "2", "--epochs", "4", "--shots", "2", "--out-dir", "curve"]
    run(script, *flags)
    lines = common.read_metrics(Path("curve"))
    assert ["val_accuracy" in line for line in lines] == [False, True, False, True]
    args = argparse.Namespace(**json.loads(Path("curve/config.json").read_text())["settings"])
    task = data.load_task(args)
    task.val = []
    with pytest.raises(UserError, match="has no validation part"):
        task.validation()


def test_fresh_and_cached_views(toyclip):
    args = argparse.Namespace(seed=1, workers=0, device="cpu", cache_dir="cache", augment="crop")
    items = [(f"toy:toy_fillshapes_sketch/train/{i}", i % 3) for i in range(6)]
    for n, distinct in ((0, 4), (2, 2)):
        args.views = n
        views = common.training_views(args, toyclip, items)
        found = [views(epoch)[0] for epoch in range(4)]
        assert len({tuple(x[0].tolist()) for x in found}) == distinct
        assert torch.allclose(found[0].norm(dim=1), torch.ones(6))
    assert len(list(Path("cache").iterdir())) == 2  # fresh views are not kept
    args.augment = "none"
    views = common.training_views(args, toyclip, items)
    assert torch.equal(views(0)[0], views(7)[0])


# vpt.py -------------------------------------------------------------------------------------------
def learner_of(toyclip, **changed) -> vpt.PromptDistribution:
    args = argparse.Namespace(**vpt.TOY | {"seed": 1} | changed)
    return vpt.new_learner(args, toyclip, vpt.initial_context(toyclip, args.ctx_init))


NAMES = ["red circle", "blue star", "green heart"]


@pytest.mark.parametrize("kind", ["global", "image"])
def test_vpt_predictions_do_not_depend_on_the_batch(kind, toyclip):
    learner = learner_of(toyclip, posterior=kind, samples=3)
    x = F.normalize(torch.randn(7, 64), dim=-1)
    whole = vpt.predict(learner, toyclip, NAMES, x)
    small = dataclasses.replace(toyclip, memory_gb=1e-9)
    one = vpt.predict(learner, small, NAMES, x)
    for key, value in whole.items():
        assert torch.allclose(value, one[key], atol=1e-4), key
        assert torch.allclose(
            value[:2], vpt.predict(learner, toyclip, NAMES, x[:2])[key], atol=1e-4
        )
    assert torch.allclose(whole["tuned"].exp().sum(1), torch.ones(7), atol=1e-5)


def test_deterministic_vpt_is_coop(toyclip):
    """--samples 0, global: the same prompt, loss and gradient as prograd.py's at λ = 0."""
    learner = learner_of(toyclip, samples=0)
    assert [n for n, p in learner.named_parameters() if p.requires_grad] == ["context"]
    coop = prograd.PromptLearner(toyclip, learner.context.detach())
    names = coop.names(NAMES)
    x, labels = F.normalize(torch.randn(4, 64), dim=-1), torch.tensor([0, 1, 2, 0])
    args = argparse.Namespace(samples=0, bound="log-mean", kl_weight=0.001)
    loss = vpt.step(learner, names, torch.zeros(0, 1, 64), x, labels, args)[0]
    args = argparse.Namespace(temperature=1.0, rule="add", lam=0.0)
    teacher = common.zero_shot_classifier(toyclip, NAMES, ["a photo of a {}."])
    theirs = prograd.step(coop, names, teacher, x, labels, args)[0]
    assert torch.allclose(loss, theirs, rtol=1e-5)
    difference = (learner.context.grad - coop.context.grad).norm()
    assert difference < 1e-4 * coop.context.grad.norm()
    image = learner_of(toyclip, samples=0, posterior="image")
    learned = {n.split(".")[0] for n, p in image.named_parameters() if p.requires_grad}
    assert learned == {"context", "mean_net"}


def test_vpt_noise_is_a_function_of_where(toyclip):
    args = argparse.Namespace(posterior="image", samples=3, seed=1)
    eps = vpt.training_noise(args, toyclip, 2, 0, torch.tensor([4, 5]))
    assert eps.shape == (3, 2, 64)
    assert torch.equal(eps[:, 1:], vpt.training_noise(args, toyclip, 2, 9, torch.tensor([5])))
    args.posterior = "global"
    assert vpt.training_noise(args, toyclip, 2, 0, torch.tensor([4, 5])).shape == (3, 1, 64)


def test_vpt_runs():
    image = run(vpt, "--posterior", "image", "--samples", "2", "--shots", "1", "--batch-size", "4")
    assert set(image["tests"][0]["extra"]) == {"mean_residual"}
    elbo = run(vpt, "--bound", "elbo", "--kl-weight", "64", "--samples", "2", "--shots", "1")
    assert elbo["tests"][0]["tuned"] != image["tests"][0]["tuned"]
    folder = "runs/vpt-toy_fillshapes_sketch-1shot-seed1"
    assert run(vpt, "--eval", folder)["tests"] == image["tests"]
    clip = common.load_clip()
    learner = vpt.read_learner(folder, argparse.Namespace(seed=2), clip)
    noise = vpt.noise(clip, 1, 2, [("evaluation",)])
    assert torch.equal(learner.eval_noise, noise)  # the noise belongs to the run
    with pytest.raises(UserError, match="--ctx-init is empty"):
        run(vpt, "--ctx-init", " ")


# proreg.py ----------------------------------------------------------------------------------------
FINE = ["--shots", "4", "--batch-size", "20", "--lr", "1e-3"]


def test_ensembles_and_mixtures():
    """At A = 0 they are the tuned model, at A = 1 zero-shot CLIP."""
    flags = ["--ensemble", "0", "0.5", "1", "--wise-ft", "0", "1"]
    result = run(proreg, *FINE, *flags, "--out-dir", "here")
    for test in result["tests"]:
        extra = test["extra"]
        assert list(extra) == ["ensemble 0", "ensemble 0.5", "ensemble 1", "wise-ft 0", "wise-ft 1"]
        for name, wanted in (("ensemble", "zero_shot"), ("wise-ft", "zero_shot")):
            assert abs(extra[f"{name} 1"]["nll"] - test[wanted]["nll"]) < 1e-4
            assert abs(extra[f"{name} 0"]["nll"] - test["tuned"]["nll"]) < 1e-4
    again = run(proreg, "--eval", "here", "--ensemble", "1", "--wise-ft", "1")
    assert again["tests"][1]["extra"]["wise-ft 1"] == result["tests"][1]["extra"]["wise-ft 1"]


def test_losses_heads_and_parts():
    found = {}
    for name, flags in {
        "proreg": [],
        "kd": ["--loss", "kd"],
        "ce": ["--loss", "ce"],
        "head": ["--train", "head"],
        "mlp": ["--head", "mlp"],
    }.items():
        found[name] = tuned(run(proreg, *FINE, *flags, "--out-dir", name, "--test-part", "val"))
    assert len({tuple(value) for value in found.values()}) == 5
    frozen = {k: v for k, v in checkpoint("head").items() if k.startswith("model/visual")}
    start = common.load_clip().model.visual.state_dict()
    assert all(torch.equal(v, start[k.removeprefix("model/visual.")]) for k, v in frozen.items())
    assert any(key.startswith("model/cls_head") for key in checkpoint("mlp"))
    for flags in (
        ["--wise-ft", "0.5"],
        ["--classes", "base"],
        ["--test-on", "toy_fillshapes_sketch"],
    ):
        with pytest.raises(UserError, match="--head mlp has no prompt"):
            run(proreg, *FINE, "--head", "mlp", *flags)


def test_unseen_classes_by_their_prompts():
    """--classes base: the tuned encoder meets new classes with their prompts' features."""
    result = run(proreg, *FINE, "--classes", "base")
    assert [test["classes"] for test in result["tests"]][:2] == ["base", "new"]
    assert result["tests"][1]["tuned"]["accuracy"] > 30  # of 6 classes


def test_parts_of_a_batch_learn_the_same():
    whole = run(proreg, *FINE, "--out-dir", "whole", "--test-part", "val")
    flags = ["--accumulate", "3", "--test-part", "val"]
    parts = run(proreg, *FINE, "--out-dir", "parts", *flags)
    for key, value in checkpoint("whole").items():
        if value.is_floating_point():
            assert torch.allclose(value, checkpoint("parts")[key], rtol=1e-2, atol=1e-3), key
    assert torch.allclose(torch.tensor(tuned(whole)), torch.tensor(tuned(parts)), rtol=5e-3)


def test_selecting_on_validation_images(monkeypatch):
    """--select val keeps the first of the best epochs, also over an interruption."""
    flags = [*FINE, "--select", "val", "--epochs", "4", "--lr", "3e-3"]
    run(proreg, *flags, "--out-dir", "here")
    accuracies = [line["val_accuracy"] for line in common.read_metrics(Path("here"))]
    best = common.load_checkpoint("here/best", proreg_learner("here"))
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    result = json.loads(Path("here/result.json").read_text())
    args = argparse.Namespace(**result["settings"])
    clip = common.load_clip()
    learner = proreg_learner("here")
    common.load_checkpoint("here/best", learner)
    test = data.load_task(args).tests[0]
    logits, labels = proreg.tuned_logits(args, clip, learner, test)
    assert common.evaluate(logits, labels) == result["tests"][0]["tuned"]
    with contextlib.redirect_stdout(io.StringIO()):
        again = proreg.main(["--eval", "here", "--out-dir", "again"])
    assert tuned(again) == tuned(result)  # of the best epoch, too


def test_weights_lie_as_the_fused_optimizer_reads_them():
    """ResNets are channels-last; moments that were read from a checkpoint are not."""
    clip = tiny_clip()
    clip.model.visual.to(memory_format=torch.channels_last)
    learner = proreg.PromptedClassifier(clip, ["cat", "dog"], "a photo of a {}.")
    assert not all(p.is_contiguous() for p in clip.model.visual.parameters())
    assert all(p.is_contiguous() for p in learner.parameters())


def test_flags_that_do_not_fit():
    for flags, text in (
        ("--loss kd --alpha 2", "--alpha of --loss kd is a share: 1 at most"),
        ("--head mlp --wise-ft 0.5", "--head mlp has no prompt"),
    ):
        with pytest.raises(data.UserError, match=text):
            run(proreg, *flags.split())


def proreg_learner(folder: str):
    settings = common.read_run(folder)["settings"]
    return proreg.read_learner(folder, argparse.Namespace(**settings), common.load_clip())


def torchrun(*flags: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [str(REPO / "proreg.py"), *QUICK, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_learn_what_one_does():
    """The first alone speaks and writes. 41 images in batches of 20: the last batch has one image,
    so that one process has none of it."""
    flags = ["--shots", "4", "--lr", "1e-4", "--batch-size", "47", "--test-part", "val"]
    run(proreg, *flags, "--out-dir", "one")
    done = torchrun(*flags, "--out-dir", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to two") == 1
    one, two = checkpoint("one"), checkpoint("two")
    for key, value in one.items():
        if value.is_floating_point():
            assert torch.allclose(value, two[key], rtol=1e-2, atol=1e-4), key
    lines = [common.read_metrics(Path(folder))[-1] for folder in ("one", "two")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-3)
    assert lines[0]["train_accuracy"] == lines[1]["train_accuracy"]


def test_one_process_alone_downloads(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one process"):
        run(proreg, *FINE, "--download")


def test_world_size_alone_joins_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert run(proreg, *FINE, "--test-part", "val")["tests"]
    assert not torch.distributed.is_initialized()
