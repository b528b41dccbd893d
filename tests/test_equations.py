"""What no recording covers: the METHOD sections as text to paste, against their equations written
out in numpy; their worked examples; edges; ProReg's AdamW and its rates, step by step."""

import doctest
import inspect
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_replay import settings, train_proreg
from golden_world import OWN, deviation, world

import common
import prograd
import proreg
import vpt


def paste(module) -> SimpleNamespace:
    """The METHOD section by itself, with `import torch` and nothing else."""
    (text,) = re.findall(r"# 1\. METHOD.*?(?=# 2\. )", inspect.getsource(module), re.DOTALL)
    names = {"torch": torch}
    exec(text, names)
    return SimpleNamespace(**{key: f for key, f in names.items() if inspect.isfunction(f)})


PASTED = {module: paste(module) for module in (prograd, vpt, proreg)}


@pytest.mark.parametrize("module", PASTED, ids=lambda module: module.__name__)
def test_worked_examples(module):
    """Each METHOD function's docstring ends with one, and it holds, pasted too."""
    for name, function in vars(PASTED[module]).items():
        last = inspect.getdoc(function).rpartition("\n\n")[2]
        assert last.startswith(">>> "), f"{name} has no worked example at the end"
        given = {"module": False, "globs": function.__globals__}
        (test,) = doctest.DocTestFinder().find(function, name, **given)
        assert doctest.DocTestRunner().run(test).failed == 0, name
    assert doctest.testmod(module).failed == doctest.testmod(common).failed == 0


def randn(*shape: int, seed: int = 0, size: float = 3.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=draw, dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def same(ours, equation) -> None:
    assert deviation(ours, torch.as_tensor(equation)) < 1e-12


def test_prograd_equations():
    method = PASTED[prograd]
    for seed in range(6):
        g_d, g_g = randn(4, 6, seed=seed), randn(4, 6, seed=seed + 10)
        d, g = g_d.flatten().tolist(), g_g.flatten().tolist()
        dot = sum(a * b for a, b in zip(d, g))
        share = 0.7 * dot / sum(b * b for b in g) if dot < 0 else 0.0
        expected = torch.tensor([a - share * b for a, b in zip(d, g)], dtype=torch.float64)
        same(method.project_gradient(g_d, g_g, 0.7), expected.view(4, 6))
        kept = method.project_gradient(g_d, g_g)
        assert torch.equal(kept, g_d) if dot >= 0 else abs((kept * g_g).sum()) < 1e-12
    x, z, T = randn(5, 4, seed=1), randn(5, 4, seed=2), 1.7
    rows = -(softmax(z.numpy() / T) * np.log(softmax(x.numpy() / T))).sum(axis=-1) * T**2
    same(method.distillation_loss(x, z, T), rows.mean())
    same(PASTED[proreg].prompt_losses(x, z, T), rows)
    same(PASTED[proreg].distillation_loss(x, z, T), rows.mean())


def test_vpt_equations():
    method = PASTED[vpt]
    x, text = F.normalize(randn(4, 8), dim=-1), F.normalize(randn(3, 2, 5, 8, seed=1), dim=-1)
    shared = np.einsum("bd,lcd->lbc", x, text[:, 0])  # Q = 1
    same(method.sample_logits(x, text[:, :1], 9.0), 9 * shared)
    own = torch.cat([text, text[:, :, [1, 0, 3, 2, 4]]], dim=1)  # Q = B
    same(method.sample_logits(x, own, 9.0), 9 * np.einsum("bd,lbcd->lbc", x, own))
    mu, logvar, eps = randn(2, 8, size=1), randn(2, 8, seed=1, size=1), randn(3, 1, 8, seed=2)
    sigma = np.sqrt(np.exp(logvar.numpy()))
    same(method.sample_residual(mu, logvar, eps), mu.numpy() + sigma * eps.numpy())
    kl = (mu.numpy() ** 2 + sigma**2 - 1 - np.log(sigma**2)) / 2
    same(method.kl_to_standard_normal(mu, logvar), kl.mean(axis=-1))
    logits, y = randn(3, 4, 5, seed=4), torch.tensor([0, 3, 1, 1])
    p = softmax(logits.numpy())  # [L, B, C]
    mean, at = p.mean(axis=0), (np.arange(4), y.numpy())
    same(method.log_mean_prob(logits), np.log(mean))
    same(method.task_loss(logits, y), -np.log(mean[at]).mean())
    same(method.task_loss(logits, y, "elbo"), -np.mean([np.log(q[at]) for q in p]))
    E = -(mean * np.log(mean)).sum(axis=-1)
    total, disagreement = method.uncertainty(logits)
    same(total, E)
    same(disagreement, E + (p * np.log(p)).sum(axis=-1).mean(axis=0))


def test_proreg_equations():
    method = PASTED[proreg]
    x, z, y = randn(5, 4, seed=1), randn(5, 4, seed=2), torch.tensor([0, 3, 1, 1, 2])
    at = np.arange(5), y.numpy()
    p, p_zs = softmax(x.numpy())[at], softmax(z.numpy())[at]
    ce, kl = -np.log(p), method.prompt_losses(x, z, 2.0).numpy()
    same(method.label_losses(x, y), ce)
    for k in (1.0, 10.0):
        w = p_zs**k / (p + p_zs**k + 1e-5)
        same(method.adaptive_weight(x, z, y, k), w)
        expected = ((1 - w) * ce).mean() + 1.5 * (w * kl).mean()
        same(method.proreg_loss(x, z, y, 1.5, k, 2.0), expected)
    same(method.fixed_kd_loss(x, z, y, 0.3, 2.0), 0.7 * ce.mean() + 0.3 * kl.mean())


def test_edges():
    g, zero = randn(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    project = PASTED[prograd].project_gradient
    assert torch.equal(project(g, zero), g) and torch.equal(project(zero, g), zero)
    assert project(-3 * g, g).norm() < 1e-14 * g.norm()
    # Saturated probabilities in float32: every combination of sure, right and wrong.
    sure = 1e4 * torch.eye(2)
    x, z = sure[[0, 0, 1, 1]].requires_grad_(), sure[[0, 1, 0, 1]]
    y = torch.zeros(4, dtype=torch.long)
    w = PASTED[proreg].adaptive_weight(x, z, y)
    assert not w.requires_grad and deviation(w, [1 / 2.00001, 0, 1 / 1.00001, 0]) < 1e-6
    for loss in (PASTED[proreg].proreg_loss(x, z, y), PASTED[vpt].task_loss(x[None], y)):
        assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()
    assert all(part.isfinite().all() for part in PASTED[vpt].uncertainty(torch.stack([x, z])))


def test_proreg_adamw_and_its_rates():
    """Eq. 7, six steps of proreg.train: the rate of each, decay by name, and the update."""
    golden, args = world(OWN), settings(proreg)
    images = golden.images(golden.clip)[0]
    y = torch.arange(len(images)) % len(golden.classnames)
    start = proreg.PromptedClassifier(golden.clip, golden.classnames, "a photo of a {}.")
    flags = {"epochs": 3, "batch_size": 4, "warmup": 0.4, "loss": "proreg"}
    steps = train_proreg(golden.clip, start, images, y, **flags)
    shares = [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]  # up in int(0.4 · 6) steps, then down
    b1, b2, eps = 0.9, 0.98, 1e-8  # as released
    for name, parameter in start.named_parameters():
        peak = args.lr * (1 if name.startswith("visual.") else args.head_lr_factor)
        decay = 0.0 if name.endswith("bias") else args.weight_decay
        theta = first = parameter.detach()
        m = v = torch.zeros_like(theta)
        for t, (share, (_, learned)) in enumerate(zip(shares, steps, strict=True), start=1):
            after, g, rate = learned[name]
            assert rate == pytest.approx(peak * share, rel=1e-15)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            theta = theta - rate * decay * theta
            theta = theta - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            if share == 0:
                assert torch.equal(after, first)
            else:
                assert deviation(after - first, theta - first) < 1e-8, (name, t)


# Numbers ------------------------------------------------------------------------------------------
def test_evaluate():
    """Unbalanced classes, and calibration by hand."""
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]).double()
    found = common.evaluate(p.log(), torch.tensor([0, 0, 0, 1]))
    assert found["accuracy"] == 75.0 and found["mean_class_accuracy"] == 50.0
    nll = -(2 * math.log(0.9) + math.log(0.6) + math.log(0.2)) / 4
    assert math.isclose(found["nll"], nll)
    ece = 100 * (2 * 0.1 + 0.4 + 0.8) / 4
    assert math.isclose(found["ece"], ece, rel_tol=1e-6)
    with pytest.raises(FloatingPointError, match="not finite"):
        common.evaluate(torch.tensor([[math.nan, 0]]), torch.tensor([0]))


