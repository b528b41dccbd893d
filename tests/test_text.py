"""The text encoder: rows of names behind one prefix equal open_clip's own tower, exactly."""

import copy
import dataclasses
import math

import open_clip
import pytest
import torch
from conftest import CONFIG, TEXT, tiny_model

import common
import prograd
from data import UserError

SHORT, LONG = "a", " ".join(["word"] * 52)
NAMES = ["cat", "a very long name of a dog", SHORT, LONG, "cat_fish", "x y z", "cat"]


def by_open_clip(clip, names, context=None, template="a photo of a {}."):
    """Text features [C, D] of whole prompts, each padded to the context length. `context` [M, W] or
    [C, M, W] takes the place of the tokens after SOS."""
    model = clip.model
    tokens = clip.tokenizer([template.replace("{}", n.replace("_", " ")) for n in names])
    x = model.token_embedding(tokens)
    if context is not None:
        M = context.shape[-2]
        filler = " ".join(["X"] * M)
        tokens = clip.tokenizer([f"{filler} {n.replace('_', ' ')}." for n in names])
        x = model.token_embedding(tokens)
        context = context.expand(len(names), -1, -1)
        x = torch.cat([x[:, :1], context, x[:, 1 + M :]], dim=1)
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(names)), tokens.argmax(dim=-1)]
    return x @ model.text_projection


def equal(ours, theirs):
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_prompts_equal_encode_text(clip64):
    tokens = clip64.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    with torch.no_grad():
        theirs = clip64.model.encode_text(tokens)
    equal(common.prompt_features(clip64, NAMES, "a photo of a {}."), theirs)


@pytest.mark.parametrize("memory_gb", [4.0, 1e-3, 1e-9])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], [LONG, SHORT], NAMES * 9])
def test_features_and_gradients(clip64, names, memory_gb):
    """In one piece and in many, for one class, for short and long names together."""
    clip = dataclasses.replace(clip64, memory_gb=memory_gb)
    context = torch.randn(5, clip.width, dtype=torch.float64, requires_grad=True)
    learner = prograd.PromptLearner(clip, context)
    ours = learner(learner.names(names))
    theirs = by_open_clip(clip, names, context)
    equal(ours, theirs)
    weight = torch.randn_like(theirs)
    (ours_grad,) = torch.autograd.grad((ours * weight).sum(), learner.context)
    (their_grad,) = torch.autograd.grad((theirs * weight).sum(), context)
    equal(ours_grad, their_grad)


@pytest.mark.parametrize("memory_gb", [4.0, 1e-9])
def test_class_specific_contexts(clip64, memory_gb):
    clip = dataclasses.replace(clip64, memory_gb=memory_gb)
    context = torch.randn(len(NAMES), 3, clip.width, dtype=torch.float64, requires_grad=True)
    learner = prograd.PromptLearner(clip, context)
    ours = learner(learner.names(NAMES))
    theirs = by_open_clip(clip, NAMES, context)
    equal(ours, theirs)
    (ours_grad,) = torch.autograd.grad(ours.square().sum(), learner.context)
    (their_grad,) = torch.autograd.grad(theirs.square().sum(), context)
    equal(ours_grad, their_grad)


def test_many_prefixes(clip64):
    """G prefixes at once equal each by itself, whatever the memory."""
    names = common.name_tokens(clip64, NAMES, 2)
    prefix = torch.randn(5, 3, clip64.width, dtype=torch.float64)
    whole = common.encode_prompts(clip64, prefix, names)
    assert whole.shape == (5, len(NAMES), 16)
    for g in range(5):
        equal(common.encode_prompts(clip64, prefix[g : g + 1], names)[0], whole[g])
    small = dataclasses.replace(clip64, memory_gb=1e-9)
    equal(common.encode_prompts(small, prefix, names), whole)


def test_no_name_sees_another(clip64):
    """Change one name: every other feature stays, and so do empty ends of rows."""
    with torch.no_grad():
        before = common.prompt_features(clip64, NAMES, "a photo of a {}.")
        after = common.prompt_features(clip64, ["dog", *NAMES[1:]], "a photo of a {}.")
    equal(after[1:], before[1:])
    assert (after[0] - before[0]).norm() > 1e-3 * before[0].norm()
    assert before.isfinite().all()
    equal(before[6], before[0])


def test_rows_are_near_their_length(clip64):
    names = common.name_tokens(clip64, open_clip.IMAGENET_CLASSNAMES[:200], 16)
    R, S, _ = names.rows.shape
    assert S + 17 <= 2 * common.ROW_LENGTH and R * S < 1.3 * 200 * 6
    assert names.slot.unique().numel() == 200


def test_the_length_of_a_prompt_is_counted(clip64):
    """76 tokens of prompt and SOS are the limit, --csc's context included."""
    fits = " ".join(["word"] * 58)
    common.name_tokens(clip64, [fits], 16)
    common.name_tokens(clip64, [fits], 0, own=16)
    for n_ctx, own in ((17, 0), (0, 17)):
        with pytest.raises(UserError, match="tokens.*fit: shorten it, or the context"):
            common.name_tokens(clip64, [fits], n_ctx, own=own)


def test_word_toyclip_never_saw(toyclip):
    with pytest.raises(UserError, match="toyclip never saw 'dachshund' of 'a photo of a dachshund"):
        common.prompt_features(toyclip, ["dachshund"], "a photo of a {}.")


def test_custom_text_tower_and_layer_scale():
    """open_clip's CustomTextCLIP keeps its text tower in model.text; some towers scale layers."""
    config = CONFIG | {"custom_text": True, "text_cfg": TEXT | {"ls_init_value": 0.1}}
    model = tiny_model("customtext", config=config).double().requires_grad_(False)
    clip = common.Clip(model, None, open_clip.get_tokenizer("customtext"))
    assert model.text is common.text_tower(model)
    tokens = clip.tokenizer([f"a {name.replace('_', ' ')}" for name in NAMES])
    equal(common.prompt_features(clip, NAMES, "a {}"), model.encode_text(tokens))


def test_towers_that_are_not_clips(clip64):
    """Not causal, or not read at EOT: the numerical self-check says so in one line."""
    clip = dataclasses.replace(clip64, model=copy.deepcopy(clip64.model))
    common.check_text_tower(clip)
    clip.model.attn_mask.fill_(0)
    with pytest.raises(UserError, match="no text tower like CLIP's: causal, and read at the text"):
        common.check_text_tower(clip)
    clip = dataclasses.replace(clip64, model=copy.deepcopy(clip64.model))
    clip.model.text_pool_type = "first"
    with pytest.raises(UserError, match="no text tower like CLIP's"):
        common.check_text_tower(clip)


def test_zero_shot_classifier(clip64):
    one = common.zero_shot_classifier(clip64, NAMES, ["a {}."])
    assert torch.allclose(one.norm(dim=-1), torch.ones(len(NAMES), dtype=torch.float64))
    both = common.zero_shot_classifier(clip64, NAMES, ["a {}.", "the {}."])
    mean = one + common.zero_shot_classifier(clip64, NAMES, ["the {}."])
    equal(both, mean / mean.norm(dim=-1, keepdim=True))


def test_bf16_is_near(clip64):
    clip = dataclasses.replace(clip64, model=copy.deepcopy(clip64.model).float())
    exact = common.prompt_features(clip, NAMES, "a {}.")
    rough = common.prompt_features(dataclasses.replace(clip, precision="bf16"), NAMES, "a {}.")
    assert rough.dtype == torch.float32
    error = ((rough - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.05 and math.isfinite(error)
