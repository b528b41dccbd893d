"""Replay of proreg*: the losses on recorded logits, and the shipped training loop on the recorded full steps.

A full step starts from a student that is not the zero-shot model. `train` meets it as a run to be resumed.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_world import GoldenWorld, Recording, close

import common
import data
import proreg
import runs

PATTERN = "proreg*"
SKIP = {}
VALUE, GRADIENT = 1e-5, 2e-5  # design.md, "Golden data"


def numbers(case: str) -> dict[str, float]:
    """{"alpha": 2.0, "T": 1.0} of "alpha2.0_T1.0" (and gamma, which the released code reads and does not use)."""
    pairs = [(name, part.removeprefix(name)) for part in case.split("_") for name in ("alpha", "gamma", "T")]
    return {name: float(value) for name, value in pairs if value.replace(".", "").isdigit()}


def replay(name: str, g: Recording, golden: GoldenWorld) -> None:
    if name.endswith(".json"):
        return replay_groups(g, golden)
    replay_losses(g)
    for case in sorted({key.split("/")[1] for key in g.keys() if key.startswith("step/") and key.endswith("/loss")}):
        replay_step(g, golden, case)


def replay_losses(g: Recording) -> None:
    """Weights, losses and gradients on logits, saturated rows included."""
    logits, zs_logits, labels = g["logits/student"], g["logits/teacher"], g["logits/labels"]
    weight = proreg.adaptive_weight(logits, zs_logits, labels)
    close(weight, g["xERM/w_t"], VALUE, "w")
    close(F.cross_entropy(logits, labels, reduction="none"), g["xERM/XE_s"], VALUE, "student's label loss")
    close(F.cross_entropy(zs_logits, labels, reduction="none"), g["xERM/XE_t"], VALUE, "teacher's label loss")
    for key in [key.removesuffix("/loss") for key in g.keys() if key.startswith(("xERM/", "know")) and "/loss" in key]:
        kind, case = key.split("/")
        alpha, T = numbers(case)["alpha"], numbers(case)["T"]
        student = logits.clone().requires_grad_()
        if kind == "xERM":
            loss = proreg.proreg_loss(student, zs_logits, labels, alpha, T=T)
        else:
            loss = proreg.fixed_kd_loss(student, zs_logits, labels, alpha, T)
        (gradient,) = torch.autograd.grad(loss, student)
        close(loss, g[f"{key}/loss"], VALUE, f"{key} loss")
        close(gradient, g[f"{key}/grad"], GRADIENT, f"{key} gradient")
        for row in range(len(labels)):  # a wrong saturated row must not hide behind the others
            close(gradient[row], g[f"{key}/grad"][row], 10 * GRADIENT, f"{key} gradient of row {row}")


def replay_step(g: Recording, golden: GoldenWorld, case: str) -> None:
    """One step of proreg.train on the first batch of images: loss, logits, every recorded gradient."""
    seen = first_step(g, golden, case)
    close(seen["loss"], g[f"step/{case}/loss"], VALUE, f"{case} loss")
    for key in [key for key in g.keys() if key.startswith(f"step/{case}/")]:
        if key.endswith("/logits"):
            close(seen["logits"], g[key], VALUE, key)
        elif "/grad/" in key:
            close(seen["gradients"][key.split("/grad/")[1]], g[key], GRADIENT, key)


def first_step(g: Recording, golden: GoldenWorld, case: str) -> dict:
    """What proreg.train computes in its first step: {"loss", "logits", "gradients": {name: tensor}}."""
    clip, images, labels, seen = golden.clip(), golden.images32[0], g["step/labels"], {}
    text, given = recorded_text(g, golden), numbers(case)
    loss = {"xERM": "proreg", "kd": "kd", "ce": "ce"}[case.split("_")[0]]
    settings = proreg.DEFAULTS["paper"] | {"loss": loss, "alpha": given.get("alpha", 0.0), "epochs": 1, "max_steps": 0}
    settings |= {"batch_size": len(labels), "temperature": given.get("T", 1.0), "augment": "crop", "seed": 1}
    settings |= {"precision": "fp32", "workers": 0, "eval_every": 0, "checkpoint_seconds": 0.0, "dataset": "golden"}
    args = argparse.Namespace(**settings)
    items = [("", label) for label in labels.tolist()]
    task = data.Task("golden", golden.classnames, "", items, [], [], "", "", [], [])

    close(text, g["step/teacher_text_features"], VALUE, "the prompts' text features, unnormalised")
    learner = proreg.PromptedClassifier(clip, golden.classnames, text)
    start = learner.state_dict() | {"visual.proj": g["step/student_visual_proj"]}
    start |= {key: g[f"step/student_{key}"] for key in ("text_features", "logit_scale")}

    class Images(torch.utils.data.Dataset):
        def __init__(self, items, *_):
            assert items is task.train

        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return images[i], labels[i].item(), i

    def classify(learner, features, text=None, unpatched=proreg.PromptedClassifier.forward):
        seen["logits"] = unpatched(learner, features, text)
        seen["learner"] = learner
        return seen["logits"]

    def step(optimizer):
        seen["gradients"] = {name: p.grad.clone() for name, p in seen["learner"].named_parameters()}

    def check_finite(epoch, step, **quantities):
        seen.update(quantities)

    with tempfile.TemporaryDirectory() as out:
        runs.save_checkpoint(Path(out), "proreg", args, start, 0)
        with (
            mock.patch("proreg.prompt_features", lambda *_: text),
            mock.patch("vision.ImageSet", Images),
            mock.patch("common.check_finite", check_finite),
            mock.patch.object(proreg.PromptedClassifier, "forward", classify),
            mock.patch.object(torch.optim.AdamW, "step", step),
            mock.patch("runs.end_epoch"),
        ):
            proreg.train(args, clip, task, Path(out))
    order = proreg.draw_epoch(args, clip, task, 0)[0][0]  # the loop shuffles: undo it
    seen["logits"] = torch.empty_like(seen["logits"]).index_copy(0, order, seen["logits"].detach())
    return seen


def recorded_text(g: Recording, golden: GoldenWorld) -> torch.Tensor:
    """Text features of the recorded tokens, [C, D]. prompt_features gives them too, where no name has an underscore:
    the released code does not turn these into blanks."""
    clip, tokens = golden.clip(), g["step/tokenized_prompts"].tolist()
    rows = [row[1 : row.index(clip.tokenizer.eot_token_id) + 1] for row in tokens]
    with torch.no_grad():
        text = common.encode_prompts(clip, common.start_of_text(clip), *common.embed(clip, rows))[0]
    plain = [c for c, name in enumerate(golden.classnames) if name.replace(" ", "").isalpha()]
    words = clip.tokenizer.decode(rows[plain[0]][:-1]).strip()
    template = words.replace(golden.classnames[plain[0]].lower(), "{}").replace("{} .", "{}.")
    names = [golden.classnames[c] for c in plain]
    close(proreg.prompt_features(clip, names, template), text[plain], VALUE, f"text features of {template!r}")
    return text


def replay_groups(g: Recording, golden: GoldenWorld) -> None:
    """Rate and weight decay of every tensor that ours trains; the others are the text tower's, which stays frozen."""
    clip, lr = golden.clip(), proreg.DEFAULTS["paper"]["lr"]
    learner = proreg.PromptedClassifier(clip, ["one", "two"], torch.zeros(2, clip.dim))
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    rules = {"factor": proreg.DEFAULTS["paper"]["head_lr_factor"], "weight_decay": proreg.METHOD["weight_decay"]}
    ours = {}
    for group in proreg.parameter_groups(learner, lr, **rules):
        ours |= {names[id(p)]: (group["peak"], group["weight_decay"]) for p in group["params"]}
    assert set(ours) == set(names.values())
    recorded, theirs = {}, 0
    for group in g["groups"]:
        recorded |= dict.fromkeys(group["clip_part"], (group["lr"], group["weight_decay"]))
        theirs += group["n"]
    ours = {name if name == "text_features" else f"clip.{name}": value for name, value in ours.items()}
    for name in ours:
        assert name in recorded, f"{name} is not in the recording"
        for mine, released in zip(ours[name], recorded[name]):
            close(mine, released, 1e-12, name)
    # What ours does not have is the text tower. The released optimiser holds it, but it never gets a gradient there.
    text = {"clip." + name for name, _ in clip.model.named_parameters() if not name.startswith("visual.")}
    assert set(recorded) - set(ours) <= text - {"clip.logit_scale"}
    # Its groups also hold the frozen teacher, a second CLIP: all of both, and the classifier.
    assert theirs == 2 * len(list(clip.model.parameters())) + 1

    schedule = g["schedule"]
    steps, rising = schedule["num_training_steps"], schedule["num_warmup_steps"]
    assert schedule["power"] == 1 and schedule["lr_end"] == 0
    for step in range(steps):
        factor = step / rising if step < rising else (steps - step) / (steps - rising)
        assert abs(proreg.warmup_linear(step, steps, rising / steps) - factor) < 1e-12
