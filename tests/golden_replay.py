"""Replays of the three methods' recordings, through their functions and their own training loops.
Each of REPLAYS takes a recording and its world, and notes in the recording how far all is off."""

import argparse
import contextlib
import copy
import dataclasses
import math
import re
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_world import GoldenWorld, Recording, deviation

import common
import data
import prograd
import proreg
import vpt


def settings(module, **given) -> argparse.Namespace:
    """The settings of module's script: these, and elsewhere the paper's defaults."""
    paper = common.DEFAULTS | module.defaults({"dataset": "golden"}) | {"device": "cpu"}
    return argparse.Namespace(**paper | given)


def make_task(classnames: list[str], template: str, labels=()) -> data.Task:
    """A task whose images are given otherwise."""
    train = [("", label) for label in labels]
    return data.Task("golden", classnames, template, template, train, [], [], [])


def train(module, args, clip, task, batches: list[tuple], start=None, rates=None) -> list[dict]:
    """module.train of prograd or vpt, batches[i] = (x [B, D], labels [B]) in epoch i: what each
    step left behind. start: a learner to begin with. rates: of a recorded schedule; none: --lr."""
    steps = []
    schedule = common.warmup_cosine if rates is not None else lambda *_: args.lr
    args.epochs = len(batches)
    if rates is not None and len(rates) > 2:  # lr / 2 · (1 + cos(π / E)) tells E; all are compared
        args.epochs = round(math.pi / math.acos(2 * rates[2].item() / rates[1].item() - 1))

    def end_epoch(out, epoch, learner, optimizer, line, **note):
        for name, p in learner.named_parameters():
            momentum = optimizer.state[p]["momentum_buffer"]
            line[name] = p.detach().clone(), p.grad.clone(), momentum.clone()
        steps.append(line)

    with (
        mock.patch.object(data, "batches", lambda n, *_: [torch.arange(n)]),
        mock.patch.object(common, "end_epoch", end_epoch),
        mock.patch.object(common, "warmup_cosine", schedule),
        tempfile.TemporaryDirectory() as out,
        contextlib.suppress(IndexError),  # where the batches end
    ):
        if start is not None:  # train goes on from the checkpoint that it finds
            common.save_checkpoint(Path(out), start, epoch=0)
        module.train(args, clip, task, batches.__getitem__, Path(out))
    assert len(steps) == len(batches)
    return steps


def before_names(clip: common.Clip, classnames: list[str], g: Recording, key: str) -> list[int]:
    """Of tokenised prompts the ids between SOS and the class name, the same in all. What follows
    must be our tokens of the name, a full stop and EOT, and zeros."""
    recorded, texts = g[key], [f"{name}." for name in classnames]
    # The place of EOT, the highest id, tells how many tokens more than SOS stand before the name.
    P = 1 + int(recorded[0].argmax() - common.pad(clip, texts)[0].argmax())
    ours = common.pad(clip, texts, P)
    ours[:, 1:P] = recorded[0, 1:P]
    g.compare(key, ours)
    return recorded[0, 1:P].tolist()


