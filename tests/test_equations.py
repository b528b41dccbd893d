"""The METHOD functions against the equations written out, and what no recording covers."""

import ast
import doctest
import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import prograd
import proreg
import vpt

SCRIPTS = (prograd, vpt, proreg)
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def method_section(script) -> str:
    """Section 1 of a script, as someone would copy it."""
    source = inspect.getsource(script)
    start = source.index("# 1. METHOD")
    return source[
        source.index("def ", start) : source.index("# ---", source.index("# 2. MODEL") - 200)
    ]


def method_functions(script) -> list[str]:
    tree = ast.parse(method_section(script))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("script", [*SCRIPTS, common], ids=lambda module: module.__name__)
def test_worked_examples(script):
    result = doctest.testmod(script)
    assert result.failed == 0 and result.attempted > 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_every_method_function_has_an_example(script):
    names = method_functions(script)
    assert len(names) >= 2
    for name in names:
        assert ">>>" in getattr(script, name).__doc__, name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda module: module.__name__)
def test_method_section_can_be_pasted(script):
    """It needs torch and nothing else, and gives the same numbers."""
    space = {"torch": torch}
    exec(method_section(script), space)  # noqa: S102
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 5, 4, generator=generator)
    if script is prograd:
        pairs = [("project_gradient", (logits, other)), ("distillation_loss", (logits, other, 2.0))]
    elif script is vpt:
        pairs = [("log_mean_prob", (logits[None],)), ("kl_to_standard_normal", (logits, other))]
    else:
        labels = torch.tensor([0, 1, 2, 3, 0])
        pairs = [
            ("proreg_loss", (logits, other, labels)),
            ("adaptive_weight", (logits, other, labels)),
        ]
    for name, values in pairs:
        assert torch.equal(space[name](*values), getattr(script, name)(*values))


# --------------------------------------------------------------------------------------------------
# ProGrad
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_projection(lam):
    rng = np.random.default_rng(0)
    for sign in (1, -1):
        g_g = rng.normal(size=(4, 6))
        g_d = rng.normal(size=(4, 6)) + sign * g_g
        dot = (g_d * g_g).sum()
        wanted = g_d - lam * min(dot, 0) / (g_g**2).sum() * g_g
        ours = prograd.project_gradient(torch.tensor(g_d), torch.tensor(g_g), lam)
        np.testing.assert_allclose(ours.numpy(), wanted, **EXACT)
        assert (sign < 0) == (dot < 0)


def test_projection_without_a_general_gradient():
    g_d = torch.randn(3, 2)
    assert torch.equal(prograd.project_gradient(g_d, torch.zeros(3, 2)), g_d)
    g_g = torch.randn(3, 2).double()
    g = prograd.project_gradient(-g_g + 0.1 * torch.randn(3, 2).double(), g_g)
    assert abs((g * g_g).sum()) < 1e-14


@pytest.mark.parametrize("T", [0.5, 1.0, 1e3])
def test_distillation(T):
    rng = np.random.default_rng(1)
    logits, zs = rng.normal(size=(2, 7, 5)) * 30
    p = np.exp(zs / T - zs.max(1, keepdims=True) / T)
    p /= p.sum(1, keepdims=True)
    log_q = logits / T - np.log(np.exp(logits / T - 0).sum(1, keepdims=True))
    wanted = -(p * log_q).sum(1).mean() * T**2
    for function in (prograd.distillation_loss, proreg.distillation_loss):
        np.testing.assert_allclose(function(*map(torch.tensor, (logits, zs)), T), wanted, rtol=1e-9)


# --------------------------------------------------------------------------------------------------
# VPT
# --------------------------------------------------------------------------------------------------
def test_log_mean_prob_task_loss_and_uncertainty():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, 3, 4))
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    mean = p.mean(0)
    labels = np.array([0, 3, 1])
    x, y = torch.tensor(logits), torch.tensor(labels)
    np.testing.assert_allclose(vpt.log_mean_prob(x), np.log(mean), **EXACT)
    picked = p[:, range(3), labels]
    np.testing.assert_allclose(vpt.task_loss(x, y), -np.log(picked.mean(0)).mean(), **EXACT)
    np.testing.assert_allclose(vpt.task_loss(x, y, "elbo"), -np.log(picked).mean(), **EXACT)
    total, disagreement = vpt.uncertainty(x)
    entropy = -(mean * np.log(mean)).sum(-1)
    within = -(p * np.log(p)).sum(-1).mean(0)
    np.testing.assert_allclose(total, entropy, **EXACT)
    np.testing.assert_allclose(disagreement, entropy - within, rtol=1e-10)


def test_kl_against_torch():
    mu, logvar = torch.randn(2, 3, 8).double()
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    p = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    wanted = torch.distributions.kl_divergence(q, p).mean(dim=-1)
    torch.testing.assert_close(vpt.kl_to_standard_normal(mu, logvar), wanted, **EXACT)


