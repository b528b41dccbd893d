"""ProReg: equations, model, training against a loop written independently, runs, evaluation. CPU, offline."""

import contextlib
import functools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import processes_worker as worker
import pytest
import torch

import common
import data
import proreg
import runs
import vision
from data import UserError


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(B: int = 6, C: int = 4, size: float = 3.0):
    """Student logits, teacher logits [B, C] and labels [B]."""
    return size * randn(B, C), size * randn(B, C, seed=1), torch.arange(B) % C


# ----------------------------------------------------------------------------------------------------------------------
# 1. METHOD
# ----------------------------------------------------------------------------------------------------------------------
def two_classes(*probabilities: float) -> torch.Tensor:
    """Logits [B, 2] that give label 0 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_eq4_by_hand():
    zs_logits = two_classes(0.5, 0.7, 0.8, 0.9, 0.99)
    logits, labels = two_classes(*[0.5] * 5), torch.zeros(5, dtype=torch.long)
    plain = proreg.adaptive_weight(logits, zs_logits, labels, power=1.0)
    assert plain.tolist() == pytest.approx([0.5, 0.583, 0.615, 0.643, 0.664], abs=1e-3)
    released = proreg.adaptive_weight(logits, zs_logits, labels)  # 10 is the default
    assert released.tolist() == pytest.approx([0.002, 0.053, 0.177, 0.411, 0.644], abs=1e-3)
    squared = proreg.adaptive_weight(logits, zs_logits, labels, 2.0)[0].item()
    assert squared == pytest.approx(0.25 / (0.5 + 0.25 + 1e-5), rel=1e-12)


def test_losses_against_a_slow_loop():
    logits, zs_logits, labels = case()
    alpha, power, T = 1.7, 3.0, 2.0
    mixed = kd = ce_mean = 0.0
    for s, z, y in zip(logits.tolist(), zs_logits.tolist(), labels.tolist()):
        p, p_zs = ([math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in (s, z))
        soft, soft_zs = ([math.exp(v / T) / sum(math.exp(u / T) for u in row) for v in row] for row in (s, z))
        w = p_zs[y] ** power / (p[y] + p_zs[y] ** power + 1e-5)
        ce = -math.log(p[y])
        kl = -T * T * sum(a * math.log(b) for a, b in zip(soft_zs, soft))
        mixed += ((1 - w) * ce + alpha * w * kl) / len(labels)
        kd += kl / len(labels)
        ce_mean += ce / len(labels)
    assert proreg.proreg_loss(logits, zs_logits, labels, alpha, power, T).item() == pytest.approx(mixed, rel=1e-12)
    assert proreg.distillation_loss(logits, zs_logits, T).item() == pytest.approx(kd, rel=1e-12)
    ours = proreg.fixed_kd_loss(logits, zs_logits, labels, 0.3, T).item()
    assert ours == pytest.approx(0.7 * ce_mean + 0.3 * kd, rel=1e-12)


def test_no_gradient_through_the_weight():
    logits, zs_logits, labels = case()
    logits.requires_grad_()
    w = proreg.adaptive_weight(logits, zs_logits, labels, 2.0)
    assert not w.requires_grad
    (gradient,) = torch.autograd.grad(proreg.proreg_loss(logits, zs_logits, labels, 1.5, 2.0), logits)
    soft = -(zs_logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)
    hard = -logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels]
    constant = ((1 - w) * hard).mean() + 1.5 * (w * soft).mean()
    assert torch.allclose(gradient, torch.autograd.grad(constant, logits)[0], rtol=1e-12, atol=0)


def test_special_cases():
    logits, zs_logits, labels = case()
    ce = -logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels]
    assert proreg.fixed_kd_loss(logits, zs_logits, labels, 0.0).item() == pytest.approx(ce.mean().item())
    kd = proreg.distillation_loss(logits, zs_logits)
    assert proreg.fixed_kd_loss(logits, zs_logits, labels, 1.0).item() == pytest.approx(kd.item())
    w = proreg.adaptive_weight(logits, zs_logits, labels)
    assert proreg.proreg_loss(logits, zs_logits, labels, 0.0).item() == pytest.approx(((1 - w) * ce).mean().item())
    # A teacher that gives the label no chance leaves plain fine-tuning, weight for weight.
    never = torch.full_like(zs_logits, 50.0)
    never[torch.arange(len(labels)), labels] = -50.0
    assert proreg.proreg_loss(logits, never, labels).item() == pytest.approx(ce.mean().item(), rel=1e-12)
    logits.requires_grad_()  # distillation pulls towards the teacher, and stops there
    (gradient,) = torch.autograd.grad(proreg.distillation_loss(logits, logits.detach()), logits)
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 3e4])
def test_certain_and_impossible_predictions(dtype, size):
    """Student and teacher right, wrong and undecided, each with certainty: finite, and weights where they belong."""
    right, wrong, flat = [size, -size, 0.0], [-size, size, 0.0], [0.0, 0.0, 0.0]
    rows = [(a, b) for a in (right, wrong, flat) for b in (right, wrong, flat)]
    logits = torch.tensor([a for a, _ in rows], dtype=dtype).requires_grad_()
    zs_logits, labels = torch.tensor([b for _, b in rows], dtype=dtype), torch.zeros(9, dtype=torch.long)
    for power in (1.0, 10.0):
        w = proreg.adaptive_weight(logits, zs_logits, labels, power)
        assert w.isfinite().all() and (w >= 0).all() and (w < 1).logical_or(w == 1).all()
        tight = 1e-2 if dtype == torch.bfloat16 else 1e-4
        assert w[0].item() == pytest.approx(0.5, abs=tight)  # both sure of the label
        assert w[3].item() == pytest.approx(1, abs=tight)  # the prompt is right where the model is wrong
        assert w[[1, 4, 7]].max() < 1e-40  # the prompt is wrong: learn from the label alone
    for loss in (proreg.proreg_loss(logits, zs_logits, labels), proreg.fixed_kd_loss(logits, zs_logits, labels, 0.5)):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()


def test_weight_is_defined_for_infinite_logits():
    inf = math.inf
    logits = torch.tensor([[0.0, -inf], [-inf, 0.0], [0.0, 0.0]])
    w = proreg.adaptive_weight(logits, logits.flip(0), torch.zeros(3, dtype=torch.long), power=1.0)
    assert w.tolist() == pytest.approx([1 / 3, 0, 2 / 3], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# 2. MODEL
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return worker.write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tensors(out) -> dict[str, torch.Tensor]:
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)["tensors"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_starts_as_zero_shot_clip(photos):
    args = worker.settings(photos)
    task, clip = runs.prepare(args)
    text = proreg.prompt_features(clip, task.classnames, task.template)
    learner = proreg.PromptedClassifier(clip, task.classnames, text).eval()
    for row in vision.encode_tests(args, clip, task):
        logits, labels = proreg.tuned_logits(args, clip, learner, row["test"])
        assert torch.allclose(logits, row["zero_shot"], atol=1e-4) and torch.equal(labels, row["labels"])


def test_prompt_features_are_the_text_towers():
    clip = common.load_clip("toyclip", worker.WEIGHTS)
    names = ["circle", "star", "square"]
    ours = proreg.prompt_features(clip, names, "a photo of a {}.")
    tokens = clip.tokenizer([f"a photo of a {name}." for name in names])
    theirs = clip.model.encode_text(tokens)
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item())


def test_mlp_head():
    clip = common.load_clip("toyclip", worker.WEIGHTS)
    text = torch.zeros(5, clip.dim)
    learner, again, other = (proreg.PromptedClassifier(clip, list("abcde"), text, "mlp", seed) for seed in (1, 1, 2))
    kinds = [type(layer).__name__ for layer in learner.cls_head]
    assert kinds == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert learner.cls_head[0].weight.shape == (2 * clip.dim, clip.dim)
    assert learner.cls_head[3].weight.shape == (5, 2 * clip.dim)
    assert learner.cls_head[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert same(learner.state_dict(), again.state_dict()) and not same(learner.state_dict(), other.state_dict())
    x = torch.randn(7, clip.dim)
    assert learner(x).shape == (7, 5)
    assert not torch.allclose(learner(x), learner(2 * x))  # features are read with their length, as released
    names = [name for name, _ in learner.named_parameters() if not name.startswith("visual.")]
    assert names == [f"cls_head.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")]


def test_parameter_groups_of_heads():
    clip = common.load_clip("toyclip", worker.WEIGHTS)
    learner = proreg.PromptedClassifier(clip, ["a", "b"], torch.zeros(2, clip.dim), "mlp")
    learner.visual.requires_grad_(False)
    groups = proreg.parameter_groups(learner, 1e-5, 100.0, 0.01)
    assert [(group["peak"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (pytest.approx(1e-3), 0.01, 3), (pytest.approx(1e-3), 0.0, 3)]  # fmt: skip


def test_warmup_linear():
    factors = [proreg.warmup_linear(step, 40, 0.1) for step in range(40)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(1 / 36) and factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)
    assert proreg.warmup_linear(0, 3, 0.1) == 1.0  # too few steps for a warm-up
    assert proreg.warmup_linear(2, 3, 1.0) == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------------------------
# 3. TRAIN
# ----------------------------------------------------------------------------------------------------------------------
def close(a: dict, b: dict, rel: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        difference, size = (a[key].double() - b[key].double()).norm(), b[key].double().norm()
        assert difference <= rel * size + 1e-12, f"{key}: {difference / size:.1e}"


def cosines(model, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = model.encode_image(images)
    return (x / x.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T


def by_hand(folder: Path, alpha: float, power: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """The recipe of `flags` written independently: one process, whole batches, AdamW in plain arithmetic, float64."""
    args, clip = worker.settings(folder), worker.float64_clip()
    task = data.load_from_args(args)
    tokens = clip.tokenizer([task.template.format(name) for name in task.classnames])
    text = clip.model.encode_text(tokens).detach()
    student, lr, N, size, epochs = worker.float64_clip().model, 1e-3, len(task.train), 4, 3
    weights = {f"visual.{name}": p for name, p in student.visual.named_parameters()}
    weights |= {"text_features": text.clone(), "logit_scale": student.logit_scale.detach().clone()}
    for weight in weights.values():
        weight.requires_grad_(True)
    first, second = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    step, steps = 0, epochs * math.ceil(N / size)
    for epoch in range(epochs):
        order = torch.randperm(N, generator=data.generator(seed, "order", epoch)).tolist()
        for start in range(0, N, size):
            batch = order[start : start + size]
            images = torch.stack([clip.preprocess(data.read_image(task.train[i][0])) for i in batch])
            labels = torch.tensor([task.train[i][1] for i in batch])

            logits = weights["logit_scale"].exp() * cosines(student, images, weights["text_features"])
            zs = clip.scale * cosines(clip.model, images, text).detach()
            p, q = logits.softmax(dim=1), zs.softmax(dim=1)
            rows = torch.arange(len(batch))
            w = (q[rows, labels] ** power / (p[rows, labels] + q[rows, labels] ** power + 1e-5)).detach()
            loss = (-(1 - w) * p[rows, labels].log() - alpha * w * (q * p.log()).sum(dim=1)).sum() / len(batch)
            gradients = torch.autograd.grad(loss, list(weights.values()))
            warm = int(0.1 * steps)
            rate = lr * (step / warm if step < warm else (steps - step) / (steps - warm))
            step += 1
            with torch.no_grad():
                for (name, weight), g in zip(weights.items(), gradients):
                    weight *= 1 - rate * (0.0 if "bias" in name else 0.01)
                    first[name] = 0.9 * first[name] + 0.1 * g
                    second[name] = 0.98 * second[name] + 0.02 * g * g
                    m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
                    weight -= rate * m / (v.sqrt() + 1e-8)
    return {name: weight.detach() for name, weight in weights.items()}


def unchanged():
    """ "crop" leaves the images as they are, but the teacher still looks at them in every step."""
    return mock.patch("data.train_transform", lambda preprocess, augment: preprocess)


def test_training_against_a_loop_by_hand(photos, tmp_path):
    """Also: the last batch of 10 images in fours is averaged over its own two."""
    with unchanged():
        learner = worker.float64_train(photos, tmp_path / "run", "--augment", "crop", "--alpha", "2", "--power", "1")
    trained = {name: weight.detach() for name, weight in learner.named_parameters()}
    close(trained, by_hand(photos, 2.0, 1.0), 1e-9)


def test_images_that_stay_the_same_need_the_teacher_once(photos, tmp_path):
    kept = worker.float64_train(photos, tmp_path / "a", "--augment", "none")
    calls = []

    def look(*args, looked=proreg.zero_shot_logits):
        calls.append(1)
        return looked(*args)

    with mock.patch("proreg.zero_shot_logits", look), unchanged():
        looked = worker.float64_train(photos, tmp_path / "b", "--augment", "crop")
        assert len(calls) == 3 * 3
        worker.float64_train(photos, tmp_path / "c", "--augment", "crop", "--loss", "ce")
        assert len(calls) == 3 * 3  # ordinary fine-tuning has no teacher
    close(kept.state_dict(), looked.state_dict(), 1e-6)  # kept in float32


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_parts_of_a_batch_change_nothing(photos, tmp_path, augment):
    flags = ["--augment", augment, "--batch-size", "7"]
    whole = worker.float64_train(photos, tmp_path / "1", *flags)
    parts = worker.float64_train(photos, tmp_path / "3", *flags, "--accumulate", "3")
    close(parts.state_dict(), whole.state_dict(), 1e-9)


def test_views_are_used_in_turn(photos):
    def images(epoch: int, *flags: str) -> torch.Tensor:
        args = worker.settings(photos, "--augment", "randaugment", *flags)
        task, clip = data.load_from_args(args), common.load_clip("toyclip", worker.WEIGHTS)
        order, stream = proreg.draw_epoch(args, clip, task, epoch)
        seen = {int(i): image for parts in stream for batch in parts for image, _, i in zip(*batch)}
        assert sorted(seen) == list(range(10)) and [len(batch) for batch in order] == [4, 4, 2]
        return torch.stack([seen[i] for i in range(10)])

    fresh = [images(epoch) for epoch in range(3)]
    assert torch.equal(fresh[0], images(0)) and not torch.equal(fresh[0], fresh[2])
    assert not torch.equal(fresh[0], images(0, "--seed", "2"))
    two = [images(epoch, "--views", "2") for epoch in range(3)]
    assert torch.equal(two[0], two[2]) and not torch.equal(two[0], two[1])


def test_zero_shot_clip_stays_as_it_was(photos, tmp_path):
    args = worker.settings(photos, "--out-dir", str(tmp_path / "run"), "--epochs", "1")
    task, clip = runs.prepare(args)
    before = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    learner = proreg.train(args, clip, task, runs.open_run(args, "proreg"))
    assert same(before, clip.model.state_dict())
    # All of the encoder but batch norm's running statistics has moved, and so has the classifier.
    moved = {n for n, t in learner.visual.state_dict().items() if not torch.equal(t, before[f"visual.{n}"])}
    assert moved == {name for name, _ in learner.visual.named_parameters()}
    assert not torch.equal(learner.logit_scale, before["logit_scale"])


def test_batch_norm(photos, tmp_path):
    learner = worker.float64_train(photos, tmp_path / "run", "--train-bn", "--epochs", "1")
    start = worker.float64_clip().model.visual.state_dict()
    running = [name for name in start if "running_mean" in name]
    assert running and not any(torch.equal(learner.visual.state_dict()[name], start[name]) for name in running)
    for more in (["--accumulate", "2"],):
        with pytest.raises(UserError, match="--train-bn"):
            proreg.main(worker.flags(photos, "--train-bn", *more))


@pytest.mark.parametrize("head", ["text", "mlp"])
def test_linear_probe(photos, tmp_path, head):
    learner = worker.float64_train(photos, tmp_path / "run", "--train", "head", "--head", head, "--epochs", "1")
    assert same(learner.visual.state_dict(), worker.float64_clip().model.visual.state_dict())
    start = torch.zeros(4, 64, dtype=torch.float64)
    untrained = proreg.PromptedClassifier(worker.float64_clip(), list("abcd"), start, head).state_dict()
    heads = [name for name in untrained if not name.startswith("visual.")]
    assert heads and not any(torch.equal(learner.state_dict()[name], untrained[name]) for name in heads)


def test_the_loss_falls(photos, tmp_path):
    for loss in ("proreg", "kd", "ce"):
        more = ["--augment", "none", "--lr", "1e-4", "--epochs", "8", "--label-noise", "0.5", "--loss", loss]
        worker.float64_train(photos, tmp_path / loss, *more)
        lines = metrics(tmp_path / loss)
        assert lines[-1]["loss"] < lines[0]["loss"] - 0.01


def test_max_steps(photos, tmp_path):
    worker.float64_train(photos, tmp_path / "four", "--max-steps", "4")
    assert len(metrics(tmp_path / "four")) == 2  # three steps and one


def test_a_number_that_is_not_finite_stops_the_run(photos, capsys):
    with pytest.raises(SystemExit) as stop:
        runs.run(lambda: proreg.main(worker.flags(photos, "--lr", "1e12", "--out-dir", "run")))
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "is not finite in epoch" in error and len(error.splitlines()) == 1
    assert not Path("run/result.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Runs
# ----------------------------------------------------------------------------------------------------------------------
def run(photos, out: str, *more: str) -> dict:
    return proreg.main(worker.flags(photos, "--out-dir", out, *more))


def test_run(photos):
    """Folder, result, log; ensembles and mixtures end where they should; evaluation alone gives the same numbers."""
    mixtures = ["--ensemble", "0", "0.5", "1", "--wise-ft", "0", "0.5", "1"]
    result = run(photos, "run", "--compare", *mixtures)
    names = {"config.json", "metrics.jsonl", "checkpoint.pt", "predictions.npz", "result.json", "baseline"}
    assert {path.name for path in Path("run").iterdir()} == names
    assert [(test["domain"], test["n"]) for test in result["tests"]] == [(None, 12), ("background", 12), ("style", 12)]
    assert result["protocol"]["checkpoint"] == "last step" and result["harmonic_mean"]["of"] == "ID/mean OOD"
    accuracy = [test["tuned"]["accuracy"] for test in result["tests"]]
    expected = common.harmonic_mean(accuracy[0], sum(accuracy[1:]) / 2)
    assert result["harmonic_mean"]["tuned"] == pytest.approx(expected)
    for test in result["tests"]:
        extra = test["extra"]
        assert list(extra) == [f"{kind} {share}" for kind in ("ensemble", "wise-ft") for share in ("0", "0.5", "1")]
        for end, key in (("0", "tuned"), ("1", "zero_shot")):
            assert extra[f"ensemble {end}"] == pytest.approx(test[key], abs=1e-4)
            assert extra[f"wise-ft {end}"] == pytest.approx(test[key], abs=1e-4)
        assert extra["ensemble 0.5"]["nll"] != pytest.approx(extra["wise-ft 0.5"]["nll"], abs=1e-4)
    lines = metrics("run")
    assert [line["epoch"] for line in lines] == [0, 1, 2] and 0 <= lines[0]["train_accuracy"] <= 100
    ordinary = metrics("run/baseline")
    assert ordinary[0]["loss_ce"] == ordinary[0]["loss"] and lines[0]["loss_ce"] != lines[0]["loss"]
    for line in lines:
        quantiles = [line[f"w_{q}"] for q in (10, 25, 50, 75, 90)]
        assert 0 <= quantiles[0] and quantiles == sorted(quantiles) and quantiles[-1] < 1
        assert quantiles[0] <= line["w_mean"] <= quantiles[-1] or line["w_above_half"] in (0, 1)
    assert "w_mean" not in ordinary[0]
    assert not any(
        key in json.loads(Path("run/config.json").read_text())["settings"] for key in ("classnames", "sources")
    )

    plain = run(photos, "plain", "--loss", "ce", "--no-compare")
    assert same(tensors("plain"), tensors("run/baseline"))
    for ours, theirs in zip(result["tests"], plain["tests"]):
        assert ours["baseline"] == theirs["tuned"] and theirs["baseline"] is None

    again = proreg.main(["--eval-only", "--checkpoint", "run", "--out-dir", "again", "--cache-dir", "none"])
    assert [test["tuned"] for test in again["tests"]] == [test["tuned"] for test in result["tests"]]
    assert [test["extra"] for test in again["tests"]] == [test["extra"] for test in result["tests"]]
    assert [test["baseline"] for test in again["tests"]] == [test["baseline"] for test in result["tests"]]


@pytest.mark.parametrize("more", [[], ["--select", "val", "--augment", "none", "--no-compare"]])
def test_resume_is_bitwise_equal(photos, more):
    flags = ["--augment", "randaugment", "--epochs", "4", "--compare", "--accumulate", "2", *more]
    whole = run(photos, "whole", *flags)
    saved, save, parts = [], runs.end_epoch, None

    def killed(args, out, *rest):
        save(args, out, *rest)
        saved.append(out)
        if len(saved) in (2, 5):  # where there is a baseline: once in it, once after it
            raise KeyboardInterrupt

    with mock.patch("runs.end_epoch", killed):
        for resume in ([], ["--resume"], ["--resume"]):
            with contextlib.suppress(KeyboardInterrupt):
                parts = run(photos, "parts", *flags, *resume)
    assert parts
    for out in ["", "baseline"][: 2 - ("--no-compare" in more)]:
        assert same(tensors(Path("whole", out)), tensors(Path("parts", out)))
        assert metrics(Path("whole", out)) == metrics(Path("parts", out))
    assert whole["tests"] == parts["tests"]


def test_select_val(photos):
    result = run(photos, "run", "--select", "val", "--no-compare", "--epochs", "5", "--lr", "1e-2")
    assert result["protocol"]["checkpoint"] == "best epoch on the validation part"
    assert not Path("run/best").exists()
    accuracy = [line["val_accuracy"] for line in metrics("run")]
    best = accuracy.index(max(accuracy))
    again = run(photos, "again", "--no-compare", "--epochs", "5", "--lr", "1e-2", "--max-steps", str(3 * (best + 1)))
    assert same(tensors("run"), tensors("again"))  # the weights after that epoch
    assert [test["tuned"] for test in result["tests"]] == [test["tuned"] for test in again["tests"]]


def test_unseen_classes(photos):
    """New class names meet the tuned encoder with their zero-shot text features; the MLP head has none to meet."""
    result = run(photos, "run", "--classes", "base", "--no-compare")
    base, new = (next(t for t in result["tests"] if t["classes"] == kind) for kind in ("base", "new"))
    assert result["tests"][0] is base and result["harmonic_mean"]["of"] == "base/new"
    assert new["tuned"] != new["zero_shot"]
    args = worker.settings(photos, "--classes", "base")
    task, clip = runs.prepare(args)
    learner = proreg.read_learner("run", clip).eval()
    test = next(t for t in task.tests if t.classes == "new")
    images = torch.stack([clip.preprocess(data.read_image(address)) for address, _ in test.items])
    with torch.no_grad():
        text = clip.model.encode_text(clip.tokenizer([test.template.format(name) for name in test.classnames]))
        expected = learner.logit_scale.exp() * cosines(learner, images, text)
        ours, _ = proreg.tuned_logits(args, clip, learner, test)
    assert torch.allclose(ours, expected, atol=1e-3)
    for flags in (["--classes", "base"], ["--wise-ft", "0.5"]):
        with pytest.raises(UserError, match="--head mlp"):
            run(photos, "mlp", "--head", "mlp", *flags)
    assert not Path("mlp").exists()


def test_test_sets_with_some_of_the_classes(photos):
    """ImageNet-A and -R name some of ImageNet's classes: the learned rows of these answer, in the test's order."""
    args = worker.settings(photos)
    task, clip = runs.prepare(args)
    text = proreg.prompt_features(clip, task.classnames, task.template)
    learner = proreg.PromptedClassifier(clip, task.classnames, text + torch.randn_like(text))
    whole, part = task.tests[0], data.Test("part", None, "all", [task.classnames[2], task.classnames[0]], "{}", [])
    part.items = [(address, {2: 0, 0: 1}[label]) for address, label in whole.items if label in (0, 2)]
    keep = [i for i, (_, label) in enumerate(whole.items) if label in (0, 2)]
    expected = proreg.tuned_logits(args, clip, learner, whole)[0][keep][:, [2, 0]]
    assert torch.allclose(proreg.tuned_logits(args, clip, learner, part)[0], expected, atol=1e-4)


def test_mlp_head_and_kd_run(photos):
    mlp = run(photos, "mlp", "--head", "mlp", "--no-compare", "--ensemble", "0.5", "--epochs", "2")
    assert np.isfinite(mlp["tests"][0]["tuned"]["nll"]) and "cls_head.0.weight" in tensors("mlp")
    kd = run(photos, "kd", "--loss", "kd", "--no-compare", "--epochs", "2", "--eval-every", "2")
    assert ["val_accuracy" in line for line in metrics("kd")] == [False, True]
    assert kd["settings"]["alpha"] == 0.5
    assert metrics("kd")[0]["w_mean"] > 0


def test_bf16(photos):
    """Training in mixed precision: what is learned stays fp32, and comes out close to fp32's."""
    learned = {}
    for precision in ("fp32", "bf16"):
        run(photos, precision, "--precision", precision, "--no-compare", "--epochs", "1", "--lr", "1e-4")
        learned[precision] = tensors(precision)
        assert all(t.dtype == torch.float32 for t in learned[precision].values() if t.is_floating_point())
    assert not same(*learned.values())
    assert (learned["fp32"]["text_features"] - learned["bf16"]["text_features"]).abs().max() < 1e-3
    with pytest.raises(UserError, match="fp16"):
        run(photos, "fp16", "--precision", "fp16")


