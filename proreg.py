"""ProReg: prompt regularisation for fine-tuning CLIP (Zhu et al., AAAI 2023, arXiv 2301.12429).

The idea. Fine-tuning CLIP's image encoder raises the accuracy on images like the training images,
and lowers it elsewhere: where all cows stand on grass, grass becomes a cow. The zero-shot prompt "a
photo of a CLASS." knows better, but is too generic for a special task. ProReg fine-tunes towards
both the label and the zero-shot prediction, and mixes them sample by sample: more of the prompt
where it is sure of the label, less where the tuned model is sure of the label already.

Equations (numbered by this file: the paper could not be read in full)
    Eq. 1   p(c | x) = softmax over c of s cos(f(x), t_c)                        the tuned CLIP
            at the start CLIP's own f and s, and t_c = the text feature of "a photo of a c."
    Eq. 2   L_ce = -log p(y | x)                                                 the label's loss
    Eq. 3   L_kl = -T² sum_c p_zs(c | x) log p(c | x), both at temperature T    KL and a constant
    Eq. 4   w = p_zs(y | x)^k / (p(y | x) + p_zs(y | x)^k + 1e-5)                trust in the prompt
            no gradient flows through w. It is 0.5 where both are sure of the label, 1 where only
            the prompt is, near 0 where p is well above p_zs^k
    Eq. 5   L = mean[(1 - w) L_ce] + α mean[w L_kl]                              --loss proreg
    Eq. 6   L = (1 - α) mean[L_ce] + α mean[L_kl]                                --loss kd
    Eq. 7   f, t, log s <- AdamW; the rate rises linearly from 0, then falls to 0 one step after
            the last. Its peak is --lr for f, --head-lr-factor times that for t and log s
    Eq. 8   logits: (1 - A) of the tuned model's + A of zero-shot CLIP's         --ensemble A
    Eq. 9   f, t, log s: (1 - A) of the tuned ones + A of those at the start     --wise-ft A

    paper        here                                shape            flag
    f            PromptedClassifier.visual           a tower          --model --pretrained --train
    t, log s     .text_features, .logit_scale        [C, D], number   --template --head
    p_zs         softmax of zs_logits                [B, C]           f, t, s frozen at the start
    w, k         adaptive_weight, power              [B], number      --power (10 as released)
    α, T         alpha, T                            numbers          --alpha --temperature
    B images in a batch, b in the part of it that is computed at a time (--accumulate, several
    processes), N in a set, C classes; D entries of a feature, of an image or of a text

Learned: the image encoder and the classifier. Frozen: the teacher, a second image encoder, which
sees the same augmented view of each image; the text encoder makes t and is done. The result lies
between zero-shot CLIP (weak on images like the training images, in-distribution or ID; decent
elsewhere, OOD) and fine-tuning (the reverse), at a point that α and k choose. KD with one weight,
logit ensembles and WiSE-FT lie there, too: compare at equal ID accuracy. It helps where images
hold a shortcut that the prompt does not take, not where zero-shot CLIP is wrong throughout. k = 10
and a prompt that is seldom sure (low logit scale: toyclip's is 21, CLIP's 100) leave w near 0:
plain fine-tuning. α is a factor in Eq. 5, a share in Eq. 6.

PAPER vs CODE: (The paper as others restate it. The code is github.com/BeierZhu/ProReg at 102ff0b,
and is followed but for what is said; FILE:LINES are below its folder vilt/, or config/.)
 1. k = 10 in the code (modules/losses.py:60-62); commented out are k = 1 and a ratio of losses
    (17-49). The paper's own weight was not seen.
 2. No weight decay on biases, nor on layer norms called norm, norm1, norm2, as in ViLT
    (modules/vilt_utils.py:74-84). CLIP's, ln_pre, ln_1, ln_2, ln_post, are decayed, as t and log s.
 3. AdamW is PyTorch's, not that of `transformers` (modules/vilt_utils.py:4, 136); RandAugment(2, 9)
    is torchvision's, with other operations than the code's (transforms/randaug.py).
 4. The partial last batch is kept, averaged over its own size. The code averages the means of parts
    (of processes and of accumulated steps, ../run.py:44-63) even where these have different sizes;
    here parts are weighted, so that they learn what one batch would.
 5. The code looks twice an epoch (config.py:114) and keeps what is best on validation images
    (../run.py:23-29): of DomainNet the ID test images (datasets/domain_net_dataset.py:15-16), of
    BAR those that accuracy is measured on, as its test part has no labels there
    (datasets/bar_dataset.py:29-32). Here the last step is reported; --select val looks at the
    validation part after every epoch.
 6. A `_` in a class name is a blank here; the code leaves it (modules/vilt_module.py:29).
 7. Batch norm (RN50, toyclip; none in the code) keeps CLIP's statistics; scale and shift are tuned.
 8. The paper's experiment on VQA-CP (with ViLT) is not in the code and not here.

    python proreg.py                                                   # toy world, toy CLIP
    python proreg.py --dataset bar --paper                             # the released protocol
    python proreg.py --dataset pacs --test-domain sketch --loss ce --ensemble 0.5 --wise-ft 0.3 0.5
    torchrun --nproc-per-node 4 proreg.py --dataset domainnet --workers 4
"""

