"""The text encoder: rows of names behind one prefix equal open_clip's own tower, exactly."""

import copy
import dataclasses
import inspect
import re
import sys
import types

import open_clip
import pytest
import torch
from conftest import CONFIG, REPO, SCRIPTS, TEXT, refused, run, tiny_clip, tiny_model

import common
import prograd
from data import UserError

LONG = " ".join(["word"] * 52)
NAMES = ["cat", "a very long name of a dog", "a", LONG, "cat_fish", "x y z", "cat"]


def by_open_clip(clip, names, context):
    """Text features [C, D] by open_clip's own tower, each prompt padded. context [M, W], or
    [C, M, W], one for each class."""
    if context.dim() == 3:
        each = zip(names, context, strict=True)
        return torch.cat([by_open_clip(clip, [name], one) for name, one in each])
    prefix = torch.cat([common.start_of_text(clip), context[None]], dim=1)
    ids = common.pad(clip, [f"{name}." for name in names], prefix.shape[1])
    return common.plain(clip, prefix, ids)[0]


def equal(ours, theirs, within: float = 1e-12):
    assert (ours - theirs).norm() <= within * theirs.norm() and theirs.norm() > 0


def encode_text(clip, template: str) -> torch.Tensor:
    """Text features of NAMES by the model itself."""
    prompts = [template.replace("{}", name.replace("_", " ")) for name in NAMES]
    with torch.no_grad():
        return clip.model.encode_text(clip.tokenizer(prompts))


def test_prompts_equal_encode_text(clip64):
    template = "a photo of a {}."
    equal(common.prompt_features(clip64, NAMES, template), encode_text(clip64, template))
    assert common.check_text_tower(clip64).fast


@pytest.mark.parametrize("memory_gb", [4.0, 1e-3, 1e-9])
@pytest.mark.parametrize("names", [NAMES, NAMES[:1], [LONG, "a"], NAMES * 9])
@pytest.mark.parametrize("csc", [False, True])
def test_features_and_gradients(clip64, names, memory_gb, csc):
    """In one piece and in many, for one class, for short and long names together, and with a
    context for each class."""
    clip = dataclasses.replace(clip64, memory_gb=memory_gb)
    shape = (len(names), 5, clip.width) if csc else (5, clip.width)
    context = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    learner = prograd.PromptLearner(clip, context)
    ours = learner(learner.names(names))
    theirs = by_open_clip(clip, names, context)
    equal(ours, theirs)
    weight = torch.randn_like(theirs)
    (ours_grad,) = torch.autograd.grad((ours * weight).sum(), learner.context)
    (their_grad,) = torch.autograd.grad((theirs * weight).sum(), context)
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
    assert names.which.unique().numel() == 200


def test_the_length_of_a_prompt_is_counted(clip64):
    """76 tokens of prompt and SOS are the limit, --csc's context included."""
    fits = " ".join(["word"] * 58)
    common.name_tokens(clip64, [fits], 16)
    common.name_tokens(clip64, [fits], 0, own=16)
    for n_ctx, own in ((17, 0), (0, 17), (76, 0), (99, 0)):
        with pytest.raises(UserError, match="too many tokens: shorten it, or the context"):
            common.name_tokens(clip64, [fits], n_ctx, own=own)


def test_word_toyclip_never_saw(toyclip):
    text = "toyclip never saw a word of .'a photo of a dachshund"
    with pytest.raises(UserError, match=text):
        common.prompt_features(toyclip, ["circle", "dachshund"], "a photo of a {}.")
    with pytest.raises(UserError, match=text):
        common.word_tokens(toyclip, "a photo of a dachshund")


def test_custom_text_tower_and_layer_scale():
    """open_clip's CustomTextCLIP keeps its text tower in model.text; some towers scale layers."""
    config = CONFIG | {"custom_text": True, "text_cfg": TEXT | {"ls_init_value": 0.1}}
    clip = tiny_clip("customtext", double=True, config=config)
    assert clip.model.text is common.text_tower(clip.model)
    equal(common.prompt_features(clip, NAMES, "a {}"), encode_text(clip, "a {}"))


class OtherTokenizer:
    """Of open_clip's class for Hugging Face's tokenizers: one that ends and pads with 1 and, as
    SigLIP's, begins with no token, or with BERT's."""

    context_length = 77

    def __init__(self, start: int | None):
        encode = lambda text, add_special_tokens: [9 + len(word) for word in text.split()]  # noqa: E731
        self.tokenizer = types.SimpleNamespace(cls_token_id=start, encode=encode)

    def __call__(self, texts, context_length=77):
        start = [] if self.tokenizer.cls_token_id is None else [self.tokenizer.cls_token_id]
        ids = [start + self.tokenizer.encode(text, False) for text in texts]
        ends = [1] * context_length  # at least one stays, however long the text is
        return torch.tensor([(row[: context_length - 1] + ends)[:context_length] for row in ids])


