"""ProReg: equations, model, training against a loop written independently, runs, evaluation. CPU, offline."""

import json
import math
from pathlib import Path
from unittest import mock

import processes_worker as worker
import pytest
import torch

import common
import data
import proreg
import runs


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
    for row in runs.encode_tests(args, clip, task):
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
        order = torch.randperm(N, generator=common.generator(seed, "order", epoch)).tolist()
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