# ProGrad ------------------------------------------------------------------------------------------
class ProGradCase:
    """What one recording was made with: tower, template, start, temperature, image features. Tower
    and template are found by comparing; the comparison then has to hold."""

    def __init__(self, g: Recording, golden: GoldenWorld):
        self.start = g["ctx_init"]  # [M, W] or [C, M, W]
        self.M = self.start.shape[-2]
        self.T = g["T"].item()
        towers = [(clip, golden.features(clip)) for clip in golden.clips.values()]
        recorded = g["image_features_unnorm"]
        self.clip, self.features = min(towers, key=lambda tower: deviation(tower[1], recorded))
        self.x = F.normalize(self.features, dim=-1)  # [NB, B, D]

        # PAPER vs CODE 4: the released code counts words. Tokens beyond them stay before the class
        # name, not learned. Such a prompt is ours with these words as part of every name.
        ids = before_names(self.clip, golden.classnames, g, "tokenized_prompts")
        left = self.clip.tokenizer.decode(ids[self.M :]).strip()
        self.names = [f"{left} {name}".strip() for name in golden.classnames]
        empty = self.clip.tokenizer.encode("X")[0]  # of a slot without a word
        words = self.clip.tokenizer.decode([i for i in ids[: self.M] if i != empty]).strip()
        known = {source.teacher or source.template for source in data.SOURCES.values()}
        candidates = [f"{words} {{}}."] if words else sorted(known)
        off = {t: deviation(self.teacher(t), g["zs_text_features"]) for t in candidates}
        self.template = min(off, key=off.get)
        # A row of the embedding table: the start is a template's, which train() makes itself.
        table = self.clip.model.token_embedding.weight
        last = self.start.reshape(-1, self.clip.width)[-1]
        self.from_template = bool(words) and bool((table == last).all(dim=1).any())

    def teacher(self, template: str) -> torch.Tensor:
        return common.zero_shot_classifier(self.clip, self.names, [template])

    def train(self, labels: torch.Tensor, rates=None, **flags) -> list[dict]:
        """prograd.train on batch i = (x[i], labels[i]): what each step saw and left behind."""
        flags |= {"n_ctx": self.M, "csc": self.start.dim() == 3, "temperature": self.T}
        flags |= {"init": "template" if self.from_template else "random"}
        start = None if self.from_template else prograd.PromptLearner(self.clip, self.start)
        seen = []

        def loss(logits, zs_logits, T, kept=prograd.distillation_loss):
            seen.append({"logits": logits.detach(), "zs_logits": zs_logits})
            return kept(logits, zs_logits, T)

        def project(g_d, g_g, lam, kept=prograd.project_gradient):
            seen[-1] |= {"g_d": g_d, "g_g": g_g}
            return kept(g_d, g_g, lam)

        task, batches = make_task(self.names, self.template), list(zip(self.x, labels))
        with (
            mock.patch.object(prograd, "distillation_loss", loss),
            mock.patch.object(prograd, "project_gradient", project),
        ):
            args = settings(prograd, **flags)
            steps = train(prograd, args, self.clip, task, batches, start, rates)
        return [step | saw for step, saw in zip(steps, seen, strict=True)]


def prograd_replay(g: Recording, golden: GoldenWorld) -> None:
    case = ProGradCase(g, golden)
    clip = case.clip
    g.compare("image_features_unnorm", case.features)
    g.compare("zs_text_features", case.teacher(case.template))
    lengths = [len(clip.tokenizer.encode(name.replace("_", " "))) for name in golden.classnames]
    g.compare("name_lens", lengths)
    learner = prograd.PromptLearner(clip, case.start)
    with torch.no_grad():
        g.compare("text_features_unnorm", learner(learner.names(case.names)))
    if case.from_template:
        g.compare("ctx_init", prograd.initial_context(clip, case.template, case.M, "template", 1))
    kinds = g.cases("*/labels")
    g.compare("logits_init", prograd.class_logits(learner, clip, case.names, case.x))
    still = case.train(g[f"{kinds[0]}/labels"], lr=0.0)  # nothing moves
    g.compare("logits_init", torch.stack([step["logits"] for step in still]), " in training")
    g.compare("zs_logits", torch.stack([step["zs_logits"] for step in still]))
    for kind in kinds:  # on batch 0 at the start
        labels = g[f"{kind}/labels"][:1]
        (first,) = case.train(labels)
        ours = {"xe_loss": "loss_ce", "kl_loss": "loss_kl", "g_d": "g_d", "g_g": "g_g"}
        for key, name in ours.items():
            g.compare(f"{kind}/{key}", first[name])
        g.compare(f"{kind}/cos", first["cosine"], absolute=True)
        for key in g.keys(f"{kind}/g_proj_lam*"):
            (step,) = case.train(labels, lam=float(key.rpartition("_lam")[2]))
            g.compare(key, step["context"][1])
    for key in g.cases("*/ctx"):
        prograd_trajectory(case, g, key)


