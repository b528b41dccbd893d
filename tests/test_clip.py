"""common.py: prompts encoded exactly, models loaded with the right activation, refusals of one line, features."""

import argparse
import functools
import gc
import io
import json
import math
import os
import subprocess
import sys
import types
import weakref
from unittest import mock

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from golden_world import close, deviation, world
from PIL import Image

import common
import data
import files
import runs
import vision
from common import Clip

WORDS = "cat dog tesla model s sedan (blue) boeing 737-300 forget-me-not apple_pie cocker spaniel t-shirt".split()


# ----------------------------------------------------------------------------------------------------------------------
# 1. encode_prompts is exact
# ----------------------------------------------------------------------------------------------------------------------
def small_clip(dtype=torch.float64, context_length=77, custom=False, quick=True, width=32, heads=2, layers=3) -> Clip:
    """A random CLIP with a text tower of open_clip's own code. No parameter is zero, biases included."""
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.CLIP
    vision = {"image_size": 8, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": context_length, "width": width, "heads": heads, "layers": layers}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind(24, vision, text, quick_gelu=quick)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.eval().requires_grad_(False).to(dtype)
    tokenizer = open_clip.SimpleTokenizer(context_length=context_length)
    return Clip(model, None, tokenizer, width=width, dim=24, context_length=context_length)


def names_of(C: int) -> list[str]:
    """C class names of one to three words, of many lengths in tokens."""
    return [" ".join(WORDS[(c * k + c // 7) % len(WORDS)] for k in range(1, 2 + c % 3)) for c in range(C)]


def randn(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def full_length(clip: Clip, quick: bool, prefix, suffix, eot, pairs) -> torch.Tensor:
    """Features [N, D] of the pairs (g, c), from whole sequences and nothing but matrix products: written independently.

    What stands after EOT is noise here, since it must not matter."""
    tower = getattr(clip.model, "text", clip.model)
    p = {name: value for name, value in tower.named_parameters() if not name.startswith("visual.")}
    heads = tower.transformer.resblocks[0].attn.num_heads
    rows = [torch.cat([prefix[g], suffix[c, : eot[c] + 1]]) for g, c in pairs]
    noise = randn(clip.context_length, clip.width, dtype=suffix.dtype, seed=9)
    x = torch.stack([torch.cat([row, noise[len(row) :]]) for row in rows]) + p["positional_embedding"]
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()

    def norm(x, name):
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name, weight="weight", bias="bias"):
        return x @ p[f"{name}{weight}"].T + p[f"{name}{bias}"]

    for layer in range(len(tower.transformer.resblocks)):
        block = f"transformer.resblocks.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj_", "weight", "bias").chunk(3, dim=-1)
        mixed = []
        for q_h, k_h, v_h in zip(q.chunk(heads, dim=-1), k.chunk(heads, dim=-1), v.chunk(heads, dim=-1)):
            scores = q_h @ k_h.mT / math.sqrt(q_h.shape[-1])
            mixed.append(scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v_h)
        x = x + linear(torch.cat(mixed, dim=-1), f"{block}.attn.out_proj.")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc.")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else hidden * (1 + (hidden / 2**0.5).erf()) / 2
        x = x + linear(hidden, f"{block}.mlp.c_proj.")
    last = torch.stack([x[n, prefix.shape[1] + eot[c]] for n, (_, c) in enumerate(pairs)])
    return norm(last, "ln_final") @ p["text_projection"]


CASES = [  # G, C, context_length, custom, quick, memory_gb: of these the small ones force blocks
    (1, 1, 77, False, True, 4.0),
    (1, 300, 77, False, True, 4.0),
    (40, 1, 77, False, False, 4.0),
    (40, 300, 32, False, True, 4.0),
    (40, 300, 32, False, True, 0.02),
    (1, 300, 77, True, False, 4e-4),
    (40, 7, 77, False, True, 2e-3),
    (3, 7, 32, True, True, 1e-9),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("G, C, context_length, custom, quick, memory_gb", CASES)
def test_encode_prompts_equals_the_full_sequence(G, C, context_length, custom, quick, memory_gb, dtype):
    """Features, and gradients in prefix and suffix; of many (g, c) a sample, which holds the first and the last."""
    clip, M = small_clip(dtype, context_length, custom, quick, layers=2 if G * C > 1000 else 3), 4
    suffix, eot = common.name_tokens(clip, names_of(C), M)
    context = 0.3 * randn(G, M, clip.width, dtype=dtype)
    prefix = torch.cat([common.start_of_text(clip).expand(G, -1, -1), context], dim=1).requires_grad_()
    suffix = suffix.requires_grad_()
    clip.memory_gb = memory_gb
    with mock.patch.object(common, "encode_suffixes", wraps=common.encode_suffixes) as blocks:
        features = common.encode_prompts(clip, prefix, suffix, eot)
    assert features.shape == (G, C, clip.dim)
    assert (blocks.call_count > 1) == (memory_gb < 4.0)
    pairs = [(g, c) for g in range(G) for c in range(C)]
    pairs = pairs[:: max(1, len(pairs) // 100)] + [(G - 1, C - 1)]
    expected = full_length(clip, quick, prefix, suffix, eot, pairs)
    ours = torch.stack([features[g, c] for g, c in pairs])
    weights = randn(*ours.shape, dtype=dtype, seed=5)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    close(ours, expected, tolerance)
    for (a, b), what in zip(
        zip(*(torch.autograd.grad((x * weights).sum(), (prefix, suffix)) for x in (ours, expected))),
        ("gradient of the prefix", "gradient of the suffix"),
    ):
        assert b.norm() > 0
        close(a, b, tolerance, what)
    with torch.no_grad():
        close(common.encode_prompts(clip, prefix, suffix, eot), features, tolerance, "without gradients")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("C, context_length, custom", [(1, 77, False), (300, 77, False), (300, 32, True)])
def test_encode_prompts_equals_open_clips_encode_text(C, context_length, custom, dtype, tolerance):
    clip = small_clip(dtype, context_length, custom)
    tokens = clip.tokenizer([f"a photo of a {name.replace('_', ' ')}." for name in names_of(C)])
    words = common.embed(clip, [clip.tokenizer.encode("a photo of a")])[0]
    prefix = torch.cat([common.start_of_text(clip), words], dim=1)
    ours = common.encode_prompts(clip, prefix, *common.name_tokens(clip, names_of(C), 4))[0]
    close(ours, clip.model.encode_text(tokens), tolerance)


@pytest.mark.parametrize("templates", ["a photo of a {}.", ["itap of a {}.", "{} texture.", "a {} in a video game."]])
def test_zero_shot_classifier(templates):
    """Unit mean of unit features of whole sentences; the words that all prompts begin with are encoded once."""
    clip, names = small_clip(), names_of(12)
    total = 0
    for template in [templates] if isinstance(templates, str) else templates:
        tokens = clip.tokenizer([template.replace("{}", name.replace("_", " ")) for name in names])
        total = total + F.normalize(clip.model.encode_text(tokens), dim=-1)
    close(common.zero_shot_classifier(clip, names, templates), F.normalize(total, dim=-1), 1e-6)  # float32
    # One class alone shares every word with itself: its EOT must stay in the suffix.
    one, all_of_them = (common.zero_shot_classifier(clip, some, "a {}.") for some in (names[:1], names))
    close(one, all_of_them[:1], 1e-6)


def test_order_and_company_do_not_matter():
    """A class's feature is its own: other classes, their order and a longer suffix table change rounding at most."""
    clip, names = small_clip(), names_of(20)
    suffix, eot = common.name_tokens(clip, names)
    prefix = randn(2, 5, clip.width)
    together = common.encode_prompts(clip, prefix, suffix, eot)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    close(common.encode_prompts(clip, prefix, suffix[order], eot[order]), together[:, order], 1e-12)
    alone = [common.encode_prompts(clip, prefix, suffix[c : c + 1], eot[c : c + 1]) for c in range(20)]
    close(torch.cat(alone, dim=1), together, 1e-12)
    wider = torch.cat([suffix, torch.full((20, 9, clip.width), math.nan, dtype=suffix.dtype)], dim=1)
    close(common.encode_prompts(clip, prefix, wider, eot), together, 1e-12)  # nothing after EOT is read


def saved_bytes(run) -> int:
    """Bytes that autograd keeps for the backward pass of run(), parameters not counted."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.result = run()  # alive, so that no address is used twice
    return sum(kept.values())


def test_memory_is_bounded():
    """activation_bytes is an upper bound of what a token keeps, and blocks keep next to nothing."""
    clip, G, C = small_clip(torch.float32, width=64, heads=4), 3, 40
    suffix, eot = common.name_tokens(clip, names_of(C), 1)
    prefix = randn(G, 2, 64, dtype=torch.float32).requires_grad_()

    def run():
        return common.encode_prompts(clip, prefix, suffix, eot)

    tokens = G * int((eot + 1).sum())
    estimate = tokens * common.activation_bytes(clip.model.transformer.resblocks, 64, grad=True)
    whole = saved_bytes(run)
    assert 0.3 * estimate < whole < 1.1 * estimate  # the rest is the prefix's
    clip.memory_gb = estimate / 8e9
    assert saved_bytes(run) < 0.2 * whole


def test_too_long_is_one_line_that_names_the_class():
    clip = small_clip(context_length=32)
    names = ["cat", "the cat that sat on the mat and looked at the dog in the garden", "dog"]
    template = "a blurry and very noisy photo of the small and hard to see and very very very very very small {}."
    for call in (
        lambda: common.name_tokens(clip, names, 16),
        lambda: common.zero_shot_classifier(clip, names, template),
    ):
        with pytest.raises(data.UserError, match="the cat that sat on the mat") as caught:
            call()
        assert_one_line(caught)
    suffix, eot = common.name_tokens(clip, names, 8)
    assert common.encode_prompts(clip, randn(1, 9, clip.width), suffix, eot).isfinite().all()
    with pytest.raises(data.UserError, match="--n-ctx") as caught:
        common.encode_prompts(clip, randn(1, 25, clip.width), suffix, eot)
    assert_one_line(caught)
    # As many tokens as there is room for are taken: SOS, 14 of context, 15 of the name, ".", EOT.
    suffix, eot = common.name_tokens(clip, ["cat " * 15], 14)
    assert 1 + 14 + int(eot) + 1 == 32
    with pytest.raises(data.UserError, match="cat cat"):
        common.name_tokens(clip, ["cat " * 15], 15)


def test_empty_and_unknown_names():
    clip = small_clip()
    with pytest.raises(data.UserError, match="class 1 has an empty name") as caught:
        common.name_tokens(clip, ["cat", " _ "])
    assert_one_line(caught)
    clip.known = torch.ones(49408, dtype=torch.bool)
    clip.known[clip.tokenizer.encode("spaniel")] = False
    with pytest.raises(data.UserError, match="'spaniel' of 'cocker spaniel.'") as caught:
        common.name_tokens(clip, ["cat", "cocker spaniel"])
    assert_one_line(caught)


def assert_one_line(caught) -> None:
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ----------------------------------------------------------------------------------------------------------------------
# 2. load_clip: formats and activations
# ----------------------------------------------------------------------------------------------------------------------
VIT = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 64, "patch_size": None}


@pytest.fixture(scope="module")
def small_models(tmp_path_factory) -> None:
    """Two small architectures in open_clip's registry, each with and without QuickGELU in its name."""
    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    for name, tower in (("small-vit", VIT), ("small-resnet", RESNET)):
        for suffix, quick in (("", {}), ("-quickgelu", {"quick_gelu": True})):
            config = {"embed_dim": 24, "vision_cfg": tower, "text_cfg": text} | quick
            (folder / f"{name}{suffix}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)


@functools.cache
def random_state(name: str) -> dict[str, torch.Tensor]:
    """fp16 weights of a small model, as OpenAI stores them."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.create_model(name)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}


def save(state: dict, path, kind: str) -> str:
    """Write a state dict as one of the four kinds of file that load_clip reads."""
    if kind == "safetensors":
        safetensors.torch.save_file(state, path := path / "weights.safetensors")
    elif kind == "state dict":
        torch.save(state, path := path / "weights.pt")
    elif kind == "checkpoint":  # open_clip's training script, on several GPUs
        content = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
        torch.save(content, path := path / "epoch_3.pt")
    else:
        archive(state).save(path := str(path / "ViT.pt"))
    return str(path)


def archive(state: dict[str, torch.Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript archive such as OpenAI's: the same names, fp16, and three sizes beside the weights."""

    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    root = Node()
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    for key, value in (state | {name: torch.tensor(size) for name, size in sizes.items()}).items():
        *path, leaf = key.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, Node())
            node = getattr(node, part)
        if value.is_floating_point() and "running" not in leaf:
            node.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(leaf, value)
    return torch.jit.trace(root, torch.zeros(1))


KINDS = ["safetensors", "state dict", "checkpoint", "archive"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
@pytest.mark.parametrize("name", ["small-vit", "small-resnet"])
def test_load_clip_formats(small_models, tmp_path, name, suffix, kind):
    """The name decides the activation, except for an OpenAI archive, which is QuickGELU. Numbers are compared."""
    state = random_state(name)
    clip = common.load_clip(name + suffix, save(state, tmp_path, kind))
    quick = kind == "archive" or suffix != ""
    assert clip.activation == ("quickgelu" if quick else "gelu")
    reference = {flag: open_clip.create_model(name, force_quick_gelu=flag).eval() for flag in (True, False)}
    image, text = randn(2, 3, 32, 32, dtype=torch.float32), clip.tokenizer(["a cat", "two dogs"])
    for flag, model in reference.items():
        model.load_state_dict(state)
        off = deviation(clip.model.encode_text(text), model.encode_text(text))
        assert off < 1e-6 if flag == quick else off > 1e-3
    close(clip.model.encode_image(image), reference[quick].encode_image(image), 1e-6)
    assert not clip.model.training and not any(p.requires_grad for p in clip.model.parameters())
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}
    assert clip.scale == pytest.approx(reference[quick].logit_scale.exp().item())
    assert (clip.width, clip.dim, clip.context_length) == (32, 24, 77)
    assert clip.preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_load_toyclip(tmp_path):
    """Of the token table only the rows that captions use are stored; a name with another word is refused."""
    open_clip.add_model_config(common.HERE / "toyclip" / "toyclip.json")
    state = random_state("toyclip")
    table = state["token_embedding.weight"]
    ids = sorted({*open_clip.tokenize(["a photo of a red circle.", "a drawing of a blue star."]).flatten().tolist()})
    state = {key: value for key, value in state.items() if key != "token_embedding.weight"}
    state |= {"token_ids": torch.tensor(ids, dtype=torch.int32), "token_rows": table[ids]}
    clip = common.load_clip("toyclip", save(state, tmp_path, "safetensors"))
    assert torch.equal(clip.model.token_embedding.weight[ids], table[ids].float())
    names = ["red star", "blue_circle"]
    features = common.zero_shot_classifier(clip, names, "a drawing of a {}.")
    tokens = clip.tokenizer([f"a drawing of a {name.replace('_', ' ')}." for name in names])
    close(features, F.normalize(clip.model.encode_text(tokens), dim=-1), 1e-6)
    with pytest.raises(data.UserError, match="toyclip never saw 'yellow' of 'yellow submarine.'") as caught:
        common.name_tokens(clip, ["red star", "yellow submarine"])
    assert_one_line(caught)
    del state["token_ids"]
    with pytest.raises(data.UserError, match="cannot load"):
        common.load_clip("toyclip", save(state, tmp_path, "safetensors"))


@pytest.mark.parametrize("name, kind", [("ViT-B-16", "safetensors"), ("RN50", "archive")])
def test_load_clip_real_sizes(tmp_path, name, kind):
    """Full-size architectures, weights from a local file: GELU by the model's name, QuickGELU for OpenAI's archive."""
    shapes = open_clip.create_model(name, device="meta").state_dict()
    noise = (0.02 * randn(4099)).half()  # repeated: drawing 10⁸ numbers would take longer than all else
    state = {}
    for i, (key, value) in enumerate(shapes.items()):
        drawn = noise.roll(i).repeat(-(-value.numel() // len(noise)))[: value.numel()].view(value.shape)
        positive = key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight"))
        state[key] = (1 + drawn if positive else drawn) if value.is_floating_point() else torch.tensor(0)
    clip = common.load_clip(name, save(state, tmp_path, kind))
    assert clip.activation == ("quickgelu" if kind == "archive" else "gelu")
    loaded = clip.model.state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in state.items())
    blocks = clip.model.transformer.resblocks
    assert type(blocks[0].mlp.gelu).__name__ == ("QuickGELU" if kind == "archive" else "GELU")
    assert len(blocks) == 12 and clip.width == 512 and clip.context_length == 77
    image = clip.preprocess(Image.effect_mandelbrot((300, 260), (-2, -1.5, 1, 1.5), 20).convert("RGB"))
    assert clip.model.encode_image(image[None]).shape == (1, clip.dim)
    classifier = common.zero_shot_classifier(clip, ["cat", "dog"], "a photo of a {}.")
    close(
        classifier,
        F.normalize(clip.model.encode_text(clip.tokenizer(["a photo of a cat.", "a photo of a dog."]))),
        1e-5,
    )


def test_a_tags_entry_decides_the_activation():
    """For every model that is accepted and every tag of it, open_clip is asked for what the tag's own entry says."""
    checked = 0
    for name, tag in open_clip.list_pretrained():
        entry = open_clip.get_pretrained_cfg(name, tag)
        with mock.patch.object(open_clip, "create_model", side_effect=RuntimeError("no download here")) as create:
            with pytest.raises(data.UserError):
                common.load_clip(name, tag)
        if create.called:  # not refused
            call = create.call_args
            config = open_clip.get_model_config(call.args[0])
            quick = bool(config.get("quick_gelu")) or call.kwargs["force_quick_gelu"]
            assert quick == bool(entry.get("quick_gelu")), (name, tag)
            assert call.kwargs["pretrained"] == tag and call.kwargs["require_pretrained"]
            assert {**config, "quick_gelu": None} == {**open_clip.get_model_config(name), "quick_gelu": None}
            checked += 1
    assert checked > 50
    for name, quick in (("ViT-B-16", True), ("ViT-B-16-quickgelu", True), ("RN50", True)):
        assert bool(open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]) == quick


def test_every_accepted_text_tower_is_of_a_tested_kind():
    """encode_prompts was compared with plain towers, inside CLIP and inside CustomTextCLIP: there is no third kind."""
    sizes, kinds = {"context_length", "vocab_size", "width", "heads", "layers"}, set()
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        try:
            common.refuse_text_tower(name, config["text_cfg"])
        except data.UserError:
            continue
        special = {key: value for key, value in config["text_cfg"].items() if key not in sizes and value}
        kinds.add((json.dumps(special), bool(config.get("custom_text"))))
    assert kinds == {("{}", False), ("{}", True)}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Refusals: one line, exit status 2
# ----------------------------------------------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def bad_file(kind: str, folder) -> str:
    path = folder / f"{kind}.pt"
    if kind == "noise":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    elif kind == "cut":
        torch.save(random_state("small-vit"), buffer := io.BytesIO())
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    elif kind == "cut safetensors":
        path = folder / "cut.safetensors"
        path.write_bytes(safetensors.torch.save(random_state("small-vit"))[:100_000])
    elif kind == "pickle":
        torch.save({"state_dict": Evil()}, path)
    elif kind == "list":
        torch.save([torch.zeros(3)], path)
    elif kind == "another model's":
        torch.save(random_state("small-resnet"), path)
    elif kind == "incomplete":
        torch.save({k: v for k, v in random_state("small-vit").items() if "ln_final" not in k}, path)
    elif kind == "folder":
        path.mkdir()
    return str(path)


FILES = ["noise", "empty", "text", "cut", "cut safetensors", "pickle", "list", "another model's", "incomplete"]


@pytest.mark.parametrize("kind", [*FILES, "folder", "missing"])
def test_bad_weights_files_are_refused(small_models, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = bad_file(kind, tmp_path)
    with pytest.raises(data.UserError) as caught:
        common.load_clip("small-vit", path)
    assert_one_line(caught)
    assert path in str(caught.value)
    assert not (tmp_path / "evil").exists()  # no pickle is executed


REFUSED = {
    "ViT-B-16-SigLIP": "hf_tokenizer_name",
    "roberta-ViT-B-32": "hf_model_name",
    "ViT-H-14-CLIPA": "hf_tokenizer_name|no_causal_mask",
    "coca_ViT-B-32": "embed_cls",
    "ViT-B-17": "unknown model",
    "hf-hub:someone/model": "unknown model",
    "": "unknown model",
}


@pytest.mark.parametrize("model", REFUSED)
def test_models_are_refused_before_anything_is_downloaded(model):
    with mock.patch.object(open_clip, "create_model", side_effect=AssertionError("must not get here")):
        with pytest.raises(data.UserError, match=REFUSED[model]) as caught:
            common.load_clip(model, "some_tag")
    assert_one_line(caught)


def test_tags():
    with pytest.raises(data.UserError, match="--pretrained laion9b is neither a file nor a tag") as caught:
        common.load_clip("ViT-B-16", "laion9b")
    assert_one_line(caught)
    with pytest.raises(data.UserError, match="--model ViT-B-16 needs --pretrained") as caught:
        common.load_clip("ViT-B-16")
    assert_one_line(caught)


def test_a_folder_named_like_a_tag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").mkdir()
    with mock.patch.object(open_clip, "create_model", side_effect=RuntimeError("no download here")) as create:
        with pytest.raises(data.UserError):
            common.load_clip("RN50", "openai")
    assert create.called


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--model", "ViT-B-16-SigLIP", "--pretrained", "webli"], "SigLIP"),
        (["--model", "ViT-B-17", "--pretrained", "openai"], "unknown model ViT-B-17"),
        (["--model", "ViT-B-16", "--pretrained", "no/such/file.pt"], "no/such/file.pt"),
        (["--model", "ViT-B-16", "--dataset", "toy_nothing"], "toy_nothing"),
    ],
)
def test_refusals_through_the_command(capsys, flags, expected):
    with pytest.raises(SystemExit) as caught:
        runs.run(lambda: runs.zero_shot_table(flags))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


def test_refusal_of_the_script_itself(tmp_path):
    """One whole process: nothing but the line, not even a warning of a library."""
    (tmp_path / "weights.pt").write_bytes(b"not a checkpoint")
    call = [sys.executable, common.HERE / "common.py", "--model", "RN50", "--pretrained", tmp_path / "weights.pt"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(tmp_path / "weights.pt") in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# 4. encode_images
# ----------------------------------------------------------------------------------------------------------------------
TASK = next(iter(data.world.TASKS))
TOY = [(f"toy:{TASK}/val/{i}", label) for i, label in enumerate(data.world.task_labels(TASK, "val")[:20])]


@pytest.fixture
def clip() -> Clip:
    return world().clip()


def args_of(folder, **changed) -> argparse.Namespace:
    return argparse.Namespace(**{"seed": 1, "workers": 0, "cache_dir": str(folder)} | changed)


def crop(clip: Clip):
    return data.train_transform(clip.preprocess, "crop")


def encodes(clip: Clip, *args, **kwargs) -> tuple[torch.Tensor, int]:
    """Features, and how often the image tower was called."""
    with mock.patch.object(clip.model, "encode_image", wraps=clip.model.encode_image) as tower:
        features, labels = vision.encode_images(clip, *args, **kwargs)
    items = args[0]
    assert labels.tolist() == [label for _, label in items] and features.shape == (len(items), clip.dim)
    return features, tower.call_count


def test_features_are_the_towers(clip, tmp_path):
    features, _ = encodes(clip, TOY, clip.preprocess, args_of(tmp_path))
    assert features.dtype == torch.float32
    images = torch.stack([clip.preprocess(data.read_image(address)) for address, _ in TOY])
    close(features, clip.model.encode_image(images), 1e-6)


def test_cache_is_hit_the_second_time(clip, tmp_path, capsys):
    first, calls = encodes(clip, TOY, clip.preprocess, args_of(tmp_path))
    assert calls == 1 and len(list(tmp_path.iterdir())) == 1
    # The test transform draws nothing: seed and view do not matter.
    again, calls = encodes(clip, TOY, clip.preprocess, args_of(tmp_path, seed=2), view=3)
    assert calls == 0 and torch.equal(first, again) and "from the cache" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_changes_a_feature_changes_the_key(clip, tmp_path):
    """Images, weights, activation, precision, transform; with random transforms the seed and the view as well."""
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 40), "red").save(path)
    items = [(str(path), 0)]

    def key(clip=clip, items=items, transform=clip.preprocess, seed=1, view=0):
        return vision.feature_key(clip, items, transform, seed, view)

    other = common.dataclasses.replace(clip, model=world().clip_rn().model)
    keys = [key(), key(clip=other), key(items=TOY), key(items=items * 2), key(transform=crop(clip))]
    keys += [key(clip=common.dataclasses.replace(clip, activation="gelu"))]
    keys += [key(clip=common.dataclasses.replace(clip, precision="bf16"))]
    keys += [key(transform=crop(clip), seed=2), key(transform=crop(clip), view=1)]
    keys += [key(transform=data.train_transform(clip.preprocess, "randaugment"))]
    same = key(seed=2, view=1)
    Image.new("RGB", (41, 40), "red").save(path)
    keys.append(key())
    assert len(set(keys)) == len(keys) and same == keys[0]


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_damaged_cache_is_made_again(clip, tmp_path, capsys, damage):
    first, _ = encodes(clip, TOY, clip.preprocess, args_of(tmp_path))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damaged = {"cut": content[:-50], "changed": content[:-50] + bytes(50), "emptied": b""}[damage]
    path.write_bytes(damaged)
    capsys.readouterr()
    again, calls = encodes(clip, TOY, clip.preprocess, args_of(tmp_path))
    assert calls == 1 and torch.equal(first, again)
    out = capsys.readouterr().out
    assert "warning" in out and str(path) in out
    assert path.read_bytes()[-50:] == content[-50:]
    assert encodes(clip, TOY, clip.preprocess, args_of(tmp_path))[1] == 0


def test_nothing_is_cached_when_told_so(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encodes(clip, TOY, clip.preprocess, args_of("none"))
    encodes(clip, TOY, crop(clip), args_of(tmp_path), keep=False)
    assert not list(tmp_path.iterdir())


def test_views_are_pure_functions_of_seed_view_and_position(clip, tmp_path):
    def view(number, seed=1, items=TOY):
        torch.manual_seed(number * 17 + seed)  # the global generator must not matter
        return encodes(clip, items, crop(clip), args_of("none", seed=seed), view=number)[0]

    first = view(0)
    assert torch.equal(first, view(0))
    close(view(0, items=TOY[:5]), first[:5], 1e-6)  # the same crop in another batch
    for other in (view(1), view(0, seed=2)):
        assert min(deviation(a, b) for a, b in zip(first, other)) > 1e-4


@pytest.mark.parametrize("augment, views, kept", [("crop", 0, 1), ("crop", 3, 3), ("none", 0, 1)])
def test_views_that_are_kept(clip, augment, views, kept):
    """Fresh ones are let go, so that memory does not grow with the epochs; V cached ones are encoded once."""
    args = argparse.Namespace(**vars(args_of("none")), augment=augment, views=views)
    view_of, alive = vision.training_views(args, clip, TOY), {}
    for epoch in range(7):
        x, labels = view_of(epoch)
        assert x.shape == (len(TOY), clip.dim) and torch.allclose(x.norm(dim=-1), torch.ones(len(TOY)))
        alive[id(x)] = weakref.ref(x)
        del x, labels
    gc.collect()
    assert sum(ref() is not None for ref in alive.values()) == kept


def test_order_does_not_depend_on_workers(clip):
    items = TOY * 30  # three batches; every position has a crop of its own
    assert vision.image_loader(items, 2).num_workers == 2
    alone, _ = encodes(clip, items, crop(clip), args_of("none"))
    shared, _ = encodes(clip, items, crop(clip), args_of("none", workers=2))
    assert torch.equal(alone, shared)


def test_wrong_features_stop_the_run(clip, tmp_path):
    def broken(images):
        features = clip.model.visual(images)
        features[3] = math.inf
        return features

    with mock.patch.object(clip.model, "encode_image", broken):
        with pytest.raises(FloatingPointError, match=TOY[3][0]):
            vision.encode_images(clip, TOY, clip.preprocess, args_of(tmp_path))
    assert not list(tmp_path.iterdir())  # and are not cached


def test_half_precision_stays_close(clip):
    half = common.dataclasses.replace(clip, precision="bf16")
    full, _ = encodes(clip, TOY, clip.preprocess, args_of("none"))
    features, _ = encodes(half, TOY, clip.preprocess, args_of("none"))
    assert features.dtype == torch.float32 and 1e-6 < deviation(features, full) < 0.03
    names = world().classnames
    classifiers = [common.zero_shot_classifier(c, names, "a photo of a {}.") for c in (clip, half)]
    assert classifiers[1].dtype == torch.float32 and 1e-6 < deviation(*classifiers) < 0.03


# ----------------------------------------------------------------------------------------------------------------------
# 5. Numbers and files
# ----------------------------------------------------------------------------------------------------------------------
def test_evaluate_by_hand():
    """Four images: 0.95 right, 0.65 wrong, 0.65 right, 0.55 right. The two of 0.65 share a bin, (0 + 1) against 1.3."""
    p = torch.tensor([[0.95, 0.05], [0.65, 0.35], [0.35, 0.65], [0.55, 0.45]])
    result = common.evaluate(p.log(), torch.tensor([0, 1, 1, 0]))
    assert result["accuracy"] == pytest.approx(75)
    assert result["nll"] == pytest.approx(-sum(map(math.log, (0.95, 0.35, 0.65, 0.55))) / 4)
    assert result["ece"] == pytest.approx(100 * (0.05 + 0.3 + 0.45) / 4, rel=1e-5)
    # Adding a constant to an image's logits changes nothing.
    shifted = common.evaluate(p.log() + torch.tensor([[3.0], [-2.0], [0.0], [50.0]]), torch.tensor([0, 1, 1, 0]))
    assert shifted == pytest.approx(result, rel=1e-4)


def test_evaluate_limits():
    sure = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, 0.0]])
    assert common.evaluate(sure, torch.tensor([0, 1])) == {"accuracy": 100.0, "nll": 0.0, "ece": 0.0}
    wrong = common.evaluate(sure, torch.tensor([1, 2]))
    assert wrong == pytest.approx({"accuracy": 0.0, "nll": 200.0, "ece": 100.0})
    even = common.evaluate(torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    assert even == pytest.approx({"accuracy": 100 / 3, "nll": math.log(3), "ece": 0.0}, abs=1e-4)


def test_evaluate_slow_loop():
    """Against a loop over the 15 bins."""
    logits, labels = 2 * randn(500, 7), torch.arange(500) % 7
    ours, p = common.evaluate(logits, labels), logits.softmax(dim=-1)
    ece = 0.0
    for b in range(15):
        inside = [i for i in range(500) if b / 15 <= p[i].max() < (b + 1) / 15]
        right = sum(int(p[i].argmax() == labels[i]) for i in inside)
        ece += abs(right - sum(p[i].max().item() for i in inside)) / 500
    assert ours["ece"] == pytest.approx(100 * ece, rel=1e-4)


def test_harmonic_mean():
    assert common.harmonic_mean(60.0, 30.0) == pytest.approx(40.0)
    assert common.harmonic_mean(0.0, 0.0) == common.harmonic_mean(0.0, 50.0) == 0.0


def test_warmup_cosine():
    assert common.warmup_cosine(0, 50, 0.002) == 1e-5
    assert common.warmup_cosine(1, 50, 0.002) == 0.002
    assert common.warmup_cosine(26, 50, 0.002) == pytest.approx(0.001)
    assert 0 < common.warmup_cosine(49, 50, 0.002) < 1e-4  # does not reach 0


def test_batches():
    """The partial batch is dropped iff there is a full one; the order is a function of seed and epoch."""
    assert [len(batch) for batch in data.batches(10, 4, 1, 0)] == [4, 4]
    assert [len(batch) for batch in data.batches(8, 4, 1, 0)] == [4, 4]
    assert [len(batch) for batch in data.batches(3, 4, 1, 0)] == [3]
    assert data.batches(0, 4, 1, 0) == [] or len(data.batches(0, 4, 1, 0)[0]) == 0
    orders = [torch.cat(data.batches(8, 4, seed, epoch)).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    state = torch.get_rng_state()
    assert [len(data.batches(8, 4, 1, epoch, max_steps=3)) for epoch in range(4)] == [2, 1, 0, 0]
    assert torch.equal(state, torch.get_rng_state())


def test_check_finite_names_step_and_quantity():
    common.check_finite(2, 3, loss=torch.tensor(1.0), gradient=torch.ones(3))
    with pytest.raises(FloatingPointError, match="gradient is not finite in epoch 2, step 3"):
        common.check_finite(2, 3, loss=torch.tensor(1.0), gradient=torch.tensor([1.0, math.nan]))


def test_write_atomic(tmp_path):
    """The old file or the whole new one: also when the disk is full, or the process is killed before the rename."""
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    for name in ("fsync", "replace"):
        with mock.patch.object(os, name, side_effect=OSError(28, "No space left on device")):
            with pytest.raises(OSError, match="No space left"):
                files.write_atomic(path, b"new")
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_exit_statuses(capsys):
    """What run() makes of each error: 2 for the user's, 1 for numbers and disks, 130 for Ctrl-C; always one line."""
    errors = {data.UserError("mend this"): 2, FloatingPointError("not finite"): 1, KeyboardInterrupt(): 130}
    errors |= {OSError(28, "No space left on device", "runs/x"): 1, torch.OutOfMemoryError("CUDA\nout of memory"): 1}
    for error, status in errors.items():
        with pytest.raises(SystemExit) as caught:
            runs.run(mock.Mock(side_effect=error))
        assert caught.value.code == status and len(capsys.readouterr().err.splitlines()) == 1
    assert isinstance(runs.run(lambda: None), types.NoneType)
