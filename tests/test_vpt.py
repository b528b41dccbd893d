"""VPT: the equations, the prompt distribution, its noise, training, evaluation and the script. CPU, offline."""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import golden_vpt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_world import FOLDER, close, world

import common
import data
import prograd
import runs
import vpt
from data import UserError
from toyclip import world as toy

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = sorted(path.name for path in FOLDER.glob("vpt_*.npz"))
KINDS = ["global", "image"]


def case(kind: str) -> golden_vpt.Case:
    """The recording of this posterior with the fewest samples: a small CLIP, its images, labels and a start."""
    cases = [golden_vpt.Case(world(FOLDER).recording(name), world(FOLDER)) for name in RECORDINGS]
    return min((c for c in cases if c.kind == kind), key=lambda c: (c.L, c.b))


# ----------------------------------------------------------------------------------------------------------------------
# 1. The equations
# ----------------------------------------------------------------------------------------------------------------------
def method_section() -> str:
    """The text between the banners of sections 1 and 2 of vpt.py."""
    return (ROOT / "vpt.py").read_text(encoding="utf-8").split("# 1. METHOD")[1].split("# 2. MODEL")[0]


def test_method_section_can_be_pasted_anywhere():
    pasted = {"torch": torch}
    exec("#" + method_section(), pasted)  # nothing but torch in scope
    logits, labels = torch.randn(5, 4, 3), torch.tensor([0, 2, 1, 1])
    mu, logvar, eps = torch.randn(4, 6), torch.randn(4, 6), torch.randn(5, 4, 6)
    x, text = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(5, 4, 3, 8), dim=-1)
    for name, arguments in {
        "sample_logits": (x, text, 10.0),
        "sample_residual": (mu, logvar, eps),
        "kl_to_standard_normal": (mu, logvar),
        "log_mean_prob": (logits,),
        "task_loss": (logits, labels, "elbo"),
        "uncertainty": (logits,),
    }.items():
        ours, theirs = getattr(vpt, name)(*arguments), pasted[name](*arguments)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        assert all(torch.equal(one, other) for one, other in pairs), name


def test_two_classes_by_hand():
    """Two prompts, one image, two classes: the first prompt gives 3/4 to class 0, the second 1/4."""
    logits = torch.tensor([[[math.log(3), 0.0]], [[0.0, math.log(3)]]])  # [L = 2, B = 1, C = 2]
    assert vpt.log_mean_prob(logits).exp().tolist() == [[pytest.approx(0.5), pytest.approx(0.5)]]
    label = torch.tensor([0])
    assert vpt.task_loss(logits, label).item() == pytest.approx(math.log(2))
    assert vpt.task_loss(logits, label, "elbo").item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    entropy, information = vpt.uncertainty(logits)
    each = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert entropy.item() == pytest.approx(math.log(2))
    assert information.item() == pytest.approx(math.log(2) - each)


def test_kl_by_hand_and_zero_for_the_prior():
    assert vpt.kl_to_standard_normal(torch.zeros(3, 7), torch.zeros(3, 7)).tolist() == [0.0, 0.0, 0.0]
    # one dimension of mean 2 and variance 1: 2; one of mean 0 and variance e: (e - 2) / 2; their mean
    kl = vpt.kl_to_standard_normal(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert kl.item() == pytest.approx((2 + (math.e - 2) / 2) / 2)
    mu, logvar = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    normal = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(normal, prior).mean(dim=-1)
    assert torch.allclose(vpt.kl_to_standard_normal(mu, logvar), expected)
    # WHY expm1: with exp, float32 would give 0 or worse for a posterior this near to the prior
    near = torch.full((8,), 1e-4)
    assert vpt.kl_to_standard_normal(torch.zeros(8), near).item() == pytest.approx(2.5e-9, rel=1e-2)


def test_residuals_have_the_posterior_s_mean_and_variance():
    mu, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[math.log(4.0), math.log(0.25)]])
    draws = vpt.sample_residual(mu, logvar, torch.randn(200_000, 1, 2, generator=torch.Generator().manual_seed(0)))
    assert draws.mean(dim=0)[0].tolist() == pytest.approx([1.0, -2.0], abs=0.02)
    assert draws.std(dim=0)[0].tolist() == pytest.approx([2.0, 0.5], rel=0.01)


