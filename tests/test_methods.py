"""What each script does beside the recorded steps: variants, evaluation, several processes."""

import argparse
import dataclasses
import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CACHE, QUICK, REPO, checkpoint, each_script, read, refused, run, tiny_clip

import common
import data
import prograd
import proreg
import vpt
from data import UserError

NAMES = ["red circle", "blue star", "green heart"]
FINE = "--epochs 2 --no-compare --shots 4 --batch-size 20 --lr 1e-3 --test-part val".split()


def tuned(result: dict) -> list[float]:
    return [test["tuned"]["nll"] for test in result["tests"]]


# prograd.py ---------------------------------------------------------------------------------------
def test_prograd_variants():
    """Each variant learns something else; CoOp's is what λ = 0 gives under either rule."""
    start = "--no-compare --lr 0.1 --epochs 4 --test-part val".split()
    found = {}
    for flags in ("", "--lam 0.5", "--rule add", "--teacher ensemble --rule add", "--init random",
                  "--n-ctx 4", "--lam 0", "--lam 0 --rule add"):  # fmt: skip
        found[flags] = run(prograd, *start, *flags.split(), "--out-dir", f"run {flags}")
    assert found["--lam 0"]["tests"] == found.pop("--lam 0 --rule add")["tests"]
    # Without a conflict in these few steps λ changes nothing.
    assert len({tuple(tuned(result)) for result in found.values()}) >= 6
    assert checkpoint("run --n-ctx 4")["model/context"].shape == (4, 64)


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
    result = run(prograd, *QUICK, "--csc", "--out-dir", "csc", "--shots", "1")
    assert checkpoint("csc")["model/context"].shape == (24, 16, 64)
    assert run(prograd, "--eval", "csc")["tests"] == result["tests"]
    other = ["--eval", "csc", "--dataset", "toy_colorfills_dark"]
    refused("csc has contexts for its own classes", prograd, *other)


@each_script
def test_eval_every(script):
    flags = ["--no-compare", "--eval-every", "2", "--epochs", "4", "--shots", "2"]
    run(script, *flags, "--test-part", "val", "--out-dir", "curve")
    lines = common.read_metrics(Path("curve"))
    assert ["val_accuracy" in line for line in lines] == [False, True, False, True]
    task = data.load_task(argparse.Namespace(**read("curve")["settings"]))
    task.val = []
    with pytest.raises(UserError, match="has no validation part"):
        task.validation()


def test_fresh_and_cached_views(toyclip):
    args = argparse.Namespace(seed=1, workers=0, device="cpu", cache_dir="own", augment="crop")
    items = [(f"toy:toy_fillshapes_sketch/train/{i}", i % 3) for i in range(6)]
    for n, distinct in ((0, 4), (2, 2)):
        args.views = n
        views = common.training_views(args, toyclip, items)
        found = [views(epoch)[0] for epoch in range(4)]
        assert len({tuple(x[0].tolist()) for x in found}) == distinct
        assert torch.allclose(found[0].norm(dim=1), torch.ones(6))
    assert len(list(Path("own").iterdir())) == 2  # fresh views are not kept
    args.augment = "none"
    views = common.training_views(args, toyclip, items)
    assert torch.equal(views(0)[0], views(7)[0])


# vpt.py -------------------------------------------------------------------------------------------
def learner_of(toyclip, **changed) -> vpt.PromptDistribution:
    args = argparse.Namespace(**vpt.TOY | {"seed": 1} | changed)
    return vpt.new_learner(args, toyclip, vpt.initial_context(toyclip, args.ctx_init))


@pytest.mark.parametrize("kind", ["global", "image"])
def test_vpt_predictions_do_not_depend_on_the_batch(kind, toyclip):
    learner = learner_of(toyclip, posterior=kind, samples=3)
    x = F.normalize(torch.randn(7, 64), dim=-1)
    whole = vpt.predict(learner, toyclip, NAMES, x)
    small = dataclasses.replace(toyclip, memory_gb=1e-9)
    each = vpt.predict(learner, small, NAMES, x)
    first = vpt.predict(learner, toyclip, NAMES, x[:2])
    for key, value in whole.items():
        assert torch.allclose(value, each[key], atol=1e-4), key
        assert torch.allclose(value[:2], first[key], atol=1e-4), key
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
    flags = [*QUICK, "--samples", "2", "--shots", "1", "--batch-size", "4", "--test-part", "val"]
    image = run(vpt, *flags, "--posterior", "image")
    assert set(image["tests"][0]["extra"]) == {"mean_residual"}
    whole = run(vpt, *flags, "--out-dir", "log-mean")
    elbo = run(vpt, *flags, "--out-dir", "elbo", "--bound", "elbo")
    assert tuned(elbo) != tuned(whole) != tuned(image)
    folder = "runs/vpt-toy_fillshapes_sketch-1shot-seed1"
    assert run(vpt, "--eval", folder)["tests"] == image["tests"]
    clip = common.load_clip()
    learner = vpt.read_learner(folder, argparse.Namespace(seed=2), clip)
    noise = vpt.noise(clip, 1, 2, [("evaluation",)])
    assert torch.equal(learner.eval_noise, noise)  # the noise belongs to the run


# proreg.py ----------------------------------------------------------------------------------------
def all_close(one: str, other: str, **within) -> None:
    """What two runs learned."""
    learned = checkpoint(other)
    for key, value in checkpoint(one).items():
        if value.is_floating_point():
            assert torch.allclose(value, learned[key], **within), key


