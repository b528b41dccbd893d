"""How fast: a step the plain way, as the papers' released code does it, against ours, side by side in one process.

    python benchmark/speed.py                                    # all cases, both ways: about 30 minutes on two cores
    python benchmark/speed.py --cases prograd_100 --rounds 5
    python benchmark/speed.py --growth                           # seconds against C, L and M, and the picture of it

CLIP has random weights of real size (nothing is downloaded; speed does not depend on the weights). The plain way is
written here with open_clip's own modules and without common.py: the full sequence of context_length tokens for every
class, the frozen image encoder as often as the released code calls it. Ours is the scripts' own train and predict.
Both run on the same images, names and start, and must give the same loss and gradient. Each round times both, one after
the other, so that a machine that slows down slows both; medians over the rounds count.
"""

import argparse
import copy
import ctypes
import functools
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import open_clip
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import prograd
import proreg
import runs
import vision
import vpt

RESULTS = Path(__file__).resolve().parent / "results"
WORDS = "red green blue small large old new dark bright plain".split()  # each is one token
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CLOCK = [time.perf_counter]  # the one in use
BLOCK = 7700  # tokens that the plain way holds at once for a backward pass, about 4 GB


# ----------------------------------------------------------------------------------------------------------------------
# 1. What both ways start from
# ----------------------------------------------------------------------------------------------------------------------
def random_clip(model: str, device: str, memory_gb: float = 4.0) -> common.Clip:
    """A CLIP of this architecture with random weights and CLIP's own logit scale of 100."""
    torch.manual_seed(0)
    net = open_clip.create_model(model).eval().requires_grad_(False)
    net.logit_scale.data.fill_(math.log(100.0))
    return as_clip(net.to(device), open_clip.get_tokenizer(model), device, memory_gb)


def as_clip(net, tokenizer, device: str = "cpu", memory_gb: float = 4.0) -> common.Clip:
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**net.visual.preprocess_cfg), is_train=False
    )
    clip = common.Clip(net, preprocess, tokenizer, net.logit_scale.exp().item(), device=device, memory_gb=memory_gb)
    clip.width, clip.dim = net.token_embedding.embedding_dim, net.text_projection.shape[1]
    clip.context_length = len(net.positional_embedding)
    clip.plain_visual = copy.deepcopy(net.visual)  # open_clip's own blocks, for the plain way
    return clip