ALL, AGAIN = ("a", "", "all", 80.0), ("a", "", "all", 99.0)
DOMAINS = [ALL, ("a", "x", "all", 50.0), ("a", "y", "all", 70.0)]
BASE, NEW = ("a", "", "base", 80.0), ("a", "", "new", 60.0)
BASE_DOMAINS = [BASE, ("a", "x", "base", 40.0), ("a", "x", "new", 20.0)]
OTHERS = [("b", "", "all", 1.0), ("b", "x", "all", 1.0)]  # --test-on: they do not count


@pytest.mark.parametrize(
    ("tests", "H"),
    [  # tests: dataset, domain, classes, accuracy
        ([BASE, NEW, *OTHERS], 2 * 80 * 60 / 140),
        ([*DOMAINS, *OTHERS], 2 * 80 * 60 / 140),
        ([*DOMAINS, AGAIN], 2 * 80 * 60 / 140),
        (BASE_DOMAINS, 2 * 80 * 40 / 120),
        ([*BASE_DOMAINS, NEW], 2 * 80 * 60 / 140),
        ([("a", "", "base", 0.0), ("a", "", "new", 0.0)], 0),
        ([BASE, *OTHERS], None),
        ([ALL, AGAIN], None),
    ],
)
def test_harmonic_mean_of_what_it_says(tests, H):
    rows = []
    for dataset, domain, classes, accuracy in tests:
        found = {"zero_shot": {"accuracy": accuracy}, "tuned": {"accuracy": accuracy}}
        row = {"dataset": dataset, "domain": domain, "classes": classes}
        rows.append(row | found | {"baseline": None, "extra": {}})
    wanted = {} if H is None else {"zero_shot": H, "tuned": H}
    assert common.harmonic_means(rows) == pytest.approx(wanted)
