"""Replay of proreg*: losses on recorded logits, and proreg.py's own loop on the recorded step."""

import argparse
import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_prograd import make_task
from golden_world import GoldenWorld, Recording, close

import common
import proreg

PATTERN = "proreg*"


def numbers(case: str) -> dict[str, float]:
    """{"alpha": 2.0, "T": 1.0} of "alpha2.0_T1.0" (and gamma, which the released code reads and
    does not use)."""
    found = {}
    for part in case.split("_"):
        for name in ("alpha", "gamma", "T"):
            value = part.removeprefix(name)
            if value != part and value.replace(".", "").isdigit():
                found[name] = float(value)
    return found


def replay(g: Recording, golden: GoldenWorld) -> None:
    if g.name.endswith(".json"):
        replay_groups(g, golden)
        return
    replay_losses(g)
    for key in g.cases("step/*/loss"):
        replay_step(g, golden, key)


def replay_losses(g: Recording) -> None:
    """Weights, losses and gradients on logits, saturated rows included."""
    logits, zs_logits, labels = g["logits/student"], g["logits/teacher"], g["logits/labels"]
    close(proreg.adaptive_weight(logits, zs_logits, labels), g["xERM/w_t"], "w")
    close(proreg.label_losses(logits, labels), g["xERM/XE_s"], "student's label losses")
    close(proreg.label_losses(zs_logits, labels), g["xERM/XE_t"], "teacher's label losses")
    for key in [*g.cases("xERM/*/loss"), *g.cases("knowledge_distill/*/loss")]:
        kind, case = key.split("/")
        alpha, T = numbers(case)["alpha"], numbers(case)["T"]
        student = logits.clone().requires_grad_()
        if kind == "xERM":
            loss = proreg.proreg_loss(student, zs_logits, labels, alpha, T=T)
        else:
            loss = proreg.fixed_kd_loss(student, zs_logits, labels, alpha, T)
        (gradient,) = torch.autograd.grad(loss, student)
        close(loss, g[f"{key}/loss"], f"{key} loss")
        close(gradient, g[f"{key}/grad"], f"{key} gradient")


def replay_step(g: Recording, golden: GoldenWorld, key: str) -> None:
    """One step of proreg.train on the first batch of images: loss, logits, every gradient."""
    seen = first_step(g, golden, key.split("/")[1])
    close(seen["loss"], g[f"{key}/loss"], f"{key} loss")
    for name in g.keys():
        if name == f"{key}/logits":
            close(seen["logits"], g[name], name)
        elif name.startswith(f"{key}/grad/"):
            close(seen["gradients"][name.split("/grad/")[1]], g[name], name)


def first_step(g: Recording, golden: GoldenWorld, case: str) -> dict:
    """What proreg.train computes in its first step: loss, logits, {name: gradient}."""
    clip, labels = golden.clip, g["step/labels"]
    size = clip.model.visual.image_size
    images = golden.images[f"images{size if isinstance(size, int) else size[0]}"][0]
    text = recorded_text(g, golden)
    given = numbers(case)
    loss = {"xERM": "proreg", "kd": "kd", "ce": "ce"}[case.split("_")[0]]
    settings = {"loss": loss, "alpha": given.get("alpha", 0.0), "epochs": 1, "max_steps": 0}
    settings |= {"temperature": given.get("T", 1.0), "seed": 1, "precision": "fp32"}
    settings |= {"device": "cpu", "eval_every": 0}
    args = argparse.Namespace(**proreg.PAPER | settings)
    task = make_task(golden.classnames, recorded_template(g, golden), "")
    task.template = recorded_template(g, golden)
    student = proreg.PromptedClassifier(clip, task.classnames, task.template)
    start = student.state_dict() | {"visual.proj": g["step/student_visual_proj"]}
    start |= {key: g[f"step/student_{key}"] for key in ("text_features", "logit_scale")}
    student.load_state_dict(start)
    batch = torch.arange(len(labels))
    seen = {}

    def teacher(images, index):
        x = F.normalize(clip.model.encode_image(images), dim=-1)
        return clip.scale * x @ F.normalize(text, dim=-1).T

    def classify(learner, features, text=None, kept=proreg.PromptedClassifier.forward):
        seen["logits"] = kept(learner, features, text)
        seen["learner"] = learner
        return seen["logits"]

    def step(optimizer, *_):
        learned = seen["learner"].named_parameters()
        seen["gradients"] = {name: p.grad.clone() for name, p in learned}

    def end_epoch(args, clip, task, out, epoch, learner, optimizer, sums):
        seen["loss"] = sums[1] / sums[0]

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(proreg, "epoch_order", lambda *_: [batch]))
        stream = lambda epoch, order: iter([[(images, labels, batch)]])  # noqa: E731
        stack.enter_context(patch(proreg, "training_stream", lambda *_: stream))
        stack.enter_context(patch(proreg, "zero_shot_teacher", lambda *_: teacher))
        stack.enter_context(patch(proreg, "end_epoch", end_epoch))
        stack.enter_context(patch(proreg.PromptedClassifier, "forward", classify))
        stack.enter_context(patch(torch.optim.AdamW, "step", step))
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common.save_checkpoint(out, student, epoch=0)  # train goes on from what it finds
        proreg.train(args, clip, task, out)
    return seen


