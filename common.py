"""What the three scripts share: CLIP's two encoders, made fast; numbers; flags, folders, the table.

To learn, read section 2, which is the project's own idea; of section 1 it needs `Clip`, `autocast`
and `text_tower`. The rest is the harness: skip it until you want to know how a run does something.

1. CLIP     which model, whose weights, in which precision
2. TEXT     many class names behind one prefix, exactly what CLIP computes and much faster
3. IMAGES   features by the frozen image encoder, cached on disk
4. NUMBERS  accuracy, calibration, the learning rate
5. RUNS     flags, the run's folder, checkpoints, results

Axes, everywhere: B images in a batch, N images, C classes, D joint embedding width, W width of the
text transformer, M context tokens, P prefix tokens (SOS + context), G different prefixes, R rows of
S tokens that hold all class names, K texts in a row, L samples. Small letters: a part.
"""

import argparse
import ast
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import data
from data import UserError, progress, read_json, read_run, require, run, tell, write  # noqa: F401

TOYCLIP = Path(__file__).resolve().parent / "toyclip"
VERSIONS = {p: version(p) for p in "torch torchvision open_clip_torch numpy pillow timm".split()}
ROW_LENGTH = 128  # tokens, prefix included, that a row of texts aims for
SOONER = " (sooner: fewer --epochs, --views 10, --augment none)"  # beside the time left
LOCKS = []  # of run folders; the system frees them when this process ends, however it ends
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
open_clip.add_model_config(TOYCLIP / "toyclip.json")


# 1. CLIP ------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Clip:
    """A frozen CLIP in eval mode, and what belongs to it."""

    model: torch.nn.Module
    preprocess: Callable  # the test transform, PIL image → [3, H, W]
    tokenizer: Callable
    name: str = ""
    pretrained: str = ""
    device: str = "cpu"
    precision: str = "fp32"
    memory_gb: float = 4.0  # bound on what the text encoder keeps alive
    scale: float = 100.0  # s = exp(logit_scale)
    weights: str = ""  # hash of tensors and activation: which CLIP it is, wherever its file lies
    start: torch.nn.Module | None = None  # fp32 image encoder, where model's is held in half
    fast: bool = True  # section 2's fast encoder equals its text tower: see check_text_tower

    @property
    def width(self) -> int:
        """W, of the text transformer."""
        return text_tower(self.model).token_embedding.weight.shape[1]


def load_run_clip(args: argparse.Namespace, task: data.Task, tuned: bool = False) -> Clip:
    """The CLIP that a run's flags name; the task's notes say what is special about it."""
    clip = load_clip(
        args.model, args.pretrained, args.device, args.precision, args.memory_gb, tuned
    )
    if clip.name == "toyclip":
        torch.set_num_threads(1)  # so small that a second thread costs time
    twin = f"{clip.name}-quickgelu"
    if os.path.isfile(clip.pretrained) and activation(clip.model) == "GELU":
        tell(task.notes, twin in open_clip.list_models(), f"GELU; OpenAI's weights need {twin}")
    tell(task.notes, not clip.fast, "it has no CLIP's text tower: encoded whole, 10 to 30 x slower")
    return clip


