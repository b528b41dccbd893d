"""VPT: VARIATIONAL prompt tuning, not visual; also Bayesian prompt learning (Derakhshani et al., arXiv 2210.02390).

The idea. CLIP classifies an image by comparing it with the text features of "a photo of a CLASS.". Prompt tuning
(CoOp) replaces the words before CLASS by M learned vectors, trained on a few labelled images while CLIP itself stays
frozen. With few images the vectors soon fit what is particular to these images, and classes that were not trained on
get worse. VPT learns a distribution over prompts instead of one prompt: a Gaussian over one vector r, the residual,
which is added to all M context vectors. Prompts from a whole region must then do the job, not one point that happens
to fit. A prediction is the average over the region, and where its prompts disagree the model is unsure.

Equations (the numbers are this file's own: the paper could not be read in full)
    Eq. 1   p(c | x, r) = softmax over c of s cos(f(x), t_c(r)),                                        prompted CLIP
            t_c(r) = T([SOS, v_1 + u r, .., v_M + u r, name_c, ".", EOT])
    Eq. 2   q(r) = N(μ, diag σ²);  global: μ, log σ² are learned vectors;  image: networks of f(x)      posterior
    Eq. 3   r_l = μ + σ ε_l,   ε_l ~ N(0, I),   l = 1 .. L                                              samples
    Eq. 4   KL(q | N(0, I)), but as a mean over W dimensions: mean of (μ² + σ² - 1 - log σ²) / 2        prior
    Eq. 5   log p(c | x) = log( 1/L sum_l p(c | x, r_l) )                                               prediction
    Eq. 6   L_task = mean over the batch of -log p(y | x)                        --bound log-mean       task loss
            L_task = mean over the batch of -1/L sum_l log p(y | x, r_l)         --bound elbo
    Eq. 7   v, q <- SGD(L_task + β KL), with momentum, and weight decay on all of v and q               the step
    Eq. 8   H = entropy of p(. | x),   I = H - 1/L sum_l entropy of p(. | x, r_l)                       uncertainty

    paper        here                              shape        flag
    p            PromptDistribution.context (v)    [M, W]       --ctx-init
    r            residual                          [L, K, W]    --residual-scale (u)
    μ, Σ         mu, logvar of posterior(x)        [K, W]       --posterior --logvar-init
    L            L                                 a number     --samples --eval-samples
    β            kl_weight                         a number     --kl-weight
    s, f, T(.)   clip.scale, encode_image, encode_prompts       --model --pretrained
    K = 1 with the global posterior: all images share r. K = B with the image posterior: each image has its own.

Frozen: both towers of CLIP. Learned: v and q. Why it helps: noise on the prompt keeps v from fitting details, and new
classes meet prompts that were not pinned to the training images. When it does not help: in training too short for CoOp
to overfit; where one systematic move away from CLIP is needed, which noise blurs; and with one or two samples, where
others saw the accuracy of the released global posterior collapse. Uncertainty: H is high for an ambiguous image,
I where the prompts disagree about it.

The baseline is --samples 0. Global: r = 0, exactly CoOp with M = 4. Image: r = μ(x), which we call CoCoOp-like: CoCoOp
adds a network's output to its context, too, but of two layers with ReLU (D, D/16, W), not three with ELU (D, D/2, D/2,
W).

PAPER vs CODE (the paper as others restate it; the code is github.com/saic-fi/Bayesian-Prompt-Learning at 8a73fff,
which we follow)
 1. Bound: the paper maximises the ELBO, a mean of logs; the code the log of the mean likelihood, which is never
    smaller (Jensen), and so as a loss never larger.
 2. KL: the paper's is a sum over dimensions with weight 1; the code takes the mean, times 0.001. The paper's is
    --kl-weight 512 where tokens have W = 512 entries (ViT-B/16, RN50), with --bound elbo.
 3. The code's std_posterior is a log-variance, drawn from Uniform[0, 1]: σ starts at 1 to 1.65 and hardly moves, as so
    small a KL weight pulls at it very little. The entries of CLIP's tokens have a standard deviation of about 0.02,
    50 to 80 times less, those of toyclip's 0.2: in CLIP the noise drowns the context, and what is learned is what
    works in spite of it. --residual-scale u is ours; 1 is the released code. The KL is that of r, before u.
 4. Image posterior: the paper has two layers with two heads, the code two separate networks of three layers (so have
    we).
 5. Batch: the code's image posterior fails for more than one image; its batches have 1 image, and so has our default
    on real data, because the learning rate goes with it. Here a batch of any size equals the mean over its images.
 6. Evaluation noise: the code draws it afresh for each image, unseeded. Here it is drawn once, from the seed, and
    shared by all images: a prediction depends on nothing but the image, the class names and the run.
 7. L and epochs differ by dataset in the code; how they were chosen is unknown (--paper takes them over).
 8. Precision: the code trains in fp16. Here what is learned is always fp32.

    python vpt.py                                                            # toy world, toy CLIP: a minute on a laptop
    python vpt.py --posterior image                                          # a distribution for each image
    python vpt.py --dataset dtd --classes base --shots 16 --seed 1 --paper   # the paper's base-to-new run on ViT-B/16
    python vpt.py --dataset folder:my_photos --model ViT-B-32 --pretrained openai --batch-size 8
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
def sample_logits(x: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """Logits of unit image features x [B, D] under each sampled prompt, unit text [L, K, C, D] → [L, B, C] (Eq. 1).

    K = 1: all B images meet the same L·C prompts. K = B: image b meets its own.
    """
    # Eq. 1: logits = s · cos(f(x), t)
    return scale * (x.unflatten(0, (text.shape[1], -1)) @ text.mT).flatten(1, 2)


def sample_residual(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Draw from q(r) by moving standard noise (Eq. 3). mu, logvar [K, W], eps [L, K or 1, W] → r [L, K, W].

    WHY so: all randomness is in eps, so that gradients reach mu and logvar. logvar is log σ², hence the half.
    """
    # Eq. 3: r = mu + exp(logvar / 2) * eps
    return mu + (0.5 * logvar).exp() * eps


