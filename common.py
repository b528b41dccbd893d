"""The CLIP side of the three scripts: load a model, encode prompts and images fast, measure. No method in here.

Axes, everywhere: B images in a batch, N images, C classes, D joint embedding width, W text-transformer width, M context
tokens, P prefix tokens (SOS + context), S suffix tokens (class name, ".", EOT), G different prefixes, L samples.

    python common.py --dataset toy_fillshapes_sketch --model toyclip      # the zero-shot table of a dataset
"""

import bisect
import collections
import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import open_clip
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import UserError
from files import refuse_traps

HERE = Path(__file__).resolve().parent
SECONDS = collections.Counter()  # what loading and image encoding took in this run, for result.json


# ----------------------------------------------------------------------------------------------------------------------
# 1. CLIP: load it, and refuse what the fast text path below would get wrong
# ----------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Clip:
    """A frozen CLIP in eval mode. encode_prompts reads `model` and `memory_gb` alone; copy what you need."""

    model: torch.nn.Module
    preprocess: object = None  # the test transform, PIL image → [3, H, W]
    tokenizer: object = None
    scale: float = 100.0  # logit_scale.exp()
    width: int = 512  # W
    dim: int = 512  # D
    context_length: int = 77
    device: str = "cpu"
    name: str = ""
    pretrained: str = ""
    activation: str = ""  # quickgelu or gelu
    known: torch.Tensor | None = None  # toyclip: which rows of the token table were trained, [vocabulary] bool
    precision: str = "fp32"
    memory_gb: float = 4.0


def load_clip(model: str = "toyclip", pretrained: str | None = None, device: str = "cpu") -> Clip:
    """Load a frozen CLIP: `toyclip`, or an open_clip model by name with a tag or a local weights file.

    Raises UserError for unknown names, unreadable files and text towers that are not CLIP's (SigLIP, HF towers, CLIPA).
    """
    name = model.replace("/", "-")
    if name == "toyclip":
        open_clip.add_model_config(HERE / "toyclip" / "toyclip.json")
        pretrained = pretrained or str(HERE / "toyclip" / "weights.safetensors")
    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        raise UserError(f"unknown model {model}: python -c 'import open_clip as o; print(o.list_models())' lists them")
    refuse_text_tower(name, config["text_cfg"])
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise UserError(f"--model {model} needs --pretrained: a weights file or one of {', '.join(tags) or 'no tags'}")
    # WHY: QuickGELU and GELU give different numbers, silently. So the activation follows the weights: a tag's own entry
    # decides; OpenAI's TorchScript archives are QuickGELU; for any other local file the model's name decides.
    weights, quick, plain = {}, bool(config.get("quick_gelu")), name.removesuffix("-quickgelu")
    tag = None if os.path.isfile(pretrained) else pretrained  # a folder called openai is no file
    if tag:
        entry = open_clip.get_pretrained_cfg(name, tag) or open_clip.get_pretrained_cfg(plain, tag)
        if not entry:
            raise UserError(f"--pretrained {tag} is neither a file nor a tag of {model} ({', '.join(tags)})")
        quick = bool(entry.get("quick_gelu"))
    else:
        weights, archive = read_weights(pretrained)
        quick = quick or archive
    if quick != bool(config.get("quick_gelu")):
        name = plain
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # open_clip warns of activations; ours is decided above, printed and stored
            logging.disable(logging.WARNING)  # ... and of random weights, which load_strictly replaces
            net = open_clip.create_model(name, pretrained=tag, force_quick_gelu=quick, require_pretrained=bool(tag))
        if not tag:
            load_strictly(net, weights)
    except Exception as error:  # open_clip, the hub and torch raise many kinds; the user needs the one line
        raise UserError(f"cannot load {pretrained} into {model}: {' '.join(str(error).split())[:300]}") from error
    finally:
        logging.disable(logging.NOTSET)
    net = net.float().eval().requires_grad_(False).to(device)  # WHY eval: open_clip's train mode moves BatchNorm
    tower, known = text_tower(net), None
    if "token_ids" in weights:
        known = torch.zeros(len(tower.token_embedding.weight), dtype=torch.bool)
        known[weights["token_ids"].long()] = True
    transform = image_transform_v2(PreprocessCfg(**net.visual.preprocess_cfg), is_train=False)
    clip = Clip(net, transform, open_clip.get_tokenizer(name), net.logit_scale.exp().item(), device=device, name=name)
    clip.width, clip.dim = tower.token_embedding.embedding_dim, config["embed_dim"]
    clip.context_length, clip.known = len(tower.positional_embedding), known
    clip.pretrained, clip.activation = pretrained, "quickgelu" if quick else "gelu"
    return clip


