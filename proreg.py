"""ProReg: prompt regularisation for fine-tuning CLIP (Zhu et al., AAAI 2023, arXiv 2301.12429).

The idea. Fine-tuning CLIP's image encoder raises the accuracy on images like the training images, and lowers it
elsewhere: where all cows stand on grass, grass becomes a cow. The zero-shot prompt "a photo of a CLASS." knows better,
but is too generic for a special task. ProReg fine-tunes towards both the label and the zero-shot prediction, and mixes
them sample by sample: more of the prompt where it is right and sure, less where the tuned model is sure already.

Equations (the numbers are this file's own: the paper could not be read in full)
    Eq. 1   p(c | x) = softmax over c of exp(σ) cos(f(x), t_c);  at the start CLIP's f, σ and t_c = T("a photo of a c.")
    Eq. 2   L_ce = -log p(y | x)                                                          the label's loss
    Eq. 3   L_kl = -T^2 sum_c p_zs(c | x) log p(c | x), both at temperature T             zero-shot CLIP's loss
    Eq. 4   w = p_zs(y | x)^k / (p(y | x) + p_zs(y | x)^k + 1e-5), no gradient through w  trust in the prompt
    Eq. 5   L = mean of (1 - w) L_ce + α mean of w L_kl                                   --loss proreg
    Eq. 6   L = (1 - α) mean of L_ce + α mean of L_kl                                     --loss kd: one weight for all
    Eq. 7   (f, t, σ) <- AdamW, at a rate that rises linearly from 0 and then falls linearly to 0
    Eq. 8   logits: (1 - A) of the tuned model's + A of zero-shot CLIP's                  --ensemble A
    Eq. 9   f, t, σ: (1 - A) of the tuned ones + A of those at the start                  --wise-ft A

    paper        here                                shape            flag
    f            PromptedClassifier.visual           a tower          --model --pretrained --train
    t, σ         .text_features, .logit_scale        [C, D], number   --template --head --head-lr-factor
    p_zs         softmax of zs_logits                [B, C]           as f, t, σ, frozen at the start
    w, k         adaptive_weight, power              [B], number      --power (10 as released, 1 = the plain ratio)
    α, T         alpha, T                            numbers          --alpha --temperature

Learned: the image encoder and the classifier. Frozen: the teacher, a second image encoder (one forward pass a step, or
in all without augmentation); the text encoder makes t and is done. Where it lies: between zero-shot CLIP (weak in-
distribution, ID; decent elsewhere, OOD) and fine-tuning (the reverse), at a point that α and k choose. So do KD with
one weight, logit ensembles and WiSE-FT: compare at equal ID accuracy. It helps where training images hold a shortcut
that the prompt does not take, not where zero-shot CLIP is wrong throughout. k = 10 and a prompt that is seldom sure
(low logit scale, as toyclip's 21) leave w near 0: plain fine-tuning. α is a factor in Eq. 5, a share in Eq. 6.

PAPER vs CODE: (the paper as others restate it; the code, github.com/BeierZhu/ProReg at 102ff0b, is followed)
 1. k = 10 in the code; commented out are k = 1 and a ratio of losses. The paper's own weight was not seen.
 2. No weight decay on biases. Of layer norms the code names another model's, so CLIP's are decayed, as t and σ are.
 3. AdamW is PyTorch's, not that of `transformers`; RandAugment(2, 9) is torchvision's, with other operations.
 4. The partial last batch is kept, averaged over its own size; of K processes and accumulated parts the code averages
    means of unequal parts, here they learn what one process would.
 5. The code keeps the epoch that is best on validation images (for BAR and DomainNet the ID test images), looked at
    twice an epoch. Here the last step is reported; --select val looks at the validation part after every epoch.
 6. A `_` in a class name is a blank here; the code leaves it. VQA-CP (ViLT) is not in the code and out of scope here.
 7. Batch norm (RN50, toyclip) keeps CLIP's running statistics; its scale and shift are tuned. A batch's statistics
    would change all predictions before the first step, and forget what pretraining saw. --train-bn learns new ones.

    python proreg.py                                                  # toy world and toy CLIP: a minute on a laptop
    python proreg.py --dataset pacs --test-domain sketch --paper      # the released protocol, ViT-B/32
    python proreg.py --dataset nico_animal --paper --ensemble 0.5 --wise-ft 0.3 0.5 0.7
    torchrun --nproc-per-node 4 proreg.py --dataset domainnet --paper --workers 4
"""

