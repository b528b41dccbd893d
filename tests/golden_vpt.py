"""Replay of vpt_*.npz: the shipped training loop itself is driven with the recorded batches and noise, and watched."""

import argparse
import contextlib
import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from golden_world import GoldenWorld, Recording, close, update_close

import common
import data
import runs
import vpt

PATTERN = "vpt_*.npz"
SKIP = {}
VALUE, GRADIENT, UPDATE, ALONG = 1e-5, 2e-5, 1e-4, 1e-4  # design.md, "Golden data"
RELEASED = {  # the released code's parameter names and ours
    "ctx": "context",
    "mean_posterior": "mean",
    "std_posterior": "logvar",
    "meta_net.weight_mean.module": "mean_net",
    "meta_net.weight_log_variance.module": "logvar_net",
}


def our_name(released: str) -> str:
    """ctx → context; meta_net.weight_mean.module.0.bias → mean_net.0.bias."""
    stem = next(stem for stem in RELEASED if released == stem or released.startswith(f"{stem}."))
    return RELEASED[stem] + released.removeprefix(stem)


class Case:
    """What one recording was made with: clip, posterior, start, unit image features, noise."""

    def __init__(self, g: Recording, golden: GoldenWorld):
        self.g, self.clip, self.classnames = g, golden.clip(), golden.classnames
        self.L, self.b, self.labels = g["L"].item(), g["batch"].item(), g["labels"]
        self.kind = "global" if "init/mean_posterior" in g.keys() else "image"
        self.parameters = [key.removeprefix("init/") for key in g.keys() if key.startswith("init/")]  # released names
        self.start = {our_name(name): g[f"init/{name}"] for name in self.parameters}
        images = golden.images32
        with torch.no_grad():
            features = self.clip.model.encode_image(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        self.x = F.normalize(features, dim=-1)  # [NB, B, D]
        first = g["tokenized_prompts"][0, 1 : 1 + len(self.start["context"])].tolist()
        self.words = self.clip.tokenizer.decode(first).strip()

    def settings(self, **changed) -> argparse.Namespace:
        paper = {key: value for key, value in vpt.DEFAULTS["paper"].items() if not isinstance(value, dict)}
        ours = {"dataset": "golden", "posterior": self.kind, "samples": self.L, "eval_samples": self.L, "seed": 1}
        ours |= {"batch_size": self.b, "max_steps": 0, "eval_every": 0, "ctx_init": self.words, "lr": 0.002}
        return argparse.Namespace(**paper | ours | changed)

    def learner(self) -> vpt.PromptDistribution:
        """At the recorded start, with the recorded evaluation noise."""
        learner = vpt.new_learner(self.settings(), self.clip, self.start["context"])
        runs.restore(learner, self.start, "the recording")
        learner.eval_noise = self.g["eps_eval"]
        return learner

    def train(self, rates: torch.Tensor, **changed) -> list[dict]:
        """vpt.train, recorded batch i in epoch i: what each step left behind. `rates` None: the shipped schedule."""
        steps, args = [], self.settings(**{"epochs": len(self.labels)} | changed)
        task = data.Task("golden", self.classnames, "", [], [], [], "", "", [], [])

        def noise(args, clip, epoch, step, batch):
            return self.g["eps"][epoch]

        def batches(n, size, seed, epoch, max_steps):  # in the recorded order, one a call
            return [torch.arange(n)] if epoch < len(self.labels) else []

        def end_epoch(args, out, method, epoch, learner, optimizer, line):
            now = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
            grads = {name: parameter.grad.clone() for name, parameter in learner.named_parameters()}
            steps.append({"parameters": now, "gradients": grads} | line)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(vpt, "training_noise", noise))
            stack.enter_context(mock.patch.object(data, "batches", batches))
            stack.enter_context(mock.patch.object(runs, "end_epoch", end_epoch))
            if rates is not None:
                stack.enter_context(mock.patch.object(common, "warmup_cosine", lambda e, epochs, lr: rates[e].item()))
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runs.save_checkpoint(out, "vpt", args, self.start, 0)  # train() starts from what it finds
            vpt.train(args, self.clip, task, lambda i: (self.x[i, : self.b], self.labels[i]), out)
        return steps

    def trajectory(self, key: str, **changed) -> list[dict]:
        """The steps of sgd_const or sgd_sched."""
        rates = self.g[f"{key}/lr"]
        if key == "sgd_const":
            return self.train(rates, **changed)
        # The released schedule: 1e-5 first, then a cosine from the peak; the third rate tells of how many epochs.
        epochs = round(math.pi / math.acos(2 * rates[2].item() / rates[1].item() - 1))
        return self.train(None, **{"epochs": epochs, "lr": rates[1].item()} | changed)


