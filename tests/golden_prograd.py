"""Replay of prograd_*.npz: prograd.py's own training loop on the recorded batches, watched."""

import argparse
import contextlib
import math
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_world import TOLERANCE, GoldenWorld, Recording, close, deviation

import common
import data
import prograd

PATTERN = "prograd_*.npz"


class Stop(Exception):
    """Ends training where the recording ends."""


class Case:
    """What one recording was made with: template, start, temperature, unit image features.

    Which template and tower that was is found by comparing; the comparison then has to hold.
    """

    def __init__(self, g: Recording, golden: GoldenWorld):
        self.g = g
        self.clip = golden.clip
        self.start = g["ctx_init"]
        self.T = g["T"].item()
        both = [golden.features(golden.clip), golden.features(golden.clip_rn)]
        fit = [f for f in both if f.shape == g["image_features_unnorm"].shape]
        self.features = min(fit, key=lambda f: deviation(f, g["image_features_unnorm"]))
        self.x = F.normalize(self.features, dim=-1)  # [NB, B, D]

        def off(template: str) -> float:
            teacher = common.zero_shot_classifier(self.clip, golden.classnames, [template])
            return deviation(teacher, g["zs_text_features"])

        self.template = min(templates(), key=off)
        M = self.start.shape[-2]
        left = left_over(self.clip, golden.classnames, g["tokenized_prompts"], M)
        # The released code counts words: tokens beyond them stay before the class name (pets16).
        self.names = [f"{left} {name}".strip() for name in golden.classnames]
        words = self.template.removesuffix(f"{left} {{}}." if left else "{}.").strip()
        self.student_template = f"{words} {{}}."
        ids = self.clip.tokenizer.encode(words)[-M:]
        tail = self.clip.model.token_embedding.weight[ids]
        ends = self.start[..., M - len(ids) :, :]
        self.from_template = torch.equal(ends, tail.expand_as(ends)) and self.start.dim() == 2

    def train(self, labels, rates=None, epochs: int = 1, **changed) -> list[dict]:
        """prograd.train on batch i = (x[i], labels[i]) in epoch i: what each step left behind.

        rates: given learning rates instead of the schedule. `changed`: other settings.
        """
        M = self.start.shape[-2]
        settings = prograd.SETTINGS | {"n_ctx": M, "csc": self.start.dim() == 3, "seed": 1}
        settings |= {"temperature": self.T, "lr": 0.002, "epochs": max(epochs, len(labels))}
        settings |= {"max_steps": 0, "eval_every": 0} | changed
        task = make_task(self.names, self.student_template, self.template)
        steps = []

        def loss(logits, zs_logits, T, kept=prograd.distillation_loss):
            steps.append({"logits": logits.detach(), "zs_logits": zs_logits})
            return kept(logits, zs_logits, T)

        def project(g_d, g_g, lam, kept=prograd.project_gradient):
            steps[-1] |= {"g_d": g_d, "g_g": g_g}
            return kept(g_d, g_g, lam)

        def end_epoch(out, epoch, learner, optimizer, line, **note):
            context = learner.context
            steps[-1] |= line | {"ctx": context.detach().clone(), "applied": context.grad.norm()}
            steps[-1]["momentum_buffer"] = optimizer.state[context]["momentum_buffer"].clone()
            if epoch + 1 == len(labels):
                raise Stop

        with contextlib.ExitStack() as stack:
            patch = mock.patch.object
            stack.enter_context(patch(data, "batches", lambda n, *_: [torch.arange(n)]))
            stack.enter_context(patch(prograd, "distillation_loss", loss))
            stack.enter_context(patch(prograd, "project_gradient", project))
            stack.enter_context(patch(common, "end_epoch", end_epoch))
            if rates is not None:
                given = mock.Mock(side_effect=lambda epoch, *_: rates[epoch].item())
                stack.enter_context(patch(common, "warmup_cosine", given))
            if not self.from_template:
                stack.enter_context(patch(prograd, "initial_context", lambda *_: self.start))
            stack.enter_context(contextlib.suppress(Stop))
            args = argparse.Namespace(**settings)
            views = lambda epoch: (self.x[epoch], labels[epoch])  # noqa: E731
            # The teacher's names are the plain ones: with words left over, of a shorter template.
            prograd.train(args, self.clip, task, views, Path("nowhere"))
        return steps

    def trajectory(self, key: str, **changed) -> list[dict]:
        """The steps of a recorded KIND/sgd_const_lamX or KIND/sgd_sched_lamX."""
        kind, run = key.split("/")
        rates = self.g[f"{key}/lr"]
        labels = self.g[f"{kind}/labels"][: len(rates)]
        settings = {"lam": float(run.partition("_lam")[2])} | changed
        if run.startswith("sgd_const"):
            return self.train(labels, rates, **settings)
        epochs, peak = schedule_of(rates)
        return self.train(labels, **{"lr": peak, "epochs": epochs} | settings)