def test_bounds_agree_for_one_sample_and_are_ordered_for_more():
    logits, labels = 5 * torch.randn(1, 16, 10), torch.randint(0, 10, (16,))
    assert torch.equal(vpt.task_loss(logits, labels), vpt.task_loss(logits, labels, "elbo"))
    assert vpt.task_loss(logits, labels).item() == pytest.approx(F.cross_entropy(logits[0], labels).item())
    logits = 5 * torch.randn(6, 16, 10)
    assert vpt.task_loss(logits, labels) < vpt.task_loss(logits, labels, "elbo")  # Jensen


def test_log_mean_prob_is_the_log_of_the_mean_probability():
    logits = 5 * torch.randn(7, 3, 4, dtype=torch.float64)
    naive = [
        [math.log(sum(logits[l, b].softmax(0)[c].item() for l in range(7)) / 7) for c in range(4)] for b in range(3)
    ]
    assert vpt.log_mean_prob(logits).tolist() == [pytest.approx(row) for row in naive]
    assert vpt.log_mean_prob(1e4 * logits.float()).isfinite().all()  # probabilities below float32's smallest


def test_extreme_log_variances_neither_overflow_nor_give_nan():
    for value in (-50.0, 50.0):
        mu = torch.zeros(1, 8, requires_grad=True)
        logvar = torch.full((1, 8), value, requires_grad=True)
        residual = vpt.sample_residual(mu, logvar, torch.randn(3, 1, 8))
        kl = vpt.kl_to_standard_normal(mu, logvar)
        (residual.sum() + kl.sum()).backward()
        for tensor in (residual, kl, mu.grad, logvar.grad):
            assert tensor.isfinite().all()
        c = case("global")
        learner = c.learner()
        learner.logvar.data.fill_(value)
        found = vpt.predict(learner, c.clip, c.classnames, c.x[0])
        assert all(tensor.isfinite().all() for tensor in found.values())


def test_mutual_information_is_what_samples_disagree_about():
    logits = torch.randn(1, 50, 10)
    entropy, information = vpt.uncertainty(logits)
    assert torch.allclose(information, torch.zeros(50))
    assert torch.allclose(entropy, torch.distributions.Categorical(logits=logits[0]).entropy())
    assert torch.allclose(vpt.uncertainty(logits.repeat(4, 1, 1))[1], torch.zeros(50), atol=1e-6)
    entropy, information = vpt.uncertainty(3 * torch.randn(6, 50, 10))
    assert (information > 0).all() and (information < entropy).all() and (entropy <= math.log(10)).all()
    assert (vpt.uncertainty(100 * torch.randn(6, 50, 10))[1] <= math.log(6) + 1e-6).all()  # log L at most


def test_auroc_equals_counting_all_pairs():
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (60,), generator=generator).float()  # many ties
    positive = torch.rand(60, generator=generator) < 0.3
    pairs = itertools.product(score[positive].tolist(), score[~positive].tolist())
    wins = [(a > b) + (a == b) / 2 for a, b in pairs]
    assert vpt.auroc(score, positive) == pytest.approx(sum(wins) / len(wins))
    assert vpt.auroc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False])) == 1.0
    assert vpt.auroc(score, torch.zeros(60, dtype=torch.bool)) is None
    assert vpt.auroc(score, torch.ones(60, dtype=torch.bool)) is None