def kl_to_standard_normal(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) as a mean, not a sum, over the last dimension (Eq. 4). [..., W] → [...], nats.

    WHY expm1: near logvar = 0, to where the prior pulls, exp(logvar) - 1 loses its digits.
    """
    # Eq. 4: KL = mean( (mu² + exp(logvar) - 1 - logvar) / 2 )
    return 0.5 * (mu.square() + logvar.expm1() - logvar).mean(dim=-1)


def log_mean_prob(logits: torch.Tensor) -> torch.Tensor:
    """Log of the class probabilities averaged over L samples (Eq. 5). logits [L, B, C] → [B, C], nats.

    WHY not the mean of logits or of log-probabilities: p(c | x) is an integral over r, and this is its estimate.
    """
    # Eq. 5: log p = logsumexp over l of log_softmax(logits) - log L
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - logits.new_tensor(len(logits)).log()


def task_loss(logits: torch.Tensor, labels: torch.Tensor, bound: str = "log-mean") -> torch.Tensor:
    """How badly the labels are predicted (Eq. 6). logits [L, B, C], labels [B] → scalar, nats.

    WHY it matters: "elbo", the larger loss (Jensen), asks each sampled prompt to be right, "log-mean" that some are.
    """
    # Eq. 6: -log mean_l p(y)   or   -mean_l log p(y)
    log_prob = log_mean_prob(logits) if bound == "log-mean" else logits.log_softmax(dim=-1).mean(dim=0)  # [B, C]
    return -log_prob.gather(1, labels[:, None]).mean()


def uncertainty(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy of the mean prediction, and its part due to disagreement (Eq. 8). logits [L, B, C] → [B], [B], nats."""

    def entropy(log_prob):
        return -(log_prob.exp() * log_prob).sum(dim=-1)

    # Eq. 8: H = entropy of the mean,   I = H - mean of the entropies: negative by rounding only
    total = entropy(log_mean_prob(logits))
    return total, (total - entropy(logits.log_softmax(dim=-1)).mean(dim=0)).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------------------
