"""Replay of prograd_*.npz: the shipped training loop itself is driven with the recorded batches and watched.

Everything is replayed twice. With the text tower in float64 what is left is nearly the recording's own rounding, and
design.md's tolerances have to be met. In float32, as users run it, both sides round, and twice as much is allowed.

Which template, tower and place of the class name a recording was made with is found by comparing with its features, and
the comparison then has to hold, so that recordings of other cases are replayed too.
"""

import argparse
import contextlib
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_world import GoldenWorld, Recording, close, deviation, update_close

import common
import data
import prograd

PATTERN = "prograd_*.npz"
NOISE = "student and teacher are the same prompt there: g_g is rounding noise, and so is all that is made of it"
SKIP = {
    "prograd_*degenerate.npz:*/g_g": NOISE,
    "prograd_*degenerate.npz:*/cos": NOISE,
    "prograd_*degenerate.npz:*/g_proj_lam0.5": NOISE,
    "prograd_*degenerate.npz:*/g_proj_lam1.0": NOISE,
}
FEATURES, GRADIENT, UPDATE, ALONG, COSINE = 1e-5, 2e-5, 1e-5, 1e-4, 1e-4  # design.md, "Golden data"


class Case:
    """What one recording was made with: clip, task, start, position, temperature and unit image features."""

    def __init__(self, g: Recording, golden: GoldenWorld, dtype: torch.dtype = torch.float64):
        self.g, self.clip = g, golden.clip64() if dtype is torch.float64 else golden.clip()
        self.start, self.T = g["ctx_init"].to(dtype), g["T"].item()
        features, (NB, B, _) = [], g["image_features_unnorm"].shape
        for key, clip in (("images32", golden.clip), ("images64", golden.clip_rn)):
            if key in golden.images and golden.images[key].shape[:2] == (NB, B):
                features.append(clip().model.encode_image(golden.images[key].flatten(0, 1)).unflatten(0, (NB, B)))
        self.features = min(features, key=lambda rows: deviation(rows, g["image_features_unnorm"]))
        self.x = F.normalize(self.features, dim=-1)  # [NB, B, D]

        teachers = {template: self.teacher(golden.classnames, template) for template in templates()}
        template = min(teachers, key=lambda template: deviation(teachers[template], g["zs_text_features"]))
        # The released code counts the template's words, and leaves what is beyond them at the head of the class name.
        left = left_over(self.clip, golden.classnames, g["tokenized_prompts"], self.start.shape[-2])
        self.names = [f"{left} {name}".strip() for name in golden.classnames]
        self.template = template.replace(f"{left} {{}}" if left else "{}", "{}")
        # A start of CTX_INIT is the template's, which train() then makes itself; any other is given to it.
        words = self.clip.model.token_embedding.weight
        row = self.start.reshape(-1, self.clip.width)[-1]
        self.from_template = bool((words[: self.clip.tokenizer.sot_token_id] == row).all(dim=1).any())
        at = {position: self.text(position) for position in ("end", "front")}
        self.position = min(at, key=lambda position: deviation(at[position], g["text_features_unnorm"]))

    def teacher(self, names: list[str], template: str) -> torch.Tensor:
        return common.zero_shot_classifier(self.clip, names, template)

    @torch.no_grad()
    def text(self, position: str) -> torch.Tensor:
        """The student's text features at the start, [C, D], unnormalised."""
        learner = prograd.PromptLearner(self.clip, self.start, position)
        return learner(common.name_tokens(self.clip, self.names, self.start.shape[-2]))

    def train(self, labels: torch.Tensor, rates: torch.Tensor | None = None, epochs: int = 1, **changed) -> list[dict]:
        """prograd.train on batch i = (x[i], labels[i]) in epoch i: what each step saw and left behind.

        `rates`: constant learning rates in place of the schedule. `changed`: settings other than the recording's."""
        steps, args = [], argparse.Namespace(
            **prograd.METHOD
            | {"n_ctx": self.start.shape[-2], "csc": self.start.dim() == 3, "class_position": self.position}
            | {"temperature": self.T, "lr": 0.002, "seed": 1, "epochs": epochs, "batch_size": len(labels[0])}
            | {"max_steps": 0, "eval_every": 0, "checkpoint_seconds": 0.0, "precision": "fp32"}
            | changed
        )  # fmt: skip
        task = data.Task("golden", self.names, self.template, [], [], [], "", self.template, [], [])

        def views(epoch):  # the schedule may be made for more epochs than were recorded
            i = min(epoch, len(labels) - 1)
            return self.x[i], labels[i]

        def batches(n, size, seed, epoch, max_steps):  # one batch an epoch, in the recorded order
            return [torch.arange(n)] if epoch < len(labels) else []

        def loss(logits, zs_logits, T):
            steps.append({"logits": logits.detach(), "zs_logits": zs_logits})
            return kept["distillation_loss"](logits, zs_logits, T)

        def project(g_d, g_g, lam):
            steps[-1] |= {"g_d": g_d, "g_g": g_g}
            return kept["project_gradient"](g_d, g_g, lam)

        def end_epoch(args, out, method, epoch, learner, optimizer, line):
            context = learner.context
            steps[-1] |= line | {"ctx": context.detach().clone(), "applied": context.grad.norm().item()}
            steps[-1]["momentum_buffer"] = optimizer.state[context]["momentum_buffer"].clone()

        kept = {name: getattr(prograd, name) for name in ("distillation_loss", "project_gradient")}
        with contextlib.ExitStack() as stack:

            def patch(*where_what):
                stack.enter_context(mock.patch.object(*where_what))

            patch(data, "batches", batches)
            patch(prograd, "distillation_loss", loss)
            patch(prograd, "project_gradient", project)
            patch(prograd.runs, "end_epoch", end_epoch)
            if rates is not None:
                patch(common, "warmup_cosine", lambda epoch, epochs, lr: rates[epoch].item())
            if not self.from_template:
                patch(prograd, "initial_context", lambda *_: self.start)
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            prograd.train(args, self.clip, task, views, out)
        return steps

    def trajectory(self, key: str, **changed) -> list[dict]:
        """The steps of one recorded trajectory, KIND/sgd_const_lamX or KIND/sgd_sched_lamX."""
        g, (kind, run) = self.g, key.split("/")
        rates, labels = g[f"{key}/lr"], g[f"{kind}/labels"][: len(g[f"{key}/ctx"])]
        settings = {"lam": float(run.partition("_lam")[2]), "epochs": len(rates)} | changed
        if run.startswith("sgd_const"):
            return self.train(labels, rates, **settings)
        # The released schedule: 1e-5 first, then a cosine from the peak; the third rate tells of how many epochs.
        peak = rates[1].item() if len(rates) > 1 else 0.002
        if len(rates) > 2:
            settings["epochs"] = round(math.pi / math.acos(2 * rates[2].item() / peak - 1))
        return self.train(labels, lr=peak, **settings)