# ----------------------------------------------------------------------------------------------------------------------
# 2. The distribution and its noise
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_zero_variance_equals_the_plain_prompt(kind):
    c = case(kind)
    learner = c.learner()
    with torch.no_grad():
        if kind == "global":
            learner.mean.zero_()
            learner.logvar.fill_(-200)
        else:
            for net, bias in ((learner.mean_net, 0.0), (learner.logvar_net, -200.0)):
                net[-1].weight.zero_()
                net[-1].bias.fill_(bias)
    plain = prograd.PromptLearner(c.clip, learner.context.detach())
    expected = prograd.class_logits(plain, c.clip, c.classnames, c.x[0]).log_softmax(dim=-1)
    found = vpt.predict(learner, c.clip, c.classnames, c.x[0])
    assert torch.allclose(found["tuned"], expected, atol=1e-5)
    assert torch.allclose(found["mean_residual"], expected, atol=1e-5)
    assert torch.allclose(found["mutual_information"], torch.zeros(len(expected)), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_start_is_as_released_and_depends_on_the_seed_alone(kind):
    c = case(kind)

    def start(seed):
        return vpt.PromptDistribution(c.clip, c.start["context"], kind, seed=seed).state_dict()

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = start(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    again, other = start(1), start(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    if kind == "global":
        assert not first["mean"].any() and not torch.equal(first["logvar"], other["logvar"])
        assert 0 <= first["logvar"].min() < 0.1 and 0.9 < first["logvar"].max() <= 1
        wide = vpt.PromptDistribution(c.clip, c.start["context"], logvar_init=(-4.0, -3.0)).logvar
        assert -4 <= wide.min() and wide.max() <= -3
    else:  # torch's own: uniform within 1 / sqrt(inputs)
        D = c.clip.dim
        assert not torch.equal(first["mean_net.0.weight"], other["mean_net.0.weight"])
        assert not torch.equal(first["mean_net.0.weight"], first["logvar_net.0.weight"])
        for i, inputs in ((0, D), (2, D // 2), (4, D // 2)):
            for tensor in (first[f"mean_net.{i}.weight"], first[f"logvar_net.{i}.bias"]):
                assert 0.8 * inputs**-0.5 < tensor.abs().max() <= inputs**-0.5


def test_parameters_are_the_released_ones():
    odd = json.loads((FOLDER / "oddities_vpt.json").read_text(encoding="utf-8"))
    for kind, key in (("global", "state_dict_coop"), ("image", "state_dict_cocoop")):
        c = case(kind)
        shapes = {golden_vpt.our_name(k): v for k, v in odd[key].items() if k not in ("token_prefix", "token_suffix")}
        assert {name: list(p.shape) for name, p in c.learner().state_dict().items()} == shapes  # no class in it


def test_noise_is_a_function_of_seed_epoch_and_step_or_image():
    clip = case("global").clip
    args = argparse.Namespace(seed=1, samples=4, posterior="image")
    before = torch.get_rng_state()
    batch = vpt.training_noise(args, clip, 3, 0, torch.tensor([5, 2, 9]))
    assert batch.shape == (4, 3, clip.width) and torch.equal(before, torch.get_rng_state())
    # an image's noise does not depend on its batch, its step or its place
    assert torch.equal(batch[:, 1:2], vpt.training_noise(args, clip, 3, 7, torch.tensor([2])))
    assert not torch.equal(batch[:, 1:2], vpt.training_noise(args, clip, 4, 0, torch.tensor([2])))
    assert not torch.equal(batch[:, :1], batch[:, 1:2])
    args.posterior = "global"
    step = vpt.training_noise(args, clip, 3, 0, torch.tensor([5, 2, 9]))
    assert step.shape == (4, 1, clip.width)  # shared by the batch
    assert torch.equal(step, vpt.training_noise(args, clip, 3, 0, torch.tensor([7])))
    assert not torch.equal(step, vpt.training_noise(args, clip, 3, 1, torch.tensor([5, 2, 9])))
    args.seed = 2
    assert not torch.equal(step, vpt.training_noise(args, clip, 3, 0, torch.tensor([5, 2, 9])))
    assert abs(batch.mean()) < 0.1 and abs(batch.std() - 1) < 0.1


def loss_and_gradients(c, learner, x, labels, eps, bound="log-mean") -> tuple[torch.Tensor, dict]:
    mu, logvar = learner.posterior(x)
    text = learner(common.name_tokens(c.clip, c.classnames), vpt.sample_residual(mu, logvar, eps))
    logits = vpt.sample_logits(x, F.normalize(text, dim=-1), c.clip.scale)
    loss = vpt.task_loss(logits, labels, bound) + 0.5 * vpt.kl_to_standard_normal(mu, logvar).mean()
    learner.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in learner.named_parameters()}


@pytest.mark.parametrize("bound", ["log-mean", "elbo"])
def test_image_posterior_of_a_batch_equals_the_loop_over_images(bound):
    c = case("image")
    learner, x, B = c.learner(), c.x[0], c.x.shape[1]
    labels = torch.arange(B) % len(c.classnames)
    args = argparse.Namespace(seed=1, samples=3, posterior="image")
    index = torch.randperm(100)[:B]
    loss, gradients = loss_and_gradients(c, learner, x, labels, vpt.training_noise(args, c.clip, 0, 0, index), bound)
    losses, each = zip(
        *[
            loss_and_gradients(
                c, learner, x[i, None], labels[i, None], vpt.training_noise(args, c.clip, 0, 9, index[i, None]), bound
            )
            for i in range(B)
        ]
    )
    close(loss, torch.stack(losses).mean(), 1e-6)
    for name in gradients:
        close(gradients[name], torch.stack([one[name] for one in each]).mean(dim=0), 2e-5, name)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_of_a_batch_equals_the_loop_and_survives_little_memory(kind):
    c = case(kind)
    learner, x = c.learner(), c.x.flatten(0, 1)
    whole = vpt.predict(learner, c.clip, c.classnames, x)
    singles = [vpt.predict(learner, c.clip, c.classnames, row[None]) for row in x]
    for key in whole:
        assert torch.allclose(whole[key], torch.cat([one[key] for one in singles]), atol=2e-5), key
    with mock.patch.object(c.clip, "memory_gb", 1e-5), mock.patch.object(vpt.common, "progress") as progress:
        progress.side_effect = lambda parts, text: parts
        chunked = vpt.predict(learner, c.clip, c.classnames, x)
    assert len(progress.call_args[0][0]) > 1
    for key in whole:
        assert torch.allclose(whole[key], chunked[key], atol=2e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_global_posterior_encodes_its_prompts_once_for_a_test_set(kind):
    c = case(kind)
    learner, x, prompts = c.learner(), c.x.flatten(0, 1), []
    encode = common.encode_prompts

    def count(clip, prefix, suffix, eot):
        prompts.append(len(prefix) * len(suffix))
        return encode(clip, prefix, suffix, eot)

    with mock.patch.object(common, "encode_prompts", count), mock.patch.object(vpt, "announce"):
        vpt.predict(learner, c.clip, c.classnames, x)
    images = 1 if kind == "global" else len(x)
    assert sum(prompts) == images * (1 + c.L) * len(c.classnames)  # L samples and the mean residual


def test_long_evaluation_is_announced_with_its_cost(capsys):
    vpt.announce("7 prompts", 7, lambda: torch.zeros(1))
    assert capsys.readouterr().out == ""
    with mock.patch.object(vpt.time, "time", side_effect=[0.0, 100.0, 102.0]):  # two starts, and the end of the second
        vpt.announce("7 prompts", 300, lambda: torch.zeros(1))
    assert capsys.readouterr().out == "evaluation: 7 prompts, at most 10 minutes\n"


# ----------------------------------------------------------------------------------------------------------------------
# 3. Training
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_trajectories_tell_a_mutant_without_weight_decay(name):
    c = golden_vpt.Case(world(FOLDER).recording(name), world(FOLDER))
    for key in golden_vpt.trajectories(c.g):
        golden_vpt.check_updates(c, key, c.trajectory(key))
        with pytest.raises(AssertionError, match=f"{key} update of"):
            golden_vpt.check_updates(c, key, c.trajectory(key, weight_decay=0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_hits_every_parameter(kind):
    c = case(kind)
    rates = torch.full((len(c.labels),), 0.001)
    plain, decayed = (c.train(rates, weight_decay=decay)[0]["parameters"] for decay in (0.0, 100.0))
    for name, before in c.start.items():
        if before.any():
            close(plain[name] - decayed[name], 0.001 * 100.0 * before, 1e-3, name)


def train_both(c, **changed):
    """vpt.train --samples 0 and prograd.train --lam 0 (CoOp), from the same start on the same batches."""
    trained, x, labels = [], c.x.flatten(0, 1), torch.arange(c.x[..., 0].numel()) % len(c.classnames)
    task = data.Task("golden", c.classnames, "", [], [], [], "", f"{c.words} {{}}.", [], [])
    common_settings = {"dataset": "golden", "seed": 1, "epochs": 4, "batch_size": 8, "lr": 0.05, "max_steps": 0,
                       "eval_every": 0, "checkpoint_seconds": 1e9}  # fmt: skip
    for method, more in ((vpt, changed), (prograd, {"lam": 0.0, "n_ctx": len(c.start["context"])})):
        settings = method.DEFAULTS["toy"] | common_settings | more
        with mock.patch.object(runs, "end_epoch"):
            args = argparse.Namespace(**settings)
            trained.append(method.train(args, c.clip, task, lambda epoch: (x, labels), Path("nowhere")))
    return trained


def test_without_samples_the_global_posterior_is_coop():
    c = case("global")
    ours, coop = train_both(c, samples=0, eval_samples=0, residual_scale=1.0)
    assert torch.equal(c.start["context"], vpt.initial_context(c.clip, c.words))
    close(ours.context - c.start["context"], coop.context - c.start["context"], 1e-6, "update of the context")
    fresh = vpt.PromptDistribution(c.clip, c.start["context"])
    assert not ours.mean.any() and torch.equal(ours.logvar, fresh.logvar)  # no gradient, no decay
    found = vpt.predict(ours, c.clip, c.classnames, c.x[0])
    assert torch.equal(found["tuned"], found["mean_residual"])
    expected = prograd.class_logits(coop, c.clip, c.classnames, c.x[0]).log_softmax(dim=-1)
    assert torch.allclose(found["tuned"], expected, atol=1e-5)


def test_without_samples_the_image_posterior_is_its_mean_network_alone():
    c = case("image")
    ours, _ = train_both(c, posterior="image", samples=0, eval_samples=0)
    start = vpt.PromptDistribution(c.clip, c.start["context"], "image")
    for name, before in start.named_parameters():
        after = ours.state_dict()[name]
        assert torch.equal(before, after) == name.startswith("logvar_net"), name
    other, _ = train_both(c, posterior="image", samples=0, eval_samples=0, kl_weight=7.0, bound="elbo")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ours.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# 4. The script
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def quick(tmp_path, monkeypatch, cache):
    """Flags of a run of seconds, in an empty folder, on four test images a class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(toy.TASKS[vpt.DEFAULTS["toy"]["dataset"]].parts, "test", 4)
    return ["--shots", "2", "--epochs", "3", "--samples", "3", "--checkpoint-seconds", "0", "--cache-dir", cache]


def tensors(out) -> dict:
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)["tensors"]


def figures(result: dict) -> dict:
    return {key: result[key] for key in ("split", "tests", "harmonic_mean")}


@pytest.mark.parametrize("kind", KINDS)
def test_run_reports_uncertainty(quick, kind, capsys):
    result = vpt.main([*quick, "--posterior", kind, "--out-dir", "run"])
    assert result["method"] == "vpt" and [test["classes"] for test in result["tests"]] == ["base", "new"]
    stored, baseline = np.load("run/predictions.npz"), json.loads(Path("run/baseline/result.json").read_text())
    for i, test in enumerate(result["tests"]):
        extra, n = test["extra"], test["n"]
        assert set(extra["mean_residual"]) == {"accuracy", "nll", "ece"}
        for key, row in (("auroc_tuned", "tuned"), ("auroc_zero_shot", "zero_shot")):
            p = stored[f"{i}/{row}"]
            wrong = p.argmax(axis=1) != stored[f"{i}/labels"]
            entropy = -(p * np.log(p)).sum(axis=1)
            wins = np.sign(entropy[wrong][:, None] - entropy[~wrong][None])
            assert extra[key] == pytest.approx((wins.mean() + 1) / 2, abs=1e-3)
        assert extra["auroc_baseline"] == baseline["tests"][i]["extra"]["auroc_tuned"]
        entropy, information = stored[f"{i}/entropy"], stored[f"{i}/mutual_information"]
        assert entropy.shape == information.shape == (n,)
        p = stored[f"{i}/tuned"]
        assert entropy == pytest.approx(-(p * np.log(p)).sum(axis=1), abs=1e-4)
        assert (information >= 0).all() and information.max() > 0
        assert test["baseline"] == baseline["tests"][i]["tuned"]
    assert not np.load("run/baseline/predictions.npz")["0/mutual_information"].any()
    assert baseline["settings"]["samples"] == baseline["settings"]["eval_samples"] == 0
    assert result["settings"]["eval_samples"] == 3
    header = next(line for line in capsys.readouterr().out.splitlines() if "zero-shot  " in line)
    assert header.split() == ["images", "zero-shot", {"global": "CoOp", "image": "CoCoOp-like"}[kind], "VPT"]
    assert not any("eval_noise" in name for name in tensors("run"))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_alone_gives_the_run_s_own_figures(quick, kind):
    run = vpt.main([*quick, "--posterior", kind, "--out-dir", "run"])
    again = vpt.main(["--eval-only", "--checkpoint", "run", "--out-dir", "again", "--cache-dir", quick[-1]])
    assert figures(again) == figures(run)
    mean = vpt.main(["--eval-only", "--checkpoint", "run", "--out-dir", "mean", "--eval-samples", "0",
                     "--cache-dir", quick[-1]])  # fmt: skip
    for test, other in zip(run["tests"], mean["tests"]):
        assert other["tuned"] == pytest.approx(test["extra"]["mean_residual"], abs=1e-4)
    more = vpt.main(["--eval-only", "--checkpoint", "run", "--out-dir", "more", "--eval-samples", "9",
                     "--cache-dir", quick[-1]])  # fmt: skip
    assert more["tests"][0]["tuned"]["nll"] != run["tests"][0]["tuned"]["nll"]
    assert more["tests"][0]["baseline"] == run["tests"][0]["baseline"]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_resumes_bit_for_bit(quick, kind, monkeypatch):
    flags = [*quick, "--posterior", kind, "--batch-size", "8"]
    whole, calls, loss = vpt.main([*flags, "--out-dir", "whole"]), [], vpt.task_loss

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 14:  # the baseline has 9 steps; this is in the middle of the second epoch after it
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(vpt, "task_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vpt.main([*flags, "--out-dir", "cut"])
    assert Path("cut/baseline/result.json").exists() and not Path("cut/result.json").exists()
    monkeypatch.setattr(vpt, "task_loss", loss)
    resumed = vpt.main(["--out-dir", "cut", "--resume", "--cache-dir", quick[-1]])
    assert figures(resumed) == figures(whole)
    for out in ("", "baseline"):
        ours, theirs = tensors(Path("cut", out)), tensors(Path("whole", out))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert Path("cut", out, "metrics.jsonl").read_text() == Path("whole", out, "metrics.jsonl").read_text()
        ours, theirs = np.load(Path("cut", out, "predictions.npz")), np.load(Path("whole", out, "predictions.npz"))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.files)
    assert vpt.main(["--out-dir", "cut", "--resume"]) == json.loads(json.dumps(resumed))  # finished: left as it is


def test_every_setting_changes_the_result(quick):
    """A flag that nobody reads would leave the figures as they are."""
    plain = vpt.main([*quick, "--no-compare"])
    first = plain["tests"][0]["tuned"]["nll"]
    for flags in ["--samples 4", "--eval-samples 4", "--residual-scale 0.5", "--kl-weight 3", "--bound elbo",
                  "--seed 2", "--ctx-init photo", "--logvar-init -3 -2", "--momentum 0", "--weight-decay 0.5",
                  "--lr 0.1", "--posterior image", "--batch-size 4", "--max-steps 2"]:  # fmt: skip
        assert vpt.main([*quick, "--no-compare", *flags.split()])["tests"][0]["tuned"]["nll"] != first, flags
    assert figures(vpt.main([*quick, "--no-compare"])) == figures(plain)


def test_deterministic_run_is_its_own_baseline(quick):
    result = vpt.main([*quick, "--samples", "0", "--out-dir", "run"])
    assert result["tests"][0]["baseline"] is None and not Path("run/baseline").exists()
    compared = vpt.main([*quick, "--out-dir", "both"])
    assert compared["tests"][0]["baseline"] == result["tests"][0]["tuned"]
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert set(line) == {"epoch", "lr", "loss", "loss_task"} and line["loss"] == line["loss_task"]
    assert {"kl", "sigma"} <= set(json.loads(Path("both/metrics.jsonl").read_text().splitlines()[-1]))


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--samples", "0", "--eval-samples", "3"], "--samples 0"),
        (["--ctx-init", " "], "--ctx-init"),
        (["--logvar-init", "1", "0"], "--logvar-init"),
        (["--ctx-init", "supercalifragilistic"], "toyclip"),
    ],
)
def test_mistakes_are_named(quick, flags, says):
    with pytest.raises(UserError, match=says):
        vpt.main([*quick, *flags])


def test_checkpoint_cannot_be_read_as_another_distribution(quick):
    vpt.main([*quick, "--no-compare", "--out-dir", "run"])
    for flags in ["--posterior image", "--samples 5", "--residual-scale 1", "--ctx-init photo"]:
        with pytest.raises(UserError, match=flags.split()[0]):
            vpt.main(["--eval-only", "--checkpoint", "run", *flags.split()])


def test_settings_of_the_paper():
    def settings(*flags):
        return runs.settle(vpt.build_parser(), [*flags, "--device", "cpu"], "vpt", vpt.DEFAULTS, vpt.paper_exceptions)

    real = settings("--dataset", "eurosat")
    assert (real.model, real.pretrained, real.lr, real.batch_size) == ("ViT-B-16", "openai", 0.002, 1)
    assert (real.samples, real.epochs, real.residual_scale, real.kl_weight, real.shots) == (10, 10, 1.0, 0.001, 16)
    paper = settings("--dataset", "eurosat", "--paper")
    assert (paper.samples, paper.epochs) == (20, 60)
    typed = settings("--dataset", "eurosat", "--paper", "--samples", "0")
    assert (typed.samples, typed.epochs) == (0, 60)
    assert set(vpt.PAPER) < set(data.TABLE) and len(vpt.PAPER) == 11
    other = settings("--dataset", "folder:x", "--paper")
    assert (other.samples, other.epochs) == (10, 10)


def test_line_one_says_variational_and_help_works():
    assert "VARIATIONAL prompt tuning, not visual" in vpt.__doc__.splitlines()[0]
    done = subprocess.run([sys.executable, str(ROOT / "vpt.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--residual-scale" in done.stdout and "[toy: 0.2, else: 1.0]" in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(quick, kind):
    flags = [*quick, "--no-compare", "--posterior", kind]
    exact, rough = (vpt.main([*flags, "--precision", precision]) for precision in ("fp32", "bf16"))
    assert rough["tests"][0]["tuned"]["nll"] == pytest.approx(exact["tests"][0]["tuned"]["nll"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gives_the_figures_of_the_cpu(quick, kind):
    flags = [*quick, "--no-compare", "--posterior", kind, "--precision", "fp32"]
    cpu, gpu = (vpt.main([*flags, "--device", device]) for device in ("cpu", "cuda"))
    assert gpu["tests"][0]["tuned"]["nll"] == pytest.approx(cpu["tests"][0]["tuned"]["nll"], rel=1e-3)