# 2. MODEL: M vectors in front of the class name, and a Gaussian over the vector that is added to all of them
# ----------------------------------------------------------------------------------------------------------------------
class PromptDistribution(torch.nn.Module):
    """The learned context and q(r). Holds no class: `forward` takes the tokenised names, so it reads any class list.

    context [M, W]. kind global: mean, logvar [1, W]; image: mean_net, logvar_net, D → D/2 → D/2 → W with ELU between.
    eval_noise [L, 1, W] is what evaluation samples with; where it has no rows, evaluation uses r = μ alone.
    """

    def __init__(self, clip: Clip, context: torch.Tensor, kind: str = "global", scale: float = 1.0, seed: int = 1,
                 logvar_init: tuple[float, float] = (0.0, 1.0)):  # fmt: skip
        super().__init__()
        self.clip, self.kind, self.scale = clip, kind, scale  # clip is a plain object, not a submodule
        self.context = torch.nn.Parameter(context.clone())
        D, W = clip.dim, context.shape[-1]
        with torch.random.fork_rng(devices=[]):  # WHY: layers draw from torch's global generator; lend it this seed
            torch.manual_seed(data.draw_seed(seed, "posterior"))
            if kind == "global":
                self.mean = torch.nn.Parameter(torch.zeros(1, W))
                self.logvar = torch.nn.Parameter(torch.empty(1, W).uniform_(*logvar_init))
            else:
                self.mean_net, self.logvar_net = three_layers(D, W), three_layers(D, W)
        self.register_buffer("eval_noise", torch.zeros(0, 1, W), persistent=False)
        self.to(clip.device)

    def posterior(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q(r) for unit image features x [B, D] (Eq. 2) → mu, logvar [K, W]; K = 1, one row for all, or K = B."""
        # Eq. 2
        return (self.mean, self.logvar) if self.kind == "global" else (self.mean_net(x), self.logvar_net(x))

    def forward(self, names: tuple[torch.Tensor, torch.Tensor], residual: torch.Tensor) -> torch.Tensor:
        """names = name_tokens(clip, classnames), residual [L, K, W] → text features [L, K, C, D], unnormalised."""
        context = (self.context + self.scale * residual[:, :, None]).flatten(0, 1)  # [L·K, M, W]
        prefix = torch.cat([common.start_of_text(self.clip).expand(len(context), -1, -1), context], dim=1)
        return common.encode_prompts(self.clip, prefix, *names).unflatten(0, residual.shape[:2])


def three_layers(D: int, W: int) -> torch.nn.Sequential:
    """One network of the image posterior, [B, D] → [B, W]."""
    layers = [torch.nn.Linear(D, D // 2), torch.nn.ELU(), torch.nn.Linear(D // 2, D // 2), torch.nn.ELU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(D // 2, W))


def initial_context(clip: Clip, words: str) -> torch.Tensor:
    """The words' token embeddings, [M, W]."""
    if not words.strip():
        raise UserError("--ctx-init is empty: give at least one word, such as 'a photo of a'")
    return common.embed(clip, [common.token_ids(clip, words, clip.context_length)])[0][0, :-1]  # without EOT


def new_learner(settings: argparse.Namespace, clip: Clip, context: torch.Tensor) -> PromptDistribution:
    """The module as these settings describe it, before training. --samples 0 learns v and, with "image", μ(x)."""
    s = settings
    learner = PromptDistribution(clip, context, s.posterior, s.residual_scale, s.seed, s.logvar_init)
    learner.eval_noise = noise(clip, s.seed, s.eval_samples, [("evaluation",)])
    if s.samples == 0:  # global: r stays 0, which is CoOp; image: the mean network learns, the spread is never used
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(name.startswith(("context", "mean_net")))
    return learner


def noise(clip: Clip, seed: int, L: int, columns: list[tuple]) -> torch.Tensor:
    """ε [L, K, W] of K columns; column k is a function of (seed, columns[k]) alone, whatever else is drawn with it."""
    draws = [torch.randn(L, clip.width, generator=data.generator(seed, "noise", *where)) for where in columns]
    return torch.stack(draws, dim=1).to(clip.device)


def training_noise(args: argparse.Namespace, clip: Clip, epoch: int, step: int, batch: torch.Tensor) -> torch.Tensor:
    """ε of one step: [L, 1, W], shared by the batch (global), or [L, B, W], a draw for each image (image)."""
    columns = [(epoch, step)] if args.posterior == "global" else [(epoch, i) for i in batch.tolist()]
    return noise(clip, args.seed, args.samples, columns)


# ----------------------------------------------------------------------------------------------------------------------
# 3. FLAGS
# ----------------------------------------------------------------------------------------------------------------------
METHOD = {"posterior": "global", "samples": 10, "kl_weight": 0.001, "bound": "log-mean", "ctx_init": "a photo of a",
          "logvar_init": [0.0, 1.0], "momentum": 0.9, "weight_decay": 5e-4}  # fmt: skip
DEFAULTS = {
    # Rate and epochs chosen on validation images, benchmark/results/toy. WHY not the paper's: toyclip's logit scale is
    # 21 and not CLIP's 100, so its gradients are smaller; 0.2 is the standard deviation of its token rows in use.
    "toy": METHOD | {"dataset": "toy_fillshapes_sketch", "classes": "base", "model": "toyclip", "lr": 0.08,
                     "epochs": 40, "batch_size": 8, "samples": 8, "residual_scale": 0.2, "augment": "none", "views": 1,
                     "compare": True},
    "paper": METHOD | {"classes": "all", "model": "ViT-B-16", "pretrained": "openai", "lr": 0.002, "epochs": 10,
                       "batch_size": 1, "residual_scale": 1.0, "augment": "crop", "views": 0, "compare": False},
    "fixed": {"posterior", "samples", "residual_scale", "ctx_init"},  # a checkpoint cannot be read with other values
}  # fmt: skip
PAPER = {  # dataset: (L, epochs), from the authors' instructions
    "imagenet": (10, 10), "caltech101": (20, 20), "oxford_pets": (40, 20), "stanford_cars": (20, 40),
    "oxford_flowers": (10, 40), "food101": (20, 20), "fgvc_aircraft": (10, 10), "sun397": (20, 10), "dtd": (40, 10),
    "eurosat": (20, 60), "ucf101": (5, 20),
}  # fmt: skip
DETERMINISTIC = {"global": "CoOp", "image": "CoCoOp-like"}  # what --samples 0 is


def paper_exceptions(settings: dict) -> dict:
    """--paper: what the paper's scripts set for single datasets."""
    return dict(zip(("samples", "epochs"), PAPER.get(settings["dataset"], ())))


def build_parser() -> argparse.ArgumentParser:
    parser = runs.new_parser(__doc__)
    add = parser.add_argument_group("VPT").add_argument
    add("--posterior", choices=["global", "image"], help="q(r) of Eq. 2: one for all images, or one for each")
    add("--samples", type=runs.few, help="L in training; 0 = deterministic: CoOp (global), CoCoOp-like (image)")
    add("--eval-samples", type=runs.few, help="L in evaluation; 0 = the mean residual alone [--samples]")
    add("--residual-scale", type=runs.non_negative, help="u of Eq. 1")
    add("--kl-weight", type=runs.non_negative, help="β of Eq. 7, on the mean over dimensions")
    add("--bound", choices=["log-mean", "elbo"], help="Eq. 6: log of the mean likelihood, or mean of the logs")
    add("--ctx-init", metavar="WORDS", help="the context starts as these words; M is the number of their tokens")
    add("--logvar-init", type=runs.exponent, nargs=2, metavar=("LO", "HI"), help="global: log σ² starts uniform in it")
    add("--momentum", type=runs.fraction, help="of SGD")
    add("--weight-decay", type=runs.non_negative, help="of SGD, on all that is learned, log-variances too")
    return runs.with_defaults(parser, DEFAULTS)


# ----------------------------------------------------------------------------------------------------------------------
# 4. TRAIN
# ----------------------------------------------------------------------------------------------------------------------
def train(args, clip: Clip, task: data.Task, views, out: Path) -> PromptDistribution:
    """Tune v and q; views(epoch) → unit image features [N, D] and labels [N]. Goes on from out/checkpoint.pt."""
    context = initial_context(clip, args.ctx_init)
    names = common.name_tokens(clip, task.classnames, len(context))
    learner = new_learner(args, clip, context)
    hyper = {"lr": args.lr, "momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(learner.parameters(), **hyper)  # parameters without a gradient are not decayed either
    first, val = runs.resume(out, "vpt", learner, optimizer), vision.encode_val(args, clip, task)
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
            # Eq. 2, Eq. 3: from a posterior for all or for each image, L residuals
            mu, logvar = learner.posterior(x[batch])  # [K, W]
            eps = training_noise(args, clip, epoch, step, batch)
            residual = sample_residual(mu, logvar, eps) if args.samples else mu[None]  # [L, K, W]
            with common.autocast(clip, differentiate=True):
                text = F.normalize(learner(names, residual).float(), dim=-1)  # [L, K, C, D]
            # Eq. 1
            logits = sample_logits(x[batch], text, clip.scale)  # [L, B, C]
            # Eq. 6, Eq. 4
            loss_task = task_loss(logits, labels[batch], args.bound)
            kl = kl_to_standard_normal(mu, logvar).mean()
            # Eq. 7: loss = loss_task + kl_weight * kl; without samples nothing has a spread
            loss = loss_task + args.kl_weight * kl if args.samples else loss_task
            optimizer.zero_grad()
            loss.backward()
            gradients = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
            common.check_finite(epoch, step, loss=loss, gradient=torch.cat(gradients))
            optimizer.step()
            seen.append(torch.stack([loss, loss_task, kl, (0.5 * logvar).exp().mean()]).detach())
        loss, loss_task, kl, sigma = torch.stack(seen).mean(dim=0).tolist()
        line = {"lr": lr, "loss": loss, "loss_task": loss_task}
        if args.samples:
            line |= {"kl": kl, "sigma": sigma}
        if val and (epoch + 1) % args.eval_every == 0:
            logits = class_logits(learner, clip, task.classnames, val[0])
            line["val_accuracy"] = common.evaluate(logits, val[1])["accuracy"]
        runs.end_epoch(args, out, "vpt", epoch, learner, optimizer, line)
    return learner


# ----------------------------------------------------------------------------------------------------------------------
# 5. EVALUATE
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def predict(learner: PromptDistribution, clip: Clip, classnames: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predictions for unit image features x [N, D] among any class names, in bounded memory: log-probabilities [N, C]
    `tuned`, averaged over learner.eval_noise, and `mean_residual`, with r = μ; `entropy`, `mutual_information` [N]."""
    names = common.name_tokens(clip, classnames, len(learner.context))
    (N, D), C, R, own = x.shape, len(classnames), 1 + len(learner.eval_noise), learner.kind == "image"

    def text_features(x: torch.Tensor) -> torch.Tensor:
        """[R, K, C, D], unit; row 0 is the mean residual's. WHY one noise for all images: then the prediction for an
        image is the same alone, in a batch and in any test set."""
        mu, logvar = learner.posterior(x)
        residual = torch.cat([mu[None], sample_residual(mu, logvar, learner.eval_noise)])
        with common.autocast(clip):
            return F.normalize(learner(names, residual).float(), dim=-1)

    # Floats an image keeps alive: logits and copies of them; its own text features, its prefixes' keys and values.
    layers = len(common.text_tower(clip.model).transformer.resblocks)
    floats = R * C * 6 + own * R * (3 * C * D + 2 * layers * (1 + len(learner.context)) * clip.width)
    chunk = max(1, int(clip.memory_gb * 1e9 / 4 / (4 * floats)))  # a quarter: encode_prompts needs memory too
    shared = None if own else text_features(x[:1])  # R·C prompts, once for the whole test set
    if own:
        announce(f"{N:,} images x {R} residuals x {C} classes = {N * R * C:,} prompts", N, lambda: text_features(x[:1]))
    rows = []
    for part in common.progress(x.split(chunk), "evaluate"):
        logits = sample_logits(part, text_features(part) if own else shared, clip.scale)  # [R, B, C]
        samples = logits[1:] if R > 1 else logits
        rows.append([log_mean_prob(samples), logits[0].log_softmax(dim=-1), *uncertainty(samples)])
    return dict(zip(("tuned", "mean_residual", "entropy", "mutual_information"), map(torch.cat, zip(*rows))))


def announce(what: str, times: int, work) -> None:
    """Time `work` (its second call: the first warms up) and say what `times` of it will take, if that is long."""
    for _ in range(2):
        start = time.time()
        work().sum().item()  # a GPU works in the background: wait for the number
    if (seconds := (time.time() - start) * times) > 30:
        common.log(f"evaluation: {what}, at most {seconds / 60:.0f} minutes")


def class_logits(learner: PromptDistribution, clip: Clip, classnames: list[str], x: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, C] of unit image features x [N, D] among any class names; they serve as logits."""
    return predict(learner, clip, classnames, x)["tuned"]


def auroc(score: torch.Tensor, positive: torch.Tensor) -> float | None:
    """How often a positive's score is above a negative's, ties half, by ranks. score, positive (bool) [N] → 0 to 1."""
    _, value, count = score.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2)[value].double()  # from 1; equal scores share their mean rank
    n = positive.sum().item()
    pairs = n * (len(score) - n)
    return (rank[positive].sum().item() - n * (n + 1) / 2) / pairs if pairs else None


def fit(args, clip: Clip, task: data.Task, views, tests: list[dict], out: Path, baseline: dict | None = None) -> dict:
    """Train (or read args.checkpoint), evaluate on every test set once, write the run folder, return its result."""
    if result := runs.finished(out):  # a resumed run whose baseline is finished
        return result
    start, encoded = time.time(), common.SECONDS["encode"]
    learner = read_learner(args.checkpoint, clip, args) if args.eval_only else train(args, clip, task, views, out)
    trained, rows = time.time(), []
    if common.rank() > 0:
        return {}
    for i, test in enumerate(tests):
        found, labels = predict(learner, clip, test["test"].classnames, test["x"]), test["labels"]
        extra = {"mean_residual": common.evaluate(found["mean_residual"], labels)}
        for key, logits in (("tuned", found["tuned"]), ("zero_shot", test["zero_shot"])):
            extra[f"auroc_{key}"] = auroc(uncertainty(logits[None])[0], logits.argmax(dim=-1) != labels)
        if baseline:
            extra["auroc_baseline"] = baseline["tests"][i]["extra"].get("auroc_tuned")
        extra = {key: value for key, value in extra.items() if value is not None}  # all right, or all wrong: no AUROC
        arrays = {key: found[key] for key in ("entropy", "mutual_information")}
        row = {"tuned": found["tuned"], "baseline": baseline and baseline["tests"][i]["tuned"]}
        rows.append(test | row | {"extra": extra, "arrays": arrays})
    runs.save_checkpoint(out, "vpt", args, learner.state_dict(), args.epochs)
    training = trained - start - (common.SECONDS["encode"] - encoded)  # fresh views are encoded between the steps
    seconds = {"train": training, "evaluate": time.time() - trained}
    return runs.write_result(out, "vpt", args, task, clip, rows, seconds)


def report(result: dict, out: str | Path, baseline: str, method: str) -> None:
    """The run's table, and how well each entropy tells wrong predictions from right ones."""
    runs.report(result, out, baseline, method)
    for test in result["tests"]:
        names = {"zero_shot": "zero-shot", "baseline": baseline, "tuned": method}
        found = [f"{names[k]} {test['extra'][f'auroc_{k}']:.2f}" for k in names if f"auroc_{k}" in test["extra"]]
        what = " ".join([test["dataset"], test["domain"] or test["classes"]])
        common.log(f"{what}: AUROC of entropy, wrong against right (0.5: tells nothing): {', '.join(found)}")


def read_learner(path: str, clip: Clip, args: argparse.Namespace | None = None) -> PromptDistribution:
    """The trained distribution of a run folder or checkpoint, ready for any class names. `args` instead of the stored
    settings may differ in seed and --eval-samples."""
    state = runs.load_checkpoint(path, "vpt")
    settings = args or argparse.Namespace(**state["settings"])
    M = state["tensors"].get("context", torch.zeros(0)).shape[:1]
    empty = torch.zeros(*M, clip.width, device=clip.device)
    learner = new_learner(settings, clip, empty)
    runs.restore(learner, state["tensors"], path)
    return learner


# ----------------------------------------------------------------------------------------------------------------------
# 6. MAIN
# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags; returns what result.json holds."""
    args = runs.settle(build_parser(), argv, "vpt", DEFAULTS, paper_exceptions)
    if args.eval_samples is None:
        args.eval_samples = args.samples
    if args.eval_samples and not args.samples:
        raise UserError("--eval-samples: a run with --samples 0 learns no distribution to sample from; leave it out")
    if not args.logvar_init[0] <= args.logvar_init[1]:
        raise UserError(f"--logvar-init {args.logvar_init[0]} {args.logvar_init[1]}: the lower end comes first")
    columns = DETERMINISTIC[args.posterior], "VPT" if args.samples else DETERMINISTIC[args.posterior]
    if result := args.resume and runs.finished(args.out_dir):
        report(result, args.out_dir, *columns)
        return result
    task, clip = runs.prepare(args)
    out = runs.open_run(args, "vpt")
    views, tests = vision.training_views(args, clip, task.train), vision.encode_tests(args, clip, task)
    # The baseline is deterministic, from the same start on the same batches; a run that is itself that has none.
    plain = runs.open_baseline(args, out, "vpt", samples=0, eval_samples=0) if args.compare and args.samples else None
    baseline = fit(plain, clip, task, views, tests, Path(plain.out_dir)) if plain else None
    result = fit(args, clip, task, views, tests, out, baseline)
    if result:
        report(result, out, *columns)
    return result


if __name__ == "__main__":
    runs.run(main)
