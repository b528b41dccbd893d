"""ProGrad: prompt-aligned gradient for prompt tuning (Zhu et al., ICCV 2023, arXiv 2205.14865).

The idea. CLIP classifies an image by comparing it with the text features of "a photo of a CLASS.". Prompt tuning
(CoOp) replaces the words before CLASS by M learned vectors, trained on a few labelled images while CLIP stays frozen.
With few images the vectors soon fit what is particular to these images, and forget what CLIP knew: classes that were
not trained on get worse. ProGrad asks at every step what the hand-written prompt would have wanted. Let g_d be the
gradient of the label loss, and g_g the gradient of the distance to the zero-shot prediction. If they agree (a step
down the one also goes down the other), g_d is used as it is. If they conflict, the part of g_d that undoes g_g is
removed first.

Equations (the numbers are this file's own: the paper could not be read in full)
    Eq. 1   p(c | x) = softmax over c of s cos(f(x), t_c),   t_c = T([SOS, v_1 .. v_M, name_c, ".", EOT])
    Eq. 2   L_ce = mean over the batch of -log p(y | x)                                       the label's loss
    Eq. 3   L_kl = mean of -T^2 sum_c p_zs(c | x) log p(c | x), both at temperature T         zero-shot CLIP's loss
    Eq. 4   g_d = dL_ce/dv,   g_g = dL_kl/dv                                                  from one forward pass
    Eq. 5   g = g_d                                      if <g_d, g_g> >= 0                   they agree
            g = g_d - λ (<g_d, g_g> / |g_g|^2) g_g       if <g_d, g_g> < 0                    they conflict
    Eq. 6   v <- SGD(v, g), with momentum and weight decay after the projection

    paper        here                      shape                          flag
    v            PromptLearner.context     [M, W], with --csc [C, M, W]   --n-ctx --init --csc --class-position
    p_zs         softmax of zs_logits      [B, C]                         --teacher --template
    G_d, G_g     g_d, g_g                  as context
    λ            lam                       a number                       --lam (0 = plain CoOp)
    T            T                         a number                       --temperature
    s, f, T(.)   clip.scale, encode_image, encode_prompts                 --model --pretrained

Frozen: all of CLIP (both towers, token embeddings, s). Learned: the M context vectors. Why it helps: at λ = 1, g has no
component against g_g, so to first order the label loss falls without moving away from zero-shot CLIP. (That holds for
g on this batch; momentum and weight decay come after.) When it does not help: where zero-shot CLIP is wrong in a
systematic way (a new kind of image), moving away from it is just what learning needs; hence λ < 1 with many shots.

PAPER vs CODE: (the paper as others restate it; the code, github.com/BeierZhu/Prompt-align at 1b76203, is followed)
 1. λ: the paper has 1, and 0.8 at 16 shots; the code's README 0.8 at 8 and 16 shots on Flowers102, DTD and EuroSAT,
    which --paper applies.
 2. Context length: the paper has M = 16 for few-shot, 4 for its other protocols; the code's scripts have 16 everywhere.
 3. Start: the code puts the template's words into the last of the M slots and zero vectors before; its CoOp baseline
    starts at random, a confound. Here --init sets the start of both: --lam 0 differs from ProGrad by λ alone.
 4. The code counts the template's words, we its tokens: of a template with a comma ("a type of pet, a photo of a") the
    code leaves the last token outside the context. (A test rebuilds such a recorded run by hand; no flag does.)
 5. L_kl in the code is Eq. 3: KL(p_zs | p) and the teacher's entropy, times T^2; the entropy has no gradient. Eq. 5
    does not depend on the size of g_g, so the factor T^2 matters for --rule add and the logged loss alone.
 6. The code projects each parameter tensor by itself. There is one, the context, also with --csc.
 7. At g_g = 0 the code divides by zero. Here g = g_d.

    python prograd.py                                                # toy world and toy CLIP: a minute on a laptop
    python prograd.py --dataset oxford_pets --shots 16 --paper      # the paper's few-shot protocol, RN50
    python prograd.py --dataset dtd --classes base --shots 4 --paper # base-to-new
    python prograd.py --dataset folder:my_photos --model ViT-B-16 --pretrained openai
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import data
import runs
import vision
from common import Clip
from data import UserError


# ----------------------------------------------------------------------------------------------------------------------
# 1. METHOD: the functions that are the paper. Tensors and numbers in, tensors out; paste this section anywhere.
# ----------------------------------------------------------------------------------------------------------------------
def project_gradient(g_d: torch.Tensor, g_g: torch.Tensor, lam: float = 1.0) -> torch.Tensor:
    """Remove from the label gradient g_d the component that conflicts with g_g (Eq. 5). All of one shape, any shape.

    One inner product over the whole tensor. g_g = 0 and "no conflict" both give g_d; λ = 1 leaves g orthogonal to g_g.
    WHY workers must not project their own gradients and average the results: the projection is not linear, and a mean
    of projected gradients can conflict with the mean g_g. Average g_d and g_g first, then project.
    """
    dot, norm2 = (g_d * g_g).sum(), (g_g * g_g).sum()
    conflict = (dot < 0) & (norm2 > 0)
    # Eq. 5: g = g_d - lam * dot / norm2 * g_g   where dot < 0
    share = lam * dot / torch.where(conflict, norm2, torch.ones_like(norm2))  # never 0 / 0
    return g_d - torch.where(conflict, share, torch.zeros_like(share)) * g_g


def distillation_loss(logits: torch.Tensor, zs_logits: torch.Tensor, T: float = 1.0) -> torch.Tensor:
    """Soft cross-entropy from the zero-shot prediction, times T² (Eq. 3). logits, zs_logits [B, C] → scalar, nats.

    WHY T²: gradients of softmax(logits / T) shrink like 1/T²; the factor keeps their size comparable when T changes.
    """
    p_zs = (zs_logits / T).softmax(dim=-1)  # [B, C]
    # Eq. 3: L_kl = mean( -T² · sum_c p_zs · log p )
    return -(p_zs * (logits / T).log_softmax(dim=-1)).sum(dim=-1).mean() * T**2


# ----------------------------------------------------------------------------------------------------------------------
# 2. MODEL: M vectors in front of (or behind) the class name
# ----------------------------------------------------------------------------------------------------------------------
class PromptLearner(torch.nn.Module):
    """The learned context. It holds no class: `forward` takes tokenised names, so a trained prompt reads any classes.

    context [M, W] shared by all classes, or [C, M, W], one for each (--csc). `position`: of the name, "end" or "front".
    """

    def __init__(self, clip: Clip, context: torch.Tensor, position: str = "end"):
        super().__init__()
        self.clip, self.position = clip, position  # clip is no submodule: state_dict() is the context alone
        self.context = torch.nn.Parameter(context.clone())

    def forward(self, names: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """names = name_tokens(clip, classnames, M) → text features [C, D], unnormalised (read at EOT).

        names is (suffix, eot): embeddings [C, S, W] of [name "." EOT padding], and where EOT stands in them, [C].
        """
        (suffix, eot), context, prefix = names, self.context, common.start_of_text(self.clip)
        if self.position == "end" and context.dim() == 2:  # the usual case: [SOS, context] is the same for all classes
            return common.encode_prompts(self.clip, torch.cat([prefix, context[None]], dim=1), suffix, eot)[0]  # G = 1
        # Else the context differs by class or stands behind the name: it becomes part of the suffix, at position `at`:
        # --csc: [context name "." EOT padding], at = 0;   "front": [name context "." EOT padding], at = the full stop's
        C, S, M = *suffix.shape[:2], context.shape[-2]
        if context.dim() == 3 and len(context) != C:
            raise UserError(f"this prompt has contexts for its own {len(context)} classes (--csc), not for these {C}")
        at = torch.zeros_like(eot)
        if self.position == "front":  # [SOS, name, context, ".", EOT]; a "." that BPE fused with the name stays there
            stop = common.embed(self.clip, [self.clip.tokenizer.encode(".")])[0][0]  # [1, W]
            at = eot - (suffix[torch.arange(C, device=eot.device), eot - 1] == stop).all(dim=-1).long()
        slot = torch.arange(S + M, device=eot.device).expand(C, -1) - at[:, None]  # [C, S + M], 0 where context begins
        inside = (slot >= 0) & (slot < M)
        source = torch.where(inside, S + slot, torch.where(slot < 0, slot, slot - M) + at[:, None])
        both = torch.cat([suffix, context.expand(C, -1, -1)], dim=1)  # [C, S + M, W]
        suffix = both.gather(1, source[..., None].expand_as(both))
        return common.encode_prompts(self.clip, prefix, suffix, eot + M)[0]


def initial_context(clip: Clip, template: str, n_ctx: int, init: str, seed: int, n_classes: int = 0) -> torch.Tensor:
    """[M, W] ([C, M, W] if n_classes > 0): the template's tokens in the last slots and zeros before; or N(0, 0.02²)."""
    shape = (n_classes, n_ctx, clip.width) if n_classes else (n_ctx, clip.width)
    if init == "random":
        draw = 0.02 * torch.randn(shape, generator=data.generator(seed, "context"))
        return draw.to(clip.device)
    words = template.split("{}")[0].strip() or "a photo of a"
    tokens = common.embed(clip, [common.token_ids(clip, words, clip.context_length)])[0][0, :-1]  # [k, W], without EOT
    if len(tokens) > n_ctx:
        raise UserError(f"{words!r} has {len(tokens)} tokens: use --n-ctx {len(tokens)} or more, or --init random")
    context = torch.cat([tokens.new_zeros(n_ctx - len(tokens), clip.width), tokens])
    return context.expand(shape).clone()


