"""ProGrad: prompt-aligned gradient for prompt tuning (Zhu et al., ICCV 2023, arXiv 2205.14865).

The idea. CLIP classifies an image by comparing it with the text features of "a photo of a CLASS.".
Prompt tuning (CoOp) replaces the words before CLASS by M learned vectors, trained on a few labelled
images while CLIP stays frozen. They soon fit what is particular to these images, and forget what
CLIP knew: other classes get worse. ProGrad asks at every step what the hand-written prompt would
have wanted. Let g_d be the gradient of the label loss, and g_g that of the distance to the
zero-shot prediction. If they agree (a step down the one also goes down the other), g_d is used as
it is. If they conflict, the part of g_d that undoes g_g is removed.

Equations (numbered by this file: the paper could not be read in full)
    Eq. 1   p(c | x) = softmax over c of s cos(f(x), t_c)                              prompted CLIP
            t_c = the text encoder's feature of [SOS, v_1 .. v_M, name of c, ".", EOT]
    Eq. 2   L_ce = mean over the batch of -log p(y | x)                             the label's loss
    Eq. 3   L_kl = mean of -T² sum_c p_zs(c | x) log p(c | x), at temperature T     zero-shot's loss
    Eq. 4   g_d = dL_ce/dv,   g_g = dL_kl/dv                                from one forward pass
    Eq. 5   g = g_d                                   if <g_d, g_g> >= 0    they agree
            g = g_d - λ (<g_d, g_g> / |g_g|²) g_g     if <g_d, g_g> < 0     they conflict
    Eq. 6   v <- SGD(v, g): momentum, and weight decay added after the projection. The rate is 1e-5
            in the first epoch, then follows a cosine from --lr down that does not quite reach 0

    paper        here                      shape                         flag
    v            PromptLearner.context     [M, W], or [C, M, W]          --n-ctx --init, or --csc
    p_zs         softmax of zs_logits      [B, C]                        --teacher --template
    G_d, G_g     g_d, g_g                  as context
    λ            lam                       a number                      --lam (0 = plain CoOp)
    T            T                         a number                      --temperature
    s, f         clip.scale, CLIP's image encoder                        --model --pretrained
    B images in a batch, N in a set, C classes, M context vectors; W entries of a token, the text
    transformer's width; D entries of a feature, of an image or of a text

Frozen: all of CLIP. Learned: the M context vectors. Why it helps: at λ = 1, g has no component
against g_g, so to first order the label loss falls without moving away from zero-shot CLIP (on this
batch, and before momentum and weight decay). When it does not help: where zero-shot CLIP is wrong
in a systematic way (a new kind of image), learning has to move away; hence λ < 1 with many shots.

PAPER vs CODE: (The paper as others restate it. The code is github.com/BeierZhu/Prompt-align at
1b76203, and is followed but for what is said; FILE:LINES are below its folder ProGrad.public/.)
 1. λ: the paper has 1, and 0.8 at 16 shots. The code's README.md:52, which --paper follows, has 0.8
    at 8 and 16 shots on Flowers102, DTD and EuroSAT, and else 1.
 2. Context length: the paper has M = 16 for few-shot, 4 for its other protocols; the code has 16
    everywhere (README.md:54-58, scripts/base2new_train_prograd.sh:12).
 3. Start: the code puts the template's words into the last slots of the M, zero vectors before
    (trainers/prograd.py:90-93). Its CoOp starts at random (train.py:97, trainers/coop.py:100-109),
    and so differs in more than the method. Here --init sets the start of both.
 4. The code counts the template's words (trainers/prograd.py:82), we its tokens. "a type of pet, a
    photo of a" is 8 words and 9 tokens: the code learns 8 and leaves the last, "a", before the
    class name as an ordinary token; here all 9 are context.
 5. L_kl: KL(p_zs | p) in the paper, the cross-entropy of Eq. 3 in the code
    (trainers/prograd.py:288-291). For any given T the code's gradient is T² times as long: Eq. 5
    does not notice; --rule add and the logged loss do.
 6. The code projects each parameter tensor by itself, where the cosine is below 0
    (../Dassl.ProGrad.pytorch/dassl/engine/trainer.py:335-345). There is one, the context. With
    --csc the code's starts at random (trainers/prograd.py:97-104), ours at the template.
 7. Precision: fp16 in the code (train.py:98); here context, gradients and projection are fp32.
 8. The paper's ProGrad++ has no released code. Here --teacher ensemble averages the unit text
    features of OpenAI's 80 templates for ImageNet (toyclip: of its captions' templates).

    python prograd.py                                                # toy world, toy CLIP
    python prograd.py --dataset dtd --shots 16 --paper               # the code's few-shot protocol
    python prograd.py --dataset dtd --classes base --shots 4         # base-to-new
    python prograd.py --dataset folder:my_photos --model ViT-B-16 --pretrained openai
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES

import common
import data
from common import Clip, Names, require

# 1. METHOD: the functions that are the paper. It needs torch alone: paste it anywhere -------------
Tensor = torch.Tensor


def project_gradient(g_d: Tensor, g_g: Tensor, lam: float = 1.0) -> Tensor:
    """Remove from g_d the component that conflicts with g_g (Eq. 5); where g_g is 0, nothing. Both
    are of one shape, any; the inner product is over the whole tensor.

    If g_g is tiny, its direction counts all the same. Where the context starts as exactly the
    teacher's prompt, p = p_zs in the first step: g_g should be 0, and is rounding noise below 1e-8.
    The first epoch's rate of 1e-5 keeps that step small.

    WHY several workers must average g_d and g_g first, then project: the projection is not linear,
    and a mean of projected gradients can conflict with the mean g_g.

    >>> g_d, g_g = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 0.0])
    >>> project_gradient(g_d, g_g)  # <g_d, g_g> = -3 < 0: the first entry undoes g_g
    tensor([0., 1.])
    >>> project_gradient(g_d, -g_g)  # they agree
    tensor([3., 1.])
    """
    dot = (g_d * g_g).sum()
    norm2 = (g_g * g_g).sum().clamp(min=torch.finfo(g_g.dtype).tiny)  # never 0 / 0
    # Eq. 5: g = g_d - λ · dot / |g_g|² · g_g; the clamp sets dot to 0 where they agree
    return g_d - lam * dot.clamp(max=0) / norm2 * g_g


def distillation_loss(logits: Tensor, zs_logits: Tensor, T: float = 1.0) -> Tensor:
    """Cross-entropy from the zero-shot prediction, times T² (Eq. 3). logits, zs_logits [B, C] →
    a scalar, nats: T² times KL(p_zs | p) and the entropy of p_zs. That has no gradient: hence "kl".

    WHY T²: the cross-entropy's gradient shrinks like 1/T²; the factor keeps its size comparable
    when T changes.

    >>> uniform = torch.zeros(1, 2)
    >>> distillation_loss(uniform, uniform)  # ln 2
    tensor(0.6931)
    """
    p_zs = (zs_logits / T).softmax(dim=-1)  # [B, C]
    log_p = (logits / T).log_softmax(dim=-1)
    # Eq. 3: L_kl = mean( -T² · sum_c p_zs · log p )
    return -(p_zs * log_p).sum(dim=-1).mean() * T**2


# 2. MODEL: M vectors in front of the class name ---------------------------------------------------
class PromptLearner(torch.nn.Module):
    """The learned context: [M, W] for all classes, which reads any names that `forward` is given,
    or [C, M, W], one for each class, which reads its own C classes alone (--csc)."""

    def __init__(self, clip: Clip, context: Tensor):
        super().__init__()
        self.clip = clip  # no submodule: state_dict() is the context alone
        self.context = torch.nn.Parameter(context.clone())

    def names(self, classnames: list[str]) -> Names:
        """The class names as `forward` wants them: tokenised, to stand behind M context vectors."""
        M = self.context.shape[-2]
        if self.context.dim() == 2:
            return common.name_tokens(self.clip, classnames, M)
        return common.name_tokens(self.clip, classnames, 0, own=M)  # M free places before each

    def forward(self, names: Names) -> Tensor:
        """What names(classnames) gives → text features [C, D], unnormalised."""
        prefix = common.start_of_text(self.clip)  # [1, 1, W]
        if self.context.dim() == 2:  # [SOS, context] is the same for all classes
            prefix = torch.cat([prefix, self.context[None]], dim=1)  # [1, 1 + M, W]
        else:
            # All names stand in R rows of S tokens, names.rows [R, S, W], each after M places that
            # hold position embeddings alone; names.own [C · M]: these places, among all R · S.
            places = names.rows.flatten(0, 1).index_add(0, names.own, self.context.flatten(0, 1))
            names = dataclasses.replace(names, rows=places.view_as(names.rows))
        # WHY gradients=True in evaluation, too: one precision, that of training.
        with common.autocast(self.clip, gradients=True):
            return common.encode_prompts(self.clip, prefix, names)[0]  # of the one prefix


def initial_context(clip: Clip, template: str, n_ctx: int, init: str, seed: int) -> Tensor:
    """Where the context starts, [M, W]. init "template": the tokens of the template's words before
    {} (of "a photo of a", where there are none) in the last slots of M = n_ctx, and zeros before;
    "random": N(0, 0.02²)."""
    if init == "random":
        noise = torch.randn(n_ctx, clip.width, generator=data.generator(seed, "context"))
        return 0.02 * noise.to(common.start_of_text(clip))  # its device and dtype
    words = common.word_tokens(clip, template.split("{}")[0].strip() or "a photo of a")  # [k, W]
    k = len(words)
    require(k <= n_ctx, f"{template!r} has {k} tokens: use --n-ctx {k} or more, or --init random")
    return torch.cat([words.new_zeros(n_ctx - k, clip.width), words])


def teacher_classifier(args: argparse.Namespace, clip: Clip, task: data.Task) -> Tensor:
    """Zero-shot CLIP's unit text features [C, D], of one template or of many (ProGrad++)."""
    if args.teacher == "template":
        templates = [task.teacher_template]
    elif clip.name == "toyclip":  # it does not know the words of the others
        templates = data.world.CAPTION_TEMPLATES
    else:
        templates = [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    return common.zero_shot_classifier(clip, task.classnames, templates)


# 3. FLAGS -----------------------------------------------------------------------------------------
# fmt: off
SETTINGS = {"lam": 1.0, "rule": "project", "teacher": "template", "temperature": 1.0, "n_ctx": 16,
            "init": "template", "csc": False, "batch_size": 32, "momentum": 0.9,
            "weight_decay": 5e-4}
# Base to new, 4 shots. The paper's rate is 0.002 at CLIP's logit scale s = 100. Gradients have s as
# a factor, and toyclip's is 21: 0.002 · 100 / 21 is about 0.01.
TOY = SETTINGS | {"dataset": "toy_fillshapes_sketch", "model": "toyclip",
                  "shots": 4, "lr": 0.01, "augment": "none", "views": 1, "compare": True}
REAL = SETTINGS | {"model": "RN50", "pretrained": "openai", "classes": "all", "lr": 0.002,
                   "augment": "crop", "views": 0, "compare": False}
# fmt: on


def defaults(run: dict) -> dict:
    """The default settings. run: the settings known so far, on which some of them depend."""
    if run.get("dataset", "toy_").startswith("toy_"):
        # Steps (without partial batches) at 1, 2, 4, 8, 16 shots, 12 classes: 100, 200, 400, 1,200,
        # 2,400. The paper's, 24 to 50 classes: 50, 100-300, 300-600, 1,200-2,400, 2,400-5,000.
        epochs = {1: 100, 2: 200}.get(run.get("shots", 4), 400)
        return TOY | {"epochs": epochs, "classes": "all" if run.get("csc") else "base"}
    shots = run.get("shots", 16)
    settings = REAL | {"epochs": {1: 50, 2: 100, 4: 100}.get(shots, 200)}
    if ":" in run["dataset"]:  # your own images: views = 0, fresh in each epoch, is hours on a CPU
        settings["views"] = 10
    if run.get("paper") and run["dataset"] == "imagenet":
        settings["epochs"] = 50
    if run.get("paper") and run["dataset"] in ("oxford_flowers", "dtd", "eurosat"):
        settings["lam"] = 0.8 if shots in (8, 16) else 1.0
    return settings


FLAGS = {
    "--lam": {"type": float, "metavar": "λ", "help": "of Eq. 5; 0 = CoOp; < 1 with many shots"},
    "--rule": {"choices": ["project", "add"], "help": "Eq. 5, or g_d + λ g_g: CE + λ·KL"},
    "--teacher": {"choices": ["template", "ensemble"], "help": "one prompt, or ProGrad++"},
    "--temperature": {"type": float, "metavar": "T", "help": "of Eq. 3; more = softer predictions"},
    "--n-ctx": {"type": int, "metavar": "M", "help": "context tokens; fewer for new classes"},
    "--init": {"choices": ["template", "random"], "help": "the template's words, or N(0, 0.02²)"},
    "--csc": {"action": "store_true", "help": "a context for each class, and no new classes"},
    "--momentum": {"type": float, "metavar": "X", "help": "of SGD"},
    "--weight-decay": {"type": float, "metavar": "X", "help": "of SGD, after the projection"},
}


def build_parser() -> data.Parser:
    return common.new_parser(__doc__, "ProGrad (Eq. n: see the file's head)", FLAGS, defaults)


# 4. TRAIN -----------------------------------------------------------------------------------------
def step(learner: PromptLearner, names: Names, teacher, x: Tensor, labels: Tensor, args) -> Tensor:
    """One batch: unit image features x [B, D], labels [B], the teacher's unit text features [C, D]
    → [L_ce, L_kl, cosine of g_d and g_g, conflict (1 or 0)]. Overwrites context.grad with g."""
    text = F.normalize(learner(names), dim=-1)  # [C, D]
    # Eq. 1: logits = s · cos(f(x), t)
    logits = learner.clip.scale * x @ text.T  # [B, C]
    zs_logits = learner.clip.scale * x @ teacher.T
    # Eq. 2, Eq. 3
    loss_ce = F.cross_entropy(logits, labels)
    loss_kl = distillation_loss(logits, zs_logits, args.temperature)
    # Eq. 4: two gradients from one forward pass
    (g_d,) = torch.autograd.grad(loss_ce, learner.context, retain_graph=True)
    (g_g,) = torch.autograd.grad(loss_kl, learner.context)
    # Eq. 5
    if args.rule == "project":
        learner.context.grad = project_gradient(g_d, g_g, args.lam)
    else:
        learner.context.grad = g_d + args.lam * g_g
    cosine = F.cosine_similarity(g_d.flatten(), g_g.flatten(), dim=0)
    conflict = ((g_d * g_g).sum() < 0).to(cosine)  # by the rule of Eq. 5
    return torch.stack([loss_ce, loss_kl, cosine, conflict]).detach()


def train(args: argparse.Namespace, clip: Clip, task: data.Task, views, out: Path) -> PromptLearner:
    """Tune the context. views(epoch) → unit image features [N, D], labels [N]."""
    context = initial_context(clip, task.teacher_template, args.n_ctx, args.init, args.seed)
    if args.csc:
        context = context.expand(len(task.classnames), -1, -1)  # [C, M, W]
    learner = PromptLearner(clip, context)
    names = learner.names(task.classnames)
    teacher = teacher_classifier(args, clip, task)
    tests = task.validation() if args.eval_every else []
    validation = [common.encode_test(args, clip, test) for test in tests]
    optimizer = torch.optim.SGD(
        learner.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    first = common.resume(out, learner, optimizer)  # 0, or where the checkpoint in `out` left off
    for epoch in common.progress(range(first, args.epochs), out.name + common.SOONER):
        x, labels = views(epoch)  # [N, D], [N]
        # Eq. 6: the rate of this epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        seen = []
        for batch in data.batches(len(labels), args.batch_size, args.seed, epoch, args.max_steps):
            batch = batch.to(x.device, non_blocking=True)
            seen.append(step(learner, names, teacher, x[batch], labels[batch], args))
            # Eq. 6: v <- SGD(v, g)
            optimizer.step()
        loss_ce, loss_kl, cosine, conflict = torch.stack(seen).mean(dim=0)
        # Means over the epoch's steps: "conflict" is the share of steps with a conflict.
        log = {"lr": lr, "loss_ce": loss_ce, "loss_kl": loss_kl, "cosine": cosine,
               "conflict": conflict}  # fmt: skip
        if args.eval_every and (epoch + 1) % args.eval_every == 0:
            logits = class_logits(learner, clip, task.classnames, validation[0].x)
            log["val_accuracy"] = common.evaluate(logits, validation[0].labels)["accuracy"]
        common.end_epoch(out, epoch, learner, optimizer, log, last=epoch + 1 == args.epochs)
    return learner


# 5. EVALUATE --------------------------------------------------------------------------------------
# tools/ call class_logits and read_learner of each method file alike: `template` is for proreg.py.
@torch.no_grad()
def class_logits(learner: PromptLearner, clip: Clip, classnames: list[str], x: Tensor, template=""):
    """Logits [N, C] of unit image features x [N, D] among any class names."""
    text = learner(learner.names(classnames))
    return clip.scale * x @ F.normalize(text, dim=-1).T


def read_learner(folder: str | Path, args: argparse.Namespace, clip: Clip) -> PromptLearner:
    """The trained prompt of a run folder, ready for any class names (with --csc: for its own)."""
    config = common.read_run(folder)
    shape = (args.n_ctx, clip.width)
    shape = (len(config["classnames"]), *shape) if args.csc else shape
    learner = PromptLearner(clip, common.start_of_text(clip).new_zeros(shape))
    common.load_checkpoint(folder, learner)
    return learner


def fit(args, clip: Clip, task: data.Task, views, encoded, out: Path, baseline=None) -> dict:
    """Train (or read the run to evaluate), test on `encoded`, write the run folder → its result."""
    if (out / "result.json").exists():  # a resumed run, or its baseline, that is finished
        return common.read_json(out / "result.json")
    start = time.time()
    learner = (read_learner(args.eval, args, clip) if args.eval
               else train(args, clip, task, views, out))  # fmt: skip
    found = [{"tuned": class_logits(learner, clip, frozen.test.classnames, frozen.x)}
             for frozen in encoded]  # fmt: skip
    name = method_name(args)
    return common.write_result(out, name, args, clip, task, encoded, found, start, baseline)


# 6. MAIN ------------------------------------------------------------------------------------------
def method_name(args: argparse.Namespace) -> str:
    """What these settings are called in tables."""
    if args.epochs == 0:
        return "untrained"
    if args.lam == 0:
        return "CoOp"
    return "ProGrad" if args.rule == "project" else "CE + KL"


def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags → what result.json holds."""
    args = common.settle(build_parser(), argv, "prograd", defaults)
    new = args.csc and (args.classes == "base" or args.test_on)
    require(not new, "--csc has no context for other classes: no --classes base, no --test-on")
    task = data.load_task(args)
    if args.csc and args.eval:
        same = common.read_run(args.eval)["classnames"] == task.classnames
        require(same, f"{args.eval} has contexts for its own classes (--csc), not for these")
    compare = args.compare and args.lam != 0 and not args.eval
    task.notes[:0] = common.warmup_notes(args)
    clip = common.load_run_clip(args, task)
    against = "CoOp and zero-shot" if compare else "zero-shot"
    out = common.open_run(args, task, clip, f"{method_name(args)} against {against}")
    views = common.training_views(args, clip, task.train)
    encoded = [common.encode_test(args, clip, test) for test in task.tests]
    baseline = None
    if compare:  # CoOp: λ = 0, from the same start on the same batches
        plain = argparse.Namespace(**vars(args) | {"lam": 0.0})
        baseline = fit(plain, clip, task, views, encoded, out / "baseline")
    result = fit(args, clip, task, views, encoded, out, baseline)
    common.report(result, out)
    return result


if __name__ == "__main__":
    common.run(main)