def schedule_of(rates: torch.Tensor) -> tuple[int, float]:
    """Of a recorded schedule (1e-5, then a cosine from the peak) how many epochs, and the peak."""
    peak = rates[1].item() if len(rates) > 1 else 0.002
    if len(rates) < 3:
        return len(rates), peak
    return round(math.pi / math.acos(2 * rates[2].item() / peak - 1)), peak


def make_task(names: list[str], template: str, teacher: str) -> data.Task:
    """A task without images; of the templates the words before the class name matter."""
    return data.Task("golden", names, teacher, template, [], [], [], "", [])


def templates() -> list[str]:
    """The class-last templates of all datasets."""
    return sorted({source.teacher or source.template for source in data.SOURCES.values()})


def left_over(clip, names: list[str], tokens: torch.Tensor, M: int) -> str:
    """The words between the M context slots and the class name; checks all other tokens."""
    found = set()
    eot = clip.tokenizer.eot_token_id
    for name, row in zip(names, tokens.tolist(), strict=True):
        ours = [*clip.tokenizer.encode(name.replace("_", " ") + "."), eot]
        end = row.index(eot) + 1
        assert row[0] == clip.tokenizer.sot_token_id and row[1 + M : end][-len(ours) :] == ours
        assert not any(row[end:])
        found.add(tuple(row[1 + M : end - len(ours)]))
    (left,) = found
    return clip.tokenizer.decode(list(left)).strip()


def replay(g: Recording, golden: GoldenWorld) -> None:
    case = Case(g, golden)
    clip, start = case.clip, case.start
    close(case.features, g["image_features_unnorm"], "image features")
    teacher = common.zero_shot_classifier(clip, golden.classnames, [case.template])
    close(teacher, g["zs_text_features"], "teacher")
    learner = prograd.PromptLearner(clip, start)
    with torch.no_grad():
        text = learner(learner.names(case.names))
    close(text, g["text_features_unnorm"], "text features")
    lengths = [len(clip.tokenizer.encode(name.replace("_", " "))) for name in golden.classnames]
    assert lengths == g["name_lens"].tolist()
    if case.from_template:
        M = start.shape[-2]
        ours = prograd.initial_context(clip, case.student_template, M, "template", 1)
        assert torch.equal(ours, start)

    kinds = [key for key in g.cases("*/labels")]
    labels = g[f"{kinds[0]}/labels"]
    still = case.train(labels, torch.zeros(len(labels)))  # at a rate of 0 nothing moves
    close(torch.stack([s["logits"] for s in still]), g["logits_init"], "logits")
    close(torch.stack([s["zs_logits"] for s in still]), g["zs_logits"], "teacher's logits")
    for kind in kinds:
        check_first_step(case, g, kind)
    for key in g.cases("*/ctx"):
        check_trajectory(case, key)


def check_first_step(case: Case, g: Recording, kind: str) -> None:
    """Losses, gradients and projections on batch 0 at the start."""
    (first,) = case.train(g[f"{kind}/labels"][:1])
    close(first["loss_ce"], g[f"{kind}/xe_loss"], f"{kind} label loss")
    close(first["loss_kl"], g[f"{kind}/kl_loss"], f"{kind} zero-shot loss")
    close(first["g_d"], g[f"{kind}/g_d"], f"{kind} g_d")
    if f"{kind}/g_g" in g:
        close(first["g_g"], g[f"{kind}/g_g"], f"{kind} g_g")
        assert abs(first["cosine"] - g[f"{kind}/cos"]) <= TOLERANCE
    for key in g.keys():
        if key.startswith(f"{kind}/g_proj_lam"):
            lam = float(key.partition("_lam")[2])
            ours = prograd.project_gradient(first["g_d"], first["g_g"], lam)
            close(ours, g[key], key)


def check_trajectory(case: Case, key: str) -> None:
    """Every recorded quantity along one trajectory."""
    g = case.g
    steps = case.trajectory(key)
    labels = g[f"{key.split('/')[0]}/labels"]
    assert len(steps) == len(g[f"{key}/ctx"])
    for i, step in enumerate(steps):
        recorded = g[f"{key}/ctx"][i]
        close(step["ctx"], recorded, f"{key} {i} ctx")
        close(step["ctx"] - case.start, recorded - case.start, f"{key} {i} change of ctx")
        close(step["lr"], g[f"{key}/lr"][i], f"{key} {i} lr")
        accuracy = 100 * (step["logits"].argmax(dim=1) == labels[i]).double().mean()
        ours = torch.stack([step["loss_ce"], step["loss_kl"], accuracy])
        close(ours[:2], g[f"{key}/xe_kl_acc"][i, :2], f"{key} {i} losses")
        close(ours[2], g[f"{key}/xe_kl_acc"][i, 2], f"{key} {i} accuracy", 1e-6)  # float32 there
        assert abs(step["cosine"] - g[f"{key}/cos"][i]) <= TOLERANCE, f"{key} {i} cosine"
        close(step["applied"], g[f"{key}/grad_norm_applied"][i], f"{key} {i} gradient norm")
    if f"{key}/momentum_buffer" in g:
        close(steps[-1]["momentum_buffer"], g[f"{key}/momentum_buffer"], f"{key} momentum")