import argparse
import copy
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import data
from common import Clip, require

# 1. METHOD: the functions that are the paper. It needs torch alone: paste it anywhere -------------
Tensor = torch.Tensor


def adaptive_weight(logits: Tensor, zs_logits: Tensor, labels: Tensor, power=10.0) -> Tensor:
    """Trust in the prompt, by sample (Eq. 4). logits, zs_logits [B, C], labels [B] → [B] in [0, 1).

    WHY no gradient: through w the model could lower L by moving weight to the smaller loss.

    >>> sure, wrong = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    >>> label = torch.tensor([0])
    >>> adaptive_weight(sure, sure, label), adaptive_weight(wrong, sure, label)
    (tensor([0.5000]), tensor([1.0000]))
    """
    p = (-label_losses(logits.detach(), labels)).exp()  # [B]
    p_zs = (-label_losses(zs_logits.detach(), labels)).exp()
    # Eq. 4: w = p_zs^k / ( p + p_zs^k + 1e-5 )
    return p_zs**power / (p + p_zs**power + 1e-5)


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample (Eq. 2). logits [B, C], labels [B] → [B], nats.

    >>> label_losses(torch.zeros(1, 2), torch.tensor([0]))  # ln 2
    tensor([0.6931])
    """
    # Eq. 2: L_ce = -log p(y)
    return -logits.log_softmax(dim=-1).gather(1, labels[:, None])[:, 0]


def prompt_losses(logits: Tensor, zs_logits: Tensor, T: float = 1.0) -> Tensor:
    """Cross-entropy from the zero-shot prediction, times T², of each sample (Eq. 3). logits,
    zs_logits [B, C] → [B], nats.

    WHY T²: the cross-entropy's gradient shrinks like 1/T²; the factor keeps its size comparable
    when T changes.

    >>> prompt_losses(torch.zeros(1, 2), torch.tensor([[50.0, 0.0]]))  # a sure prompt: ln 2
    tensor([0.6931])
    """
    p_zs = (zs_logits / T).softmax(dim=-1)  # [B, C]
    log_p = (logits / T).log_softmax(dim=-1)
    # Eq. 3: L_kl = -T² · sum_c p_zs · log p
    return -(p_zs * log_p).sum(dim=-1) * T**2


def distillation_loss(logits: Tensor, zs_logits: Tensor, T: float = 1.0) -> Tensor:
    """Mean of Eq. 3 over the batch. logits, zs_logits [B, C] → scalar, nats.

    >>> distillation_loss(torch.zeros(2, 2), torch.zeros(2, 2))
    tensor(0.6931)
    """
    return prompt_losses(logits, zs_logits, T).mean()


def fixed_kd_loss(logits: Tensor, zs_logits: Tensor, labels: Tensor, alpha: float, T=1.0) -> Tensor:
    """Both losses at one weight (Eq. 6). logits, zs_logits [B, C], labels [B] → scalar, nats.

    >>> sure = torch.tensor([[50.0, 0.0]])
    >>> fixed_kd_loss(sure, -sure, torch.tensor([0]), alpha=0.5)  # label fits, prompt does not
    tensor(25.)
    """
    loss_ce = label_losses(logits, labels).mean()
    # Eq. 6: L = (1 - α) · mean( L_ce ) + α · mean( L_kl )
    return (1 - alpha) * loss_ce + alpha * distillation_loss(logits, zs_logits, T)


def proreg_loss(
    logits: Tensor, zs_logits: Tensor, labels: Tensor, alpha=1.0, power=10.0, T=1.0
) -> Tensor:
    """Both losses, weighted by sample (Eq. 5). logits, zs_logits [B, C], labels [B] → scalar, nats.

    >>> sure = torch.tensor([[50.0, 0.0]])
    >>> proreg_loss(sure, -sure, torch.tensor([0]))  # the prompt is wrong: w = 0, the label counts
    tensor(0.)
    """
    w = adaptive_weight(logits, zs_logits, labels, power)  # [B]
    loss_ce = label_losses(logits, labels)
    loss_kl = prompt_losses(logits, zs_logits, T)
    # Eq. 5: L = mean( (1 - w) · L_ce ) + α · mean( w · L_kl )
    return ((1 - w) * loss_ce).mean() + alpha * (w * loss_kl).mean()


# 2. MODEL: CLIP's image encoder, and a classifier that starts as the zero-shot prompt -------------
class PromptedClassifier(torch.nn.Module):
    """A copy of CLIP's image encoder and, of the text side, the features of the classes' prompts.

    text_features [C, D] stay unnormalised, as released. WHY that matters: Adam's steps have one
    size, so the length of a row sets how fast it turns. head "mlp": no prompt, but two layers from
    a random start, cls_head; the loss and its teacher stay those of --loss.
    """

    def __init__(self, clip: Clip, classnames: list[str], template: str, head="text", seed=1):
        super().__init__()
        # clip.start: the image encoder in fp32, if the frozen one is held in half precision.
        # WHY contiguous: fused AdamW reads weights and moments in the order they have in memory.
        self.visual = copy.deepcopy(clip.start or clip.model.visual).to(
            clip.device, memory_format=torch.contiguous_format
        )
        self.classnames = classnames  # of the classifier's rows
        self.template = template
        text = common.prompt_features(clip, classnames, template)  # [C, D]
        self.cls_head = random_layers(text, seed) if head == "mlp" else None
        if head == "text":
            self.text_features = torch.nn.Parameter(text.clone())  # [C, D]
            self.logit_scale = torch.nn.Parameter(clip.model.logit_scale.detach().clone())  # log s
        self.requires_grad_().eval()  # eval: see PAPER vs CODE 7

    def encode_image(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, D], unnormalised."""
        return self.visual(images)

    def forward(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        """Image features [B, D] → logits [B, C] by the learned classifier, or by `text`, the
        features [C, D] of other prompts. Call it outside autocast."""
        if self.cls_head is not None:
            return self.cls_head(features.to(self.cls_head[0].weight))  # unnormalised, as released
        text = self.text_features if text is None else text
        x = F.normalize(features.to(text), dim=-1)
        # Eq. 1: logits = s · cos(f(x), t)
        return self.logit_scale.exp() * x @ F.normalize(text, dim=-1).T


def random_layers(text: Tensor, seed: int) -> torch.nn.Sequential:
    """--head mlp: [B, D] → [B, C], of the size, device and dtype of `text` [C, D]."""
    C, D = text.shape
    first, last = torch.nn.Linear(D, 2 * D), torch.nn.Linear(2 * D, C)
    draw = data.generator(seed, "mlp head")
    for layer in (first, last):
        torch.nn.init.normal_(layer.weight, std=0.02, generator=draw)
        torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(first, torch.nn.LayerNorm(2 * D), torch.nn.GELU(), last).to(text)


def parameter_groups(learner: PromptedClassifier, lr: float, factor: float, weight_decay: float):
    """AdamW's groups as released: what is not the image encoder (t and log s, or cls_head) at
    `factor` times the rate; no decay of what is exempt (PAPER vs CODE 2). "peak": highest rate."""
    exempt = ("bias", "norm.weight", "norm1.weight", "norm2.weight")
    groups = {}
    for name, parameter in learner.named_parameters():
        decay = 0.0 if any(part in name for part in exempt) else weight_decay
        peak = lr if name.startswith("visual.") else lr * factor
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": p, "peak": peak, "weight_decay": d} for (peak, d), p in groups.items()]


def warmup_linear(step: int, steps: int, warmup: float = 0.1) -> float:
    """Rate of step 0 .. steps - 1 (Eq. 7), a share of its peak; it rises in the first `warmup`.

    >>> [round(warmup_linear(step, 10, 0.2), 3) for step in (0, 1, 2, 9)]
    [0.0, 0.5, 1.0, 0.125]
    """
    rising = int(steps * warmup)
    return step / rising if step < rising else (steps - step) / max(1, steps - rising)


# 3. FLAGS -----------------------------------------------------------------------------------------
# fmt: off
SETTINGS = {"loss": "proreg", "classes": "all", "temperature": 1.0, "head": "text", "train": "all",
            "select": "last", "shots": "all", "betas": [0.9, 0.98], "weight_decay": 0.01,
            "warmup": 0.1, "accumulate": 1, "views": 0, "ensemble": [], "wise_ft": []}
# WHY k = 1: toyclip's prompt is seldom sure of a label, so that k = 10 is plain fine-tuning.
TOY = SETTINGS | {"dataset": "toy_shapes_biased", "model": "toyclip", "lr": 3e-4, "epochs": 8,
                  "head_lr_factor": 1.0, "batch_size": 64, "augment": "none", "power": 1.0,
                  "compare": True}
REAL = SETTINGS | {"model": "ViT-B-32", "pretrained": "openai", "lr": 1e-5, "epochs": 10,
                   "head_lr_factor": 100.0, "batch_size": 256, "augment": "randaugment",
                   "power": 10.0, "compare": False}
# α by loss, and with --paper by dataset, as in config/: bar/prompt_xERM.yaml:8,
# nico_vehicle/prompt_xERM.yaml:6, and nico_animal/prompt_proreg.yaml:6, which is one weight (kd).
ALPHA = {"proreg": {"default": 2.0, "bar": 1.0, "nico_vehicle": 1.5}, "ce": {"default": 0.0},
         "kd": {"default": 0.5, "nico_animal": 0.9}}
# fmt: on
PATIENCE = datetime.timedelta(minutes=5)  # until all processes have met


def defaults(run: dict) -> dict:
    """The default settings. run: the settings known so far, on which some of them depend."""
    alphas = ALPHA[run.get("loss", "proreg")]
    alpha = alphas.get(run.get("dataset") if run.get("paper") else "default", alphas["default"])
    return (TOY if run.get("dataset", "toy_").startswith("toy_") else REAL) | {"alpha": alpha}


FLAGS = {
    "--loss": {"choices": ["proreg", "kd", "ce"], "help": "Eq. 5, Eq. 6, or plain fine-tuning"},
    "--alpha": {"type": float, "metavar": "α", "help": "of Eq. 5, 6; more = nearer zero-shot"},
    "--power": {"type": float, "metavar": "K", "help": "k of Eq. 4; 1 = plain probabilities"},
    "--temperature": {"type": float, "metavar": "T", "help": "of Eq. 3"},
    "--head": {"choices": ["text", "mlp"], "help": "the prompt's features, or random layers"},
    "--train": {"choices": ["all", "head"], "help": "head: the classifier alone"},
    "--head-lr-factor": {"type": float, "metavar": "X", "help": "the head's rate is X times --lr"},
    "--betas": {"type": float, "nargs": 2, "metavar": "X", "help": "of AdamW"},
    "--weight-decay": {"type": float, "metavar": "X", "help": "of AdamW, not on biases"},
    "--warmup": {"type": float, "metavar": "X", "help": "share of steps with a rising rate"},
    "--accumulate": {"type": int, "metavar": "X", "help": "parts of a batch, to save memory"},
    "--select": {"choices": ["last", "val"], "help": "val: the epoch best on validation images"},
    "--ensemble": {"type": float, "nargs": "+", "metavar": "A", "help": "Eq. 8 at these A"},
    "--wise-ft": {"type": float, "nargs": "+", "metavar": "A", "help": "Eq. 9 at these A"},
}


def build_parser() -> data.Parser:
    return common.new_parser(__doc__, "ProReg (Eq. n: see the file's head)", FLAGS, defaults)


# 4. TRAIN: several processes learn what one alone would learn -------------------------------------
def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun join the other processes. The first alone speaks, evaluates and writes."""
    alone = "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"
    if alone or dist.is_initialized():
        return
    require(not args.download, "let one process download first: python data.py --download ..")
    if args.device != "cpu":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    print(f"waiting for {os.environ['WORLD_SIZE']} processes, {PATIENCE} at most", file=sys.stderr)
    try:
        store, number, n = next(dist.rendezvous("env://", timeout=PATIENCE))
    except (ValueError, RuntimeError) as error:
        raise common.UserError(f"the processes did not meet: use torchrun ({error})") from error
    day = datetime.timedelta(days=1)  # the others wait while the first evaluates
    dist.init_process_group(
        "nccl" if args.device != "cpu" else "gloo",
        timeout=day, store=store, rank=number, world_size=n,
    )  # fmt: skip
    if number > 0:
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def step(
    learner: PromptedClassifier, clip: Clip, teacher, images: Tensor, labels: Tensor, index, args
) -> tuple[Tensor, Tensor]:
    """One part of a batch: images [b, 3, H, W], labels [b], index [b] (positions in the data) → its
    loss L, and sums over its images of [1, L, L_ce, prediction right, w, w > 0.5] for the log.
    teacher(images, index) → zero-shot CLIP's logits [b, C]."""
    with common.autocast(clip):
        features = learner.encode_image(images)  # [b, D]
    logits = learner(features)  # [b, C]
    loss_ce = label_losses(logits, labels)  # [b]
    if args.loss == "ce":
        loss = loss_ce.mean()
        w = torch.zeros_like(loss_ce)
    else:
        zs_logits = teacher(images, index)
        w = adaptive_weight(logits, zs_logits, labels, args.power)  # for the log
    if args.loss == "proreg":  # Eq. 5
        loss = proreg_loss(logits, zs_logits, labels, args.alpha, args.power, args.temperature)
    if args.loss == "kd":  # Eq. 6
        loss = fixed_kd_loss(logits, zs_logits, labels, args.alpha, args.temperature)
    numbers = [torch.ones_like(w), loss.expand_as(w), loss_ce,
               (logits.argmax(dim=-1) == labels).to(w), w, (w > 0.5).to(w)]  # fmt: skip
    return loss, torch.stack(numbers).detach().sum(dim=1)


def train(args: argparse.Namespace, clip: Clip, task: data.Task, out: Path) -> PromptedClassifier:
    """Fine-tune on task.train."""
    learner = PromptedClassifier(clip, task.classnames, task.template, args.head, args.seed)
    learner.visual.requires_grad_(args.train == "all")  # AdamW skips what has no gradient
    # WHY fused: one kernel for all parameters, and the CPU need not wait to read a number.
    optimizer = torch.optim.AdamW(
        parameter_groups(learner, args.lr, args.head_lr_factor, args.weight_decay),
        args.lr, tuple(args.betas), eps=1e-8, fused=True,
    )  # fmt: skip
    # WHY a scaler: fp16 gradients underflow. Its state is not kept over a resume.
    scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.precision == "fp16")
    teacher = zero_shot_teacher(args, clip, task)
    first = common.resume(out, learner, optimizer)  # 0, or where the checkpoint in `out` left off
    for epoch in common.progress(range(first, args.epochs), out.name + common.SOONER):
        batches = training_batches(args, clip, task, epoch)
        sums = next(learner.parameters()).new_zeros(6)
        for i, (size, parts) in enumerate(batches):
            rate = warmup_linear(epoch * len(batches) + i, args.epochs * len(batches), args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.zero_grad()
            for part in parts:
                part = [tensor.to(clip.device, non_blocking=True) for tensor in part]
                loss, numbers = step(learner, clip, teacher, *part, args)
                # WHY this factor: summed over parts and processes it is the mean over the batch.
                scaler.scale(loss * (len(part[0]) / size)).backward()
                sums += numbers
            if world_size() > 1:
                add_gradients(learner)
            # Eq. 7
            scaler.step(optimizer)
            scaler.update()
        end_epoch(args, clip, task, out, epoch, learner, optimizer, rate, sums)
    if args.select == "val" and rank() == 0:
        common.load_checkpoint(out / "best", learner)
    return learner


def training_batches(args, clip: Clip, task: data.Task, epoch: int) -> list[tuple[int, Iterator]]:
    """For each batch of an epoch its size, and an iterator over the parts that this process takes
    of it, each (images [b, 3, H, W], labels [b], positions [b])."""
    transform = data.train_transform(clip.preprocess, args.augment)
    images = data.ImageSet(task.train, transform, args.seed)
    # The last batch may be smaller, and is kept, as released.
    shuffled = torch.randperm(len(images), generator=data.generator(args.seed, "order", epoch))
    whole = shuffled.split(args.batch_size)[: args.max_steps or None]  # --max-steps: of an epoch
    own = [batch[rank() :: world_size()] for batch in whole]  # this process's; may be empty
    parts = [some.chunk(args.accumulate) if len(some) else () for some in own]
    # Number i + v · N asks ImageSet for image i in view v; the position that it returns is i.
    view = epoch % args.views if args.views else epoch
    lists = [(part + view * len(images)).tolist() for some in parts for part in some]
    # One loader for all of these, as it decodes ahead. So the batches are to be used in order.
    loaded = data.load_images(images, lists, args, f"epoch {epoch + 1}")
    return [(len(batch), (next(loaded) for _ in some)) for batch, some in zip(whole, parts)]


def zero_shot_teacher(args: argparse.Namespace, clip: Clip, task: data.Task) -> Callable:
    """A function (images [b, 3, H, W], positions [b]) → frozen CLIP's logits [b, C]."""
    classifier = common.zero_shot_classifier(clip, task.classnames, [task.template])  # [C, D]

    def logits(features: Tensor) -> Tensor:
        return clip.scale * F.normalize(features.to(classifier), dim=-1) @ classifier.T

    if args.augment == "none" and args.loss != "ce":  # the same images in every epoch
        table = logits(common.encode_images(clip, task.train, clip.preprocess, args)[0])  # [N, C]
        return lambda images, index: table[index]

    def see(images: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad(), common.autocast(clip):
            features = clip.model.encode_image(images)  # [b, D]
        return logits(features)

    return see


def add_gradients(learner: PromptedClassifier) -> None:
    """Replace each gradient by the sum over all processes, in one message, not hundreds."""
    learned = [p for p in learner.parameters() if p.requires_grad]
    # A process that had no image of a small batch adds zeros.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for p, grad in zip(learned, flat.split([p.numel() for p in learned])):
        p.grad = grad.view_as(p)


def end_epoch(args, clip, task, out: Path, epoch: int, learner, optimizer, rate, sums) -> None:
    """Write the epoch's log, a checkpoint and, with --select val, the best weights so far. rate: of
    its last step, as a fraction of the peak. sums: step's, over the epoch."""
    if world_size() > 1:
        dist.all_reduce(sums)
    if rank() > 0:
        return
    loss, loss_ce, right, w, above = sums[1:] / sums[0]  # means over the epoch's images
    log = {"lr": args.lr * rate, "loss": loss, "loss_ce": loss_ce, "train_accuracy": 100 * right}
    log |= {"w_mean": w, "w_above_half": above} if args.loss != "ce" else {}
    if args.select == "val" or (args.eval_every and (epoch + 1) % args.eval_every == 0):
        found = tuned_logits(args, clip, learner, task.validation()[0])
        log["val_accuracy"] = common.evaluate(*found)["accuracy"]
    if args.select == "val":
        earlier = [past["val_accuracy"] for past in common.read_metrics(out)[:epoch]]
        if log["val_accuracy"] > max(earlier, default=-1):  # of equals the first
            common.save_checkpoint(out / "best", learner, epoch + 1)
    common.end_epoch(out, epoch, learner, optimizer, log, last=epoch + 1 == args.epochs)


# 5. EVALUATE --------------------------------------------------------------------------------------
@torch.no_grad()
def class_logits(learner: PromptedClassifier, clip: Clip, classnames: list[str], x, template):
    """Logits [N, C] of features x [N, D] of the tuned encoder: by the learned classifier if it has
    all of the classes (those of one name in order), else by their prompts: what is forgotten?"""
    own, asked = data.numbered(learner.classnames), data.numbered(classnames)
    if set(asked) <= set(own):
        return learner(x)[:, [own.index(name) for name in asked]]
    return learner(x, common.prompt_features(clip, classnames, template))


def tuned_logits(args, clip: Clip, learner: PromptedClassifier, test: data.Test):
    """Logits [N, C] of a test set's images, and labels [N]."""
    tuned = dataclasses.replace(clip, model=learner)  # whose encode_image is the tuned encoder
    x, labels = common.encode_images(tuned, test.items, clip.preprocess, args, cache=False)
    return class_logits(learner, clip, test.classnames, x, test.template), labels


def evaluate(args, clip: Clip, learner: PromptedClassifier, encoded: list) -> list[dict]:
    """For each test set (encoded: as frozen CLIP sees it) the tuned logits, and as "extra" the
    measures of each ensemble and of each mixture of weights."""
    found = []
    for frozen in encoded:
        tuned, labels = tuned_logits(args, clip, learner, frozen.test)
        # Eq. 8: logits = (1 - A) · tuned + A · zero-shot
        ensembles = {
            f"ensemble {A:g}": common.evaluate((1 - A) * tuned + A * frozen.zero_shot, labels)
            for A in args.ensemble
        }
        found.append({"tuned": tuned, "extra": ensembles})
    for A in args.wise_ft:
        mixed = mix_weights(clip, learner, A)
        for frozen, row in zip(encoded, found):
            logits, labels = tuned_logits(args, clip, mixed, frozen.test)
            row["extra"][f"wise-ft {A:g}"] = common.evaluate(logits, labels)
    return found


def mix_weights(clip: Clip, learner: PromptedClassifier, A: float) -> PromptedClassifier:
    """WiSE-FT: the weights between tuned (A = 0) and zero-shot (A = 1); its paper's α is 1 - A."""
    mixture = copy.deepcopy(learner)
    start = PromptedClassifier(clip, learner.classnames, learner.template).state_dict()
    for name, value in mixture.state_dict().items():
        if value.is_floating_point():
            # Eq. 9: (1 - A) · tuned + A · start
            value.lerp_(start[name], A)
    return mixture


def read_learner(folder: str | Path, args: argparse.Namespace, clip: Clip) -> PromptedClassifier:
    """The tuned encoder and classifier of a run folder: the ones whose figures it reports."""
    config = common.read_run(folder)
    learner = PromptedClassifier(clip, config["classnames"], config["template"], args.head)
    common.load_checkpoint(Path(folder, "best" if args.select == "val" else ""), learner)
    return learner


def fit(args, clip: Clip, task: data.Task, encoded: list, out: Path, baseline=None) -> dict:
    """Train (or read the run to evaluate), test on `encoded`, write the run folder → its result."""
    if (out / "result.json").exists():  # a resumed run, or its baseline, that is finished
        return common.read_json(out / "result.json")
    start = time.time()
    learner = read_learner(args.eval, args, clip) if args.eval else train(args, clip, task, out)
    if rank() > 0:
        return {}
    found = evaluate(args, clip, learner, encoded)
    return common.write_result(
        out, method_name(args), args, clip, task, encoded, found, start, baseline
    )


# 6. MAIN ------------------------------------------------------------------------------------------
def check_task(args: argparse.Namespace, task: data.Task) -> None:
    """UserError where the flags do not fit the data, or each other."""
    require(args.loss != "kd" or args.alpha <= 1, "--alpha of --loss kd is a share: 1 at most")
    require(args.eval or world_size() <= min(args.batch_size, len(task.train)), "too small batches")
    if not args.eval and (args.select == "val" or args.eval_every):
        task.validation()  # or UserError: there is none
    batches = range(0, len(task.train), args.batch_size)[: args.max_steps or None]  # their starts
    steps = args.epochs * len(batches)
    if not args.eval and int(steps * args.warmup) == 0 < args.warmup:
        task.notes.insert(0, f"{steps} steps are too few for --warmup {args.warmup:g}")
    trained = common.read_run(args.eval)["classnames"] if args.eval else task.classnames
    tested = {name for test in task.tests for name in data.numbered(test.classnames)}
    require(
        args.head == "text" or (tested <= set(data.numbered(trained)) and not args.wise_ft),
        "--head mlp has no prompt: no --wise-ft, no --classes base, no --test-on",
    )


def method_name(args: argparse.Namespace) -> str:
    """What these settings are called in tables."""
    return {"proreg": "ProReg", "kd": "KD", "ce": "fine-tuning"}[args.loss]


def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags → what result.json holds (in the first process)."""
    args = common.settle(build_parser(), argv, "proreg", defaults, alone=False)
    join_processes(args)
    compare = args.compare and args.loss != "ce" and not args.eval
    task = data.load_task(args)
    check_task(args, task)
    clip = common.load_run_clip(args, task, tuned=True)
    if rank() == 0:
        against = "fine-tuning and zero-shot" if compare else "zero-shot"
        out = common.open_run(args, task, clip, f"{method_name(args)} against {against}")
    else:  # reads a checkpoint to go on with, if there is one; writes nothing, tests nothing
        out = Path(args.resume or os.devnull)  # os.devnull: no folder, so it holds no checkpoint
    encoded = [common.encode_test(args, clip, test) for test in (task.tests if rank() == 0 else ())]
    baseline = None
    if compare:
        plain = argparse.Namespace(**vars(args) | {"loss": "ce", "alpha": 0.0})
        baseline = fit(plain, clip, task, encoded, out / "baseline")
    result = fit(args, clip, task, encoded, out, baseline)
    if rank() == 0:
        common.report(result, out)
    return result


if __name__ == "__main__":
    common.run(main)