def test_each_image_meets_its_own_prompts():
    x, text = torch.randn(3, 5).double(), torch.randn(2, 3, 4, 5).double()
    own = vpt.sample_logits(x, text, 7.0)
    for b in range(3):
        torch.testing.assert_close(own[:, b], 7 * text[:, b] @ x[b], **EXACT)
    shared = vpt.sample_logits(x, text[:, :1], 7.0)
    torch.testing.assert_close(shared[:, 1], 7 * text[:, 0] @ x[1], **EXACT)


# --------------------------------------------------------------------------------------------------
# ProReg
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("power", [1.0, 10.0])
def test_adaptive_weight_and_loss(power):
    rng = np.random.default_rng(3)
    logits, zs = rng.normal(size=(2, 6, 4)) * 3
    labels = rng.integers(0, 4, 6)
    p, p_zs = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (logits, zs))
    own, theirs = p[range(6), labels], p_zs[range(6), labels] ** power
    w = theirs / (own + theirs + 1e-5)
    values = torch.tensor(logits), torch.tensor(zs), torch.tensor(labels)
    np.testing.assert_allclose(proreg.adaptive_weight(*values, power), w, rtol=1e-12)
    loss = ((1 - w) * -np.log(own)).mean() + 2 * (w * -(p_zs * np.log(p)).sum(-1)).mean()
    np.testing.assert_allclose(proreg.proreg_loss(*values, 2.0, power), loss, rtol=1e-12)


def test_weight_at_the_extremes():
    """Certain and impossible labels: no NaN, and no gradient through w."""
    logits = torch.tensor([[200.0, 0], [0, 200], [200, 0], [0, 200]], requires_grad=True)
    zs = torch.tensor([[200.0, 0], [0, 200], [0, 200], [200, 0]])
    labels = torch.zeros(4, dtype=torch.long)
    w = proreg.adaptive_weight(logits, zs, labels)
    torch.testing.assert_close(w, torch.tensor([0.5, 0, 0, 1]), rtol=0, atol=2e-5)
    assert not w.requires_grad
    proreg.proreg_loss(logits, zs, labels).backward()
    assert logits.grad.isfinite().all()


def test_adamw_step_by_step(clip64):
    """proreg.py's optimiser against the equations, with its rates, for 12 steps in float64."""
    learner = proreg.PromptedClassifier(clip64, ["cat", "dog"], "a {}.")
    groups = proreg.parameter_groups(learner, 1e-3, 100.0, 0.01)
    betas, eps, steps = (0.9, 0.98), 1e-8, 12
    optimizer = torch.optim.AdamW(groups, 1e-3, betas, eps=eps, fused=True)
    rules, params = {}, dict(learner.named_parameters())
    for group in groups:
        rules |= {id(p): (group["peak"], group["weight_decay"]) for p in group["params"]}
    ours = {name: p.detach().clone() for name, p in params.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t in range(steps):
        share = proreg.warmup_linear(t, steps, 0.25)
        wanted = t / 3 if t < 3 else (steps - t) / (steps - 3)
        assert math.isclose(share, wanted)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p)
        optimizer.step()
        for name, p in params.items():
            peak, decay = rules[id(p)]
            lr = peak * share
            m[name] = betas[0] * m[name] + (1 - betas[0]) * p.grad
            v[name] = betas[1] * v[name] + (1 - betas[1]) * p.grad**2
            m_hat, v_hat = m[name] / (1 - betas[0] ** (t + 1)), v[name] / (1 - betas[1] ** (t + 1))
            ours[name] = ours[name] * (1 - lr * decay) - lr * m_hat / (v_hat.sqrt() + eps)
            assert (p - ours[name]).norm() <= 1e-10 * ours[name].norm(), name
    assert rules[id(params["text_features"])] == (0.1, 0.01)
    assert rules[id(params["visual.ln_post.bias"])] == (1e-3, 0.0)
    assert rules[id(params["visual.ln_post.weight"])] == (1e-3, 0.01)


# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------
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


def test_harmonic_mean_looks_at_the_own_dataset():
    def test(dataset, domain, classes, accuracy):
        m = {"accuracy": accuracy}
        return {"dataset": dataset, "domain": domain, "classes": classes, "zero_shot": m} | {
            "tuned": m,
            "baseline": None,
            "extra": {},
        }

    mine = [test("a", "", "base", 80.0), test("a", "", "new", 60.0)]
    others = [test("b", "", "all", 1.0), test("b", "night", "all", 1.0)]
    h = common.harmonic_means(mine + others)
    assert h == {"zero_shot": 2 * 80 * 60 / 140, "tuned": 2 * 80 * 60 / 140}
    domains = [test("a", "", "all", 80.0), test("a", "x", "all", 50.0), test("a", "y", "all", 70.0)]
    assert common.harmonic_means(domains + others)["tuned"] == 2 * 80 * 60 / 140
    assert common.harmonic_means([mine[0], *others]) == {}
    assert common.harmonic_mean(0.0, 0.0) == 0.0


def test_logit_scale_is_taken_in_double(clip64):
    assert clip64.scale == math.exp(clip64.model.logit_scale.item())
    assert F.cosine_similarity(torch.ones(1), torch.ones(1), dim=0) == 1