def read_weights(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """A local weights file → (state dict, is it an OpenAI TorchScript archive). No pickle in it is executed."""
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path), False
        if refuse_traps(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates TorchScript; OpenAI's own files are made of it
                state = torch.jit.load(path, map_location="cpu").state_dict()
            sizes = {"input_resolution", "context_length", "vocab_size"}  # numbers OpenAI stores beside the weights
            return {key: value for key, value in state.items() if key not in sizes}, True
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {key.removeprefix("module."): value for key, value in state.items()}, False
    except Exception as error:  # a broken file can fail in any of three libraries
        raise UserError(f"cannot read weights from {path}: {' '.join(str(error).split())[:200]}") from error


def load_strictly(net: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load every tensor, or raise RuntimeError. Of toyclip's token table only the rows that captions use are stored."""
    weights = {key: value for key, value in weights.items() if not key.endswith("attn_mask")}  # a constant
    if "token_ids" in weights:
        table = torch.zeros_like(net.token_embedding.weight)
        table[weights.pop("token_ids").long()] = weights.pop("token_rows").float()
        weights["token_embedding.weight"] = table
    net.load_state_dict(weights, strict=True)


# What encode_prompts relies on: the settings of an open_clip text tower and the values they must have.
PLAIN_TOWER = {"hf_model_name": None, "hf_tokenizer_name": None, "no_causal_mask": False, "pool_type": "argmax",
               "embed_cls": False, "final_ln_after_pool": False, "block_type": None, "qk_norm": False,
               "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False,
               "scale_fc": False, "proj_type": "linear", "proj_bias": False}  # fmt: skip


def refuse_text_tower(name: str, text_cfg: dict) -> None:
    """Raise UserError, before any download, unless this is CLIP's text tower: causal, EOT-pooled, plain blocks, BPE."""
    for key, plain in PLAIN_TOWER.items():
        if text_cfg.get(key, plain) != plain:
            reason = f"its text tower has {key} = {text_cfg[key]!r}"
            raise UserError(
                f"{name} cannot be used: {reason}; needed are a causal mask, EOT pooling and CLIP's tokenizer"
            )


def text_tower(model: torch.nn.Module) -> torch.nn.Module:
    """Where the text transformer lives: `model.text` in open_clip's CustomTextCLIP, else the model itself."""
    return getattr(model, "text", model)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Text: many prompts with one shared prefix, which is encoded once. The heart of the project's speed
# ----------------------------------------------------------------------------------------------------------------------
def token_ids(clip: Clip, text: str, room: int) -> list[int]:
    """BPE ids of `text` and EOT. UserError for more than `room` of them, or for a word toyclip was never trained on."""
    ids = clip.tokenizer.encode(text.replace("_", " ")) + [clip.tokenizer.eot_token_id]
    if len(ids) > room:
        free = f"{max(0, room)} of {clip.context_length} are free"
        raise UserError(f"{text!r} takes {len(ids)} tokens with EOT, and {free}: shorten it or use a smaller --n-ctx")
    if clip.known is not None and not clip.known[ids].all():
        word = next(clip.tokenizer.decode([i]) for i in ids if not clip.known[i]).strip()
        raise UserError(
            f"{clip.name} never saw {word!r} of {text!r}: choose a full-size CLIP with --model and --pretrained"
        )
    return ids


def embed(clip: Clip, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged token ids, each row ending in EOT → embeddings [C, S, W] (zeros after EOT, never read) and eot [C]."""
    table = text_tower(clip.model).token_embedding.weight
    out = table.new_zeros(len(rows), max(map(len, rows)), table.shape[1])
    for c, row in enumerate(rows):
        out[c, : len(row)] = table[row].detach()
    return out, torch.tensor([len(row) - 1 for row in rows], device=table.device)


def name_tokens(clip: Clip, classnames: list[str], n_ctx: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Suffix embeddings [C, S, W] of "name." and EOT, and the EOT's position in it [C]. `n_ctx` tokens stand before."""
    for i, name in enumerate(classnames):
        if not name.strip(" _"):
            raise UserError(f"class {i} has an empty name: give it one in classnames.txt, or rename its folder")
    return embed(clip, [token_ids(clip, f"{name}.", clip.context_length - 1 - n_ctx) for name in classnames])


def start_of_text(clip: Clip) -> torch.Tensor:
    """The SOS embedding, [1, 1, W]."""
    return text_tower(clip.model).token_embedding.weight[clip.tokenizer.sot_token_id].detach()[None, None]


def zero_shot_classifier(clip: Clip, classnames: list[str], templates: str | list[str]) -> torch.Tensor:
    """Hand-written prompts → classifier [C, D] of unit rows; of several templates their mean, normalised."""
    total, room = 0.0, clip.context_length - 1
    for template in [templates] if isinstance(templates, str) else templates:
        rows = [token_ids(clip, template.replace("{}", name), room) for name in classnames]
        shared = 0  # what all classes begin with ("a photo of a") is prefix, the rest suffix
        while all(len(row) > shared + 1 and row[shared] == rows[0][shared] for row in rows):
            shared += 1
        words = embed(clip, [rows[0][:shared]])[0] if shared else start_of_text(clip)[:, :0]
        prefix = torch.cat([start_of_text(clip), words], dim=1)  # [1, P, W]
        with torch.no_grad(), autocast(clip):
            features = encode_prompts(clip, prefix, *embed(clip, [row[shared:] for row in rows]))[0]  # [C, D]
        total = total + F.normalize(features.float(), dim=-1)
    return F.normalize(total, dim=-1)


def encode_prompts(clip: Clip, prefix: torch.Tensor, suffix: torch.Tensor, eot: torch.Tensor) -> torch.Tensor:
    """Text features of every class under every prefix: prefix [G, P, W], suffix [C, S, W], eot [C] → [G, C, D].

    Equals sending each full sequence [prefix, suffix, padding] through the tower (unnormalised, as encode_text), since
    CLIP's text attention is causal: (1) nothing after a class's EOT can influence it, so it is left out; (2) the prefix
    never sees the class name, so it is the same for all C classes, and its keys and values are computed once.
    Work: P + C * (mean name length) tokens, not C * (context length). Differentiable in prefix and suffix.
    """
    tower = text_tower(clip.model)
    position, (G, P, W), C = tower.positional_embedding, prefix.shape, len(suffix)
    lengths, order = torch.sort(eot + 1, stable=True)
    S = int(lengths[-1])
    if P + S > len(position):
        raise UserError(f"a prompt of {P + S} tokens, and the model takes {len(position)}: use a smaller --n-ctx")
    # WHY sorted by length: tokens are packed without padding, and the classes of one length share one attention call.
    real = torch.arange(S, device=eot.device) < lengths[:, None]  # [C, S], False on padding
    tokens = (suffix[order, :S] + position[P : P + S])[real]  # [T, W], class after class
    ends = [0, *lengths.cumsum(0).tolist()]
    # Blocks of (G, C) bound what is alive; with gradients a block is computed again in the backward pass.
    grad = torch.is_grad_enabled() and (prefix.requires_grad or suffix.requires_grad)
    budget = int(clip.memory_gb * 1e9 / activation_bytes(tower.transformer.resblocks, W, grad))  # tokens alive at once
    g_step, cuts = max(1, budget // (P + ends[-1])), [0]
    while cuts[-1] < C:
        cuts.append(max(cuts[-1] + 1, bisect.bisect(ends, ends[cuts[-1]] + budget) - 1))
    again = functools.partial(checkpoint, use_reentrant=False)
    run = again if grad and (g_step < G or len(cuts) > 2) else lambda function, *inputs: function(*inputs)
    spans = list(zip(lengths.cpu().tensor_split(cuts[1:-1]), tokens.tensor_split([ends[c] for c in cuts[1:-1]])))
    rows = []
    for part in (prefix + position[:P]).split(g_step):
        memory = run(encode_prefix, tower, part)
        row = [run(encode_suffixes, tower, n.tolist(), x.expand(len(part), -1, -1), *memory) for n, x in spans]
        rows.append(torch.cat(row, dim=1))
    features, projection = torch.cat(rows)[:, torch.argsort(order)], tower.text_projection  # [G, C, W], caller's order
    return projection(features) if isinstance(projection, torch.nn.Module) else features @ projection


def encode_prefix(tower: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Prefixes x [g, P, W] → the memory of them: keys and values of each layer in turn, each [g, H, P, W/H]."""
    memory = []
    for block in tower.transformer.resblocks:
        q, k, v = (part.transpose(1, 2) for part in heads(block, x))
        memory += [k, v]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = finish_block(block, x, mixed.transpose(1, 2).flatten(2))  # the last layer's is read by nobody
    return memory


def encode_suffixes(tower: torch.nn.Module, lengths: list[int], x: torch.Tensor, *memory: torch.Tensor) -> torch.Tensor:
    """Packed tokens x [g, t, W] of c suffixes of these (sorted) lengths, over the prefix's memory → EOT's [g, c, W]."""
    runs = [(n, lengths.count(n)) for n in sorted(set(lengths))]
    last = torch.tensor(lengths, device=x.device).cumsum(0) - 1
    for layer, block in enumerate(tower.transformer.resblocks):
        keys, values = memory[2 * layer : 2 * layer + 2]
        spans = [part.split([n * count for n, count in runs], dim=1) for part in heads(block, x)]
        parts = [attend(q, k, v, keys, values, n) for q, k, v, (n, _) in zip(*spans, runs)]
        mixed = torch.cat(parts, dim=1)  # [g, t, W]
        if layer + 1 == len(tower.transformer.resblocks):
            x, mixed = x[:, last], mixed[:, last]  # of the last layer only EOT's output is read
        x = finish_block(block, x, mixed)
    return tower.ln_final(x)


def attend(q, k, v, keys, values, n: int) -> torch.Tensor:
    """Attention of c suffixes of n tokens, q, k, v [g, c * n, H, d], to the prefix [g, H, P, d] and themselves."""
    (g, t, H, d), P = q.shape, keys.shape[2]
    q, k, v = (part.transpose(1, 2) for part in (q * d**-0.5, k, v))  # [g, H, c·n, d]
    to_prefix = (q @ keys.transpose(-1, -2)).unflatten(2, (-1, n))  # [g, H, c, n, P]: one product for all classes
    q, k, v = (part.unflatten(2, (-1, n)) for part in (q, k, v))  # [g, H, c, n, d]
    future = torch.full((n, n), -math.inf, device=q.device, dtype=q.dtype).triu(1)
    to_self = q @ k.transpose(-1, -2) + future  # [g, H, c, n, n]
    weights = torch.cat([to_prefix, to_self], dim=-1).softmax(dim=-1).to(v.dtype)
    on_prefix, on_self = weights.split([P, n], dim=-1)
    mixed = on_prefix.flatten(2, 3) @ values + (on_self @ v).flatten(2, 3)  # [g, H, c·n, d]
    return mixed.transpose(1, 2).reshape(g, t, H * d)


def heads(block: torch.nn.Module, x: torch.Tensor):
    """The first half of a residual attention block: x [g, t, W] → q, k, v, each [g, t, H, W/H]."""
    qkv = linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(-3)


def finish_block(block: torch.nn.Module, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """The second half: output projection and MLP, added to the residual stream (ls_1, ls_2: layer scale, if any)."""
    scale_1, scale_2 = (getattr(block, name, torch.nn.Identity()) for name in ("ls_1", "ls_2"))
    x = x + scale_1(linear(mixed, block.attn.out_proj.weight, block.attn.out_proj.bias))
    y = block.ln_2(x)
    for layer in block.mlp:  # Linear, activation, Linear
        y = linear(y, layer.weight, layer.bias) if isinstance(layer, torch.nn.Linear) else layer(y)
    return x + scale_2(y)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear. WHY a convolution: on the CPU, PyTorch's matrix products are MKL's, which are slow on AMD, and its
    convolutions oneDNN's, which are not. A 1x1 convolution over the tokens is the same sum, on Zen 5 in half the time.
    """
    small = x.numel() < 2**15 or weight.numel() < 2**16  # not worth a convolution's set-up
    if small or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, W, T, 1]: a column of T pixels of W channels
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def activation_bytes(blocks, W: int, grad: bool) -> int:
    """Bytes a token takes at most, by benchmark/speed.py: 35 W floats a layer for a backward pass, else 40 W."""
    return 4 * W * (35 * len(blocks) if grad else 40)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Precision, files, several processes (torchrun), output that only the first of them prints
# ----------------------------------------------------------------------------------------------------------------------
def autocast(clip: Clip, differentiate: bool = False):
    """Mixed precision as --precision says. WHY not fp16 with gradients: they underflow; that pass then runs in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(clip.precision)
    if dtype is None or (differentiate and dtype is torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(torch.device(clip.device).type, dtype)


def versions() -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")}
    return {"python": sys.version.split()[0]} | libraries


def start_processes(device: str) -> str:
    """Join torchrun's process group if there is one, and resolve `auto` → the device of this process."""
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        if kind not in ("cpu", "cuda", "mps"):
            raise RuntimeError("this kind of device is not supported")
        if kind != "cpu" and (torch.device(device).index or 0) >= getattr(torch, kind).device_count():
            raise RuntimeError(f"no such {kind.upper()} device here")
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}; use cpu, cuda, cuda:1 or auto") from error
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value):
    """Rank 0's value, on every rank."""
    if dist.is_initialized():
        dist.broadcast_object_list(box := [value], src=0)
        return box[0]
    return value


def gather_rows(mine: torch.Tensor, total: int) -> torch.Tensor:
    """Rank r of K holds rows r, r + K, r + 2K, ... of `total`: all of them, in order, on every rank."""
    if world_size() == 1:
        return mine
    most = -(-total // world_size())
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def log(text: str) -> None:
    """A line on stdout."""
    if rank() == 0:
        print(text, flush=True)


def progress(iterable, text: str):
    """A progress bar on stderr, silent when stderr is not a terminal."""
    return tqdm(iterable, text, leave=False, disable=rank() != 0 or not sys.stderr.isatty())


# ----------------------------------------------------------------------------------------------------------------------
# 4. Numbers: what is measured, the schedule, the guard
# ----------------------------------------------------------------------------------------------------------------------
def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """logits [N, C] (or log-probabilities), labels [N] → accuracy (percent), nll (nats), ece (15 bins, percent)."""
    log_prob = logits.float().log_softmax(dim=-1)
    confidence, predicted = log_prob.exp().max(dim=-1)
    right = (predicted == labels).float()
    bins = (confidence * 15).long().clamp(0, 14)  # bin b holds confidences in [b/15, (b+1)/15)
    gaps = torch.zeros(15, device=logits.device).index_add_(0, bins, right - confidence)  # a bin's sum of both
    ece, nll = 100 * gaps.abs().sum().item() / len(labels), F.nll_loss(log_prob, labels).item()
    if not math.isfinite(nll):
        raise FloatingPointError("the predictions are not finite: try a smaller --lr, and check the model's weights")
    return {"accuracy": 100 * right.mean().item(), "nll": nll, "ece": ece}


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b), and 0 where either is 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def warmup_cosine(epoch: int, epochs: int, lr: float) -> float:
    """Rate of epoch e: 1e-5 for e = 0, then lr/2 * (1 + cos(pi (e - 1) / E)), which does not reach 0, as released."""
    return 1e-5 if epoch == 0 else 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))


def check_finite(epoch: int, step: int, **quantities: torch.Tensor) -> None:
    """Stop with FloatingPointError, naming the quantity and the step, before a wrong number reaches the parameters."""
    for name, value in quantities.items():
        if not value.isfinite().all():
            where = f"{name} is not finite in epoch {epoch}, step {step}"
            raise FloatingPointError(f"{where}; the last checkpoint is kept: try a smaller --lr or --precision fp32")


if __name__ == "__main__":
    import runs  # flags and tables live there

    runs.run(runs.zero_shot_table)