def names_of(C: int) -> list[str]:
    """C different names of four tokens: with the full stop and EOT, S = 6."""
    digits = [(c // 100 % 10, c // 10 % 10, c % 10) for c in range(C)]
    return [f"{WORDS[i]} {WORDS[j]} {WORDS[k]} cat" for i, j, k in digits]


def task_of(C: int, n_images: int) -> data.Task:
    """`n_images` images of the toy world under C made-up class names."""
    toy = data.load_dataset(prograd.DEFAULTS["toy"]["dataset"], shots="all")
    items = [(address, i * 7 % C) for i, (address, _) in enumerate((toy.train + toy.tests[0].items)[:n_images])]
    template = "a photo of a {}."
    return data.Task("speed", names_of(C), template, items, [], [], "", template, [], [])


def settings(method, *flags: str, device: str, memory_gb: float) -> argparse.Namespace:
    """The script's own settings. A learning rate of nothing: every step is then the first step."""
    argv = ["--dataset", prograd.DEFAULTS["toy"]["dataset"], "--cache-dir", "none", "--lr", "1e-12", "--device", device]
    argv += ["--memory-gb", str(memory_gb), "--checkpoint-seconds", "1e9", "--no-compare", *flags]
    return runs.settle(method.build_parser(), argv, method.__name__, method.DEFAULTS)


def now(device: str) -> float:
    """Seconds, once all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCK[0]()


# ----------------------------------------------------------------------------------------------------------------------
# 2. The plain way
# ----------------------------------------------------------------------------------------------------------------------
def plain_prompts(clip: common.Clip, names: list[str], M: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ "X .. X name." → embeddings of the full context length [C, T, W], and where EOT is [C]. As in CoOp."""
    tokens = clip.tokenizer([" ".join(["X"] * M) + f" {name}." for name in names]).to(clip.device)
    return clip.model.token_embedding(tokens), tokens.argmax(dim=-1)


def plain_text(net, embedded: torch.Tensor, eot: torch.Tensor) -> torch.Tensor:
    """Sequences [n, T, W] → features [n, D]."""
    x = net.transformer(embedded + net.positional_embedding, attn_mask=net.attn_mask)
    return net.ln_final(x)[torch.arange(len(x)), eot] @ net.text_projection


def plain_features(net, contexts: torch.Tensor, embedded: torch.Tensor, eot: torch.Tensor) -> torch.Tensor:
    """Every class under every context: contexts [L, M, W], embedded [C, T, W], eot [C] → [L, C, D]."""
    (L, M, _), C = contexts.shape, len(embedded)
    prompts = embedded.expand(L, -1, -1, -1)
    context = contexts[:, None].expand(-1, C, -1, -1)
    prompts = torch.cat([prompts[:, :, :1], context, prompts[:, :, 1 + M :]], dim=2)  # [L, C, T, W]
    return plain_text(net, prompts.flatten(0, 1), eot.repeat(L)).unflatten(0, (L, C))


def plain_gradients(clip, contexts, learned, losses_of, embedded, eot):
    """Losses of the text features, and each loss's gradient with respect to `learned` → (losses, gradients, seconds).

    contexts() → [L, M, W]; losses_of(features [L, C, D]) → losses, which may also depend on `learned` in other ways.
    More than BLOCK tokens are done in parts. The features' gradients then come from an extra forward pass, which the
    seconds leave out: they are what a machine with enough memory would take.
    """
    net, T = clip.model, embedded.shape[1]
    L, C = len(contexts()), len(embedded)
    if L * C * T <= BLOCK:
        start = now(clip.device)
        losses = losses_of(plain_features(net, contexts(), embedded, eot))
        gradients = [torch.autograd.grad(loss, learned, retain_graph=True) for loss in losses]
        return losses, gradients, now(clip.device) - start
    step = max(1, BLOCK // T)
    parts = [(l, torch.arange(C)[c : c + step]) for l in range(L) for c in range(0, C, step)]
    with torch.no_grad():
        done = [plain_features(net, contexts()[l, None], embedded[c], eot[c])[0] for l, c in parts]
    features = torch.cat(done).unflatten(0, (L, C)).requires_grad_()
    losses = losses_of(features)
    by_features = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
    direct = [torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True) for loss in losses]
    gradients = [[torch.zeros_like(p) if g is None else g for p, g in zip(learned, row)] for row in direct]
    start = now(clip.device)
    for l, c in parts:
        part = plain_features(net, contexts()[l, None], embedded[c], eot[c])[0]
        for row, by_feature in zip(gradients, by_features):
            for total, g in zip(row, torch.autograd.grad(part, learned, by_feature[l, c], retain_graph=True)):
                total += g
    return losses, gradients, now(clip.device) - start


def plain_images(clip, images: torch.Tensor, times: int) -> torch.Tensor:
    """Unit features of a batch, encoded as often as the released code does."""
    with torch.no_grad():
        for _ in range(times):
            features = clip.plain_visual(images)
    return F.normalize(features, dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Ours, timed from within the scripts' own training loops
# ----------------------------------------------------------------------------------------------------------------------
def timed_steps(work, device: str):
    """(what `work` returns, seconds from each step of its optimiser to the next): the first step only warms up."""
    marks = []
    handle = register_optimizer_step_post_hook(lambda *_: marks.append(now(device)))
    try:
        result = work()
    finally:
        handle.remove()
    return result, [b - a for a, b in zip(marks, marks[1:])] or [math.nan]


def our_training(method, args, clip, task, *views):
    """The script's own train() in a folder that is thrown away → (what it learned, the log's first line, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "config.json").write_text("{}")
        learner, seconds = timed_steps(lambda: method.train(args, clip, task, *views, out), clip.device)
        line = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return learner, line, seconds


def with_steps(args, steps: int) -> argparse.Namespace:
    """Epochs enough for that many steps, whether an epoch has one or more."""
    return argparse.Namespace(**vars(args) | {"epochs": steps, "max_steps": steps})


def image_batch(clip, task, args, view: int = 0) -> torch.Tensor:
    """The images that ours sees in this view, decoded and augmented: both ways pay for that."""
    images = vision.ImageSet(task.train, data.train_transform(clip.preprocess, args.augment), args.seed, view)
    return torch.stack([images[i][0] for i in range(len(images))]).to(clip.device)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 difference, in double precision."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


class Case:
    """One comparison. parts: {name: function that does the work once and returns its seconds}. ratios: (what, the plain
    parts, our parts, bar). check() → {what: relative difference of the two ways}.

    tokens: of the plain way's text pass. times: {part: how often it counts}. our_steps(k) trains k steps.
    """

    def __init__(self, parts, ratios, check, tokens=0, times=None, our_steps=None):
        self.parts, self.ratios, self.check, self.tokens = parts, ratios, check, tokens
        self.times, self.our_steps = times or {}, our_steps


def prograd_case(clip, C: int, M: int = 16, batch: int = 32, bars=(None, None, None)) -> Case:
    """Text and loss part (image features given to both); whole step with cached views; whole step with a fresh view."""
    task, flags = task_of(C, batch), ["--n-ctx", str(M), "--batch-size", str(batch), "--augment", "crop"]
    shared = {"device": clip.device, "memory_gb": clip.memory_gb}
    cached = settings(prograd, *flags, "--views", "1", **shared)
    fresh = settings(prograd, *flags, "--views", "0", **shared)
    embedded, eot = plain_prompts(clip, task.classnames, M)
    labels = torch.tensor([label for _, label in task.train], device=clip.device)
    x = plain_images(clip, image_batch(clip, task, cached), 1)  # [B, D]
    with torch.no_grad():
        template = clip.tokenizer([task.template.format(name) for name in task.classnames]).to(clip.device)
        teacher = torch.cat([F.normalize(clip.model.encode_text(part), dim=-1) for part in template.split(100)])
    start = prograd.initial_context(clip, task.template, M, "template", 1)
    context = start.clone().requires_grad_()

    def losses_of(features):
        text = F.normalize(features[0], dim=-1)
        logits, zs_logits = clip.scale * x @ text.T, clip.scale * x @ teacher.T
        return F.cross_entropy(logits, labels), F.cross_entropy(logits, zs_logits.softmax(dim=-1))

    last = []  # what the last timed plain step gave

    def plain_step():
        last[:] = plain_gradients(clip, lambda: context[None], [context], losses_of, embedded, eot)
        return last

    def check():
        (ce, kl), ((g_d,), (g_g,)), _ = last or plain_step()
        dot = (g_d * g_g).sum()
        g = g_d - dot / (g_g * g_g).sum() * g_g if dot < 0 else g_d
        learner, line, _ = our_training(prograd, with_steps(cached, 1), clip, task, lambda epoch: (x, labels))
        losses = {"loss_ce": abs(line["loss_ce"] / ce.item() - 1), "loss_kl": abs(line["loss_kl"] / kl.item() - 1)}
        return losses | {"gradient": difference(learner.context.grad, g)}

    def plain_encode():
        begin = now(clip.device)
        plain_images(clip, image_batch(clip, task, cached), 2)  # once by the zero-shot model, once by the student
        return now(clip.device) - begin

    def our_steps(steps):
        """In one epoch: what comes at its end is no part of a step."""
        views = x.repeat(steps, 1), labels.repeat(steps)
        return median(our_training(prograd, with_steps(cached, steps), clip, task, lambda epoch: views)[2])

    def our_fresh_view():
        views = vision.training_views(fresh, clip, task.train)
        return median(our_training(prograd, with_steps(fresh, 2), clip, task, views)[2])

    parts = {
        "plain text": lambda: plain_step()[2],
        "plain images": plain_encode,
        "ours": lambda: our_steps(4),
        "ours, fresh view": our_fresh_view,
    }
    ratios = [("text and loss", ["plain text"], ["ours"], bars[0]),
              ("step, cached views", ["plain text", "plain images"], ["ours"], bars[1]),
              ("step, fresh views", ["plain text", "plain images"], ["ours, fresh view"], bars[2])]  # fmt: skip
    return Case(parts, ratios, check, C * embedded.shape[1], our_steps=our_steps)


def vpt_case(clip, posterior: str, C: int = 50, L: int = 10, bar=None) -> Case:
    """A step on one image, whose feature is given to both: it is a hundredth of the plain step."""
    task = task_of(C, 1)
    flags = ["--posterior", posterior, "--samples", str(L), "--eval-samples", "0", "--batch-size", "1"]
    flags += ["--kl-weight", "0.001", "--residual-scale", "1"]
    args = settings(vpt, *flags, device=clip.device, memory_gb=clip.memory_gb)
    x, labels = plain_images(clip, image_batch(clip, task, args), 1), torch.tensor([task.train[0][1]])
    labels = labels.to(clip.device)
    context = vpt.initial_context(clip, args.ctx_init)
    embedded, eot = plain_prompts(clip, task.classnames, len(context))
    eps = vpt.training_noise(args, clip, 0, 0, torch.tensor([0]))[:, 0]  # [L, W]
    copied = copy.deepcopy(vpt.new_learner(args, clip, context))  # the same start
    learned = {name: p for name, p in copied.named_parameters() if p.requires_grad}

    def distribution():
        return (copied.mean, copied.logvar) if posterior == "global" else (copied.mean_net(x), copied.logvar_net(x))

    def contexts():
        mu, logvar = distribution()
        return copied.context + (mu + (logvar / 2).exp() * eps)[:, None]  # [L, M, W]

    def losses_of(features):
        mu, logvar = distribution()
        log_p = (clip.scale * F.normalize(features, dim=-1) @ x[0]).log_softmax(dim=-1).logsumexp(dim=0) - math.log(L)
        kl = (mu**2 + logvar.exp() - 1 - logvar).mean() / 2
        return [-log_p[labels[0]] + 0.001 * kl]

    last = []

    def plain_step():
        last[:] = plain_gradients(clip, contexts, list(learned.values()), losses_of, embedded, eot)
        return last

    def check():
        (loss,), (gradients,), _ = last or plain_step()
        learner, line, _ = our_training(vpt, with_steps(args, 1), clip, task, lambda epoch: (x, labels))
        ours = dict(learner.named_parameters())
        pairs = {name: difference(ours[name].grad, g) for name, g in zip(learned, gradients)}
        return {"loss": abs(line["loss"] / loss.item() - 1), "gradient": max(pairs.values())}

    def our_steps(steps):
        views = x.repeat(steps, 1), labels.repeat(steps)
        return median(our_training(vpt, with_steps(args, steps), clip, task, lambda epoch: views)[2])

    parts = {"plain": lambda: plain_step()[2], "ours": lambda: our_steps(4)}
    return Case(parts, [("step", ["plain"], ["ours"], bar)], check, L * C * embedded.shape[1], our_steps=our_steps)


def vpt_evaluation_case(clip, C: int = 50, L: int = 10, N: int = 1000, bar=None) -> Case:
    """Prediction of N images. The plain way encodes L * C prompts for each; one image is timed, and counted N times."""
    task = task_of(C, some := min(N, 50))
    flags = ["--samples", str(L), "--eval-samples", str(L), "--residual-scale", "1", "--augment", "none"]
    args = settings(vpt, *flags, device=clip.device, memory_gb=clip.memory_gb)
    learner = vpt.new_learner(args, clip, vpt.initial_context(clip, args.ctx_init))
    first = image_batch(clip, data.Task(**vars(task) | {"train": task.train[:1]}), args)
    embedded, eot = plain_prompts(clip, task.classnames, len(learner.context))

    @torch.no_grad()
    def plain_prediction():
        x = plain_images(clip, first, 1)
        residual = learner.mean + (learner.logvar / 2).exp() * learner.eval_noise[:, 0]
        text = F.normalize(plain_features(clip.model, learner.context + residual[:, None], embedded, eot), dim=-1)
        return (clip.scale * text @ x[0]).log_softmax(dim=-1).logsumexp(dim=0) - math.log(L)

    def check():
        found = vpt.predict(learner, clip, task.classnames, plain_images(clip, first, 1))["tuned"][0]
        return {"log-probabilities": difference(found, plain_prediction())}

    def seconds(work):
        def run():
            start = now(clip.device)
            work()
            return now(clip.device) - start

        return run

    x = F.normalize(torch.randn(N, clip.dim, device=clip.device), dim=-1)
    parts = {
        "plain": seconds(plain_prediction),  # of one image, with its encoding
        "ours": seconds(lambda: vpt.predict(learner, clip, task.classnames, x)),
        "ours, images": seconds(lambda: vision.encode_images(clip, task.train, clip.preprocess, args)),  # some of N
    }
    ratios = [
        ("images from the cache", ["plain"], ["ours"], bar),
        ("images too", ["plain"], ["ours", "ours, images"], None),
    ]
    return Case(parts, ratios, check, times={"plain": N, "ours, images": N / some})


def proreg_case(clip, C: int = 50, batch: int = 16, steps: int = 4, bars=(None, None)) -> Case:
    """Fine-tuning the image encoder, with augmentation and with --augment none, where the teacher's logits are kept."""
    task = task_of(C, batch * steps)
    flags = ["--batch-size", str(batch), "--epochs", "10", "--alpha", "2", "--power", "10", "--head-lr-factor", "100"]
    shared = {"device": clip.device, "memory_gb": clip.memory_gb}
    fresh = settings(proreg, *flags, "--augment", "randaugment", "--views", "0", **shared)
    fixed = settings(proreg, *flags, "--augment", "none", **shared)
    tokens = clip.tokenizer([task.template.format(name) for name in task.classnames]).to(clip.device)
    with torch.no_grad():
        zero_shot = clip.model.encode_text(tokens)  # [C, D]

    def plain_training(args, steps):
        student = copy.deepcopy(clip.plain_visual).requires_grad_(True)
        text = torch.nn.Parameter(zero_shot.clone())
        scale = torch.nn.Parameter(clip.model.logit_scale.detach().clone())
        optimizer = torch.optim.AdamW([*student.parameters(), text, scale], args.lr, (0.9, 0.98), weight_decay=0.01)
        images = vision.ImageSet(task.train, data.train_transform(clip.preprocess, args.augment), args.seed)
        order, first = torch.randperm(len(images), generator=data.generator(args.seed, "order", 0)), None
        for index in order.split(batch)[:steps]:
            rows = [images[i] for i in index.tolist()]  # the images of our batch
            x, labels = (torch.stack(part).to(clip.device) for part in zip(*[(i, torch.tensor(l)) for i, l, _ in rows]))
            logits = scale.exp() * F.normalize(student(x), dim=-1) @ F.normalize(text, dim=-1).T
            zs_logits = clip.scale * plain_images(clip, x, 1) @ F.normalize(zero_shot, dim=-1).T
            loss_ce = F.cross_entropy(logits, labels, reduction="none")
            loss_kl = F.cross_entropy(logits, zs_logits.softmax(dim=-1), reduction="none")
            with torch.no_grad():
                p, p_zs = (-loss_ce).exp(), (-10 * F.cross_entropy(zs_logits, labels, reduction="none")).exp()
                w = p_zs / (p + p_zs + 1e-5)
            loss = ((1 - w) * loss_ce).mean() + 2 * (w * loss_kl).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            first = loss.item() if first is None else first
        return first, text.grad, student.conv1.weight.grad

    def check():
        loss, *gradients = plain_training(fixed, 1)
        learner, line, _ = our_training(proreg, argparse.Namespace(**vars(fixed) | {"max_steps": 1}), clip, task)
        found = (learner.text_features.grad, learner.visual.conv1.weight.grad)
        worst = max(difference(a, b) for a, b in zip(found, gradients))
        return {"loss": abs(line["loss"] / loss - 1), "gradient": worst}

    def plain(args):
        return median(timed_steps(lambda: plain_training(args, steps), clip.device)[1])

    def ours(args):
        few = argparse.Namespace(**vars(args) | {"max_steps": steps})
        return median(our_training(proreg, few, clip, task)[2])

    parts = {"plain": lambda: plain(fresh), "ours": lambda: ours(fresh),
             "plain, --augment none": lambda: plain(fixed), "ours, --augment none": lambda: ours(fixed)}  # fmt: skip
    ratios = [("step", ["plain"], ["ours"], bars[0]),
              ("step, --augment none", ["plain, --augment none"], ["ours, --augment none"], bars[1])]  # fmt: skip
    return Case(parts, ratios, check)


# ----------------------------------------------------------------------------------------------------------------------
# 4. The cases, and what is measured of each
# ----------------------------------------------------------------------------------------------------------------------
VIT, RESNET, VIT32 = "ViT-B-16-quickgelu", "RN50-quickgelu", "ViT-B-32-quickgelu"
CASES = {  # name: (model, case); the bars are what two idle CPU cores should reach
    "prograd_47": (RESNET, lambda clip: prograd_case(clip, C=47)),
    "prograd_100": (VIT, lambda clip: prograd_case(clip, C=100, bars=(18, 30, 4))),
    "prograd_1000": (VIT, lambda clip: prograd_case(clip, C=1000, bars=(14, None, None))),
    "vpt_global": (VIT, lambda clip: vpt_case(clip, "global", bar=13)),
    "vpt_image": (VIT, lambda clip: vpt_case(clip, "image", bar=13)),
    "vpt_evaluation": (VIT, lambda clip: vpt_evaluation_case(clip, bar=200)),
    "proreg": (VIT32, lambda clip: proreg_case(clip, bars=(0.97, 1.2))),
}


def matrix_rates(device: str, n: int = 2048) -> dict[str, float]:
    """The machine's rates of fp32 matrix products in GFLOP/s, each the best of five: torch.mm's and common.linear's."""
    a, rates = torch.randn(n, n, device=device), {}
    for name, product in {"torch.mm": torch.mm, "common.linear": common.linear}.items():
        seconds = []
        for _ in range(5):
            start = now(device)
            product(a, a)
            seconds.append(now(device) - start)
        rates[name] = 2 * n**3 / min(seconds) / 1e9
    return rates


def operations(case: Case) -> float:
    """Operations in the matrix products of one of our training steps, counted as they run."""
    counts = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            case.our_steps(steps)
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


@functools.cache
def peak_memory(name: str, part: str, device: str) -> dict:
    """Peak memory of one part of a case in MiB, in a process of its own: in all, and over what stood there before."""
    command = [sys.executable, __file__, "--memory", name, part, "--device", device]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_memory(name: str, part: str, device: str) -> dict:
    case = build(name, device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        case.parts[part]()
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        ctypes.CDLL(None).malloc_trim(0)  # give back what building the case has freed
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
        before = resident("VmRSS")
        case.parts[part]()
        peak = resident("VmHWM")
    return {"peak_mb": round(peak), "added_mb": round(peak - before)}


def processor_seconds() -> tuple[float, float]:
    """Processor time of this process, and of all others (where the system tells: Linux)."""
    path, mine = Path("/proc/stat"), time.process_time()
    busy = [int(n) for n in path.read_text().splitlines()[0].split()[1:9]] if path.exists() else [100 * mine]
    return mine, sum(busy[:3] + busy[5:]) / 100 - mine  # without idle and waiting for disks


def resident(key: str) -> float:
    """VmRSS (resident memory now) or VmHWM (its peak) of this process, in MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def build(name: str, device: str) -> Case:
    model, make = CASES[name]
    return make(random_clip(model, device))


def run_case(name: str, rounds: int, device: str) -> dict:
    """Check, time in turn, take medians, weigh → what is stored and printed."""
    case = build(name, device)
    print(f"\n{name} ({CASES[name][0]}, {device}, load {os.getloadavg()[0]:.1f})")
    seconds, rates, start = {part: [] for part in case.parts}, [], processor_seconds()
    for _ in range(rounds):
        rates.append(matrix_rates(device))
        for part, work in case.parts.items():
            seconds[part].append(work())
    ours, others = (b - a for a, b in zip(start, processor_seconds()))
    print(f"  meanwhile other processes took {100 * others / (ours + others):.0f} % of the processor time used")
    equal = case.check()
    print("  relative difference, plain to ours: " + ", ".join(f"{k} {v:.1e}" for k, v in equal.items()))
    if not max(equal.values()) < 1e-3:
        raise SystemExit(f"error: {name}: the two ways do not agree, so their times do not compare")
    middle = {part: median(values) * case.times.get(part, 1) for part, values in seconds.items()}
    result = {
        "model": CASES[name][0],
        "equal": equal,
        "rounds": rounds,
        "others": others / (ours + others),
        "seconds": middle,
        "all": seconds,
    }
    rate = {name: median(row[name] for row in rates) for name in rates[0]}
    result |= {"matrix_gflops": rate, "ratios": {}, "memory": {}}
    for what, over, under, bar in case.ratios:
        ratio = sum(middle[part] for part in over) / sum(middle[part] for part in under)
        # A round's ratio compares neighbours in time; their spread says how far the ratio can be trusted.
        sums = [
            [sum(seconds[p][i] * case.times.get(p, 1) for p in side) for i in range(rounds)] for side in (over, under)
        ]
        each = [a / b for a, b in zip(*sums)]
        result["ratios"][what] = {"ratio": ratio, "low": min(each), "high": max(each), "bar": bar}
        verdict = "" if bar is None else f", bar {bar}: {'met' if ratio >= bar else 'NOT MET'}"
        print(f"  {what}: {ratio:.2f} times as fast ({min(each):.2f} to {max(each):.2f}){verdict}")
    if case.our_steps:
        reached = operations(case) / middle["ours"] / 1e9
        result["share"] = {name: reached / value for name, value in rate.items()}
        shares = " and ".join(f"{reached / value:.2f} of {name}'s {value:.0f}" for name, value in rate.items())
        print(f"  ours: {reached:.0f} GFLOP/s, {shares}")
    for part, value in middle.items():
        text = ""
        if case.tokens > BLOCK and part in ("plain", "plain text"):  # too much to be tried: counted from 7,700 tokens
            added = peak_memory("prograd_100", "plain text", device)["added_mb"] * case.tokens / BLOCK
            result["memory"][part] = {"added_mb": round(added), "computed": True}
            text = f", about {added:.0f} MiB (computed from a smaller case)"
        elif any(part in over + under for _, over, under, _ in case.ratios[:1]):
            found = result["memory"][part] = peak_memory(name, part, device)
            text = f", {found['peak_mb']} MiB at peak, {found['added_mb']} MiB of it by the work itself"
        print(f"  {part}: {1000 * value:.0f} ms{text}")
    return result


# ----------------------------------------------------------------------------------------------------------------------
# 5. How cost grows
# ----------------------------------------------------------------------------------------------------------------------
GROWTH = {  # axis: (values, values at which the plain way is timed too, case, prompts' (prefixes, classes, P))
    "C": ([10, 30, 100, 300, 1000], [10, 30, 100], lambda clip, C: prograd_case(clip, C), lambda C: (1, C, 17)),
    "L": ([1, 2, 5, 10, 20, 40], [1, 2], lambda clip, L: vpt_case(clip, "global", L=L), lambda L: (L, 50, 5)),
    "M": ([4, 8, 16, 32, 64], [4, 16, 64], lambda clip, M: prograd_case(clip, 100, M), lambda M: (1, 100, 1 + M)),
}  # fmt: skip
TITLES = {
    "C": "classes C (ProGrad, M = 16)",
    "L": "samples L (VPT, C = 50)",
    "M": "context tokens M (ProGrad, C = 100)",
}


def grow(rounds: int, device: str) -> dict:
    """Seconds of the text and loss part of a training step against C, L and M; names of S = 6 tokens."""
    clip, table = random_clip(VIT, device), {}
    print(f"\n{'':8}{'tokens, plain':>15}{'ours':>8}{'ms, plain':>12}{'ours':>10}{'ours, ms/token':>16}")
    for axis, (values, plain_values, make, shape) in GROWTH.items():
        table[axis] = []
        for value in values:
            case, (G, C, P) = make(clip, value), shape(value)
            names = [next(part for part in case.parts if part.startswith("plain")), "ours"]
            row = {axis: value, "plain_tokens": case.tokens, "our_tokens": G * (P + 6 * C)}
            for key, part in zip(("plain", "ours"), names):
                wanted = key == "ours" or value in plain_values
                row[key] = median(case.parts[part]() for _ in range(rounds)) if wanted else None
            table[axis].append(row)
            plain = "" if row["plain"] is None else f"{1000 * row['plain']:.0f}"
            each = 1000 * row["ours"] / row["our_tokens"]
            print(f"{axis} = {value:<4}{row['plain_tokens']:>15}{row['our_tokens']:>8}{plain:>12}"
                  f"{1000 * row['ours']:>10.0f}{each:>16.2f}", flush=True)  # fmt: skip
    return table


def draw(table: dict, path: Path) -> None:
    """The picture of grow()'s table, if matplotlib is there."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.rcParams.update({"svg.hashsalt": "speed", "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for panel, (axis, rows) in zip(panels, table.items()):
        for key, style in (("plain", "s--"), ("ours", "o-")):
            points = [(row[axis], row[key]) for row in rows if row[key]]
            panel.plot(*zip(*points), style, label={"plain": "full sequences", "ours": "shared prefix (ours)"}[key])
        panel.set(xscale="log", yscale="log", xlabel=TITLES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})
    print(f"written: {path}")


def machine(device: str, threads: int) -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"load": os.getloadavg()[0], "versions": common.versions(), "commit": runs.commit()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[], help="which comparisons [all]")
    parser.add_argument("--growth", action="store_true", help="seconds against C, L and M instead")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed, in turn; medians count [3]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU [all cores]")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: processor seconds, for a shared "
                        "machine; use it with --threads 1 [wall]")  # fmt: skip
    parser.add_argument("--out", default=str(RESULTS), help="folder of speed.json and cost.svg [benchmark/results]")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "PART"), help="only measure a part's peak memory")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    CLOCK[0] = CLOCKS[args.clock]
    logging.disable(logging.WARNING)  # open_clip warns of random weights, which are meant
    if args.memory:
        print(json.dumps(measure_memory(*args.memory, args.device)))
        return
    path = Path(args.out, f"speed{'' if args.device == 'cpu' else '-' + args.device}.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    here = machine(args.device, args.threads) | {"clock": args.clock}
    print(
        f"{here['cpu']}, {args.threads} threads, {args.clock} clock, load {here['load']:.1f}, torch {torch.__version__}"
    )
    if args.growth:
        found["growth"] = {"machine": here, "table": grow(args.rounds, args.device)}
        draw(found["growth"]["table"], path.with_name("cost.svg"))
    for name in [] if args.growth else args.cases or CASES:
        load = os.getloadavg()[0]
        found["cases"][name] = run_case(name, args.rounds, args.device) | {"machine": here | {"load": load}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