import argparse
import copy
import dataclasses
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common
import data
import runs
import vision
from common import Clip
from data import UserError


# ----------------------------------------------------------------------------------------------------------------------
# 1. METHOD: the functions that are the paper. Tensors and numbers in, tensors out; paste this section anywhere.
# ----------------------------------------------------------------------------------------------------------------------
def adaptive_weight(logits, zs_logits, labels, power: float = 10.0) -> torch.Tensor:
    """Trust in the zero-shot prompt, sample by sample (Eq. 4). logits, zs_logits [B, C], labels [B] → [B] in [0, 1).

    WHY log space: probabilities of 0 and 1 are usual here, and p^10 leaves float32's range below p = 1e-4.
    WHY no gradient: through w the model could lower its loss by being less sure of the label.
    """
    with torch.no_grad():
        log_p = logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]  # [B], of the label
        log_zs = power * zs_logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]
        # Eq. 4: w = p_zs^k / ( p + p_zs^k + 1e-5 )
        return (log_zs - torch.stack([log_p, log_zs, torch.full_like(log_p, 1e-5).log()]).logsumexp(dim=0)).exp()


# same in prograd.py
def distillation_loss(logits: torch.Tensor, zs_logits: torch.Tensor, T: float = 1.0) -> torch.Tensor:
    """Soft cross-entropy from the zero-shot prediction, times T² (Eq. 3). logits, zs_logits [B, C] → scalar, nats.

    WHY T²: gradients of softmax(logits / T) shrink like 1/T²; the factor keeps their size comparable when T changes.
    """
    p_zs = (zs_logits / T).softmax(dim=-1)  # [B, C]
    # Eq. 3: L_kl = mean( -T² · sum_c p_zs · log p )
    return -(p_zs * (logits / T).log_softmax(dim=-1)).sum(dim=-1).mean() * T**2


def fixed_kd_loss(logits, zs_logits, labels, alpha: float, T: float = 1.0) -> torch.Tensor:
    """Both losses at one weight for all samples (Eq. 6). logits, zs_logits [B, C], labels [B] → scalar, nats."""
    loss_ce = -logits.log_softmax(dim=-1).gather(1, labels[:, None]).mean()
    # Eq. 6: L = (1 - α) · mean( L_ce ) + α · mean( L_kl )
    return (1 - alpha) * loss_ce + alpha * distillation_loss(logits, zs_logits, T)


def proreg_loss(logits, zs_logits, labels, alpha: float = 1.0, power: float = 10.0, T: float = 1.0) -> torch.Tensor:
    """Both losses, weighted sample by sample (Eq. 5). logits, zs_logits [B, C], labels [B] → scalar, nats."""
    w = adaptive_weight(logits, zs_logits, labels, power)  # [B]
    loss_ce = -logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]  # [B], Eq. 2
    p_zs = (zs_logits / T).softmax(dim=-1)  # [B, C]
    loss_kl = -(p_zs * (logits / T).log_softmax(dim=-1)).sum(dim=-1) * T**2  # [B], Eq. 3
    # Eq. 5: L = mean( (1 - w) · L_ce ) + α · mean( w · L_kl )
    return ((1 - w) * loss_ce).mean() + alpha * (w * loss_kl).mean()