@pytest.mark.parametrize("scale", [2.0**16, 2.0**127])
def test_gradient_scaler(photos, tmp_path, scale):
    """fp16's scaler, here on fp32 gradients: it changes nothing; steps that overflow are skipped."""
    more = ["--augment", "randaugment", "--epochs", "6", "--lr", "1e-4"]
    learned, scaler = {}, functools.partial(torch.amp.GradScaler, init_scale=scale)
    for name, precision in (("plain", "fp32"), ("scaled", "fp16")):
        args = worker.settings(photos, *more, "--out-dir", str(tmp_path / name))
        task, clip = runs.prepare(args)
        args.precision = precision  # the scaler's; the tower computes in fp32
        with mock.patch("torch.amp.GradScaler", scaler):
            learner = proreg.train(args, clip, task, runs.open_run(args, "proreg"))
        learned[name] = learner.state_dict()
    state = torch.load(tmp_path / "scaled/checkpoint.pt", weights_only=True)["optimizer"]
    kept, steps = state["param_groups"][0]["scaler"]["scale"], state["state"][0]["step"].item()
    if scale == 2.0**16:
        assert kept == scale and steps == 18
        close(learned["scaled"], learned["plain"], 1e-3)
    else:
        assert 1 < kept < scale and 0 < steps < 18
    assert all(tensor.isfinite().all() for tensor in learned["scaled"].values())