def templates() -> list[str]:
    """The class-last templates of all datasets."""
    tables = [table for table in data.TABLE.values() if isinstance(table, dict) and "template" in table]
    return sorted({table.get("teacher_template", table["template"]) for table in tables})


def left_over(clip: common.Clip, names: list[str], tokens: torch.Tensor, M: int) -> str:
    """The words between the M context slots and the class name, the same in all prompts; checks all other tokens."""
    found = set()
    for name, row in zip(names, tokens.tolist(), strict=True):
        ours = clip.tokenizer.encode(name.replace("_", " ") + ".") + [clip.tokenizer.eot_token_id]
        end = row.index(clip.tokenizer.eot_token_id) + 1
        assert row[0] == clip.tokenizer.sot_token_id and row[1 + M : end][-len(ours) :] == ours, name
        assert not any(row[end:])
        found.add(tuple(row[1 + M : end - len(ours)]))
    (left,) = found
    return clip.tokenizer.decode(list(left)).strip()


def trajectories(g: Recording) -> list[str]:
    """KIND/sgd_... of each trajectory in the recording."""
    return sorted({key.rpartition("/")[0] for key in g.keys() if key.endswith("/ctx")})


def replay(name: str, g: Recording, golden: GoldenWorld) -> None:
    for dtype, slack in ((torch.float64, 1), (torch.float32, 2)):
        compare(name, g, golden, Case(g, golden, dtype), slack)