# ----------------------------------------------------------------------------------------------------------------------
# 3. FLAGS
# ----------------------------------------------------------------------------------------------------------------------
METHOD = {"lam": 1.0, "rule": "project", "teacher": "template", "temperature": 1.0, "n_ctx": 16, "init": "template",
          "csc": False, "class_position": "end", "batch_size": 32, "momentum": 0.9, "weight_decay": 5e-4}  # fmt: skip
DEFAULTS = {
    # Rate and epochs chosen on validation images, benchmark/results/toy. WHY not the paper's: toyclip's logit scale is
    # 21 and not CLIP's 100, so its gradients are smaller.
    "toy": METHOD | {"dataset": "toy_fillshapes_sketch", "classes": "base", "model": "toyclip", "lr": 0.08,
                     "epochs": 30, "augment": "none", "views": 1, "compare": True},
    "paper": METHOD | {"classes": "all", "model": "RN50", "pretrained": "openai", "lr": 0.002, "augment": "crop",
                       "views": 0, "compare": False, "epochs": {1: 50, 2: 100, 8: 200}},  # from 1, 2 and 8 shots on
    "fixed": {"n_ctx", "csc", "class_position"},  # a checkpoint cannot be read with other values of these
}  # fmt: skip


def paper_exceptions(settings: dict) -> dict:
    """--paper: what the papers' scripts set for single datasets."""
    exceptions = {}
    if settings["dataset"] in ("oxford_flowers", "dtd", "eurosat") and settings["shots"] in (8, 16):
        exceptions["lam"] = 0.8
    if settings["dataset"] == "imagenet":
        exceptions["epochs"] = 50
    return exceptions