def prograd_trajectory(case: ProGradCase, g: Recording, key: str) -> None:
    """Every recorded quantity along KIND/sgd_const_lamX or KIND/sgd_sched_lamX."""
    kind, run = key.split("/")
    labels = g[f"{kind}/labels"][: len(g[f"{key}/ctx"])]
    rates = None if run.startswith("sgd_const") else g[f"{key}/lr"]
    steps = case.train(labels, rates, lam=float(run.rpartition("_lam")[2]))
    context, gradient, momentum = zip(*[step["context"] for step in steps])
    g.compare_rows(f"{key}/ctx", context, case.start)
    g.compare_rows(f"{key}/lr", [step["lr"] for step in steps])
    g.compare(f"{key}/cos", [step["cosine"] for step in steps], absolute=True)
    g.compare_rows(f"{key}/grad_norm_applied", [grad.norm() for grad in gradient])
    g.compare(f"{key}/momentum_buffer", momentum[-1])
    *losses, accuracy = g[f"{key}/xe_kl_acc"].T
    for name, recorded in zip(("loss_ce", "loss_kl"), losses):
        g.off[f"{key}/xe_kl_acc {name}"] = deviation([step[name] for step in steps], recorded)
    # The accuracy was made in float32: count images.
    right = torch.stack([step["logits"].argmax(dim=1) for step in steps]) == labels
    counts = (accuracy * labels.shape[1] / 100).round()
    g.off[f"{key}/xe_kl_acc accuracy"] = deviation(right.sum(dim=1), counts)


# VPT ----------------------------------------------------------------------------------------------
# The released code's parameter names and ours.
RELEASED = {"ctx": "context", "mean_posterior": "mean", "std_posterior": "logvar"}
RELEASED |= {"meta_net.weight_mean.module": "mean_net"}
RELEASED |= {"meta_net.weight_log_variance.module": "logvar_net"}


def vpt_replay(g: Recording, golden: GoldenWorld) -> None:
    # What it was made with: posterior, start, image features, noise.
    clip, classnames, labels = golden.clip, golden.classnames, g["labels"]  # [NB, b]
    released = {}  # {our name: theirs}
    for theirs in (key.removeprefix("init/") for key in g.keys("init/*")):
        stem = next(stem for stem in RELEASED if theirs.startswith(stem))
        released[theirs.replace(stem, RELEASED[stem])] = theirs
    ids = before_names(clip, classnames, g, "tokenized_prompts")
    args = settings(
        vpt,
        posterior="global" if "mean" in released else "image",
        samples=g["L"].item(),
        batch_size=g["batch"].item(),
        ctx_init=clip.tokenizer.decode(ids).strip(),
    )
    context = vpt.initial_context(clip, args.ctx_init)
    g.compare("init/ctx", context)
    learner = vpt.new_learner(args, clip, context)
    learner.load_state_dict({name: g[f"init/{theirs}"] for name, theirs in released.items()})
    learner.eval_noise = g["eps_eval"]
    images = F.normalize(golden.features(clip), dim=-1)  # [NB, B, D]
    batches = [(x[: len(y)], y) for x, y in zip(images, labels)]  # the first of each

    def steps_of(n: int, rates=None) -> list[dict]:
        task = make_task(classnames, "")
        with mock.patch.object(vpt, "training_noise", lambda args, clip, i, *_: g["eps"][i]):
            return train(vpt, args, clip, task, batches[:n], learner, rates)

    # The first batch.
    x, _ = batches[0]
    g.compare("image_features_norm", x)
    names = common.name_tokens(clip, classnames, len(learner.context))
    with torch.no_grad():
        mu, logvar = learner.posterior(x)
        text = learner(names, vpt.sample_residual(mu, logvar, g["eps"][0]))  # [L, 1, C, D]
    g.compare("mu", mu)
    g.compare("logvar", logvar)
    g.compare("text_features_unnorm", text.squeeze(1))
    (first,) = steps_of(1)
    for key, name in {"loss": "loss", "task_loss": "loss_task", "kl": "kl"}.items():
        g.compare(key, first[name].reshape(1))
    for name, theirs in released.items():
        g.compare(f"grad/{theirs}", first[name][1])
    # Evaluation: the same noise for every image, hence the same prediction alone and together.
    for key in g.keys("eval_logprob*"):
        x = images[0, : len(g[key])]
        each = [vpt.class_logits(learner, clip, classnames, row[None]) for row in x]
        g.compare(key, torch.cat(each), " one at a time")
        g.compare(key, vpt.class_logits(learner, clip, classnames, x))
    # Training.
    for key in g.cases("sgd_*/lr"):
        rates = None if key.startswith("sgd_const") else g[f"{key}/lr"]
        steps = steps_of(len(g[f"{key}/lr"]), rates)
        g.compare_rows(f"{key}/lr", [step["lr"] for step in steps])
        g.compare(f"{key}/loss", [step["loss"] for step in steps])
        for name, start in learner.named_parameters():
            values = [step[name][0] for step in steps]
            g.compare_rows(f"{key}/{released[name]}", values, start.detach())


