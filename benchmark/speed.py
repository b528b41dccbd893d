"""Time the papers' way against ours, in one run: common.plain, open_clip with every class padded to
the context length, and common.encode_prompts. Equal losses and gradients are checked, and kernels
counted.

    python benchmark/speed.py                   # a CPU, ViT-B/16 with random weights: some minutes
    python benchmark/speed.py --quick           # small sizes, to see that it runs
    python benchmark/speed.py --device cuda     # events, peak memory, share of the time it is busy

Ratios are of one run on one machine. Kernels are counted by operators that start one, on the CPU.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
import prograd
import proreg
import vpt

# Views, what only calls other operators, and copies of the host's.
FREE = """view reshape transpose permute expand slice as_strided unsqueeze squeeze split
split_with_sizes unbind select t detach empty empty_like empty_strided alias _unsafe_view unflatten
flatten linear matmul softmax narrow chunk tensor_split layer_norm to contiguous clone _to_copy
lift_fresh detach_ zeros ones full zeros_like ones_like new_zeros view_as item is_nonzero expand_as
unsafe_split cross_entropy_loss log_softmax scaled_dot_product_attention new_empty_strided
broadcast_to index new_empty result_type _reshape_alias resolve_conj resolve_neg numpy_T
lift_fresh_copy resize_ cosine_similarity dropout gelu_ conv2d convolution _convolution"""
FREE = {f"aten::{name}" for name in FREE.split()}


def count_kernels(step) -> int:
    """Kernels that one call of step() starts, after one call to warm up."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    names = [event.name for event in record.events() if event.name.startswith("aten::")]
    return sum(name not in FREE for name in names)


def make_clip(args: argparse.Namespace) -> common.Clip:
    """A CLIP of real size with random weights."""
    torch.manual_seed(0)
    if args.quick:
        open_clip.add_model_config(common.TOYCLIP / "toyclip.json")
    name = "toyclip" if args.quick else "ViT-B-16"
    model = open_clip.create_model(name).eval().requires_grad_(False).to(args.device)
    how = args.device, "fp32", args.memory_gb
    clip = common.Clip(model, None, open_clip.get_tokenizer(name), "random", "", *how)
    return common.in_precision(clip, args.precision, tuned=True)


def papers_way(step, clip: common.Clip, names: list[str], n_ctx: int):
    """The step, but that its prompts are encoded whole and padded, by open_clip's own tower."""
    ids = common.pad(clip, [f"{name}." for name in names], 1 + n_ctx)

    def padded():
        encode = lambda clip, prefix, packed: common.plain(clip, prefix, ids)  # noqa: E731
        with mock.patch.object(common, "encode_prompts", encode):
            return step()

    return padded


def random_images(clip: common.Clip, n: int) -> torch.Tensor:
    size = clip.model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    return torch.randn(n, 3, side, side, device=clip.device)


@torch.no_grad()
def encode(clip: common.Clip, images: torch.Tensor) -> torch.Tensor:
    with common.autocast(clip):
        return F.normalize(clip.model.encode_image(images).float(), dim=-1)


