"""Time the papers' way (common.plain: open_clip, every class padded to the context length) against
ours, in one run. Equal losses and gradients are checked, and kernels counted.

    python benchmark/speed.py                   # a CPU, ViT-B/16 with random weights: some minutes
    python benchmark/speed.py --quick           # small sizes, to see that it runs
    python benchmark/speed.py --device cuda     # peak memory, share of the time it is busy
"""

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import open_clip
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
import prograd
import proreg
import vpt

CPU = "lscpu | grep -oE 'Model name.*|amx_bf16|avx512_bf16' | sort -u"  # what multiplies bf16
GPU = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"


def count_kernels(step) -> int:
    """Operators that compute in a call of step(): all but views, and memory that is only taken."""
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if not operator.is_view:
                names.append(operator.overloadpacket.__name__)
            return operator(*args, **(kwargs or {}))

    with Record():
        step()
    return sum("empty" not in name and name != "_unsafe_view" for name in names)


def make_clip(args: argparse.Namespace) -> common.Clip:
    """A CLIP of real size with random weights."""
    torch.manual_seed(0)
    if args.quick:
        open_clip.add_model_config(common.TOYCLIP / "toyclip.json")
    name = "toyclip" if args.quick else "ViT-B-16"
    model = open_clip.create_model(name).eval().requires_grad_(False).to(args.device)
    clip = common.Clip(model, None, open_clip.get_tokenizer(name), "random", memory_gb=8.0)
    clip.device = args.device
    return common.in_precision(clip, args.precision, tuned=True)


def papers_way(step, clip: common.Clip, names: list[str], n_ctx: int):
    """The step, but that its prompts are encoded whole and padded, by open_clip's own tower, all
    at once: in pieces, that are computed again for gradients, it would be slower than theirs."""
    ids = common.pad(clip, [f"{name}." for name in names], 1 + n_ctx)
    unbound = dataclasses.replace(clip, memory_gb=1e6)

    def encode(clip, prefix, packed):
        return common.plain(unbound, prefix, ids)

    def padded():
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


def prograd_steps(clip: common.Clip, names: list[str], kind: str = "step") -> dict:
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
    images = random_images(clip, B)

    def step(encodings):
        features = x
        for _ in range(encodings):
            features = encode(clip, images)
        numbers = prograd.step(learner, packed, teacher, features, labels, settings)
        return numbers[:2], learner.context.grad

    @torch.no_grad()
    def evaluate(size):
        tested = x.repeat(10_000 // B if clip.device != "cpu" else 200 // B, 1)
        parts = [clip.scale * part @ F.normalize(learner(packed)).T for part in tested.split(size)]
        return [torch.cat(parts)]

    works = {"step": (step, 0, 0), "fresh": (step, 2, 1), "evaluation": (evaluate, 100, 10_000)}
    work, theirs, ours = works[kind]
    return {"plain": papers_way(lambda: work(theirs), clip, names, M), "ours": lambda: work(ours)}


def vpt_steps(clip: common.Clip, names: list[str], kind: str = "global") -> dict:
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


def proreg_steps(clip: common.Clip, names: list[str]) -> dict:
    """One ProReg step of a batch: the teacher and the student see the same images. Ours is the
    papers' way here, but that the teacher's images are encoded once (--augment none)."""
    torch.manual_seed(1)
    B = 8 if clip.device == "cpu" else 64
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


def now() -> float:
    """The time, when all that was started has ended."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    row = {"case": title} | {f"{name}_seconds": math.inf for name in found}
    for _, name in itertools.product(range(args.repeat), found):
        start = now()
        steps[name]()
        row[f"{name}_seconds"] = min(row[f"{name}_seconds"], now() - start)
    for name in found if args.device != "cpu" else ():
        torch.cuda.reset_peak_memory_stats()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            steps[name]()
            torch.cuda.synchronize()
        busy = sum(event.self_device_time_total for event in record.key_averages()) / 1e6
        row[f"{name}_busy"] = min(1.0, busy / row[f"{name}_seconds"])
        row[f"{name}_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    plain, ours = (row.get(f"{name}_seconds", math.nan) for name in ("plain", "ours"))
    row["ratio"] = plain / ours
    row["kernels"] = {name: count_kernels(steps[name]) for name in found}
    print(f"{title:44} {plain:9.4f} {ours:9.4f} {row['ratio']:7.1f} {row['kernels']}", flush=True)
    return row


def main(argv: list[str] | None = None) -> list[dict]:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--quick", action="store_true", help="toyclip, few classes")
    parser.add_argument("--only", default="", help="cases whose titles hold this text")
    parser.add_argument("--out", metavar="FILE.json", help="write the figures")
    args = parser.parse_args(argv)
    gpu = args.device != "cpu"
    imagenet = open_clip.IMAGENET_CLASSNAMES
    six = [f"ab cd {i % 10} {i // 10 % 10}" for i in range(100)]  # 4 words, ".", EOT: 6 tokens
    sizes, few = [10, 47, 100] + [397, 1000] * gpu, [50] + [500] * gpu
    if args.quick:
        sizes, few, six = [10], [5], six[::10]
    clip = make_clip(args)
    cases = [(f"ProGrad, {C} names of ImageNet", prograd_steps, imagenet[:C]) for C in sizes]
    cases += [(f"ProGrad, {len(six)} names of 6 tokens", prograd_steps, six)]
    for C in sizes:
        cases += [(f"ProGrad, {C} names, fresh views", prograd_steps, imagenet[:C], "fresh")]
    tested = imagenet[: few[0]]
    cases += [(f"ProGrad, {few[0]} names, evaluation", prograd_steps, tested, "evaluation")]
    for C, kind in itertools.product(few, ("global", "image")):
        cases += [(f"VPT, {C} names, L = 10, {kind}", vpt_steps, imagenet[:C], kind)]
    cases += [("ProReg", proreg_steps, tested)]
    device = ", ".join(subprocess.getoutput(GPU if gpu else CPU).splitlines())
    print(f"{device}\n{'':44} {'plain s':>9} {'ours s':>9} {'ratio':>7} kernels")
    about = {"device": device, "torch": torch.__version__, "precision": args.precision, "rows": []}
    for title, make, *given in cases:
        if args.only in title:
            about["rows"].append(compare(title, make(clip, *given), args))
            if args.out:  # after each case, for a run may be cut off
                data.write(Path(args.out), json.dumps(about, indent=1).encode())
    return about["rows"]


if __name__ == "__main__":
    data.run(main)