LAST = {"no_causal_mask": True, "pool_type": "last"}
KINDS = {  # text_cfg and tokenizer of MobileCLIP's, SigLIP's and CLIPA's kinds, and of one more
    "mobileclip": ({"no_causal_mask": True}, None),
    "first": ({"no_causal_mask": True, "pool_type": "first"}, None),
    "coca": ({"embed_cls": True}, None),
    "siglip": (LAST | {"proj_bias": True}, OtherTokenizer(None)),
    "clipa": (LAST, OtherTokenizer(101)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_clips_in_all_scripts(kind, tmp_path, monkeypatch):
    """The numerical self-check sees what is not causal, or not read at a text's end, and the plain
    encoder takes over."""
    text, tokenizer = KINDS[kind]
    config = CONFIG | {"text_cfg": TEXT | text, "custom_text": True}
    config |= {"init_logit_bias": -10} if kind == "siglip" else {}
    torch.save(tiny_model(f"tiny{kind}", config=config).state_dict(), tmp_path / "x.pt")
    if tokenizer:
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: tokenizer)
    clip = common.load_clip(f"tiny{kind}", str(tmp_path / "x.pt"), precision="bf16")
    clip = dataclasses.replace(clip, precision="fp32")  # its weights are fp32 in a bf16 run, too
    equal(common.prompt_features(clip, NAMES[:3], "a {}"), encode_text(clip, "a {}")[:3], 1e-5)
    context = torch.randn(2, clip.width, requires_grad=True)
    found = []
    for memory_gb in (4.0, 1e-9):
        learner = prograd.PromptLearner(dataclasses.replace(clip, memory_gb=memory_gb), context)
        features = learner(learner.names(NAMES[:3]))
        (grad,) = torch.autograd.grad(features.square().sum(), learner.context)
        found.append((features, grad))
    for whole, pieces in zip(*found):
        equal(pieces, whole, 1e-4)
    with pytest.raises(UserError, match="too many tokens"):
        common.name_tokens(clip, ["cat", "x " * 80], 2)
    flags = ["--model", f"tiny{kind}", "--pretrained", "x.pt", "--epochs", "1", "--max-steps", "2"]
    flags += ["--batch-size", "8", "--no-compare", "--test-part", "val"]
    for script in SCRIPTS.values():
        notes = run(script, *flags, "--out-dir", script.__name__)["notes"]
        assert any("encoded whole" in note for note in notes)
    refused("no --csc", prograd, *flags, "--csc", "--out-dir", "csc")


def test_prefix_of_another_length(clip64):
    prefix = torch.zeros(1, 4, clip64.width, dtype=torch.float64)
    with pytest.raises(UserError, match="a prefix of 4 tokens: .* packed for one of 3"):
        common.encode_prompts(clip64, prefix, common.name_tokens(clip64, NAMES, 2))


def test_section_2_pastes():
    """Exactly section 2 and what its head names, with plain open_clip and benchmark/README's loop:
    features and gradient equal the padded way's."""
    text = (REPO / "common.py").read_text(encoding="utf-8")
    section = text[text.index("# 2. TEXT") : text.index("# 3. IMAGES")]
    wanted = re.search(r"# To paste .* the imports and (.*\n.*)\. bench", section).group(1)
    pasted = [line for line in text.splitlines() if re.match(r"(import|from) (?!data\b)", line)]
    for name in re.findall(r"\w+", wanted):
        if hasattr(common, name) and name.isupper():
            pasted += re.findall(rf"^{name} = .*", text, re.M)
        elif hasattr(common, name):
            pasted.append(inspect.getsource(getattr(common, name)))
    readme = (REPO / "benchmark/README.md").read_text(encoding="utf-8")
    loop = re.search(r"own code\n.*?```python\n(.*?)```", readme, re.S).group(1)
    model = tiny_model("tinypaste")
    names, images = ["cat", "a long dog", "fish"], torch.randn(4, 3, 32, 32)
    here = types.ModuleType("pasted")
    vars(here).update(name="tinypaste", model=model, classnames=names, device="cpu")
    here.loader = [(images, torch.tensor([0, 1, 2, 1]))]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pasted", here)  # dataclasses look there
        exec("\n".join(pasted) + section + loop.replace("optimizer.step()", "pass"), vars(here))
    clip = common.Clip(model, None, open_clip.get_tokenizer("tinypaste"))
    context = here.context.detach().clone().requires_grad_()
    features = torch.nn.functional.normalize(by_open_clip(clip, names, context), dim=-1)
    logits = model.logit_scale.exp() * here.x @ features.T
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, here.labels), context)
    equal(here.text, features, 1e-5)
    equal(here.context.grad, grad, 1e-5)


def test_zero_shot_classifier(clip64):
    """Unit rows; of several templates their mean, normalised."""

    def classifier(*templates: str) -> torch.Tensor:
        return common.zero_shot_classifier(clip64, NAMES, templates)

    one, mean = classifier("a {}."), classifier("a {}.") + classifier("the {}.")
    equal(one.norm(dim=-1), torch.ones(len(NAMES), dtype=torch.float64))
    equal(classifier("a {}.", "the {}."), mean / mean.norm(dim=-1, keepdim=True))


def test_bf16_is_near(clip64):
    clip = dataclasses.replace(clip64, model=copy.deepcopy(clip64.model).float())
    exact = common.prompt_features(clip, NAMES, "a {}.")
    rough = common.prompt_features(dataclasses.replace(clip, precision="bf16"), NAMES, "a {}.")
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    equal(rough, exact, 0.05)