def load_clip(
    model="toyclip", pretrained=None, device="cpu", precision="fp32", memory_gb=4.0, tuned=False
) -> Clip:
    """`toyclip`; an open_clip model by name with a tag or a local weights file; or hf-hub:ORG/NAME.
    tuned: keep the image encoder's fp32 weights as `start`. UserError for what cannot be loaded."""
    # Of hf-hub: and local-dir: open_clip takes configuration, weights and tokenizer together.
    name = model if ":" in model else model.replace("/", "-")
    source = pretrained or (str(TOYCLIP / "weights.safetensors") if name == "toyclip" else "")
    logging.disable(logging.CRITICAL)  # what open_clip logs is said better in the line below
    try:
        with warnings.catch_warnings(action="ignore"):
            net = build_model(name, source)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, the hub and torch raise many kinds
        # WHY not torch's advice on a pickle: it is to unpickle all the same.
        tensors = "not tensors alone: save the state_dict, torch.save(model.state_dict(), FILE)"
        reason = tensors if "weights_only" in str(error) else str(error)[:300] or repr(error)
        raise UserError(f"cannot load {model} {source}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    # WHY eval: open_clip returns models in train mode, where BatchNorm's statistics move.
    net = net.float().eval().requires_grad_(False)
    require(hasattr(text_tower(net), "token_embedding"), f"{name} has a text tower of another kind")
    hashes = {
        key: hashlib.sha1(value.contiguous().numpy()).hexdigest()
        for key, value in sorted(net.state_dict().items())
    }
    sizes = open_clip.transform.PreprocessCfg(**net.visual.preprocess_cfg)
    clip = Clip(
        net, open_clip.transform.image_transform_v2(sizes, is_train=False), tokenizer, name, source,
        memory_gb=memory_gb, scale=net.logit_scale.double().exp().item(),
        weights=hashlib.sha1(repr((activation(net), hashes)).encode()).hexdigest(),
    )  # fmt: skip
    # WHY checked on the CPU: a fault that only a GPU shows must stop the run.
    clip = in_precision(check_text_tower(clip), precision, tuned)
    net.to(device)
    return dataclasses.replace(clip, device=device)


def build_model(name: str, pretrained: str) -> torch.nn.Module:
    """The model with its weights: of a tag, of the hub, or of a local file (an archive of OpenAI's,
    safetensors, a state dict or a training checkpoint). No Python code in a file is run.

    WHY care: QuickGELU and GELU give different numbers, silently. A tag's own entry decides;
    OpenAI's archives are QuickGELU; for other local files the model's name decides. WHY not
    open_clip's loader for files: it resizes position embeddings of another size without a word.
    """
    if ":" in name:
        require(not pretrained, f"{name} has weights of its own: no --pretrained")
        return open_clip.create_model(name, require_pretrained=True)
    if not os.path.isfile(pretrained):
        tags = open_clip.list_pretrained_tags_by_model(name)
        require(
            not tags or pretrained in tags, f"no file, no tag of {name}'s {tags}: {pretrained!r}"
        )
        quick = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
        return open_clip.create_model(
            name, pretrained, force_quick_gelu=quick, require_pretrained=True
        )
    try:
        state, archive = torch.jit.load(pretrained, map_location="cpu").state_dict(), True
    except RuntimeError:  # no archive; what follows reads with weights_only
        state, archive = open_clip.factory.load_state_dict(pretrained), False
    net = open_clip.create_model(name, force_quick_gelu=archive)
    no_weights = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    net.load_state_dict({k: value for k, value in state.items() if not k.endswith(no_weights)})
    return net


def in_precision(clip: Clip, precision: str, tuned: bool = False) -> Clip:
    """The CLIP with its frozen towers held in `precision`: what autocast would cast anew in every
    pass is cast once. Every number stays that of autocast over fp32 weights, to the last bit. The
    text tower stays fp32 in fp16 (see autocast), and for `plain`: open_clip's code casts more."""
    if precision == "fp32":
        return clip
    start = copy.deepcopy(clip.model.visual) if tuned else None
    tower = clip.model if precision == "bf16" and clip.fast else clip.model.visual
    open_clip.model.convert_weights_to_lp(tower, HALF[precision])
    for part in tower.modules():
        # WHY: on a CPU nn.MultiheadAttention has a path for eval mode that rounds otherwise, which
        # autocast over fp32 weights does not take. It drops nothing out in either mode.
        part.training = isinstance(part, torch.nn.MultiheadAttention)
    return dataclasses.replace(clip, precision=precision, start=start)


def activation(net: torch.nn.Module) -> str:
    return "QuickGELU" if "QuickGELU" in repr(net) else "GELU"


@torch.no_grad()
def check_text_tower(clip: Clip) -> Clip:
    """The clip; one to encode by `plain` where the fast encoder does not equal its text tower."""
    plainly = dataclasses.replace(clip, fast=False)
    theirs = prompt_features(plainly, ["photo"], "a {}")
    with contextlib.suppress(AttributeError, TypeError, RuntimeError, ValueError):
        ours = prompt_features(clip, ["photo"], "a {}")
        if (ours - theirs).norm() < 1e-3 * theirs.norm():
            return clip
    return plainly


def text_tower(model: torch.nn.Module) -> torch.nn.Module:
    """Where the text transformer lives: `model.text` in open_clip's CustomTextCLIP, or `model`."""
    return getattr(model, "text", model)


def autocast(clip: Clip, gradients: bool = False) -> torch.autocast:
    """Mixed precision as --precision says; what is learned, and the losses, stay fp32. WHY not fp16
    where a prompt needs gradients: they underflow. That pass then runs in fp32."""
    half = clip.precision == "bf16" or (clip.precision == "fp16" and not gradients)
    return torch.autocast(torch.device(clip.device).type, HALF.get(clip.precision), enabled=half)


# 2. TEXT: many names behind one prefix. The heart of the project's speed --------------------------
# To paste it elsewhere take along the imports and ROW_LENGTH, HALF, Clip, text_tower, autocast,
# check_text_tower, and of data.py UserError, require. benchmark/README.md has a loop with it.
@dataclasses.dataclass
class Names:
    """C texts as embeddings, each whole, side by side in R rows of S tokens, at most K in a row.
    All have the same P prefix tokens before them: so each row goes through the tower behind one
    copy of the prefix, and a mask keeps the texts of a row from seeing each other."""

    rows: Tensor  # [R, S, W] token + position embeddings; at `own` places positions alone
    mask: Tensor  # [R, 1, P + S, P + S] 0 where a token sees the other, else -inf
    ends: Tensor  # [R, K] where in a row, prefix included, its k-th text ends
    which: Tensor  # [C] which of the R · K ends is class c's
    own: Tensor  # [C · own] which of the R · S places are for the classes' own contexts


def encode_prompts(clip: Clip, prefix: Tensor, names: Names | Tensor) -> Tensor:
    """Text features of every class under every prefix: prefix [G, P, W] → [G, C, D], unnormalised.

    Equals `plain`, for CLIP's text attention is causal: (1) what stands after a class's EOT cannot
    influence it, so it is left out; (2) the prefix never sees the names, so that many names can
    stand behind one copy of it. Work: R · (P + S) tokens a prefix, not C · context length.
    Differentiable in both. Call it within autocast(clip). UserError for names of another P.
    """
    if isinstance(names, Tensor):  # ids
        return plain(clip, prefix, names)
    tower = text_tower(clip.model)
    P, packed = prefix.shape[1], names.mask.shape[-1] - names.rows.shape[1]
    require(P == packed, f"a prefix of {P} tokens: these names were packed for one of {packed}")
    x = in_pieces(
        clip, partial(encode_rows, tower), prefix, names.rows, names.mask, names.ends
    )  # [G, R, K, W]
    x = x.flatten(1, 2).index_select(1, names.which)  # [G, C, W]
    return (x @ tower.text_projection).to(prefix.dtype)  # whatever autocast computes in


def plain(clip: Clip, prefix: Tensor, ids: Tensor) -> Tensor:
    """What encode_prompts equals: every whole prompt [prefix, text, padding] through open_clip's
    own tower, its token embeddings exchanged. prefix [G, P, W], ids = pad(clip, texts, P) →
    [G, C, D], unnormalised. It serves towers that are not causal, too."""
    embedding = text_tower(clip.model).token_embedding

    def encode(some: Tensor, ids: Tensor) -> Tensor:
        start = some.repeat_interleave(len(ids), dim=0)  # [g·c, P, W]

        def put(module, given, x):
            return torch.cat([start, x[:, start.shape[1] :]], dim=1)

        with embedding.register_forward_hook(put):
            features = clip.model.encode_text(ids.repeat(len(some), 1), normalize=False)
        return features.unflatten(0, (len(some), -1)).to(prefix.dtype)

    return in_pieces(clip, encode, prefix, ids)


def encode_rows(tower: torch.nn.Module, prefix, rows, mask, ends) -> Tensor:
    """Each of r rows behind each of g prefixes through the transformer → what stands where the
    texts end, [g, r, K, W]. prefix [g, P, W], rows [r, S, W], mask [r, 1, P+S, P+S], ends [r, K].
    """
    g, P, W = prefix.shape
    start = (prefix + tower.positional_embedding[:P])[:, None].expand(-1, len(rows), -1, -1)
    x = torch.cat([start, rows.expand(g, -1, -1, -1)], dim=2).flatten(0, 1)  # [g·r, P + S, W]
    mask = mask.expand(g, *mask.shape).flatten(0, 1)
    ends = ends.expand(g, *ends.shape).flatten(0, 1)[:, :, None].expand(-1, -1, W)
    for block in tower.transformer.resblocks:
        attend = block.attn
        qkv = F.linear(block.ln_1(x), attend.in_proj_weight, attend.in_proj_bias)
        # q, k, v: [g·r, heads, P + S, W / heads] each
        q, k, v = qkv.unflatten(-1, (3, attend.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = mask.to(q.dtype)  # autocast would cast it in every layer
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        if block is tower.transformer.resblocks[-1]:  # of the last layer only the ends are read
            x, mixed = x.gather(1, ends), mixed.gather(1, ends)
        # ls_1, ls_2: layer scale, or the identity
        x = x + block.ls_1(attend.out_proj(mixed))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return tower.ln_final(x).unflatten(0, (g, -1))


def in_pieces(clip: Clip, encode: Callable, prefix: Tensor, rows: Tensor, *more: Tensor) -> Tensor:
    """encode(prefix, rows, ..) → [G, R, ..], in pieces of prefixes and rows [R, S, ..] that bound
    what is alive (clip.memory_gb). For gradients pieces are computed again in the backward pass."""
    P, W = prefix.shape[1:]
    # A token takes at most 35 W floats a layer with gradients, else 40 W (measured).
    gradients = torch.is_grad_enabled() and (prefix.requires_grad or rows.requires_grad)
    floats = 35 * len(text_tower(clip.model).transformer.resblocks) if gradients else 40
    alive = max(1, int(clip.memory_gb * 1e9 / (4 * W * floats * (P + rows.shape[1]))))  # rows
    if gradients and len(prefix) * len(rows) > alive:
        encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
    pieces = list(zip(*(tensor.split(alive) for tensor in (rows, *more))))
    parts = []
    for some in prefix.split(max(1, alive // len(rows))):
        parts.append(torch.cat([encode(some, *piece) for piece in pieces], dim=1))
    return torch.cat(parts)


def name_tokens(clip: Clip, classnames: list[str], n_ctx: int, own: int = 0) -> Names | Tensor:
    """ "name." of every class, to stand behind SOS and `n_ctx` context tokens. --csc: n_ctx is 0,
    and `own` places before each name are kept for its class's own context."""
    return pack(clip, [f"{name}." for name in classnames], n_ctx, own)


def pack(clip: Clip, texts: list[str], n_ctx: int = 0, own: int = 0) -> Names | Tensor:
    """Tokenise texts that stand behind SOS, `n_ctx` context tokens and `own` places of their own.
    Where the fast encoder cannot be used: ids for `plain`.

    WHY rows of about 128 tokens: a text takes a handful of tokens, not the context length. Shorter
    rows repeat the prefix more often, longer ones compare more tokens that are masked.
    """
    before = start_of_text(clip).shape[1] + n_ctx  # P
    ids = pad(clip, texts, before + own)  # [C, n]
    if not clip.fast:
        require(not own, f"{clip.name} is encoded whole (see its note): no --csc")
        return ids.to(clip.device)
    tower = text_tower(clip.model)
    table, position = tower.token_embedding.weight.detach(), tower.positional_embedding.detach()
    # A text ends where open_clip reads it, at EOT, which has the largest id.
    place, last = torch.arange(ids.shape[1]), ids.argmax(dim=1)
    kept = (place >= before) & (place <= last[:, None])  # [C, n]
    # All tokens that are kept stand in one line: each text has `size` of them, rows get about equal
    # shares. Of each token in that line: its text, its place in the prompt, its row.
    size = kept.sum(dim=1)  # [C]
    end = size.cumsum(0)
    n_rows = math.ceil(int(end[-1]) / max(1, ROW_LENGTH - before))
    row_of = (end - size) * n_rows // end[-1]  # [C] the row of each text
    text, place = kept.nonzero(as_tuple=True)
    row = row_of[text]
    word = place >= before + own  # or EOT
    x = position[place]
    x[word] += table[ids[kept][word]]
    # A token sees the prefix and its own text, up to itself.
    text_of = in_rows(text, row, empty=len(ids))  # [R, S]
    sees = F.pad(text_of[:, :, None] == text_of[:, None], (before, 0, before, 0), value=True).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, -math.inf)[:, None]
    _, column = in_rows(place == last[text], row).nonzero(as_tuple=True)  # [C] of the row, its EOT
    ends = in_rows(before + column, row_of)
    return Names(
        rows=in_rows(x, row),
        mask=mask.to(table),
        ends=ends.to(table.device),
        which=ends.flatten().nonzero()[:, 0].to(table.device),  # where no text is, is a 0
        own=in_rows(~word, row).flatten().nonzero()[:, 0].to(table.device),
    )


def in_rows(values: Tensor, row: Tensor, empty: int = 0) -> Tensor:
    """values [n, ..], each to its row; row [n] never falls → [R, longest row, ..], the ends of
    shorter rows filled with `empty`."""
    parts = values.split(row.bincount().tolist())
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=empty)


def pad(clip: Clip, texts: list[str], before: int = 1) -> Tensor:
    """Ids [C, context length], on the CPU, of texts to stand behind `before` tokens. After SOS an
    ordinary word keeps each place of the context. UserError for a text that is too long, or has a
    word that toyclip never saw."""
    tower = text_tower(clip.model)
    n = min(clip.tokenizer.context_length, len(tower.positional_embedding))  # CoCa's has one more
    filler = "a " * (before - start_of_text(clip).shape[1])
    prompts = [filler + text.replace("_", " ") for text in texts]
    *rows, empty = clip.tokenizer([*prompts, ""], context_length=n + 1)
    # What fits has padding in the place too many, and before it EOT or padding.
    long = [x for x, row in zip(texts, rows) if row[n] != empty[n] or row[n - 1] not in empty]
    require(not long, f"{long[:1]} has too many tokens: shorten it, or the context")
    new = [x for x, row in zip(texts, rows) if clip.name == "toyclip"  # untrained rows are zero
           and not tower.token_embedding.weight[row[row > 0]].any(dim=1).all()]  # fmt: skip
    require(not new, f"toyclip never saw a word of {new[:1]}: name another --model")
    return torch.stack(rows)[:, :n]


def word_tokens(clip: Clip, words: str) -> Tensor:
    """The embeddings of a text's tokens, [k, W], without SOS and EOT."""
    ids, longer = pad(clip, [words, f"{words} a"])
    end = int((ids != longer).nonzero()[0])  # where one word more would stand
    ids = ids[start_of_text(clip).shape[1] : end]
    return text_tower(clip.model).token_embedding.weight[ids].detach()


def start_of_text(clip: Clip) -> Tensor:
    """The embedding of SOS, [1, 1, W]; of a tokenizer that has none (SigLIP's) [1, 0, W]."""
    theirs = getattr(clip.tokenizer, "tokenizer", None)  # Hugging Face's, in open_clip's
    sos = theirs.cls_token_id if theirs else clip.tokenizer.sot_token_id
    table = text_tower(clip.model).token_embedding.weight.detach()
    return table[None, :0] if sos is None else table[None, sos : sos + 1]


@torch.no_grad()
def prompt_features(clip: Clip, classnames: list[str], template: str) -> Tensor:
    """Text features [C, D] of a hand-written prompt, unnormalised."""
    texts = [template.replace("{}", name) for name in classnames]
    with autocast(clip):
        return encode_prompts(clip, start_of_text(clip), pack(clip, texts))[0]


def zero_shot_classifier(clip: Clip, classnames: list[str], templates: list[str]) -> Tensor:
    """Unit rows [C, D] of hand-written prompts; of several templates their mean, normalised."""
    each = [F.normalize(prompt_features(clip, classnames, t), dim=-1) for t in templates]
    return F.normalize(torch.stack(each).mean(dim=0), dim=-1)


# 3. IMAGES: each goes through the frozen encoder once; features are cached on disk ----------------
def encode_images(clip: Clip, items: list[data.Item], transform, args, view=0, cache=True) -> tuple:
    """Image features [N, D] (fp32, unnormalised) and labels [N] of one view of `items`. Reads
    args.seed, workers, device and cache_dir. UserError names every broken image at once."""
    labels = torch.tensor([label for _, label in items], device=clip.device)
    path = (
        Path(args.cache_dir, feature_key(clip, items, transform, args, view))
        if cache and args.cache_dir != "none"
        else None
    )
    if path and path.exists():
        with contextlib.suppress(Exception):  # after a full disk or a kill
            return safetensors.torch.load_file(path, device=clip.device)["features"], labels
        print(f"note: {path} is damaged: its images are encoded again")
    numbers = torch.arange(len(items)) + view * len(items)  # see ImageSet
    lists = [batch.tolist() for batch in numbers.split(256)]
    images = data.ImageSet(items, transform, args.seed)
    with torch.no_grad(), autocast(clip):
        features = torch.cat([
            clip.model.encode_image(batch.to(clip.device, non_blocking=True)).float()
            for batch, _, _ in data.load_images(images, lists, args, "encode images")
        ])  # fmt: skip
    if path:
        write(path, safetensors.torch.save({"features": features.cpu()}))
    return features, labels


def feature_key(clip: Clip, items: list[data.Item], transform, args, view: int) -> str:
    """A file name: hash of all that decides features (the test transform draws none), and of each
    file of what an exchanged one cannot keep (inode, time of change)."""
    code = [ast.unparse(ast.parse(inspect.getsource(part))) for part in FEATURE_CODE]  # no comments
    files = [os.stat(path) for path, _ in items if os.path.exists(path)]  # toy images are no files
    states = [(s.st_size, s.st_mtime_ns, s.st_ino, s.st_ctime_ns) for s in files]
    parts = [clip.weights, repr(clip.model), clip.precision, clip.device, VERSIONS, code,
             [path for path, _ in items], states, repr(transform),
             transform is not clip.preprocess and [args.seed, view]]  # fmt: skip
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest() + ".safetensors"


# What makes a feature of an image's address.
FEATURE_CODE = (encode_images, autocast, in_precision, data.world, data.read_image, data.ImageSet,
                data.train_transform, data.draw_seed)  # fmt: skip


def training_views(args: argparse.Namespace, clip: Clip, items: list[data.Item]) -> Callable:
    """A function epoch → unit features [N, D], labels [N]: of one view, of V cached views in turn
    (--views V), or always of a fresh one (--views 0)."""
    transform = data.train_transform(clip.preprocess, args.augment)
    views = 1 if args.augment == "none" else args.views

    @lru_cache(maxsize=views)
    def encode(view: int):
        x, labels = encode_images(clip, items, transform, args, view, cache=views > 0)
        return F.normalize(x, dim=-1), labels

    return lambda epoch: encode(epoch % views if views else epoch)


# A test set, encoded by frozen CLIP: unit features [N, D], labels [N], zero-shot's logits [N, C].
EncodedTest = dataclasses.make_dataclass("EncodedTest", ["test", "x", "labels", "zero_shot"])


def encode_test(args: argparse.Namespace, clip: Clip, test: data.Test) -> EncodedTest:
    classifier = zero_shot_classifier(clip, test.classnames, [test.template])
    features, labels = encode_images(clip, test.items, clip.preprocess, args)
    x = F.normalize(features, dim=-1)
    return EncodedTest(test, x, labels, clip.scale * x @ classifier.T)


# 4. NUMBERS ---------------------------------------------------------------------------------------
def outcomes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """logits [N, C], labels [N] → of every image [N] the predicted class, its probability
    ("confidence"), and the label's negative log-probability ("nll", nats)."""
    log_prob = logits.log_softmax(dim=-1)
    confidence, predicted = log_prob.exp().max(dim=-1)
    nll = F.nll_loss(log_prob, labels, reduction="none")
    return {"predicted": predicted, "confidence": confidence, "nll": nll}


def evaluate(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """logits [N, C] (or log-probabilities), labels [N] → accuracy (%), mean_class_accuracy (%, mean
    of the accuracies of the classes that occur), nll (nats), ece (expected calibration error, 15
    bins, %). FloatingPointError where they are not finite.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> found = evaluate(logits, torch.tensor([0, 0, 1, 1]))
    >>> {key: round(value, 2) for key, value in found.items()}
    {'accuracy': 75.0, 'mean_class_accuracy': 75.0, 'nll': 0.63, 'ece': 13.08}
    """
    predicted, confidence, nlls = outcomes(logits, labels).values()
    right = (predicted == labels).to(confidence)
    per_class = labels.bincount(right) / labels.bincount()  # 0 / 0 where there is no image
    bins = (confidence * 15).long().clamp(0, 14)  # bin b holds confidences in [b/15, (b+1)/15)
    gaps = bins.bincount(right - confidence, 15)  # of each bin that sum
    nll = nlls.mean().item()
    if not math.isfinite(nll):
        raise FloatingPointError("predictions are not finite: try --precision fp32, a lower --lr")
    return {
        "accuracy": 100 * right.mean().item(),
        "mean_class_accuracy": 100 * per_class.nanmean().item(),
        "nll": nll,
        "ece": 100 * gaps.abs().sum().item() / len(labels),
    }


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def warmup_cosine(epoch: int, epochs: int, lr: float) -> float:
    """Rate of epoch e = 0 .. E - 1 as released: 1e-5 for e = 0, then a cosine that does not reach
    0: lr / 2 · (1 + cos(π (e - 1) / E)).

    >>> [round(warmup_cosine(epoch, 4, 0.002), 5) for epoch in range(4)]
    [1e-05, 0.002, 0.00171, 0.001]
    """
    return 1e-5 if epoch == 0 else 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def warmup_notes(args: argparse.Namespace) -> list[str]:
    """Where warmup_cosine does what nobody means."""
    low = not args.eval and (args.lr < 1e-5 or args.epochs == 1)
    return ["the first epoch's rate is 1e-5: more than --lr, or (--epochs 1) the only one"] * low


# 5. RUNS: flags, the run folder, results ----------------------------------------------------------
# fmt: off
FOLDER = {"type": os.path.expanduser, "metavar": "DIR"}
FLAGS = {
    "model": {
        "--model": {"help": "toyclip, an open_clip name such as RN50, or hf-hub:ORG/NAME"},
        "--pretrained": FOLDER | {"metavar": "W", "help": "an open_clip tag or a weights file"},
        "--precision": {"choices": ["fp32", *HALF], "help": "[bf16 or fp16 on a GPU, else fp32]"},
        "--memory-gb": {"type": float, "metavar": "X", "help": "for texts [half a GPU's, else 4]"}},
    "optimisation": {
        "--paper": {"action": "store_true", "help": "the paper's exceptions for single datasets"},
        "--epochs": {"type": int, "metavar": "E", "help": "passes over the training images"},
        "--batch-size": {"type": int, "metavar": "B", "help": "images a step"},
        "--lr": {"type": float, "help": "peak learning rate"},
        "--augment": {"choices": ["crop", "none", "randaugment"], "help": "of training images"},
        "--views": {"type": int, "metavar": "V", "help": "cached views in turn; 0: always fresh"},
        "--max-steps": {"type": int, "metavar": "STEPS", "help": "an epoch at most, for trials"},
        "--eval-every": {"type": int, "metavar": "E", "help": "epochs between validations"}},
    "run": {
        "--out-dir": FOLDER | {"help": "run folder [runs/METHOD-DATASET-SHOTS-SEED]"},
        "--resume": FOLDER | {"help": "go on with this run folder, or begin it [no]"},
        "--eval": FOLDER | {"help": "evaluate this run on what the data flags say [no]"},
        "--compare": {"action": argparse.BooleanOptionalAction, "help": "train plain, too"},
        "--device": {"help": "cpu, cuda, cuda:1"},
        "--workers": {"type": int, "metavar": "COUNT", "help": "processes that decode images"},
        "--cache-dir": FOLDER | {"help": "of cached image features, or none"}},
}
DEFAULTS = {
    "data_root": "data", "download": False, "shots": 16, "seed": 1, "test_on": [], "paper": False,
    "test_part": "test", "template": None, "train_domain": None, "test_domain": None,
    "pretrained": None, "precision": None, "memory_gb": None, "max_steps": 0, "eval_every": 0,
    "out_dir": None, "resume": None, "eval": None, "workers": os.cpu_count() or 1,
    "device": "cuda" if torch.cuda.is_available() else "cpu", "cache_dir": "cache",
}
# What numbers can be; of other flags 0 or more.
RANGES = {
    **dict.fromkeys(["momentum", "warmup", "ensemble", "wise_ft"], (0, 1)),
    **dict.fromkeys(["batch_size", "shots", "n_ctx", "accumulate"], (1, 1e9)),
    **dict.fromkeys(["lr", "memory_gb", "temperature", "power", "head_lr_factor"], (1e-9, 1e9)),
    "betas": (0, 0.999999),
}
# Settings of an earlier run. NOW is said by every command for itself. --resume and --eval take the
# rest from the run, --eval without HOW. A typed value that differs is refused, but for MOVED and,
# with --eval, what it is TESTED on.
NOW = {"download", "device", "workers", "cache_dir", "out_dir", "resume", "eval"}
HOW = {"memory_gb", "precision", "compare", "eval_every"}
MOVED = {"data_root", "pretrained", "memory_gb"}
TESTED = {"dataset", "classes", "test_on", "test_part", "template", "train_domain", "test_domain",
          "ensemble", "wise_ft"}
# fmt: on


# Flags and settings
def new_parser(doc: str, method: str, own_flags: dict, defaults: Callable) -> data.Parser:
    """A method's own flags, then those of all scripts; the help of each ends with its defaults. WHY
    argparse is given none of them: settle must tell what was typed from what was not."""
    parser = data.Parser(
        description=doc.split("\n\n")[0], usage="%(prog)s [flags]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=30, width=110),
    )  # fmt: skip
    kinds = [DEFAULTS | defaults({"dataset": name}) for name in ("toy_", "dtd")]
    for name, flags in {method: own_flags, "data": data.FLAGS, **FLAGS}.items():
        group = parser.add_argument_group(name)
        for option, details in flags.items():
            action = group.add_argument(option, **details)
            if not action.help.endswith("]"):
                values = dict.fromkeys(str(kind.get(action.dest)) for kind in kinds)
                action.help += f" [{' on toy data, else '.join(values)}]"
    return parser


def settle(parser, argv, method: str, defaults: Callable, alone=True) -> argparse.Namespace:
    """Every setting: as typed; else as in the run to go on with or to evaluate; else `defaults` for
    this dataset and so many shots; else DEFAULTS. alone: the method learns in one process."""
    typed = vars(parser.parse_args(argv))
    require(
        not alone or "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1",
        f"{method}.py runs in one process: start it by python {method}.py",
    )
    require(
        "resume" not in typed or not typed.keys() & {"eval", "out_dir"},
        "--resume RUN names the run's folder: leave out --eval and --out-dir",
    )
    first = inherited(typed, method) | typed
    args = argparse.Namespace(**DEFAULTS | {"method": method} | defaults(first) | first)
    if args.model == "toyclip" or ":" in args.model:  # the default weights are another model's
        args.pretrained = first.get("pretrained")
    settle_device(args)
    for key, value in vars(args).items():
        low, high = RANGES.get(key, (0, 1e18))
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int | float):
                require(
                    low <= x <= high,
                    f"--{key.replace('_', '-')} {x}: it must be from {low:g} to {high:g}",
                )
    return args


def inherited(typed: dict, method: str) -> dict:
    """The settings of the run that --resume goes on with or --eval evaluates; {} without one.
    UserError for a typed value that differs from what was trained."""
    folder = typed.get("resume", typed.get("eval"))
    if folder is None or (
        typed.keys() >= {"resume", "dataset"} and not Path(folder, "config.json").exists()
    ):
        return {}
    stored = read_run(folder)["settings"]
    require(stored["method"] == method and not stored["eval"], f"{folder} is no {method} training")
    anew = NOW | HOW if "eval" in typed else NOW
    free = MOVED | TESTED if "eval" in typed else MOVED
    if "eval" in typed and typed.get("dataset", stored["dataset"]) != stored["dataset"]:
        # Its classes are all new.
        stored |= {"train_domain": None, "test_domain": None, "classes": "all", "test_on": []}
    for key in (typed.keys() & stored.keys()) - anew - free:
        require(
            typed[key] == stored[key],
            f"{folder} has --{key.replace('_', '-')} {stored[key]}: leave it out",
        )
    require(
        stored["classes"] == "base" or typed.get("classes") != "base",
        f"{folder} was not trained on half of these classes: leave --classes base out",
    )
    return {key: value for key, value in stored.items() if key not in anew}


def settle_device(args: argparse.Namespace) -> None:
    """Is there such a device? And fill in --precision and --memory-gb for it."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    require(args.device in devices, f"--device {args.device}: here it can be {', '.join(devices)}")
    cuda = args.device != "cpu"
    require(cuda or args.precision != "fp16", "--precision fp16 needs a GPU; fp32 and bf16 do not")
    half = "bf16" if cuda and torch.cuda.get_device_capability(args.device) >= (8, 0) else "fp16"
    args.precision = args.precision or (half if cuda else "fp32")
    # Of the total memory, not of what is free: the size of pieces changes the last bits.
    total = torch.cuda.get_device_properties(args.device).total_memory if cuda else 8e9
    args.memory_gb = total / 2e9 if args.memory_gb is None else args.memory_gb


# The run folder
def open_run(args: argparse.Namespace, task: data.Task, clip: Clip, title: str) -> Path:
    """Make or find the run folder, write config.json, print what is done on what. A run goes on
    with the CLIP, classes and images that it began with; for an evaluation only the CLIP counts."""
    config = {"method": args.method, "settings": vars(args), "weights": clip.weights,
              "classnames": task.classnames, "template": task.template, "train": task.lines,
              "training": task.training, "root": os.path.abspath(task.root),
              "tests": [test.images for test in task.tests]}  # fmt: skip
    earlier = args.eval or args.resume
    old = read_run(earlier) if earlier and data.begun(earlier) else config
    require(old["weights"] == clip.weights, f"{earlier} had other CLIP weights: name --pretrained")
    for key in () if args.eval else ("classnames", "train", "tests"):
        other = (sorted({*old[key]} ^ {*config[key]}) or ["their order"])[0]
        require(old[key] == config[key], f"{earlier} was begun with other {key}: {other}")
    require(
        not args.eval or Path(args.eval, "result.json").exists(),
        f"{args.eval} has not finished training: --resume it",
    )
    out = claim_folder(args)
    write(out / "config.json", json.dumps(config, indent=1).encode())
    trained = f"{len(task.train)} training images (shots: {args.shots}, seed: {args.seed})"
    tested = f"{sum(len(test.items) for test in task.tests)} images (sets: {len(task.tests)})"
    model = [clip.name, Path(clip.pretrained).name, activation(clip.model), clip.precision]
    notes = task.notes if len(task.notes) <= 2 else [task.notes[0], "more notes in result.json"]
    print(
        f"{title} on {task.name}: {len(task.classnames)} classes, {task.template!r}",
        f"model: {', '.join(filter(None, model))} on {clip.device}; run: {out}",
        f"data: {f'trained in {args.eval}' if args.eval else trained}; test: {tested}",
        *(f"note: {note}" for note in notes),
        sep="\n",
        flush=True,
    )
    return out


def claim_folder(args: argparse.Namespace) -> Path:
    """The run's folder: one in which no other command is at work, and nothing was trained."""
    named = args.resume or args.out_dir
    stem = f"{args.method}-{Path(args.dataset).name}-{args.shots}shot-seed{args.seed}"
    for k in itertools.count(1):
        out = Path(named or Path("runs", stem.replace(":", "-") + f"-{k}" * (k > 1)))
        free = not data.begun(out) and (not (out / "config.json").exists() or read_run(out))
        if args.resume or free:
            with contextlib.suppress(filelock.Timeout):
                # It makes the folder. is_singleton: a process may begin two runs in one folder.
                LOCKS.append(filelock.FileLock(out / ".lock", 0, is_singleton=True).acquire())
                return out
        require(not named, f"{out} is in use, or holds a run to --resume: name another --out-dir")


# Checkpoints and epochs
def save_checkpoint(out: Path, module: torch.nn.Module, epoch: int, optimizer=None) -> None:
    """checkpoint.safetensors, after so many epochs: what is learned as model/NAME, the optimiser's
    state of its i-th parameter as optimizer/i/NAME."""
    kept = {f"model/{key}": value for key, value in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items() if optimizer else ():
        kept |= {f"optimizer/{i}/{key}": x for key, x in state.items() if x is not None}
    write(
        out / "checkpoint.safetensors", safetensors.torch.save(to_cpu(kept), {"epoch": f"{epoch}"})
    )


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU. WHY as one row of bytes: a GPU then stops once, not hundreds of times."""
    raw = [value.detach().flatten().view(torch.uint8) for value in tensors.values()]
    parts = torch.cat(raw).cpu().split([len(part) for part in raw])
    return {
        name: part.clone().view(value.dtype).view(value.shape)  # a clone is aligned for its type
        for (name, value), part in zip(tensors.items(), parts)
    }


def load_checkpoint(folder: str | Path, module: torch.nn.Module, optimizer=None) -> int:
    """Put a run's checkpoint into module and optimiser, which must fit it → its epochs."""
    path = Path(folder, "checkpoint.safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            kept = {key: file.get_tensor(key) for key in file.keys()}
            epoch = int(file.metadata()["epoch"])
        module.load_state_dict(part_of(kept, "model/"))
    except Exception as error:  # there is none yet, or it is foreign, damaged or of other flags
        raise UserError(f"{path} cannot be read: {str(error)[:200]}") from error
    if optimizer:
        parts = [part_of(kept, f"optimizer/{i}/") for i, _ in enumerate(module.parameters())]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(enumerate(parts))})
    return epoch


def part_of(tensors: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `start`, by the rest of their names."""
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


def resume(out: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the folder's checkpoint, if there is one → the epoch to go on with."""
    return (
        load_checkpoint(out, module, optimizer) if (out / "checkpoint.safetensors").exists() else 0
    )


def end_epoch(out: Path, epoch: int, module, optimizer, line: dict, last: bool = False) -> None:
    """A line of metrics.jsonl, {name: number or tensor}, and a checkpoint; FloatingPointError
    for what is not finite. The last checkpoint has no optimiser's state: it is most of its size,
    and is not needed any more. WHY read here, once an epoch: reading stops a GPU."""
    # 0, or nan where anything in it is not finite.
    learned = {f"model/{key}": (value * 0).sum() for key, value in module.state_dict().items()}
    zero = next(module.parameters()).new_zeros((), dtype=torch.float64)
    each = {name: zero + x for name, x in (line | learned).items()}
    numbers = dict(zip(each, torch.stack([*each.values()]).tolist()))
    bad = [name for name, number in numbers.items() if not math.isfinite(number)]
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite in epoch {epoch + 1}: try a lower --lr")
    # WHY the line first: after a kill between the two the epoch and its line are done again.
    lines = [*read_metrics(out)[:epoch], {"epoch": epoch, **{key: numbers[key] for key in line}}]
    write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    save_checkpoint(out, module, epoch + 1, None if last else optimizer)


def read_metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl; after a kill the last may be of an epoch that is done again."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


# Results
def write_result(
    out: Path, name: str, args, clip: Clip, task: data.Task, encoded: list[EncodedTest],
    found: list[dict], start: float, baseline: dict | None = None,
) -> dict:  # fmt: skip
    """predictions.npz and result.json → the result. name: the method's. found[i] is about test set
    i: "tuned" logits [N, C]; "extra" measures and "arrays" of [N], where there are any. `baseline`
    is the result of the plain method's run."""
    tests, arrays = [], {}
    for i, (test, frozen, row) in enumerate(zip(task.tests, encoded, found, strict=True)):
        tests.append({
            "dataset": test.name, "domain": test.domain, "classes": test.classes,
            "n": len(test.items), "images": test.images, "template": test.template,
            "zero_shot": evaluate(frozen.zero_shot, frozen.labels),
            "baseline": baseline and baseline["tests"][i]["tuned"],
            "tuned": evaluate(row["tuned"], frozen.labels), "extra": row.get("extra", {}),
        })  # fmt: skip
        kept = {"labels": frozen.labels, **row.get("arrays", {})}
        for kind, logits in {"zero_shot": frozen.zero_shot, "tuned": row["tuned"]}.items():
            # WHY clamp: to float16's least normal number, so that no logarithm is infinite.
            kept[kind] = logits.softmax(dim=-1).clamp(min=torch.finfo(torch.half).tiny).half()
            kept |= {f"{kind}_{key}": x for key, x in outcomes(logits, frozen.labels).items()}
        arrays |= {f"{i}/{key}": value.cpu().numpy() for key, value in kept.items()}
        arrays[f"{i}/classnames"] = np.array(test.classnames)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write(out / "predictions.npz", buffer.getbuffer())
    training = {"run": os.path.abspath(args.eval or out), **task.training}
    result = {"method": args.method, "name": name, "baseline_name": baseline and baseline["name"],
              "settings": vars(args), "clip": clip.weights, "training": training, "tests": tests,
              "split": training["split"],
              "harmonic_mean": harmonic_means(tests) if training["dataset"] == task.name else {},
              "seconds": round(time.time() - start, 2), "versions": VERSIONS,
              "notes": task.notes}  # fmt: skip
    write(out / "result.json", json.dumps(result, indent=1).encode())
    return result


def harmonic_means(tests: list[dict]) -> dict[str, float]:
    """H of base and new accuracy, or of in-distribution accuracy and the mean of the other domains;
    {} if there is neither. Other datasets (--test-on) do not count."""
    own = [test for test in tests[1:] if test["dataset"] == tests[0]["dataset"]]
    new = [test for test in own if test["classes"] == "new" and not test["domain"]]
    rest = new or [t for t in own if t["domain"] and t["classes"] == tests[0]["classes"]]
    means = {}
    for column, found in measures(tests[0]).items() if rest else ():
        others = [measures(test)[column]["accuracy"] for test in rest]
        means[column] = harmonic_mean(found["accuracy"], sum(others) / len(others))
    return means


def measures(test: dict) -> dict[str, dict[str, float]]:
    """{column: accuracy, nll, ...} of a test: zero_shot, baseline, tuned, and those in "extra"."""
    return {k: test[k] for k in ("zero_shot", "baseline", "tuned") if test[k]} | test["extra"]


def report(result: dict, out: Path) -> None:
    """Print the run's one table."""
    first = result["tests"][0]
    names = {"zero_shot": "zero-shot", "baseline": result["baseline_name"], "tuned": result["name"]}
    columns = [names.get(key, key.replace("_", " ")) for key in measures(first)]
    rows = [["", "images", "", *columns]]
    for test in result["tests"]:
        words = [test["dataset"], test["domain"], test["classes"]]
        label = " ".join(word for word in words if word not in (first["dataset"], "", "all"))
        found = measures(test).values()
        rows += [
            [label or "all", str(test["n"]), "accuracy %"]
            + [f"{m['accuracy']:.1f}" for m in found],
            ["", "", "NLL nats"] + [f"{m['nll']:.3f}" for m in found],
            ["", "", "ECE %"] + [f"{m['ece']:.1f}" for m in found],
        ]
    if result["harmonic_mean"]:
        means = [f"{h:.1f}" for h in result["harmonic_mean"].values()]
        rows.append(["H", "", "accuracy %", *means])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for label, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        print("  ".join([label.ljust(widths[0]), *cells]).rstrip())
    print(
        f"written to {out}; try next:",
        f"    python tools/page.py {out}",
        f"    python tools/use.py predict {result['settings']['eval'] or out} IMAGE",
        sep="\n",
    )