def compare(name: str, g: Recording, golden: GoldenWorld, case: Case, slack: float) -> None:
    clip, start = case.clip, case.start

    # Features and logits before training.
    close(case.features, g["image_features_unnorm"], FEATURES * slack, "image features")
    close(
        case.teacher(case.names, case.template),
        g["zs_text_features"],
        FEATURES * slack,
        f"teacher of {case.template!r}",
    )
    close(case.text(case.position), g["text_features_unnorm"], FEATURES * slack, "text features")
    lengths = [len(clip.tokenizer.encode(name.replace("_", " "))) for name in golden.classnames]
    assert lengths == g["name_lens"].tolist()
    if case.from_template:
        n_classes = len(start) if start.dim() == 3 else 0
        assert torch.equal(
            prograd.initial_context(clip, case.template, start.shape[-2], "template", 1, n_classes), start
        )

    kinds = sorted({key.split("/")[0] for key in g.keys() if "/" in key})
    labels = g[f"{kinds[0]}/labels"]
    still = case.train(labels, torch.zeros(len(labels)), epochs=len(labels))  # at a rate of 0 nothing moves
    for what, key in (("logits", "logits_init"), ("zs_logits", "zs_logits")):
        close(torch.stack([step[what] for step in still]), g[key], FEATURES * slack, key)
    for kind in kinds:
        # The first step sees both losses and both gradients.
        (first,) = case.train(g[f"{kind}/labels"][:1])
        close(first["loss_ce"], g[f"{kind}/xe_loss"], FEATURES * slack, f"{kind} label loss")
        close(first["loss_kl"], g[f"{kind}/kl_loss"], FEATURES * slack, f"{kind} zero-shot loss")
        close(first["g_d"], g[f"{kind}/g_d"], GRADIENT * slack, f"{kind} g_d")
        noise = "degenerate" in name
        if not noise:
            close(first["g_g"], g[f"{kind}/g_g"], GRADIENT * slack, f"{kind} g_g")
            assert abs(first["cosine"] - g[f"{kind}/cos"].item()) <= COSINE
        for key in [key for key in g.keys() if key.startswith(f"{kind}/g_proj_lam")]:
            lam = float(key.partition("_lam")[2])
            if lam == 0 or not noise:
                close(prograd.project_gradient(first["g_d"], first["g_g"], lam), g[key], GRADIENT * slack, key)

    for key in trajectories(g):
        steps = case.trajectory(key)
        assert len(steps) == len(g[f"{key}/ctx"])
        check_trajectory(g, key, start, steps, slack)


def check_update(g: Recording, key: str, start: torch.Tensor, steps: list[dict], slack: float = 1) -> None:
    """The context after the last step. What a mutant must fail."""
    update_close(start, steps[-1]["ctx"], g[f"{key}/ctx"][-1], UPDATE * slack, f"{key} update")


def check_trajectory(g: Recording, key: str, start: torch.Tensor, steps: list[dict], slack: float) -> None:
    """Every recorded quantity along one trajectory."""
    labels = g[f"{key.split('/')[0]}/labels"]
    check_update(g, key, start, steps, slack)
    for i, step in enumerate(steps):
        what = f"{key} step {i}"
        # WHY the last bit: at the warm-up's rate a step moves the recorded float32 context by little more than that.
        recorded = g[f"{key}/ctx"][i].double()
        last_bit = 2**-24 * recorded.norm() / (recorded - start.double()).norm()
        update_close(start, step["ctx"], recorded, ALONG + (i + 1) * last_bit.item(), what)
        close(step["lr"], g[f"{key}/lr"][i], 1e-12, f"{what} lr")
        accuracy = 100 * (step["logits"].argmax(dim=1) == labels[i]).double().mean().item()
        for j, value in enumerate((step["loss_ce"], step["loss_kl"], accuracy)):
            close(
                value, g[f"{key}/xe_kl_acc"][i, j], ALONG, f"{what} {('label loss', 'zero-shot loss', 'accuracy')[j]}"
            )
        assert abs(step["cosine"] - g[f"{key}/cos"][i].item()) <= COSINE, what
        close(step["applied"], g[f"{key}/grad_norm_applied"][i], ALONG, f"{what} gradient norm")
    if f"{key}/momentum_buffer" in g:
        close(steps[-1]["momentum_buffer"], g[f"{key}/momentum_buffer"], ALONG, f"{key} momentum buffer")