# ----------------------------------------------------------------------------------------------------------------------
# 2. MODEL: CLIP's image encoder, and a classifier that starts as the zero-shot prompt
# ----------------------------------------------------------------------------------------------------------------------
class PromptedClassifier(nn.Module):
    """A copy of CLIP's image encoder and, of the text side, only the features of the training classes' prompts.

    text [C, D] is unnormalised, as released. WHY that matters: Adam's steps have one size, so the length of a row sets
    how fast it turns. head "mlp": two layers from a random start in its place, the promptless baseline.
    """

    def __init__(self, clip: Clip, classnames: list[str], text: torch.Tensor, head: str = "text", seed: int = 1):
        super().__init__()
        self.visual = copy.deepcopy(vision.hasten(clip.model.visual)).requires_grad_(True)
        self.classnames, self.cls_head = classnames, None  # the names of the classifier's rows
        if head == "text":
            self.text_features = nn.Parameter(text.clone())  # [C, D]
            self.logit_scale = nn.Parameter(clip.model.logit_scale.detach().clone())  # σ, a logarithm
        else:
            (C, D), draw = text.shape, data.generator(seed, "mlp head")
            layers = [nn.Linear(D, 2 * D), nn.LayerNorm(2 * D), nn.GELU(), nn.Linear(2 * D, C)]
            for layer in (layers[0], layers[3]):
                nn.init.normal_(layer.weight, std=0.02, generator=draw)
                nn.init.zeros_(layer.bias)
            self.cls_head = nn.Sequential(*layers).to(text)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)  # [B, 3, H, W] → [B, D], unnormalised

    def forward(self, features: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
        """Features [B, D] → logits [B, C] by the learned classifier or other `text` [C, D]; fp32, outside autocast."""
        if self.cls_head is not None:
            return self.cls_head(features.to(self.cls_head[0].weight))  # unnormalised, as released
        text = self.text_features if text is None else text
        # Eq. 1: logits = exp(σ) · cos(f(x), t)
        return self.logit_scale.exp() * F.normalize(features.to(text), dim=-1) @ F.normalize(text, dim=-1).T


@torch.no_grad()
def prompt_features(clip: Clip, classnames: list[str], template: str) -> torch.Tensor:
    """Text features [C, D] of the zero-shot prompts, unnormalised."""
    rows = [common.token_ids(clip, template.replace("{}", name), clip.context_length - 1) for name in classnames]
    return common.encode_prompts(clip, common.start_of_text(clip), *common.embed(clip, rows))[0]


def parameter_groups(learner: PromptedClassifier, lr: float, factor: float, weight_decay: float) -> list[dict]:
    """AdamW's groups as released: the head at `factor` times the rate; no decay on the names of its list."""
    groups = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            head = any(part in name for part in ("text_features", "logit_scale", "cls_head"))
            exempt = any(part in name for part in ("bias", "norm.weight", "norm1.weight", "norm2.weight"))
            peak, decay = lr * factor if head else lr, 0.0 if exempt else weight_decay
            groups.setdefault((peak, decay), {"params": [], "peak": peak, "weight_decay": decay})
            groups[peak, decay]["params"].append(parameter)
    return list(groups.values())


def warmup_linear(step: int, steps: int, warmup: float = 0.1) -> float:
    """The rate of step 0 .. steps - 1, as a part of its peak: from 0 up over the first steps, then down towards 0."""
    rising = int(steps * warmup)
    return step / rising if step < rising else (steps - step) / max(1, steps - rising)


# ----------------------------------------------------------------------------------------------------------------------
# 3. FLAGS
# ----------------------------------------------------------------------------------------------------------------------
METHOD = {"loss": "proreg", "temperature": 1.0, "head": "text", "train": "all", "train_bn": False, "select": "last",
          "shots": "all", "betas": [0.9, 0.98], "weight_decay": 0.01, "warmup": 0.1, "accumulate": 1, "views": 0,
          "ensemble": [], "wise_ft": []}  # fmt: skip
DEFAULTS = {
    "toy": METHOD | {"dataset": "toy_shapes_biased", "model": "toyclip", "lr": 1e-3, "head_lr_factor": 1.0,
                     "batch_size": 64, "epochs": 8, "augment": "none", "power": 1.0, "compare": True},
    "paper": METHOD | {"model": "ViT-B-32", "pretrained": "openai", "lr": 1e-5, "head_lr_factor": 100.0,
                       "batch_size": 256, "epochs": 10, "augment": "randaugment", "power": 10.0, "compare": False},
    "fixed": {"head"},  # a checkpoint cannot be read with another value of it
}  # fmt: skip
# WHY k = 1 and a larger α on toy data: toyclip's logit scale is 21 and not CLIP's 100. Its prompt is seldom sure of a
# label, so that p_zs^10 is nearly 0 (plain fine-tuning); α = 4 is the best H on validation images, by a little.
ALPHA = {"proreg": {"toy": 4.0, "paper": 2.0, "bar": 1.0, "nico_vehicle": 1.5}, "ce": {"toy": 0.0, "paper": 0.0},
         "kd": {"toy": 0.5, "paper": 0.5, "nico_animal": 0.9}}  # fmt: skip


def paper_exceptions(settings: dict) -> dict:
    """--paper: α of the released configuration files where a dataset has its own; all others have the default's."""
    alphas, dataset = ALPHA[settings["loss"]], settings["dataset"]
    return {"alpha": alphas[dataset]} if dataset in alphas else {}


def build_parser() -> argparse.ArgumentParser:
    parser = runs.new_parser(__doc__)
    add = parser.add_argument_group("ProReg").add_argument
    add("--loss", choices=["proreg", "kd", "ce"], help="Eq. 5, Eq. 6, or ordinary fine-tuning from the prompt")
    add("--alpha", type=runs.non_negative, help="α of Eq. 5 or 6 [toy: 4 or 0.5, else: 2 or 0.5, --paper: by dataset]")
    add("--power", type=runs.positive_float, help="k of Eq. 4: 1 = the plain ratio of probabilities")
    add("--temperature", type=runs.positive_float, help="T of Eq. 3")
    add("--head", choices=["text", "mlp"], help="text: the prompt's features; mlp: two random layers, no prompt")
    add("--train", choices=["all", "head"], help="all: encoder and head; head: a linear probe from the prompt")
    add("--train-bn", action="store_true", default=None, help="batch norm learns new running statistics")
    add("--head-lr-factor", type=runs.positive_float, help="the head's learning rate, in units of --lr")
    add("--betas", type=runs.below_one, nargs=2, metavar="B", help="of AdamW")
    add("--weight-decay", type=runs.non_negative, help="of AdamW; none on biases")
    add("--warmup", type=runs.fraction, help="part of the steps in which the rate rises")
    add("--accumulate", type=runs.positive_int, help="parts to cut a batch into, to save memory; the same result")
    add("--select", choices=["last", "val"], help="report the last step, or the epoch best on the validation part")
    add("--ensemble", type=runs.fraction, nargs="+", metavar="A", help="Eq. 8 at these shares of zero-shot CLIP")
    add("--wise-ft", type=runs.fraction, nargs="+", metavar="A", help="Eq. 9 (1 - A is WiSE-FT's own coefficient)")
    return runs.with_defaults(parser, DEFAULTS)


# ----------------------------------------------------------------------------------------------------------------------
# 4. TRAIN
# ----------------------------------------------------------------------------------------------------------------------
def train(args, clip: Clip, task: data.Task, out: Path) -> PromptedClassifier:
    """Fine-tune on task.train; goes on from out/checkpoint.pt. K processes learn what one alone would learn."""
    text = prompt_features(clip, task.classnames, task.template)  # [C, D]
    learner = PromptedClassifier(clip, task.classnames, text, args.head, args.seed)
    learner.visual.requires_grad_(args.train == "all")
    groups = parameter_groups(learner, args.lr, args.head_lr_factor, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=1e-8)
    parameters = [parameter for group in groups for parameter in group["params"]]
    first = runs.resume(out, "proreg", learner, optimizer)
    # WHY a scaler: fp16 gradients underflow. Its state travels with the optimiser's, for --resume.
    scaler = torch.amp.GradScaler(torch.device(clip.device).type, enabled=args.precision == "fp16")
    scaler.load_state_dict(optimizer.param_groups[0].get("scaler") or scaler.state_dict())
    classifier, table = F.normalize(text, dim=-1), None  # the teacher's, [C, D]
    if args.augment == "none" and args.loss != "ce":  # it sees the same images in every epoch: one pass is enough
        x, _ = vision.encode(args, clip, task.train, clip.preprocess, task.train, what="training images")  # [N, D]
        table = clip.scale * x.to(text) @ classifier.T  # [N, C]
    N, steps = len(task.train), -(-len(task.train) // args.batch_size)  # steps an epoch, the partial batch too
    for epoch in range(first, args.epochs):
        order, stream = draw_epoch(args, clip, task, epoch)
        if not order:  # --max-steps
            break
        seen = text.new_zeros(N, 4)  # for the log, of each image: L, L_ce, was it right, w
        learner.train(args.train_bn)
        for step, batch in enumerate(common.progress(order, f"{out.name}, epoch {epoch + 1} of {args.epochs}")):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warmup_linear(epoch * steps + step, args.epochs * steps, args.warmup)
            for parameter in parameters:  # zeros and not None: a process without images in this batch adds these
                parameter.grad = torch.zeros_like(parameter)
            for images, labels, index in next(stream):  # this process's parts of the batch: [b, 3, H, W], [b], [b]
                with common.autocast(clip):
                    features = learner.encode_image(images)  # [b, D]
                logits, w = learner(features), 0 * labels  # [b, C], [b]
                loss = loss_ce = F.cross_entropy(logits, labels)
                if args.loss != "ce":
                    zs_logits = zero_shot_logits(clip, classifier, images) if table is None else table[index]  # [b, C]
                    w = adaptive_weight(logits, zs_logits, labels, args.power)
                if args.loss == "proreg":  # Eq. 5
                    loss = proreg_loss(logits, zs_logits, labels, args.alpha, args.power, args.temperature)
                elif args.loss == "kd":  # Eq. 6
                    loss = fixed_kd_loss(logits, zs_logits, labels, args.alpha, args.temperature)
                common.check_finite(epoch, step, loss=loss)
                # WHY this share: summed over parts and processes it is the mean over the batch, whatever their sizes.
                scaler.scale(loss * (len(labels) / len(batch))).backward()
                numbers = loss.expand(len(labels)), loss_ce.expand(len(labels)), logits.argmax(dim=-1) == labels, w
                seen[index] = torch.stack([number.detach().to(seen) for number in numbers], dim=1)
            if common.world_size() > 1:
                flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # one message, not hundreds
                dist.all_reduce(flat)  # the sum over processes
                nn.utils.vector_to_parameters(flat, [parameter.grad for parameter in parameters])
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))  # clips nothing, gives the norm
            if not scaler.is_enabled() or scaler.get_scale() < 1:  # WHY: a scaler skips a step that overflowed
                common.check_finite(epoch, step, gradient=norm)
            # Eq. 7
            scaler.step(optimizer)
            scaler.update()
        optimizer.param_groups[0]["scaler"] = scaler.state_dict()
        end_epoch(args, clip, task, out, epoch, learner, optimizer, seen, torch.cat(order))
    if args.select == "val":
        common.broadcast(None)  # process 0 may still be writing
        best = runs.load_checkpoint(out / "best", "proreg")
        common.log(f"--select val: epoch {best['epoch']} of {args.epochs}")
        runs.restore(learner, best["tensors"], out / "best")
    return learner