def build_parser() -> argparse.ArgumentParser:
    parser = runs.new_parser(__doc__)
    add = parser.add_argument_group("ProGrad").add_argument
    add("--lam", type=runs.non_negative, help="λ of Eq. 5: 1 = remove the whole conflict, 0 = plain CoOp")
    add("--rule", choices=["project", "add"], help="project: Eq. 5; add: g_d + λ g_g, that is CE + λ·KL (the control)")
    add("--teacher", choices=["template", "ensemble"], help="one zero-shot prompt, or the mean of many (ProGrad++)")
    add("--temperature", type=runs.positive_float, help="T of Eq. 3")
    add("--n-ctx", type=runs.positive_int, help="M, context tokens")
    add("--init", choices=["template", "random"], help="start from the template's words, or from N(0, 0.02²)")
    add("--csc", action="store_true", default=None, help="one context for each class (no new classes then)")
    add("--class-position", choices=["end", "front"], help="where the class name stands")
    add("--momentum", type=runs.fraction, help="of SGD")
    add("--weight-decay", type=runs.non_negative, help="of SGD, added after the projection")
    return runs.with_defaults(parser, DEFAULTS)


# ----------------------------------------------------------------------------------------------------------------------
# 4. TRAIN
# ----------------------------------------------------------------------------------------------------------------------
def train(args, clip: Clip, task: data.Task, views, out: Path) -> PromptLearner:
    """Tune the context; views(epoch) → unit image features [N, D] and labels [N]. Goes on from out/checkpoint.pt."""
    names = common.name_tokens(clip, task.classnames, args.n_ctx)
    n_classes = len(task.classnames) if args.csc else 0
    start = initial_context(clip, task.teacher_template, args.n_ctx, args.init, args.seed, n_classes)
    learner = PromptLearner(clip, start, args.class_position)
    templates = task.teacher_template if args.teacher == "template" else task.ensemble
    teacher = common.zero_shot_classifier(clip, task.classnames, templates)  # [C, D]
    hyper = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(learner.parameters(), **hyper)
    first, val = runs.resume(out, "prograd", learner, optimizer), vision.encode_val(args, clip, task)
    for epoch in common.progress(range(first, args.epochs), out.name):
        x, labels = views(epoch)  # [N, D], [N]
        order = data.batches(len(labels), args.batch_size, args.seed, epoch, args.max_steps)
        if not order:  # --max-steps
            break
        if common.rank() > 0:
            continue  # WHY: a step is too small to share, so the other processes only help to encode images
        lr = optimizer.param_groups[0]["lr"] = common.warmup_cosine(epoch, args.epochs, args.lr)
        seen = []
        for step, batch in enumerate(order):
            with common.autocast(clip, differentiate=True):
                text = F.normalize(learner(names).float(), dim=-1)  # [C, D]
            # Eq. 1: logits = s · cos(f(x), t)
            logits, zs_logits = clip.scale * x[batch] @ text.T, clip.scale * x[batch] @ teacher.T  # [B, C]
            # Eq. 2, Eq. 3
            loss_ce = F.cross_entropy(logits, labels[batch])
            loss_kl = distillation_loss(logits, zs_logits, args.temperature)
            # Eq. 4: two gradients from one forward pass
            (g_d,) = torch.autograd.grad(loss_ce, learner.context, retain_graph=True)
            (g_g,) = torch.autograd.grad(loss_kl, learner.context)
            # Eq. 5
            g = project_gradient(g_d, g_g, args.lam) if args.rule == "project" else g_d + args.lam * g_g
            common.check_finite(epoch, step, loss_ce=loss_ce, loss_kl=loss_kl, gradient=g)
            # Eq. 6: v <- SGD(v, g)
            learner.context.grad = g
            optimizer.step()
            cosine = F.cosine_similarity(g_d.flatten(), g_g.flatten(), dim=0)
            seen.append(torch.stack([loss_ce, loss_kl, cosine, (cosine < 0).float()]).detach())
        # `projected`: the share of steps in conflict (with λ = 0 and --rule add nothing is projected)
        loss_ce, loss_kl, cosine, projected = torch.stack(seen).mean(dim=0).tolist()
        line = {"lr": lr, "loss_ce": loss_ce, "loss_kl": loss_kl, "cosine": cosine, "projected": projected}
        if val and (epoch + 1) % args.eval_every == 0:
            logits = class_logits(learner, clip, task.classnames, val[0])
            line["val_accuracy"] = common.evaluate(logits, val[1])["accuracy"]
        runs.end_epoch(args, out, "prograd", epoch, learner, optimizer, line)
    return learner