def recorded_template(g: Recording, golden: GoldenWorld) -> str:
    """The template of the recorded prompts, read off one whose name tokenises to plain words."""
    clip = golden.clip
    for name, row in zip(golden.classnames, g["step/tokenized_prompts"].tolist()):
        if name.isalpha():
            words = clip.tokenizer.decode(row[1 : row.index(clip.tokenizer.eot_token_id)]).strip()
            return words.replace(name.lower(), "{}").replace("{} .", "{}.")
    raise AssertionError("no class name is a plain word")


def recorded_text(g: Recording, golden: GoldenWorld) -> torch.Tensor:
    """Text features of the recorded tokens, [C, D]: by open_clip for all classes, and by ours where
    the name has no underscore (the released code leaves it, ours makes it a blank)."""
    clip, recorded = golden.clip, g["step/teacher_text_features"]
    with torch.no_grad():
        close(clip.model.encode_text(g["step/tokenized_prompts"]), recorded, "released prompts")
    plain = [c for c, name in enumerate(golden.classnames) if "_" not in name]
    names = [golden.classnames[c] for c in plain]
    ours = common.prompt_features(clip, names, recorded_template(g, golden))
    close(ours, recorded[plain], "our prompts")
    return recorded


def replay_groups(g: Recording, golden: GoldenWorld) -> None:
    """Rate and decay of every tensor that ours trains; the others are the text tower's."""
    clip, lr = golden.clip, proreg.PAPER["lr"]
    learner = proreg.PromptedClassifier(clip, ["one", "two"], "{}")
    names = {id(p): name for name, p in learner.named_parameters()}
    factor, decay = proreg.PAPER["head_lr_factor"], proreg.PAPER["weight_decay"]
    ours = {}
    for group in proreg.parameter_groups(learner, lr, factor, decay):
        for p in group["params"]:
            name = names[id(p)]
            name = name if name == "text_features" else f"clip.{name}"
            ours[name] = [group["peak"], group["weight_decay"]]
    recorded, count = {}, 0
    for group in g["groups"]:
        recorded |= dict.fromkeys(group["clip_part"], [group["lr"], group["weight_decay"]])
        count += group["n"]
    assert len(ours) == len(names)
    for name, found in ours.items():
        close(found, recorded[name], name)
    text = {f"clip.{n}" for n, _ in clip.model.named_parameters() if not n.startswith("visual.")}
    assert set(recorded) - set(ours) == text - {"clip.logit_scale"}
    # The released groups also hold the frozen teacher, a second CLIP.
    assert count == 2 * len(list(clip.model.parameters())) + 1
    schedule = g["schedule"]
    steps, rising = schedule["num_training_steps"], schedule["num_warmup_steps"]
    assert schedule["power"] == 1 and schedule["lr_end"] == 0
    for step in range(steps):
        share = step / rising if step < rising else (steps - step) / (steps - rising)
        assert abs(proreg.warmup_linear(step, steps, rising / steps) - share) < 1e-12