def draw_epoch(args, clip: Clip, task: data.Task, epoch: int):
    """The epoch's batches of image numbers (the last may be smaller), and an iterator over what this process takes of
    each: every K-th image, loaded, in at most --accumulate parts."""
    order = torch.randperm(len(task.train), generator=data.generator(args.seed, "order", epoch)).split(args.batch_size)
    order = order[: max(0, args.max_steps - epoch * len(order))] if args.max_steps else order
    mine = [batch[common.rank() :: common.world_size()] for batch in order]
    parts = [[part.tolist() for part in share.chunk(args.accumulate) if len(part)] for share in mine]
    view = epoch % args.views if args.views else epoch
    images = vision.ImageSet(task.train, data.train_transform(clip.preprocess, args.augment), args.seed, view)
    loader = iter(vision.image_loader(images, args.workers, batch_sampler=sum(parts, [])))
    return order, (([tensor.to(clip.device) for tensor in next(loader)] for _ in share) for share in parts)


@torch.no_grad()
def zero_shot_logits(clip: Clip, classifier: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The teacher: frozen CLIP's logits [b, C] of images [b, 3, H, W], by the prompts' unit features [C, D]."""
    with common.autocast(clip):
        features = clip.model.encode_image(images)
    return clip.scale * F.normalize(features.to(classifier), dim=-1) @ classifier.T


def end_epoch(args, clip: Clip, task: data.Task, out: Path, epoch: int, learner, optimizer, seen, order) -> None:
    """Write the epoch's line, a checkpoint and, with --select val, the best weights so far."""
    if common.world_size() > 1:
        dist.all_reduce(seen)  # an image was seen by one process, and is 0 in the others
    loss, loss_ce, right, w = seen[order.to(seen.device)].double().T.cpu()
    state = optimizer.param_groups[0]  # what is added here travels with the optimiser's state, for --resume
    line = {"lr": state["lr"], "loss": loss.mean().item(), "loss_ce": loss_ce.mean().item()}
    line["train_accuracy"] = 100 * right.mean().item()
    if args.loss != "ce":
        line |= {"w_mean": w.mean().item(), "w_above_half": (w > 0.5).double().mean().item()}
        line |= {f"w_{q}": w.quantile(q / 100).item() for q in (10, 25, 50, 75, 90)}
    if args.select == "val" or (args.eval_every and (epoch + 1) % args.eval_every == 0):
        test = data.Test(task.name, None, "all", task.classnames, task.template, task.val)
        line["val_accuracy"] = common.evaluate(*tuned_logits(args, clip, learner, test))["accuracy"]
    if common.rank() > 0:
        return
    if args.select == "val" and line["val_accuracy"] > state.get("best", -1):  # of equals the first
        state["best"] = line["val_accuracy"]
        (out / "best").mkdir(exist_ok=True)
        runs.save_checkpoint(out / "best", "proreg", args, learner.state_dict(), epoch + 1)
    runs.end_epoch(args, out, "proreg", epoch, learner, optimizer, line)


# ----------------------------------------------------------------------------------------------------------------------
# 5. EVALUATE
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def tuned_logits(args, clip: Clip, learner: PromptedClassifier, test: data.Test) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, C] of a test set's images among its class names, and labels [N]. Processes share the images.

    By the learned classifier if it has all of the names, else by their prompts, to see what the encoder has forgotten.
    """
    tuned = dataclasses.replace(clip, model=learner.eval())
    what = f"{test.domain or test.classes} images of {test.name}, tuned encoder"
    x, labels = vision.encode_images(tuned, test.items, clip.preprocess, args, keep=False, what=what)  # [N, D]
    if test.classnames == learner.classnames:
        return learner(x), labels
    if set(test.classnames) <= set(learner.classnames):
        return learner(x)[:, [learner.classnames.index(name) for name in test.classnames]], labels
    return learner(x, prompt_features(clip, test.classnames, test.template)), labels


def evaluate(args, clip: Clip, learner: PromptedClassifier, tests: list[dict]) -> list[dict]:
    """The rows of `tests` with the tuned model's logits, and in "extra" the measures of every ensemble and mixture."""
    tuned, mixtures = [tuned_logits(args, clip, learner, row["test"])[0] for row in tests], {}
    for A in args.ensemble:
        # Eq. 8: logits = (1 - A) · tuned + A · zero-shot
        mixtures[f"ensemble {A:g}"] = [(1 - A) * t + A * row["zero_shot"] for t, row in zip(tuned, tests)]
    for A in args.wise_ft:
        text = prompt_features(clip, **args.trained_on)
        mixed, start = copy.deepcopy(learner), PromptedClassifier(clip, learner.classnames, text)
        for value, zero_shot in zip(mixed.state_dict().values(), start.state_dict().values(), strict=True):
            if value.is_floating_point():
                # Eq. 9: θ = (1 - A) · θ_tuned + A · θ_zs, running statistics too
                value.lerp_(zero_shot, A)
        mixtures[f"wise-ft {A:g}"] = [tuned_logits(args, clip, mixed, row["test"])[0] for row in tests]
    extra = [
        {name: common.evaluate(m[i], row["labels"]) for name, m in mixtures.items()} for i, row in enumerate(tests)
    ]
    return [row | {"tuned": logits, "extra": more} for row, logits, more in zip(tests, tuned, extra)]