def trajectories(g: Recording) -> list[str]:
    return sorted({key.split("/")[0] for key in g.keys() if key.startswith("sgd_")})


def replay(name: str, g: Recording, golden: GoldenWorld) -> None:
    case = Case(g, golden)
    clip, b, L, learner = case.clip, case.b, case.L, case.learner()
    D, M = clip.dim, len(case.start["context"])
    shapes = {name: list(parameter.shape) for name, parameter in learner.named_parameters()}
    assert shapes == {name: list(tensor.shape) for name, tensor in case.start.items()}
    assert torch.equal(vpt.initial_context(clip, case.words), case.start["context"])

    # The prompt: SOS, M words, the class name, a full stop, EOT, and padding.
    suffix, eot = common.name_tokens(clip, case.classnames, M)
    table = clip.model.token_embedding.weight
    for c, row in enumerate(g["tokenized_prompts"]):
        end = row.argmax().item()
        assert row[0] == clip.tokenizer.sot_token_id and end == 1 + M + eot[c] and not row[end + 1 :].any()
        assert torch.equal(suffix[c, : eot[c] + 1], table[row[1 + M : end + 1]])

    # Posterior, text features, losses and every gradient of the first batch.
    x = case.x[0, :b]
    close(x, g["image_features_norm"], VALUE, "image features")
    with torch.no_grad():
        mu, logvar = learner.posterior(x)
        residual = vpt.sample_residual(mu, logvar, g["eps"][0])
        text = learner((suffix, eot), residual)
    close(mu, g["mu"], VALUE, "mu")
    close(logvar, g["logvar"], VALUE, "logvar")
    close(vpt.kl_to_standard_normal(mu, logvar), g["kl"], VALUE, "kl")
    assert text.shape == (L, 1, len(suffix), D)
    close(text[:, 0], g["text_features_unnorm"], VALUE, "text features")
    first = case.train(g["sgd_const/lr"])[0]
    for ours, key in (("loss", "loss"), ("loss_task", "task_loss"), ("kl", "kl")):
        close(first[ours], g[key].squeeze(), VALUE, key)
    for parameter in case.parameters:
        close(first["gradients"][our_name(parameter)], g[f"grad/{parameter}"], GRADIENT, f"gradient of {parameter}")

    # Evaluation, one image at a time and all together: the same noise for every image, hence the same prediction.
    for key in [key for key in g.keys() if key.startswith("eval_logprob")]:
        x = case.x[0, : len(g[key])]
        one = torch.cat([vpt.class_logits(learner, clip, case.classnames, row[None]) for row in x])
        close(one, g[key], VALUE, f"{key}, one at a time")
        close(vpt.class_logits(learner, clip, case.classnames, x), g[key], VALUE, key)

    for key in trajectories(g):
        check_trajectory(case, key, case.trajectory(key))


def check_trajectory(case: Case, key: str, steps: list[dict]) -> None:
    """Rates, losses and updates along one trajectory."""
    g = case.g
    assert len(steps) == len(g[f"{key}/lr"])
    close(torch.tensor([step["lr"] for step in steps]), g[f"{key}/lr"], 1e-7, f"{key} lr")
    close(torch.tensor([step["loss"] for step in steps]), g[f"{key}/loss"], ALONG, f"{key} loss")
    check_updates(case, key, steps)


def check_updates(case: Case, key: str, steps: list[dict]) -> None:
    """The update of every parameter, after each step where it was recorded, else after the last."""
    for released in case.parameters:
        name, recorded = our_name(released), case.g[f"{key}/{released}"]
        before, whole = case.start[name], recorded.dim() == case.start[name].dim() + 1
        recorded = recorded if whole else recorded[None]
        for i, (step, after) in enumerate(zip(steps[-len(recorded) :], recorded, strict=True)):
            # On the way an update can be so small (the first rate is 1e-5) that float32's own steps show beside it.
            grain = 0.0 if i + 1 == len(recorded) else 2**-23 * (after.norm() / (after - before).norm()).item()
            what = f"{key} update of {released}, {i + 1} of {len(recorded)}"
            update_close(before, step["parameters"][name], after, UPDATE + grain, what)
