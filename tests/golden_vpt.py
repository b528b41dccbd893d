"""Replay of vpt_*.npz: vpt.py's own training loop on the recorded batches and noise, watched."""

import argparse
import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_prograd import Stop, make_task, schedule_of
from golden_world import GoldenWorld, Recording, close

import common
import data
import vpt

PATTERN = "vpt_*.npz"
RELEASED = {  # the released code's parameter names and ours
    "ctx": "context",
    "mean_posterior": "mean",
    "std_posterior": "logvar",
    "meta_net.weight_mean.module": "mean_net",
    "meta_net.weight_log_variance.module": "logvar_net",
}


def our_name(released: str) -> str:
    """ctx → context; meta_net.weight_mean.module.0.bias → mean_net.0.bias."""
    fits = [stem for stem in RELEASED if released == stem or released.startswith(f"{stem}.")]
    return RELEASED[fits[0]] + released.removeprefix(fits[0])


class Case:
    """What one recording was made with: posterior, start, unit image features, noise."""

    def __init__(self, g: Recording, golden: GoldenWorld):
        self.g = g
        self.clip = golden.clip
        self.classnames = golden.classnames
        self.labels = g["labels"]  # [NB, b]
        self.kind = "global" if "init/mean_posterior" in g else "image"
        self.parameters = [k.removeprefix("init/") for k in g.keys() if k.startswith("init/")]
        self.start = {our_name(name): g[f"init/{name}"] for name in self.parameters}
        self.x = F.normalize(golden.features(golden.clip), dim=-1)  # [NB, B, D]
        first = g["tokenized_prompts"][0, 1 : 1 + len(self.start["context"])].tolist()
        self.words = self.clip.tokenizer.decode(first).strip()

    def settings(self, **changed) -> argparse.Namespace:
        ours = {"posterior": self.kind, "samples": self.g["L"].item(), "seed": 1, "lr": 0.002}
        ours |= {"batch_size": self.g["batch"].item(), "ctx_init": self.words, "max_steps": 0}
        ours |= {"eval_every": 0, "epochs": len(self.labels)}
        return argparse.Namespace(**vpt.PAPER | ours | changed)

    def learner(self) -> vpt.PromptDistribution:
        """At the recorded start, with the recorded evaluation noise."""
        learner = vpt.new_learner(self.settings(), self.clip, self.start["context"])
        learner.load_state_dict(self.start)
        learner.eval_noise = self.g["eps_eval"]
        return learner

    def train(self, rates: torch.Tensor | None, **changed) -> list[dict]:
        """vpt.train, recorded batch i in epoch i: what each step left behind."""
        steps = []
        args = self.settings(**changed)
        b = args.batch_size

        def end_epoch(out, epoch, learner, optimizer, line, **note):
            now = {name: p.detach().clone() for name, p in learner.named_parameters()}
            grads = {name: p.grad.clone() for name, p in learner.named_parameters()}
            steps.append({"parameters": now, "gradients": grads} | line)
            if epoch + 1 == len(self.labels):
                raise Stop

        with contextlib.ExitStack() as stack:
            patch = mock.patch.object
            noise = mock.Mock(side_effect=lambda args, clip, epoch, *_: self.g["eps"][epoch])
            stack.enter_context(patch(vpt, "training_noise", noise))
            stack.enter_context(patch(data, "batches", lambda n, *_: [torch.arange(n)]))
            stack.enter_context(patch(common, "end_epoch", end_epoch))
            if rates is not None:
                given = mock.Mock(side_effect=lambda epoch, *_: rates[epoch].item())
                stack.enter_context(patch(common, "warmup_cosine", given))
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            common.save_checkpoint(out, self.learner(), epoch=0)  # train goes on from what it finds
            stack.enter_context(contextlib.suppress(Stop))
            views = lambda i: (self.x[i, :b], self.labels[i])  # noqa: E731
            vpt.train(args, self.clip, make_task(self.classnames, "", ""), views, out)
        return steps

    def trajectory(self, key: str, **changed) -> list[dict]:
        """The steps of sgd_const or sgd_sched."""
        rates = self.g[f"{key}/lr"]
        if key == "sgd_const":
            return self.train(rates, **changed)
        epochs, peak = schedule_of(rates)
        return self.train(None, **{"epochs": epochs, "lr": peak} | changed)


def replay(g: Recording, golden: GoldenWorld) -> None:
    case = Case(g, golden)
    clip, learner = case.clip, case.learner()
    L, b = g["L"].item(), g["batch"].item()
    M = len(case.start["context"])
    shapes = {name: p.shape for name, p in learner.named_parameters()}
    assert shapes == {name: value.shape for name, value in case.start.items()}
    assert torch.equal(vpt.initial_context(clip, case.words), case.start["context"])
    for name, row in zip(case.classnames, g["tokenized_prompts"].tolist(), strict=True):
        ids = clip.tokenizer.encode(f"{case.words} {name.replace('_', ' ')}.")
        prompt = [clip.tokenizer.sot_token_id, *ids, clip.tokenizer.eot_token_id]
        assert row[: len(prompt)] == prompt and not any(row[len(prompt) :])

    # Posterior, text features, losses and every gradient of the first batch.
    x = case.x[0, :b]
    close(x, g["image_features_norm"], "image features")
    names = common.name_tokens(clip, case.classnames, M)
    with torch.no_grad():
        mu, logvar = learner.posterior(x)
        text = learner(names, vpt.sample_residual(mu, logvar, g["eps"][0]))
    close(mu, g["mu"], "mu")
    close(logvar, g["logvar"], "logvar")
    close(vpt.kl_to_standard_normal(mu, logvar), g["kl"], "kl")
    assert text.shape[:2] == (L, 1)
    close(text[:, 0], g["text_features_unnorm"], "text features")
    first = case.train(g["sgd_const/lr"])[0]
    for ours, key in (("loss", "loss"), ("loss_task", "task_loss"), ("kl", "kl")):
        close(first[ours], g[key].squeeze(), key)
    for name in case.parameters:
        close(first["gradients"][our_name(name)], g[f"grad/{name}"], f"gradient of {name}")

    # Evaluation: the same noise for every image, hence the same prediction alone and together.
    for key in g.keys():
        if key.startswith("eval_logprob"):
            x = case.x[0, : len(g[key])]
            each = [vpt.class_logits(learner, clip, case.classnames, row[None]) for row in x]
            close(torch.cat(each), g[key], f"{key}, one at a time")
            close(vpt.class_logits(learner, clip, case.classnames, x), g[key], key)
    for key in g.cases("sgd_*/lr"):
        check_trajectory(case, key, case.trajectory(key))


def check_trajectory(case: Case, key: str, steps: list[dict]) -> None:
    """Rates, losses, parameters and their changes along one trajectory."""
    g = case.g
    assert len(steps) == len(g[f"{key}/lr"])
    close([step["lr"] for step in steps], g[f"{key}/lr"], f"{key} lr")
    close(torch.stack([step["loss"] for step in steps]), g[f"{key}/loss"], f"{key} loss")
    for name in case.parameters:
        start, recorded = case.start[our_name(name)], g[f"{key}/{name}"]
        recorded = recorded if recorded.dim() > start.dim() else recorded[None]  # of the last step
        for i, (step, after) in enumerate(zip(steps[-len(recorded) :], recorded, strict=True)):
            ours = step["parameters"][our_name(name)]
            close(ours, after, f"{key} {i} {name}")
            close(ours - start, after - start, f"{key} {i} change of {name}")