def fit(args, clip: Clip, task: data.Task, tests: list[dict], out: Path, baseline: dict | None = None) -> dict:
    """Train (or read args.checkpoint), evaluate on every test set once, write the run folder, return its result."""
    if result := runs.finished(out):  # a resumed run whose baseline is finished
        return result
    start, encoded = time.time(), common.SECONDS["encode"]
    learner = read_learner(args.checkpoint, clip) if args.eval_only else train(args, clip, task, out)
    trained, rows = time.time(), evaluate(args, clip, learner, tests)
    if common.rank() > 0:
        return {}
    rows = [row | {"baseline": baseline and baseline["tests"][i]["tuned"]} for i, row in enumerate(rows)]
    runs.save_checkpoint(out, "proreg", args, learner.state_dict(), args.epochs)
    seconds = {"encode": encoded, "train": trained - start, "evaluate": time.time() - trained}
    result = runs.write_result(out, "proreg", args, task, clip, rows, seconds)
    shutil.rmtree(out / "best", ignore_errors=True)  # checkpoint.pt holds the same weights
    return result


def read_learner(path: str, clip: Clip) -> PromptedClassifier:
    """The tuned encoder and classifier of a run folder or checkpoint."""
    state = runs.load_checkpoint(path, "proreg")
    names, head = (state["trained_on"] or {"classnames": []})["classnames"], state["settings"].get("head", "text")
    learner = PromptedClassifier(clip, names, torch.zeros(len(names), clip.dim, device=clip.device), head)
    runs.restore(learner, state["tensors"], path)
    return learner