def settings(*flags: str):
    return runs.settle(proreg.build_parser(), list(flags), "proreg", proreg.DEFAULTS, proreg.paper_exceptions)


def test_settings_of_the_release():
    args = settings("--dataset", "pacs")
    released = {"lr": 1e-5, "head_lr_factor": 100.0, "betas": [0.9, 0.98], "weight_decay": 0.01, "batch_size": 256}
    released |= {"epochs": 10, "augment": "randaugment", "power": 10.0, "temperature": 1.0, "warmup": 0.1}
    released |= {"model": "ViT-B-32", "pretrained": "openai", "shots": "all", "classes": "all"}
    assert released == {key: getattr(args, key) for key in released}
    for dataset, alpha in {"bar": 1.0, "nico_animal": None, "nico_vehicle": 1.5, "pacs": None}.items():
        assert settings("--dataset", dataset, "--paper").alpha == alpha  # None: the default, 2
        assert settings("--dataset", dataset).alpha is None
        assert settings("--dataset", dataset, "--paper", "--alpha", "3").alpha == 3
    assert proreg.ALPHA["proreg"]["paper"] == 2.0 and proreg.ALPHA["kd"]["paper"] == 0.5
    assert settings("--dataset", "nico_animal", "--paper", "--loss", "kd").alpha == 0.9


def test_no_flags_mean_the_toy_world():
    args = settings()
    assert (args.dataset, args.model, args.shots, args.classes) == ("toy_shapes_biased", "toyclip", "all", "all")
    assert args.compare and args.power == 1.0 and not args.train_bn


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gpu(photos, precision):
    """Mixed precision on a GPU trains, resumes and comes out near the CPU's fp32."""
    more = ["--no-compare", "--lr", "1e-4", "--augment", "randaugment"]
    run(photos, "cpu", *more)
    device = ["--device", "cuda", "--precision", precision]
    run(photos, "gpu", *more, *device)
    state = torch.load("gpu/checkpoint.pt", weights_only=True)["tensors"]
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    close({"t": state["text_features"]}, {"t": tensors("cpu")["text_features"]}, 1e-2)
