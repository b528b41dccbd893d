"""What was tried to make a step or the images faster, each timed in turn with what the scripts do now.

    python benchmark/tried.py                # all, about five minutes on two cores
    python benchmark/tried.py --only names fused

README.md beside this file says what was kept. A ratio above 1 says that the second way is faster.
"""

import argparse
import contextlib
import json
import logging
import os
from pathlib import Path
from statistics import median

import speed  # puts the repository's root on the path, too
import torch
import torch.nn.functional as F
from speed import RESNET, VIT, now, random_clip

import common
import vision


def context_gradients(clip, names: list[str], M: int = 16, together: bool = False):
    """ProGrad's two backward passes, one after the other or `together` → features [C, D] and gradients [2, M, W]."""
    suffix, eot = common.name_tokens(clip, names, M)
    context = 0.02 * torch.randn(M, clip.width, generator=torch.Generator().manual_seed(0))
    context.requires_grad_()
    prefix = torch.cat([common.start_of_text(clip), context[None]], dim=1)
    features = common.encode_prompts(clip, prefix, suffix, eot)[0]
    wanted = torch.randn(2, *features.shape, generator=torch.Generator().manual_seed(1)).to(features)
    if together:
        (gradients,) = torch.autograd.grad(features, context, wanted, is_grads_batched=True)
    else:
        gradients = torch.stack([torch.autograd.grad(features, context, w, retain_graph=True)[0] for w in wanted])
    return features.detach(), gradients


@contextlib.contextmanager
def swapped(name: str, function):
    """common.`name` is `function` for a while."""
    kept = getattr(common, name)
    setattr(common, name, function)
    try:
        yield
    finally:
        setattr(common, name, kept)


def fused_attention(q, k, v, keys, values, n: int) -> torch.Tensor:
    """common.attend by one fused call, over keys and values that repeat the prefix for every class."""
    (g, t, H, d), P = q.shape, keys.shape[2]
    q, k, v = (part.unflatten(1, (-1, n)).transpose(2, 3).flatten(0, 1) for part in (q, k, v))  # [g·c, H, n, d]
    keys, values = (m.repeat_interleave(t // n, dim=0) for m in (keys, values))  # [g·c, H, P, d]
    mask = torch.ones(n, P + n, dtype=torch.bool, device=q.device).tril(P)
    mixed = F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), attn_mask=mask)
    return mixed.transpose(1, 2).reshape(g, t, H * d)


def padded_name_tokens(clip, names: list[str], n_ctx: int = 0):
    """common.name_tokens, but every name is as long as the longest: what encoding without packing would cost."""
    suffix, eot = name_tokens(clip, names, n_ctx)
    return suffix, torch.full_like(eot, suffix.shape[1] - 1)


name_tokens = common.name_tokens


def images_of(clip, n: int, **kind) -> torch.Tensor:
    return torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(2)).to(clip.device, **kind)


@torch.no_grad()
def encode(clip, images, precision: str = "fp32"):
    clip.precision = precision
    with common.autocast(clip):
        return clip.model.encode_image(images).float()


def trials(device: str):
    """For each trial: name, what it is, the way now, the other way, and whether both should give the same numbers."""
    vit, resnet = random_clip(VIT, device), random_clip(RESNET, device)
    open_clips = {VIT: random_clip(VIT, device), RESNET: random_clip(RESNET, device)}
    vision.hasten(vit.model.visual)
    vision.hasten(resnet.model.visual)
    names, imagenet = speed.names_of(100), list(speed.open_clip.IMAGENET_CLASSNAMES)
    compiled = torch.compile(common.encode_suffixes, dynamic=False)
    step = context_gradients

    def padded():
        with swapped("name_tokens", padded_name_tokens):
            return step(vit, imagenet)

    def other(name, function, *args):
        with swapped(name, function):
            return step(*args)

    def low():
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return step(vit, names)

    def without(work, *args):
        """With PyTorch's own products."""
        with swapped("linear", F.linear):
            return work(*args)

    vit_batch, resnet_batch = images_of(vit, 16), images_of(resnet, 32)
    return {
        "names": ("ImageNet's 1,000 names, all padded to the longest", lambda: step(vit, imagenet), padded, False),
        "both": ("both gradients in one batched pass", lambda: step(vit, names),
                 lambda: step(vit, names, together=True), True),
        "compile": ("torch.compile of encode_suffixes", lambda: step(vit, names),
                    lambda: other("encode_suffixes", compiled, vit, names), True),
        "fused": ("scaled_dot_product_attention over a repeated prefix, C = 100", lambda: step(vit, names),
                  lambda: other("attend", fused_attention, vit, names), True),
        "fused_names": ("the same, ImageNet's 1,000 names", lambda: step(vit, imagenet),
                        lambda: other("attend", fused_attention, vit, imagenet), True),
        "linear": ("F.linear in place of common.linear, text pass, C = 100", lambda: step(vit, names),
                   lambda: without(step, vit, names), True),
        "vit_linear": ("F.linear in place of common.linear, ViT-B/16", lambda: encode(vit, vit_batch),
                       lambda: without(encode, vit, vit_batch), True),
        "vit_blocks": ("open_clip's own blocks in place of vision.hasten's, ViT-B/16", lambda: encode(vit, vit_batch),
                       lambda: encode(open_clips[VIT], vit_batch), True),
        "text_bf16": ("bf16 text pass", lambda: step(vit, names), low, False),
        "vit_bf16": ("bf16 image encoding, ViT-B/16", lambda: encode(vit, vit_batch),
                     lambda: encode(vit, vit_batch, "bf16"), False),
        "resnet_bf16": ("bf16 image encoding, RN50", lambda: encode(resnet, resnet_batch),
                        lambda: encode(resnet, resnet_batch, "bf16"), False),
        "resnet_layout": ("open_clip's layout in place of channels last, RN50", lambda: encode(resnet, resnet_batch),
                          lambda: encode(open_clips[RESNET], resnet_batch), True),
    }  # fmt: skip


def seconds(work, device: str) -> float:
    start = now(device)
    work()
    return now(device) - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=[], help="names of trials [all]")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed, in turn; medians count [5]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU [all cores]")
    parser.add_argument("--clock", choices=list(speed.CLOCKS), default="wall", help="as in speed.py [wall]")
    parser.add_argument("--out", default=str(speed.RESULTS), help="folder of tried.json [benchmark/results]")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    speed.CLOCK[0] = speed.CLOCKS[args.clock]
    logging.disable(logging.WARNING)
    path = Path(args.out, "tried.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, (what, now_way, other_way, same) in trials(args.device).items():
        if args.only and name not in args.only:
            continue
        try:
            worst = max(speed.difference(a, b) for a, b in zip(now_way(), other_way()))  # this also warms both up
        except Exception as error:  # a way that does not run here (no compiler, no kernel) is an answer, too
            print(f"{name}: {what}: does not run here: {str(error).splitlines()[0][:120]}")
            continue
        pairs = [(seconds(now_way, args.device), seconds(other_way, args.device)) for _ in range(args.rounds)]
        a, b = (median(column) for column in zip(*pairs))
        found[name] = {"what": what, "ms_now": 1000 * a, "ms_other": 1000 * b, "ratio": a / b, "difference": worst}
        found[name] |= {
            "should_be_equal": same,
            "machine": speed.machine(args.device, args.threads) | {"clock": args.clock},
        }
        print(f"{name}: {what}: {1000 * a:.0f} → {1000 * b:.0f} ms, {a / b:.2f} times as fast, difference {worst:.0e}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