def report_mixtures(result: dict) -> None:
    """Print the accuracies and H of the tuned model, each ensemble and each mixture of weights."""
    tests = result["tests"]
    rows = [["accuracy %", *(test["domain"] or test["classes"] for test in tests), "H"]]
    for name in ["zero_shot", "tuned", *tests[0]["extra"]]:
        chosen = [test | {"tuned": (test["extra"] | test)[name]} for test in tests]
        h = runs.harmonic_means(chosen)
        cells = [f"{test['tuned']['accuracy']:.1f}" for test in chosen]
        rows.append([name.replace("_", "-"), *cells, f"{h['tuned']:.1f}" if h else ""])
    runs.print_aligned(rows)


# ----------------------------------------------------------------------------------------------------------------------
# 6. MAIN
# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags; returns what result.json holds."""
    args = runs.settle(build_parser(), argv, "proreg", DEFAULTS, paper_exceptions)
    if args.alpha is None:
        kind = "toy" if args.dataset.startswith("toy_") else "paper"
        args.alpha, args.sources["alpha"] = ALPHA[args.loss][kind], f"{kind} default of --loss {args.loss}"
    name = {"proreg": "ProReg", "kd": "KD", "ce": "fine-tuning"}[args.loss]
    if result := args.resume and runs.finished(args.out_dir):
        runs.report(result, args.out_dir, "fine-tuning", name)
        return result
    if args.train_bn and (common.world_size() > 1 or args.accumulate > 1):
        raise UserError("--train-bn: batch statistics need the whole batch at once; use one process, no --accumulate")
    task, clip = runs.prepare(args)
    if (args.select == "val" or args.eval_every) and not (task.val or args.eval_only):
        raise UserError(f"{task.name} has no validation part: leave out --select val and --eval-every")
    if args.eval_only:  # the names that the classifier's rows belong to
        args.trained_on = runs.load_checkpoint(args.checkpoint, "proreg")["trained_on"] or args.trained_on
    trained = set(args.trained_on["classnames"])
    if args.head == "mlp" and (args.wise_ft or any(set(test.classnames) - trained for test in task.tests)):
        raise UserError("--head mlp has no prompt: no --wise-ft, no unseen classes (--classes base, --test-on)")
    out = runs.open_run(args, "proreg")
    tests, compare = vision.encode_tests(args, clip, task), args.compare and args.loss != "ce"
    plain = runs.open_baseline(args, out, "proreg", loss="ce", alpha=0.0) if compare else None
    baseline = fit(plain, clip, task, tests, Path(plain.out_dir)) if plain else None
    result = fit(args, clip, task, tests, out, baseline)
    if result:
        runs.report(result, out, "fine-tuning", name)
        if result["tests"][0]["extra"]:
            report_mixtures(result)
    return result


if __name__ == "__main__":
    runs.run(main)