# ----------------------------------------------------------------------------------------------------------------------
# 5. EVALUATE
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def class_logits(learner: PromptLearner, clip: Clip, classnames: list[str], x: torch.Tensor) -> torch.Tensor:
    """Logits [N, C] of unit image features x [N, D] among any class names."""
    with common.autocast(clip):
        text = learner(common.name_tokens(clip, classnames, learner.context.shape[-2]))
    return clip.scale * x @ F.normalize(text.float(), dim=-1).T


def fit(args, clip: Clip, task: data.Task, views, tests: list[dict], out: Path, baseline: dict | None = None) -> dict:
    """Train (or read args.checkpoint), evaluate on every test set once, write the run folder, return its result."""
    if result := runs.finished(out):  # a resumed run whose baseline is finished
        return result
    start, encoded = time.time(), common.SECONDS["encode"]
    learner = read_learner(args.checkpoint, clip) if args.eval_only else train(args, clip, task, views, out)
    trained, rows = time.time(), []
    if common.rank() > 0:
        return {}
    for i, test in enumerate(tests):
        tuned = class_logits(learner, clip, test["test"].classnames, test["x"])
        rows.append(test | {"tuned": tuned, "baseline": baseline and baseline["tests"][i]["tuned"]})
    runs.save_checkpoint(out, "prograd", args, learner.state_dict(), args.epochs)
    training = trained - start - (common.SECONDS["encode"] - encoded)  # fresh views are encoded between the steps
    seconds = {"train": training, "evaluate": time.time() - trained}
    return runs.write_result(out, "prograd", args, task, clip, rows, seconds)