def test_ensembles_and_mixtures():
    """At A = 0 they are the tuned model, at A = 1 zero-shot CLIP."""
    flags = ["--ensemble", "0", "0.5", "1", "--wise-ft", "0", "1"]
    result = run(proreg, *FINE, *flags, "--out-dir", "here")
    for test in result["tests"]:
        extra = test["extra"]
        assert list(extra) == ["ensemble 0", "ensemble 0.5", "ensemble 1", "wise-ft 0", "wise-ft 1"]
        for name in ("ensemble", "wise-ft"):
            assert abs(extra[f"{name} 1"]["nll"] - test["zero_shot"]["nll"]) < 1e-4
            assert abs(extra[f"{name} 0"]["nll"] - test["tuned"]["nll"]) < 1e-4
    again = run(proreg, "--eval", "here", "--test-part", "val", "--wise-ft", "1")
    assert again["tests"][0]["extra"]["wise-ft 1"] == result["tests"][0]["extra"]["wise-ft 1"]


def test_losses_heads_and_parts():
    found = set()
    for flags in ("", "--loss kd", "--loss ce", "--train head", "--head mlp"):
        result = run(proreg, *FINE, *flags.split(), "--out-dir", f"run {flags}")
        found.add(tuple(tuned(result)))
    assert len(found) == 5
    start = common.load_clip().model.visual.state_dict()
    learned = checkpoint("run --train head")
    assert all(torch.equal(learned[f"model/visual.{key}"], start[key]) for key in start)
    assert any(key.startswith("model/cls_head") for key in checkpoint("run --head mlp"))


def test_unseen_classes_by_their_prompts():
    """--classes base: the tuned encoder meets new classes with their prompts' features."""
    result = run(proreg, *FINE, "--test-part", "test", "--classes", "base")
    assert [test["classes"] for test in result["tests"]][:2] == ["base", "new"]
    assert result["tests"][1]["tuned"]["accuracy"] > 30  # of 6 classes


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


def test_parts_of_a_batch_learn_the_same():
    whole = run(proreg, *FINE, "--out-dir", "whole")
    parts = run(proreg, *FINE, "--out-dir", "parts", "--accumulate", "3")
    all_close("whole", "parts", rtol=1e-2, atol=1e-3)
    assert tuned(parts) == pytest.approx(tuned(whole), rel=5e-3)


def test_selecting_on_validation_images():
    """--select val keeps the first of the best epochs, also for an evaluation."""
    flags = [*FINE, "--select", "val", "--epochs", "4", "--lr", "3e-3"]
    result = run(proreg, *flags, "--out-dir", "here")
    accuracies = [line["val_accuracy"] for line in common.read_metrics(Path("here"))]
    args, clip = argparse.Namespace(**result["settings"]), common.load_clip()
    learner = proreg.read_learner("here", args, clip)
    best = common.load_checkpoint("here/best", learner)
    assert best == accuracies.index(max(accuracies)) + 1
    logits, labels = proreg.tuned_logits(args, clip, learner, data.load_task(args).tests[0])
    assert common.evaluate(logits, labels) == result["tests"][0]["tuned"]
    again = run(proreg, "--eval", "here", "--test-part", "val", "--out-dir", "again")
    assert tuned(again) == tuned(result)  # of the best epoch, too


def test_weights_lie_as_the_fused_optimizer_reads_them():
    """ResNets are channels-last; moments that were read from a checkpoint are not."""
    clip = tiny_clip()
    clip.model.visual.to(memory_format=torch.channels_last)
    learner = proreg.PromptedClassifier(clip, ["cat", "dog"], "a photo of a {}.")
    assert not all(p.is_contiguous() for p in clip.model.visual.parameters())
    assert all(p.is_contiguous() for p in learner.parameters())


def torchrun(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(REPO / "proreg.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_learn_what_one_does():
    """The first alone speaks and writes. 48 images in batches of 47: the last batch has one image,
    so that one process has none of it."""
    flags = [*FINE, "--lr", "1e-4", "--batch-size", "47"]
    run(proreg, *flags, "--out-dir", "one")
    done = torchrun(*flags, "--out-dir", "two", "--cache-dir", CACHE.name)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to two") == 1
    all_close("one", "two", rtol=1e-2, atol=1e-4)
    lines = [common.read_metrics(Path(folder))[-1] for folder in ("one", "two")]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-3)
    assert lines[0]["train_accuracy"] == lines[1]["train_accuracy"]


@pytest.mark.parametrize(
    ("script", "flags", "port", "text"),
    [
        (prograd, [], None, "prograd.py runs in one process"),
        (proreg, ["--download"], None, "let one process download first"),
        (proreg, [], None, "the processes did not meet"),  # no address is known
        (proreg, [], "0", "the processes did not meet"),  # the other never comes
    ],
)
def test_a_process_without_its_partner(script, flags, port, text, monkeypatch):
    monkeypatch.setattr(proreg, "PATIENCE", datetime.timedelta(seconds=2))
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    if port:
        monkeypatch.setenv("MASTER_PORT", port)
    refused(text, script, *QUICK, *flags)


def test_world_size_alone_joins_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert run(proreg, *FINE)["tests"]
    assert not torch.distributed.is_initialized()