# ProReg -------------------------------------------------------------------------------------------
# PAPER vs CODE 6: the release leaves a "_" in a class name, ours makes it a blank. This letter
# stands in for it on the way to the tokeniser, which is handed the "_": so the tokens are the
# release's, and all that follows is our code.
STAND_IN = "\ue000"
LOSSES = {"xERM": "proreg", "knowledge_distill": "kd", "kd": "kd", "ce": "ce"}  # --loss


def loss_flags(case: str) -> dict:
    """--loss, --alpha, --temperature of "xERM_alpha2.0_T1.0" (gamma is not used by the release)."""
    flags = {"loss": next(LOSSES[kind] for kind in LOSSES if case.startswith(kind))}
    for name, value in re.findall(r"(alpha|T)([\d.]+)", case):
        flags[name.replace("T", "temperature")] = float(value)
    return flags


def proreg_replay(g: Recording, golden: GoldenWorld) -> None:
    # Weights, losses and gradients on logits, saturated rows included.
    logits, zs_logits, labels = g["logits/student"], g["logits/teacher"], g["logits/labels"]
    g.compare_rows("xERM/w_t", proreg.adaptive_weight(logits, zs_logits, labels))
    g.compare("xERM/XE_s", proreg.label_losses(logits, labels))
    g.compare("xERM/XE_t", proreg.label_losses(zs_logits, labels))
    for key in [*g.cases("xERM/*/loss"), *g.cases("knowledge_distill/*/loss")]:
        flags, student = loss_flags(key), logits.clone().requires_grad_()
        loss = proreg.proreg_loss if flags["loss"] == "proreg" else proreg.fixed_kd_loss
        found = loss(student, zs_logits, labels, flags["alpha"], T=flags["temperature"])
        g.compare(f"{key}/loss", found)
        g.compare(f"{key}/grad", torch.autograd.grad(found, student)[0])

    # The first step of proreg.train on the first batch of images.
    clip = dataclasses.replace(golden.clip, tokenizer=copy.copy(golden.clip.tokenizer))
    encode = golden.clip.tokenizer.encode
    clip.tokenizer.encode = lambda text: encode(text.replace(STAND_IN, "_"))
    names = [name.replace("_", STAND_IN) for name in golden.classnames]
    ids = before_names(clip, names, g, "step/tokenized_prompts")
    student = proreg.PromptedClassifier(clip, names, f"{clip.tokenizer.decode(ids).strip()} {{}}.")
    g.compare("step/teacher_text_features", student.text_features)  # as it starts: unnormalised
    start = {"visual.proj": g["step/student_visual_proj"]}
    start |= {key: g[f"step/student_{key}"] for key in ("text_features", "logit_scale")}
    student.load_state_dict(student.state_dict() | start)
    images, labels = golden.images(clip)[0], g["step/labels"]
    for key in g.cases("step/*/loss"):
        flags = loss_flags(key.split("/")[1])
        ((loss, learned),) = train_proreg(clip, student, images, labels, epochs=1, **flags)
        g.compare(f"{key}/loss", loss)
        g.compare(f"{key}/logits", student(student.encode_image(images)))
        for name, (_, gradient, _) in learned.items():
            g.compare(f"{key}/grad/{name}", gradient)