def prograd_steps(clip: common.Clip, names: list[str], args, kind: str = "step") -> dict:
    """One ProGrad step of B = 32 images, M = 16: forward, both gradients, projection. "fresh" views
    are encoded first, by the released code in its learner and in its teacher. "evaluation" is of
    many images by a trained prompt, which the released code encodes for every 100 of them."""
    C, M, B = len(names), 16, 32
    torch.manual_seed(1)
    D = clip.model.text_projection.shape[1]
    x = F.normalize(torch.randn(B, D, device=clip.device), dim=-1)
    labels = torch.randint(0, C, (B,), device=clip.device)
    teacher = F.normalize(torch.randn(C, D, device=clip.device), dim=-1)
    learner = prograd.PromptLearner(clip, 0.02 * torch.randn(M, clip.width, device=clip.device))
    settings = argparse.Namespace(temperature=1.0, rule="project", lam=1.0)
    packed = learner.names(names)
    images = random_images(clip, B) if kind == "fresh" else None

    def step(encodings):
        features = [encode(clip, images) for _ in range(encodings)][-1] if kind == "fresh" else x
        numbers = prograd.step(learner, packed, teacher, features, labels, settings)
        return numbers[:2], learner.context.grad

    @torch.no_grad()
    def evaluate(size):
        tested = x.repeat(10_000 // B if clip.device != "cpu" else 200 // B, 1)
        parts = [clip.scale * part @ F.normalize(learner(packed)).T for part in tested.split(size)]
        return [torch.cat(parts)]

    work, sizes = (evaluate, (100, 10_000)) if kind == "evaluation" else (step, (2, 1))
    theirs = papers_way(lambda: work(sizes[0]), clip, names, M)
    return {"plain": theirs, "ours": lambda: work(sizes[1])}


def vpt_steps(clip: common.Clip, names: list[str], args, kind: str = "global") -> dict:
    """One VPT step of one image, L = 10, M = 4: forward and backward."""
    torch.manual_seed(1)
    L, D = 10, clip.model.text_projection.shape[1]
    x = F.normalize(torch.randn(1, D, device=clip.device), dim=-1)
    labels = torch.zeros(1, dtype=torch.long, device=clip.device)
    context = 0.02 * torch.randn(4, clip.width, device=clip.device)
    learner = vpt.PromptDistribution(clip, context, kind)
    eps = torch.randn(L, 1, clip.width, device=clip.device)
    settings = argparse.Namespace(samples=L, bound="log-mean", kl_weight=0.001)
    packed = common.name_tokens(clip, names, 4)

    def ours():
        numbers = vpt.step(learner, packed, eps, x, labels, settings)
        return numbers[:2], learner.context.grad

    return {"plain": papers_way(ours, clip, names, 4), "ours": ours}


def proreg_steps(clip: common.Clip, names: list[str], args) -> dict:
    """One ProReg step of a batch: the teacher and the student see the same images. Ours is the
    papers' way here, but that the teacher's images are encoded once (--augment none)."""
    torch.manual_seed(1)
    B = 8 if args.device == "cpu" else 64
    images = random_images(clip, B)
    labels = torch.randint(0, len(names), (B,), device=clip.device)
    learner = proreg.PromptedClassifier(clip, names, "a photo of a {}.").eval()
    classifier = F.normalize(learner.text_features.detach(), dim=-1)
    settings = argparse.Namespace(loss="proreg", alpha=2.0, power=10.0, temperature=1.0)

    def see(images, index):
        return clip.scale * encode(clip, images) @ classifier.T

    table = see(images, None)

    def step(teacher):
        learner.zero_grad()
        loss, numbers = proreg.step(learner, clip, teacher, images, labels, None, settings)
        loss.backward()
        return numbers[1:3], learner.text_features.grad.clone()

    return {"plain": lambda: step(see), "ours": lambda: step(lambda images, index: table)}


def seconds(step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def compare(title: str, steps: dict, args: argparse.Namespace) -> dict:
    """Time both ways in turn, if there is memory for them, and check that they give the same."""
    found = {}
    for name, step in steps.items():
        try:
            found[name] = step()  # also warms up
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    near = 1e-3 if args.precision == "fp32" else 5e-2
    for ours, theirs in zip(found["ours"], found.get("plain", ())):
        off = ((ours - theirs).norm() / theirs.norm()).item()
        assert off < near, f"{title}: the two ways differ by {off:.1e}"
    row, times = {"case": title}, {name: [] for name in found}
    for _ in range(args.repeat):
        for name in found:
            times[name].append(seconds(steps[name], args.device))
    for name in found:
        row[f"{name}_seconds"] = min(times[name])
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                steps[name]()
                torch.cuda.synchronize()
            busy = sum(event.self_device_time_total for event in record.key_averages()) / 1e6
            row[f"{name}_busy"] = min(1.0, busy / row[f"{name}_seconds"])
            row[f"{name}_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    plain, ours = (row.get(f"{name}_seconds", float("nan")) for name in ("plain", "ours"))
    row["ratio"] = plain / ours
    row["kernels"] = {name: count_kernels(steps[name]) for name in found}
    print(f"{title:44} {plain:9.4f} {ours:9.4f} {row['ratio']:7.1f} {row['kernels']}", flush=True)
    return row


def processor() -> str:
    """This machine's processor, and whether it multiplies bf16 matrices in hardware (AMX)."""
    about = Path("/proc/cpuinfo")  # of Linux
    text = about.read_text(encoding="utf-8") if about.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    kinds = [word for word in ("amx_bf16", "avx512_bf16") if word in text]
    name = name.group(1) if name else platform.processor()
    return (
        f"{name}, {os.cpu_count()} cores, {' and '.join(kinds) or 'neither AMX nor AVX-512 bf16'}"
    )


def main(argv: list[str] | None = None) -> list[dict]:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--memory-gb", type=float, default=8.0, help="of the text encoder")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--quick", action="store_true", help="toyclip, few classes")
    parser.add_argument("--only", default="", help="cases whose titles hold this text")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures")
    args = parser.parse_args(argv)
    imagenet = open_clip.IMAGENET_CLASSNAMES
    six = [f"ab cd {i % 10} {i // 10 % 10}" for i in range(100)]  # 4 words, ".", EOT: 6 tokens
    gpu = args.device != "cpu"
    sizes, few = [10, 47, 100] + [397, 1000] * gpu, [50] + [500] * gpu
    if args.quick:
        sizes, few = [10], [5]
    clip = make_clip(args)
    prompt = [("names of ImageNet", imagenet[:C], "step") for C in sizes]
    prompt += [("names of 6 tokens", six[:: 10 if args.quick else 1], "step")]
    prompt += [("names, fresh views", imagenet[:C], "fresh") for C in sizes]
    prompt += [("names, evaluation", imagenet[: few[0]], "evaluation")]
    cases = [(f"ProGrad, {len(n)} {text}", prograd_steps, n, {"kind": k}) for text, n, k in prompt]
    cases += [(f"VPT, {C} names, L = 10, {kind}", vpt_steps, imagenet[:C], {"kind": kind})
              for C in few for kind in ("global", "image")]  # fmt: skip
    cases += [("ProReg", proreg_steps, imagenet[: few[0]], {})]
    print(f"{'':44} {'plain s':>9} {'ours s':>9} {'ratio':>7} kernels")
    asked = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    device = subprocess.getoutput(asked) if gpu else processor()
    print(device)
    about = {"device": device, "torch": torch.__version__, "precision": args.precision, "rows": []}
    for title, make, names, more in cases:
        if args.only in title:
            steps = make(dataclasses.replace(clip), names, args, **more)
            about["rows"].append(compare(title, steps, args))
            if args.out:  # after each case, for a run may be cut off
                data.write(Path(args.out), json.dumps(about, indent=1).encode())
    return about["rows"]


if __name__ == "__main__":
    data.run(main)
