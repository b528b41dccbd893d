"""The equations of prograd.py: numbers worked out by hand, properties, and loops written independently.

Section 1 touches nothing but the METHOD section, so that test_copies.py can run it on the pasted text as well.
The other methods' equations are in test_vpt.py and test_proreg.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_world import close, deviation, world

import common
import data
import prograd


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# 1. METHOD
# ----------------------------------------------------------------------------------------------------------------------
def test_eq5_by_hand():
    g_d, g_g = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([-2.0, 0.0]),
    )  # <g_d, g_g> = -2, |g_g|² = 4: the conflict is g_d's first entry
    for lam, expected in ((0.0, [1.0, 2.0]), (0.5, [0.5, 2.0]), (1.0, [0.0, 2.0]), (2.0, [-1.0, 2.0])):
        assert prograd.project_gradient(g_d, g_g, lam).tolist() == expected
    assert prograd.project_gradient(g_d, g_g).tolist() == [0.0, 2.0]  # λ = 1 is the default


def test_eq5_no_conflict_changes_nothing():
    g_d = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    across = torch.tensor([[2.0, -1.0], [0.0, 0.0]])  # at a right angle
    for g_g in (g_d, 0.1 * g_d, across):
        assert (g_d * g_g).sum() >= 0
        assert torch.equal(prograd.project_gradient(g_d, g_g), g_d)


def test_eq5_zero_gradients():
    zero, g = torch.zeros(2, 3), randn(2, 3).float()
    assert torch.equal(prograd.project_gradient(g, zero), g)
    assert torch.equal(prograd.project_gradient(zero, g), zero)
    assert torch.equal(prograd.project_gradient(zero, zero), zero)


def test_eq5_opposite_leaves_nothing():
    g_g = randn(5, 7)
    assert prograd.project_gradient(-3 * g_g, g_g).abs().max() < 1e-15
    close(prograd.project_gradient(-3 * g_g, g_g, 0.5), -1.5 * g_g, 1e-15)


def test_eq5_orthogonal_and_still_downhill():
    """λ says how much of the conflict stays: <g, g_g> = (1 - λ) <g_d, g_g>. The label loss falls: <g, g_d> > 0."""
    for seed in range(20):
        g_d, g_g = randn(4, 6, seed=seed), randn(4, 6, seed=100 + seed)
        g_d = g_d if (g_d * g_g).sum() < 0 else -g_d
        for lam in (0.0, 0.5, 0.8, 1.0):
            g = prograd.project_gradient(g_d, g_g, lam)
            assert abs((g * g_g).sum() - (1 - lam) * (g_d * g_g).sum()) < 1e-12
            assert (g * g_d).sum() > 0


def test_eq5_one_product_over_the_whole_tensor():
    """Any shape gives what the flattened gradients give, and not what a projection of each row would."""
    g_d, g_g = randn(3, 2, 5, seed=1), -randn(3, 2, 5, seed=1) + 0.5 * randn(3, 2, 5, seed=2)
    whole = prograd.project_gradient(g_d, g_g)
    assert torch.equal(whole, prograd.project_gradient(g_d.flatten(), g_g.flatten()).view(3, 2, 5))
    rows = torch.stack([prograd.project_gradient(a, b) for a, b in zip(g_d.flatten(0, 1), g_g.flatten(0, 1))])
    assert deviation(rows.view(3, 2, 5), whole) > 0.1


def test_eq5_slow_loop():
    for seed in range(10):
        g_d, g_g = randn(9, seed=seed).tolist(), randn(9, seed=50 + seed).tolist()
        dot, norm2 = sum(a * b for a, b in zip(g_d, g_g)), sum(b * b for b in g_g)
        expected = [a - 0.7 * dot / norm2 * b if dot < 0 else a for a, b in zip(g_d, g_g)]
        ours = prograd.project_gradient(
            torch.tensor(g_d, dtype=torch.float64), torch.tensor(g_g, dtype=torch.float64), 0.7
        )
        close(ours, expected, 1e-14)


def test_eq5_projecting_each_workers_gradient_is_something_else():
    """The docstring's WHY: the mean of two workers' projected gradients can conflict with their mean g_g."""
    g_d, g_g = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0]])
    mean = torch.stack([prograd.project_gradient(d, g) for d, g in zip(g_d, g_g)]).mean(dim=0)
    assert (mean * g_g.mean(dim=0)).sum() < -0.1
    right = prograd.project_gradient(g_d.mean(dim=0), g_g.mean(dim=0))
    assert abs((right * g_g.mean(dim=0)).sum()) < 1e-6


def test_eq3_by_hand():
    three_to_one, even = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert prograd.distillation_loss(even, three_to_one).item() == pytest.approx(math.log(2))
    expected = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    assert prograd.distillation_loss(three_to_one, even).item() == pytest.approx(expected)
    # T = 2: probabilities of halved logits, and four times the loss.
    assert prograd.distillation_loss(2 * three_to_one, even, 2.0).item() == pytest.approx(4 * expected)
    # A mean over the batch, not a sum.
    both = prograd.distillation_loss(torch.cat([even, three_to_one]), torch.cat([three_to_one, even]))
    assert both.item() == pytest.approx((math.log(2) + expected) / 2)


def test_eq3_slow_loop():
    logits, zs_logits, T = 3 * randn(4, 5, seed=1), 3 * randn(4, 5, seed=2), 1.7
    total = 0.0
    for row, zs_row in zip(logits.tolist(), zs_logits.tolist()):
        sums = [sum(math.exp(value / T) for value in values) for values in (row, zs_row)]
        for value, zs_value in zip(row, zs_row):
            total -= T * T * math.exp(zs_value / T) / sums[1] * math.log(math.exp(value / T) / sums[0])
    assert prograd.distillation_loss(logits, zs_logits, T).item() == pytest.approx(total / 4, rel=1e-13)


def test_eq3_is_kl_plus_the_teachers_entropy():
    """PAPER vs CODE 5: the value differs from KL(p_zs | p) by the entropy of p_zs, the gradient does not."""
    logits, zs_logits, T = randn(6, 4, seed=3).requires_grad_(), randn(6, 4, seed=4), 2.0
    p_zs = (zs_logits / T).softmax(dim=-1)
    kl = F.kl_div((logits / T).log_softmax(dim=-1), p_zs, reduction="batchmean") * T**2
    entropy = -(p_zs * p_zs.log()).sum(dim=-1).mean() * T**2
    ours = prograd.distillation_loss(logits, zs_logits, T)
    assert ours.item() == pytest.approx((kl + entropy).item(), rel=1e-13)
    close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(kl, logits)[0], 1e-13)


def test_eq3_gradient_and_minimum():
    logits, zs_logits, T = randn(6, 4, seed=5).requires_grad_(), randn(6, 4, seed=6), 3.0
    (gradient,) = torch.autograd.grad(prograd.distillation_loss(logits, zs_logits, T), logits)
    close(gradient, T / 6 * ((logits / T).softmax(dim=-1) - (zs_logits / T).softmax(dim=-1)), 1e-13)
    same = (zs_logits + randn(6, 1, seed=7)).requires_grad_()  # equal up to a constant per row: equal probabilities
    assert torch.autograd.grad(prograd.distillation_loss(same, zs_logits, T), same)[0].abs().max() < 1e-15


def test_eq3_why_t_squared():
    """Without the factor, doubling a large T divides the gradient by four; with it, the gradient keeps its size."""
    logits, zs_logits = randn(6, 4, seed=8).requires_grad_(), randn(6, 4, seed=9)
    sizes = {}
    for T in (50.0, 100.0):
        (gradient,) = torch.autograd.grad(prograd.distillation_loss(logits, zs_logits, T), logits)
        sizes[T] = gradient.norm().item()
    assert sizes[100.0] == pytest.approx(sizes[50.0], rel=0.02)
    assert sizes[100.0] / 100**2 == pytest.approx(sizes[50.0] / 50**2 / 4, rel=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# 2. MODEL
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip() -> common.Clip:
    return world().clip64()


def sentence(clip: common.Clip, ids: list[int], at: int, context: torch.Tensor) -> torch.Tensor:
    """Text feature [D] of SOS, these tokens, EOT, with `context` [M, W] before token `at`: the full-length pass."""
    model, tokenizer = clip.model, clip.tokenizer
    ids = [tokenizer.sot_token_id, *ids, tokenizer.eot_token_id]
    words = model.token_embedding(torch.tensor(ids))
    x = torch.cat([words[: at + 1], context, words[at + 1 :]])
    x = torch.cat([x, x.new_zeros(clip.context_length - len(x), clip.width)]) + model.positional_embedding
    x = model.ln_final(model.transformer(x[None], attn_mask=model.attn_mask.to(x.dtype)))[0]
    return x[len(ids) + len(context) - 1] @ model.text_projection


@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("position", ["end", "front"])
def test_eq1_prompt_order(clip, position, csc):
    """[SOS, context, name, ".", EOT] or [SOS, name, context, ".", EOT], with one context or one for each class."""
    names, M = world().classnames, 5
    context = 0.1 * randn(*((len(names),) if csc else ()), M, clip.width)
    ours = prograd.PromptLearner(clip, context, position)(common.name_tokens(clip, names, M))
    for c, name in enumerate(names):
        ids = clip.tokenizer.encode(name.replace("_", " ") + ".")
        at = 0 if position == "end" else len(clip.tokenizer.encode(name.replace("_", " ")))
        close(ours[c], sentence(clip, ids, at, context[c] if csc else context), 1e-9, name)


def test_learner_holds_the_context_alone(clip):
    learner = prograd.PromptLearner(clip, randn(4, clip.width))
    assert list(learner.state_dict()) == ["context"] == [name for name, _ in learner.named_parameters()]
    text = learner(common.name_tokens(clip, world().classnames, 4))
    text.sum().backward()
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    assert learner.context.grad.norm() > 0


def test_template_start_is_the_template(clip):
    """With as many slots as the template has tokens, training starts at the zero-shot prompt; more slots stay zero."""
    names, template = world().classnames, "a photo of a {}."
    start = prograd.initial_context(clip, template, 4, "template", 1)
    text = prograd.PromptLearner(clip, start)(common.name_tokens(clip, names, 4))
    # zero_shot_classifier gives float32
    close(F.normalize(text, dim=-1), common.zero_shot_classifier(clip, names, template), 1e-6)
    longer = prograd.initial_context(clip, template, 7, "template", 1)
    assert torch.equal(longer[3:], start) and not longer[:3].any()
    each = prograd.initial_context(clip, template, 7, "template", 1, n_classes=3)
    assert torch.equal(each, longer.expand(3, 7, -1))


def test_template_start_counts_tokens(clip):
    """PAPER vs CODE 4: a comma is a token. Words after the class name are left out; none before it: "a photo of a"."""
    start = prograd.initial_context(clip, "a type of pet, a photo of a {}.", 9, "template", 1)
    assert start.any(dim=-1).all()
    with pytest.raises(data.UserError, match="9 tokens"):
        prograd.initial_context(clip, "a type of pet, a photo of a {}.", 8, "template", 1)
    plain = prograd.initial_context(clip, "a photo of a {}.", 4, "template", 1)
    assert torch.equal(prograd.initial_context(clip, "{} texture.", 4, "template", 1), plain)


def test_random_start(clip):
    """N(0, 0.02²), a function of the seed alone."""
    state = torch.get_rng_state()
    start = prograd.initial_context(clip, "a photo of a {}.", 16, "random", 1)
    assert torch.equal(state, torch.get_rng_state())
    assert start.shape == (16, clip.width) and start.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(start, prograd.initial_context(clip, "something else {}", 16, "random", 1))
    assert not torch.equal(start, prograd.initial_context(clip, "a photo of a {}.", 16, "random", 2))
    assert prograd.initial_context(clip, "", 4, "random", 1, n_classes=3).shape == (3, 4, clip.width)