def train_proreg(clip, start, images: torch.Tensor, labels: torch.Tensor, **flags) -> list[tuple]:
    """proreg.train from the learner `start` on one view of images [N, 3, H, W], labels [N]. Of each
    step: its loss, and {name: (parameter after it, its gradient, its rate)}."""
    flags = {"batch_size": len(labels), "augment": "crop", "views": 1, "workers": 0} | flags
    task = make_task(start.classnames, start.template, labels.tolist())
    losses, steps = [], []

    def step(*given, kept=proreg.step):
        losses.append(kept(*given))
        return losses[-1]

    def update(optimizer, *_, kept=torch.optim.AdamW.step):
        kept(optimizer)
        steps.append({})
        for group in optimizer.param_groups:
            for p in group["params"]:
                steps[-1][id(p)] = p.detach().clone(), p.grad.clone(), group["lr"]

    rows = list(zip(images, labels.tolist(), range(len(labels))))
    with (
        mock.patch.object(data, "ImageSet", lambda *_: rows),
        mock.patch.object(proreg, "step", step),
        mock.patch.object(torch.optim.AdamW, "step", update),
        tempfile.TemporaryDirectory() as out,
    ):
        common.save_checkpoint(Path(out), start, epoch=0)  # train goes on from what it finds
        learner = proreg.train(settings(proreg, **flags), clip, task, Path(out))
    names = {name: id(p) for name, p in learner.named_parameters()}
    learned = [{name: found[i] for name, i in names.items()} for found in steps]
    return list(zip([loss for loss, _ in losses], learned, strict=True))


def proreg_groups(g: Recording, golden: GoldenWorld) -> None:
    """Rate and decay of every tensor that ours trains; and the schedule's arguments."""
    args = settings(proreg)
    learner = proreg.PromptedClassifier(golden.clip, golden.classnames, "{}")
    names = {p: f"clip.{name}" for name, p in learner.named_parameters()}
    names[learner.text_features] = "text_features"
    groups = proreg.parameter_groups(learner, args.lr, args.head_lr_factor, args.weight_decay)
    ours = {names[p]: (x["peak"], x["weight_decay"]) for x in groups for p in x["params"]}
    theirs = {}
    for group in g["groups"]:
        assert group.keys() == {"lr", "weight_decay", "n", "clip_part"}
        theirs |= dict.fromkeys(group["clip_part"], (group["lr"], group["weight_decay"]))
    # What ours does not have is the text tower: in the released optimiser, without a gradient.
    # That one also holds the frozen teacher, a second CLIP.
    model = dict(golden.clip.model.named_parameters())
    text = {f"clip.{n}" for n in model if not n.startswith("visual.") and n != "logit_scale"}
    assert text <= theirs.keys() and len(ours) == len(names)
    assert ours == {name: rule for name, rule in theirs.items() if name not in text}
    assert sum(group["n"] for group in g["groups"]) == 2 * len(model) + 1

    # Up from 0, then transformers' polynomial decay of power 1 down to 0.
    given = dict(g["schedule"])
    steps, rising = given.pop("num_training_steps"), given.pop("num_warmup_steps")
    assert given == {"power": 1, "lr_end": 0}
    up = [step / rising for step in range(rising)]
    down = [(steps - step) / (steps - rising) for step in range(rising, steps)]
    assert [proreg.warmup_linear(step, steps, args.warmup) for step in range(steps)] == up + down


REPLAYS = {  # by the pattern of their files
    "prograd_*.npz": prograd_replay,
    "vpt_*.npz": vpt_replay,
    "proreg*.npz": proreg_replay,
    "proreg*.json": proreg_groups,
}
