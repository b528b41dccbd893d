"""On a GPU: python -m pytest -m gpu. With GPU_TEST_DEVICE=cpu the tests themselves are tried."""

import os
from unittest import mock

import pytest
import test_methods
import torch
import torch.nn.functional as F
from conftest import checkpoint, each_script, interrupted, read, run, tiny_clip
from test_runs import SHORT

import common
import prograd

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
ON = ["--device", DEVICE]
PRECISIONS = ["fp32", "bf16"] + ["fp16"] * (DEVICE != "cpu")
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def prompt_gradient(device: str, precision: str, memory_gb: float):
    """Text and image features, the loss and a prompt's gradient, of the same random weights."""
    clip = tiny_clip()
    clip.model.to(device)
    clip.device, clip.precision, clip.memory_gb = device, precision, memory_gb
    clip.scale = 20.0
    names = [f"class {i % 7} of {i}" for i in range(60)]
    context = prograd.initial_context(clip, "a photo of a {}.", 16, "template", seed=1)
    learner = prograd.PromptLearner(clip, context.to(device))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad(), common.autocast(clip):
        x = F.normalize(clip.model.encode_image(images).float(), dim=-1)
    features = learner(learner.names(names))
    logits = clip.scale * x @ F.normalize(features, dim=-1).T
    loss = F.cross_entropy(logits, torch.arange(16, device=device))
    (gradient,) = torch.autograd.grad(loss, learner.context)
    return [x.detach().cpu().float() for x in (features, x, loss, gradient)]


@pytest.mark.parametrize(("precision", "near"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("memory_gb", [4.0, 1e-4])
def test_equals_the_cpu(precision, near, memory_gb):
    """Features, loss and gradient, in one piece and in many."""
    expected = prompt_gradient("cpu", "fp32", 4.0)
    for ours, theirs in zip(prompt_gradient(DEVICE, precision, memory_gb), expected):
        assert (ours - theirs).norm() <= near * theirs.norm()


@each_script
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_epoch(script, precision):
    flags = ["--epochs", "1", "--compare", "--precision", precision, "--out-dir", "here", *ON]
    result = run(script, *SHORT[script], *flags)
    assert result["settings"]["precision"] == precision
    assert all(50 < test["tuned"]["accuracy"] <= 100 for test in result["tests"])
    learned = checkpoint("here").values()
    assert all(value.isfinite().all() for value in learned if value.is_floating_point())


@each_script
def test_stopped_and_resumed(script):
    flags = [*SHORT[script], "--no-compare", *ON]
    whole = run(script, *flags, "--out-dir", "whole")
    with interrupted(epoch=2):
        run(script, *flags, "--resume", "stopped")
    again = run(script, "--resume", "stopped", *ON)
    for ours, theirs in zip(again["tests"], whole["tests"]):
        assert ours["tuned"]["accuracy"] == pytest.approx(theirs["tuned"]["accuracy"], abs=0.3)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is never waited for")
@each_script
def test_an_epoch_waits_for_nothing(script):
    """From the second step of an epoch (the first encodes images) to its end."""
    modes = []

    def step(*args, kept=script.step):
        modes.append("error" if modes else "default")
        torch.cuda.set_sync_debug_mode(modes[-1])
        return kept(*args)

    def end_epoch(*args, kept=common.end_epoch, **note):
        torch.cuda.set_sync_debug_mode("default")
        return kept(*args, **note)

    flags = ["--epochs", "1", "--batch-size", "4", "--no-compare", *ON, "--out-dir", "here"]
    try:
        with (
            mock.patch.object(script, "step", step),
            mock.patch.object(common, "end_epoch", end_epoch),
        ):
            run(script, *SHORT[script], *flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(modes) > 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    flags = ["--lr", "1e-4", "--device", "cuda", "--out-dir", "two"]
    done = test_methods.torchrun(*test_methods.FINE, *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read("two")["tests"]
