"""On a GPU: python -m pytest -m gpu. With GPU_TEST_DEVICE=cpu the tests themselves are tried."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import test_methods
import test_runs
import torch
import torch.nn.functional as F
from conftest import tiny_clip

import common
import data
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


@pytest.mark.parametrize("name", test_runs.SCRIPTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_epoch(name, precision):
    flags = ["--epochs", "1", "--precision", precision, "--out-dir", "here", *ON]
    result = test_runs.run(name, *flags)
    assert result["settings"]["precision"] == precision
    assert all(50 < test["tuned"]["accuracy"] <= 100 for test in result["tests"])
    learned = safetensors.torch.load_file("here/checkpoint.safetensors")
    assert all(value.isfinite().all() for value in learned.values() if value.is_floating_point())


@pytest.mark.parametrize("name", test_runs.SCRIPTS)
def test_stopped_and_resumed(name, monkeypatch):
    whole = test_runs.run(name, "--out-dir", "whole", "--no-compare", *ON)
    kept = common.save_checkpoint

    def stop(out, *args, **note):
        kept(out, *args, **note)
        if note["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        test_runs.run(name, "--resume", "stopped", "--no-compare", *ON)
    monkeypatch.setattr(common, "save_checkpoint", kept)
    again = test_runs.run(name, "--resume", "stopped")
    for ours, theirs in zip(again["tests"], whole["tests"]):
        assert ours["tuned"]["accuracy"] == pytest.approx(theirs["tuned"]["accuracy"], abs=0.3)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is never waited for")
@pytest.mark.parametrize("name", test_runs.SCRIPTS)
def test_an_epoch_waits_for_nothing(name, monkeypatch):
    """From the second step of an epoch (the first encodes images) to its end."""
    module = test_runs.SCRIPTS[name]
    kept_step, kept_end = module.step, common.end_epoch
    calls = []

    def step(*args, **kwargs):
        calls.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > 1 else "default")
        return kept_step(*args, **kwargs)

    def end_epoch(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        return kept_end(*args, **kwargs)

    monkeypatch.setattr(module, "step", step)
    monkeypatch.setattr(common, "end_epoch", end_epoch)
    try:
        flags = ["--epochs", "1", "--batch-size", "4", "--no-compare", *ON]
        test_runs.run(name, *flags, "--out-dir", "here")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) > 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus():
    done = test_methods.torchrun("--lr", "1e-4", "--device", "cuda", "--out-dir", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(Path("two/result.json").read_text())["tests"]


def test_too_many_gpus_are_refused():
    wanted = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(data.UserError, match="--device"):
        test_runs.run("prograd", "--device", wanted)