def read_learner(path: str, clip: Clip) -> PromptLearner:
    """The trained prompt of a run folder or checkpoint, ready for any class names (with --csc: for its own)."""
    state = runs.load_checkpoint(path, "prograd")
    shape = state["tensors"].get("context", torch.zeros(1, 1)).shape[-3:-1]  # [M], with --csc [C, M]
    empty = torch.zeros(*(shape or [0]), clip.width, device=clip.device)
    learner = PromptLearner(clip, empty, state["settings"].get("class_position", "end"))
    runs.restore(learner, state["tensors"], path)
    return learner


# ----------------------------------------------------------------------------------------------------------------------
# 6. MAIN
# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags; returns what result.json holds."""
    args = runs.settle(build_parser(), argv, "prograd", DEFAULTS, paper_exceptions)
    if args.csc and (args.classes == "base" or args.test_on):
        raise UserError("--csc has no context for classes outside training: leave out --classes base and --test-on")
    name = "CoOp" if args.lam == 0 else "ProGrad" if args.rule == "project" else "CE + KL"
    if result := args.resume and runs.finished(args.out_dir):
        runs.report(result, args.out_dir, "CoOp", name)
        return result
    task, clip = runs.prepare(args)
    if args.csc and args.eval_only:
        noted = runs.load_checkpoint(args.checkpoint, "prograd")["trained_on"]
        if noted and noted["classnames"] != task.classnames:
            raise UserError(f"{args.checkpoint} has contexts for its own classes (--csc), not for these of {task.name}")
    out = runs.open_run(args, "prograd")
    views, tests = vision.training_views(args, clip, task.train), vision.encode_tests(args, clip, task)
    # The baseline is CoOp, λ = 0, from the same start on the same batches; of a run that is itself CoOp there is none.
    plain = runs.open_baseline(args, out, "prograd", lam=0.0) if args.compare and args.lam != 0 else None
    baseline = fit(plain, clip, task, views, tests, Path(plain.out_dir)) if plain else None
    result = fit(args, clip, task, views, tests, out, baseline)
    if result:
        runs.report(result, out, "CoOp", name)
    return result


if __name__ == "__main__":
    runs.run(main)
