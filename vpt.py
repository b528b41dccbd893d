"""VPT: VARIATIONAL prompt tuning, not visual; also called Bayesian prompt learning (Derakhshani et
al., ICCV 2023, arXiv 2210.02390).

The idea. CLIP classifies an image by comparing it with the text features of "a photo of a CLASS.".
Prompt tuning (CoOp) replaces the words before CLASS by M learned vectors, trained on a few labelled
images while CLIP stays frozen. They soon fit what is particular to these images, and other classes
get worse. VPT learns a distribution over prompts instead of one: a Gaussian over one vector r, the
residual, which is added to all M context vectors. A whole region of prompts must do the job, not
one that happens to fit. Predictions are averaged over it; where they disagree the model is unsure.

Equations (numbered by this file: the paper could not be read in full)
    Eq. 1   p(c | x, r) = softmax over c of s cos(f(x), t_c(r))                        prompted CLIP
            t_c(r) = the text encoder's feature of [SOS, v_1 + u r .. v_M + u r, name, ".", EOT]
    Eq. 2  q(r) = N(μ, diag σ²);  global: μ, log σ² are learned;  image: networks of f(x)  posterior
    Eq. 3   r_l = μ + σ ε_l,   ε_l ~ N(0, I),   l = 1 .. L                                   samples
    Eq. 4   KL(q | N(0, I)), a mean over W (and Q): mean of (μ² + σ² - 1 - log σ²) / 2         prior
    Eq. 5   log p(c | x) = log( 1/L sum_l p(c | x, r_l) )                                 prediction
    Eq. 6   L_task = mean over the batch of -log p(y | x)               --bound log-mean   task loss
            L_task = mean over the batch of -1/L sum_l log p(y | x, r_l)     --bound elbo
    Eq. 7   v, q <- SGD(L_task + β KL), with momentum, and weight decay on all of v and q   the step
            The rate is 1e-5 in the first epoch, then follows a cosine from --lr down towards 0
    Eq. 8   E = entropy of p(. | x),  MI = E - 1/L sum_l entropy of p(. | x, r_l)        uncertainty

    paper        here                              shape        flag
    p, here v    PromptDistribution.context        [M, W]       --ctx-init
    r            residual                          [L, Q, W]
    u (ours)     u, 1 on real data, 4 on toy data  a number     --residual-scale
    μ, Σ         mu, logvar of posterior(x)        [Q, W]       --posterior
    L            number of samples                 a number     --samples
    β            kl_weight                         a number     --kl-weight
    s, f         clip.scale, CLIP's image encoder               --model --pretrained
    B images in a batch, N in a set, C classes, M context vectors; W entries of a token, the text
    transformer's width; D entries of a feature, of an image or of a text; L samples of each of Q
    posteriors: Q = 1 with the global one, which all images share; Q = B with an image posterior

Frozen: all of CLIP. Learned: v and q. Why it helps: noise on the prompt keeps v from fitting
details of the training images. When it does not help: in training too short for CoOp to overfit;
where one systematic move away from CLIP is needed, which noise blurs; and with one or two samples:
github.com/jonyhu/bayesian-prompt-learning ran the released global posterior on FGVC Aircraft, and
found 4 and 11 % of the new classes' images right with L = 1 and 2, 34 % with 5 or 10.

The baseline is --samples 0. Global: r = 0, exactly CoOp with M = 4. Image: r = μ(x), which we call
CoCoOp-like: CoCoOp adds a network's output to its context, too, but of two layers with ReLU (D,
D/16, W), not three with ELU (D, D/2, D/2, W).

PAPER vs CODE: (The paper as others restate it. The code is
github.com/saic-fi/Bayesian-Prompt-Learning at 8a73fff, and is followed; FILE:LINES are its own.)
 1. Bound: the paper maximises the ELBO, a mean of logs; the code the log of the mean likelihood
    (trainers/vpt.py:277-281). As a loss the code's is never larger (Jensen's inequality).
 2. KL: in the paper a sum over dimensions, with weight 1; in the code their mean, times 0.001
    (trainers/vpt.py:283, 297). The paper's is --bound elbo --kl-weight W (ViT-B/16, RN50: 512).
 3. The code's std_posterior is a log-variance (trainers/vpt.py:197). The global posterior's is
    drawn from Uniform[0, 1] (its line 148): σ starts at 1 to 1.65 and hardly moves, as weight decay
    (on all that is learned, its line 343) and the small KL weight pull little. CLIP's token entries
    have a standard deviation of about 0.02, 50 to 80 times less: the noise drowns the context. The
    code has u = 1; our 4 brings toyclip's larger tokens nearer that. The KL is of r, not of u r.
 4. Image posterior: the paper has two layers with two heads, the code two separate networks of
    three layers (trainers/vpt.py:31-37, 48-49), and so do we.
 5. Batch: the code's has 1 image (configs/trainers/VPT/vit_b16_c4_ep10_batch1_ctxv1.yaml:3); for
    more its image posterior is wrong (trainers/vpt.py:214 adds [B, W] to [M, W]). Ours is right,
    and the loss a mean over images; but our default is 1, too, as the learning rate goes with it.
 6. Evaluation noise: the code draws it afresh for each image from the global generator
    (trainers/vpt.py:196), so that a prediction depends on what was drawn before. Here it is drawn
    once, from the run's seed, for all images: only image, class names and run decide a prediction.
 7. L and epochs differ by dataset in the code (VPT.md:20-52; our --paper), for unknown reasons.
 8. Precision: the code trains in fp16 (train.py:103). Here what is learned is always fp32.

    python vpt.py                                                     # toy world, toy CLIP
    python vpt.py --posterior image                                  # a distribution for each image
    python vpt.py --dataset dtd --classes base --shots 16 --paper     # the code's base-to-new run
    python vpt.py --dataset folder:my_photos --model ViT-B-32 --pretrained openai --batch-size 8
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import data
from common import Clip, Names, require

# 1. METHOD: the functions that are the paper. It needs torch alone: paste it anywhere -------------
Tensor = torch.Tensor


def sample_logits(x: Tensor, text: Tensor, scale: float) -> Tensor:
    """Logits of unit image features x [B, D] by sampled prompts (Eq. 1), whose unit text features
    are text [L, Q, C, D] → [L, B, C]. Q = 1: all images meet the same prompts; Q = B: each its own.

    >>> x = torch.eye(2)  # two images
    >>> sample_logits(x, torch.eye(2)[None, None], scale=10.0)  # L = 1, two classes
    tensor([[[10.,  0.],
             [ 0., 10.]]])
    """
    Q = text.shape[1]
    x = x.unflatten(0, (Q, -1))  # [Q, B / Q, D]: [1, B, D] or [B, 1, D]
    # Eq. 1: logits = s · cos(f(x), t); here x is f(x), of unit length
    logits = scale * (x @ text.mT)  # [L, Q, B / Q, C]
    return logits.flatten(1, 2)


def sample_residual(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Draw from q(r) by moving standard noise (Eq. 3). mu, logvar [Q, W], eps [L, Q, W], or
    [L, 1, W] for all Q posteriors alike → r [L, Q, W].

    WHY so: all randomness is in eps, so that gradients reach mu and logvar = log σ².

    >>> sample_residual(torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[[2.0]]]))
    tensor([[[3.]]])
    """
    # Eq. 3: r = mu + exp(logvar / 2) * eps
    return mu + (0.5 * logvar).exp() * eps


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) as a mean, not a sum, over the last dimension (Eq. 4).
    mu, logvar [..., W] → [...], nats.

    WHY expm1: near logvar = 0, to where the prior pulls, exp(logvar) - 1 loses its digits.

    >>> kl_to_standard_normal(torch.tensor([0.0, 2.0]), torch.zeros(2))  # the mean of 0 and 2 nats
    tensor(1.)
    """
    # Eq. 4: KL = mean( (mu² + exp(logvar) - 1 - logvar) / 2 )
    return 0.5 * (mu.square() + logvar.expm1() - logvar).mean(dim=-1)


def log_mean_prob(logits: Tensor) -> Tensor:
    """Log of class probabilities averaged over samples (Eq. 5). logits [L, B, C] → [B, C], nats.

    WHY not the mean of logits or of log-probabilities: p(c | x) is an integral over r, and this is
    its estimate.

    >>> sure = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])  # two samples that disagree
    >>> log_mean_prob(sure).exp()
    tensor([[0.5000, 0.5000]])
    """
    L = logits.new_full((), len(logits))
    # Eq. 5: log p = logsumexp over l of log_softmax(logits) - log L
    return logits.log_softmax(dim=-1).logsumexp(dim=0) - L.log()


def task_loss(logits: Tensor, labels: Tensor, bound: str = "log-mean") -> Tensor:
    """How badly the labels are predicted (Eq. 6). logits [L, B, C], labels [B] → scalar, nats.

    WHY it matters: "elbo" asks each sampled prompt to be right, "log-mean" that some are.

    >>> disagree = torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]])
    >>> label = torch.tensor([0])
    >>> task_loss(disagree, label), task_loss(disagree, label, "elbo")  # ln 2, and 50 / 2
    (tensor(0.6931), tensor(25.))
    """
    # Eq. 6: -log mean_l p(y)   or   -mean_l log p(y)
    if bound == "log-mean":
        log_prob = log_mean_prob(logits)  # [B, C]
    else:
        log_prob = logits.log_softmax(dim=-1).mean(dim=0)
    return -log_prob.gather(1, labels[:, None]).mean()


def uncertainty(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the mean prediction, and its part due to disagreement (Eq. 8). logits [L, B, C] →
    [B], [B], nats.

    >>> total, disagreement = uncertainty(torch.tensor([[[50.0, 0.0]], [[0.0, 50.0]]]))
    >>> total, disagreement  # ln 2, and all of it disagreement
    (tensor([0.6931]), tensor([0.6931]))
    """

    def entropy(log_prob):
        return -(log_prob.exp() * log_prob).sum(dim=-1)

    # Eq. 8: E = entropy of the mean,   MI = E - mean of the entropies (≥ 0, but for rounding)
    total = entropy(log_mean_prob(logits))
    within = entropy(logits.log_softmax(dim=-1)).mean(dim=0)
    return total, (total - within).clamp(min=0)


# 2. MODEL: M vectors before the class name, and a Gaussian over what is added to all of them ------
class PromptDistribution(torch.nn.Module):
    """The learned context [M, W] and q(r). It holds no class: `forward` takes tokenised names, so
    that a trained distribution reads any classes.

    kind "global": mean, logvar [1, W]; "image": mean_net, logvar_net. eval_noise [L, 1, W]: the
    samples of evaluation, the same for all images; with L = 0 evaluation uses r = μ alone.
    """

    def __init__(self, clip: Clip, context: Tensor, kind="global", u=1.0, seed=1):
        super().__init__()
        self.clip = clip  # no submodule: CLIP is not learned
        self.kind = kind
        self.u = u
        self.context = torch.nn.Parameter(context.clone())
        D = common.prompt_features(clip, ["a"], "{}").shape[1]  # of any text
        W = clip.width
        with torch.random.fork_rng(devices=[]):  # layers draw from torch's global generator
            torch.manual_seed(data.draw_seed(seed, "posterior"))
            if kind == "global":
                self.mean = torch.nn.Parameter(torch.zeros(1, W))
                self.logvar = torch.nn.Parameter(torch.empty(1, W).uniform_(0, 1))
            else:
                self.mean_net = three_layers(D, W)
                self.logvar_net = three_layers(D, W)
        # persistent=False: checkpoints are without it, as the seed gives it again.
        self.register_buffer("eval_noise", torch.zeros(0, 1, W), persistent=False)
        self.to(context)  # its device and dtype

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 2: q(r) for unit image features x [B, D] → mu, logvar [Q, W]."""
        if self.kind == "global":
            return self.mean, self.logvar
        return self.mean_net(x), self.logvar_net(x)

    def forward(self, names: Names, residual: Tensor) -> Tensor:
        """names = name_tokens(clip, classnames, M), residual [L, Q, W] → text features
        [L, Q, C, D], unnormalised."""
        L, Q, _ = residual.shape
        contexts = self.context + self.u * residual[:, :, None]  # [L, Q, M, W]
        start = common.start_of_text(self.clip).expand(L * Q, -1, -1)
        prefix = torch.cat([start, contexts.flatten(0, 1)], dim=1)  # [L·Q, 1 + M, W]
        # WHY gradients=True in evaluation, too: one precision, that of training.
        with common.autocast(self.clip, gradients=True):
            features = common.encode_prompts(self.clip, prefix, names)  # [L·Q, C, D]
        return features.unflatten(0, (L, Q))


def three_layers(D: int, W: int) -> torch.nn.Sequential:
    """A network of the image posterior, [B, D] → [B, W]."""
    layers = [torch.nn.Linear(D, D // 2), torch.nn.ELU(), torch.nn.Linear(D // 2, D // 2)]
    return torch.nn.Sequential(*layers, torch.nn.ELU(), torch.nn.Linear(D // 2, W))


def initial_context(clip: Clip, words: str) -> Tensor:
    """The words' token embeddings, [M, W]."""
    require(words.strip(), "--ctx-init is empty: give at least one word, such as 'a photo of a'")
    return common.word_tokens(clip, words)


def new_learner(args: argparse.Namespace, clip: Clip, context: Tensor) -> PromptDistribution:
    """The module before training. --samples 0 learns v and, with the image posterior, μ(x)."""
    learner = PromptDistribution(clip, context, args.posterior, args.residual_scale, args.seed)
    learner.eval_noise = noise(clip, args.seed, args.samples, [("evaluation",)])
    if args.samples == 0:  # global: r stays 0, which is CoOp; image: the spread is never used
        for name, parameter in learner.named_parameters():
            parameter.requires_grad_(name.split(".")[0] in ("context", "mean_net"))
    return learner


def noise(clip: Clip, seed: int, L: int, columns: list[tuple]) -> Tensor:
    """ε [L, Q, W]. columns[i] says what ε[:, i] is for: ("evaluation",), (epoch, step) or (epoch,
    image). With the seed it decides this draw, whatever else is drawn beside it."""
    generators = [data.generator(seed, "noise", *purpose) for purpose in columns]
    draws = [torch.randn(L, clip.width, generator=generator) for generator in generators]
    start = common.start_of_text(clip)
    return torch.stack(draws, dim=1).to(start.device, start.dtype, non_blocking=True)


def training_noise(args, clip: Clip, epoch: int, step: int, batch: Tensor) -> Tensor:
    """ε [L, Q, W] of one step: one draw that all images share, or one for each, by its position in
    the data. batch [B]: these positions, on the CPU."""
    if args.posterior == "global":
        return noise(clip, args.seed, args.samples, [(epoch, step)])
    return noise(clip, args.seed, args.samples, [(epoch, i) for i in batch.tolist()])


# 3. FLAGS -----------------------------------------------------------------------------------------
# fmt: off
SETTINGS = {"posterior": "global", "samples": 10, "kl_weight": 0.001, "bound": "log-mean",
            "ctx_init": "a photo of a", "batch_size": 1, "momentum": 0.9, "weight_decay": 5e-4}
# Base to new, 4 shots. The paper's rate is 0.002 at CLIP's logit scale of 100, which is 0.01 at
# toyclip's of 21; twice that here, for half as many steps or fewer. With u = 4 the noise is 20 to
# 30 times the entries of toyclip's tokens (as released: 50 to 80 times CLIP's).
TOY = SETTINGS | {"dataset": "toy_fillshapes_sketch", "model": "toyclip", "classes": "base",
                  "shots": 4, "lr": 0.02, "epochs": 40, "residual_scale": 4.0, "augment": "none",
                  "views": 1, "compare": True}
REAL = SETTINGS | {"model": "ViT-B-16", "pretrained": "openai", "classes": "all", "lr": 0.002,
                   "epochs": 10, "residual_scale": 1.0, "augment": "crop", "views": 0,
                   "compare": False}
RELEASED = {  # with --paper: dataset: (L, epochs), see PAPER vs CODE 7
    "imagenet": (10, 10), "caltech101": (20, 20), "oxford_pets": (40, 20), "dtd": (40, 10),
    "stanford_cars": (20, 40), "oxford_flowers": (10, 40), "food101": (20, 20), "ucf101": (5, 20),
    "fgvc_aircraft": (10, 10), "sun397": (20, 10), "eurosat": (20, 60)}
# fmt: on
DETERMINISTIC = {"global": "CoOp", "image": "CoCoOp-like"}  # what --samples 0 is


def defaults(run: dict) -> dict:
    """The default settings. run: the settings known so far, on which some of them depend."""
    if run.get("dataset", "toy_").startswith("toy_"):
        return TOY
    settings = dict(REAL)
    if ":" in run["dataset"]:  # your own images: views = 0, fresh in each epoch, is hours on a CPU
        settings["views"] = 10
    if run.get("paper") and run["dataset"] in RELEASED:
        settings["samples"], settings["epochs"] = RELEASED[run["dataset"]]
    return settings


FLAGS = {
    "--posterior": {"choices": ["global", "image"], "help": "Eq. 2: one q(r), or one an image"},
    "--samples": {"type": int, "metavar": "L", "help": "5 or more; 0 = deterministic"},
    "--residual-scale": {"type": float, "metavar": "U", "help": "u of Eq. 1, a factor of r"},
    "--kl-weight": {"type": float, "metavar": "β", "help": "of Eq. 7; W is the paper's, for elbo"},
    "--bound": {"choices": ["log-mean", "elbo"], "help": "Eq. 6: the code's, or the paper's"},
    "--ctx-init": {"metavar": "WORDS", "help": "v starts from them; M is their number of tokens"},
    "--momentum": {"type": float, "metavar": "X", "help": "of SGD"},
    "--weight-decay": {"type": float, "metavar": "X", "help": "of SGD, on all of v and q"},
}


def build_parser() -> data.Parser:
    return common.new_parser(__doc__, "VPT (Eq. n: see the file's head)", FLAGS, defaults)


# 4. TRAIN -----------------------------------------------------------------------------------------
def step(learner: PromptDistribution, names: Names, eps: Tensor, x: Tensor, labels, args) -> Tensor:
    """One batch: unit image features x [B, D], labels [B], noise eps [L, Q, W] → [loss, L_task, KL,
    mean of σ]. Sets the gradients of v and q."""
    # Eq. 2, Eq. 3: L residuals of each posterior; without samples the mean is the one residual
    mu, logvar = learner.posterior(x)  # [Q, W]
    residual = sample_residual(mu, logvar, eps) if args.samples else mu[None]  # [L, Q, W]
    text = F.normalize(learner(names, residual), dim=-1)  # [L, Q, C, D]
    # Eq. 1
    logits = sample_logits(x, text, learner.clip.scale)  # [L, B, C]
    # Eq. 6, Eq. 4
    loss_task = task_loss(logits, labels, args.bound)
    kl = kl_to_standard_normal(mu, logvar).mean()
    # Eq. 7: loss = loss_task + kl_weight * kl. Without samples there is no spread, and no KL
    loss = loss_task + args.kl_weight * kl if args.samples else loss_task
    learner.zero_grad()
    loss.backward()
    sigma = (0.5 * logvar).exp().mean()
    return torch.stack([loss, loss_task, kl, sigma]).detach()


def train(args, clip: Clip, task: data.Task, views, out: Path) -> PromptDistribution:
    """Tune v and q. views(epoch) → unit image features [N, D], labels [N]."""
    context = initial_context(clip, args.ctx_init)
    names = common.name_tokens(clip, task.classnames, len(context))
    learner = new_learner(args, clip, context)
    tests = task.validation() if args.eval_every else []
    validation = [common.encode_test(args, clip, test) for test in tests]
    # What --samples 0 does not learn gets no gradient, and SGD passes over it, decay included.
    optimizer = torch.optim.SGD(
        learner.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    first = common.resume(out, learner, optimizer)  # 0, or where the checkpoint in `out` left off
    for epoch in common.progress(range(first, args.epochs), out.name + common.SOONER):
        x, labels = views(epoch)  # [N, D], [N]
        # Eq. 7: the rate of this epoch
        lr = common.warmup_cosine(epoch, args.epochs, args.lr)
        optimizer.param_groups[0]["lr"] = lr
        seen = []
        for batch in data.batches(len(labels), args.batch_size, args.seed, epoch, args.max_steps):
            eps = training_noise(args, clip, epoch, len(seen), batch)
            batch = batch.to(x.device, non_blocking=True)
            seen.append(step(learner, names, eps, x[batch], labels[batch], args))
            # Eq. 7: v, q <- SGD
            optimizer.step()
        loss, loss_task, kl, sigma = torch.stack(seen).mean(dim=0)
        log = {"lr": lr, "loss": loss, "loss_task": loss_task}
        log |= {"kl": kl, "sigma": sigma} if args.samples else {}
        if args.eval_every and (epoch + 1) % args.eval_every == 0:
            logits = class_logits(learner, clip, task.classnames, validation[0].x)
            log["val_accuracy"] = common.evaluate(logits, validation[0].labels)["accuracy"]
        common.end_epoch(out, epoch, learner, optimizer, log, last=epoch + 1 == args.epochs)
    return learner


# 5. EVALUATE --------------------------------------------------------------------------------------
@torch.no_grad()
def predict(learner: PromptDistribution, clip: Clip, classnames: list[str], x: Tensor) -> dict:
    """Predictions for unit image features x [N, D] among any class names, in bounded memory.

    Log-probabilities [N, C]: "tuned", of the mean over the samples learner.eval_noise (Eq. 5), and
    "mean_residual", by the one prompt of r = μ. [N]: "entropy" and "mutual_information" (Eq. 8).
    """
    names = common.name_tokens(clip, classnames, len(learner.context))

    def text_features(x: Tensor) -> Tensor:
        """[1 + L, Q, C, D], unit; first that of r = μ. One noise for all: see PAPER vs CODE 6."""
        mu, logvar = learner.posterior(x)
        residual = torch.cat([mu[None], sample_residual(mu, logvar, learner.eval_noise)])
        return F.normalize(learner(names, residual), dim=-1)

    # Images go in chunks that take a quarter of the memory, beside the text encoder's: at most six
    # arrays of logits, and three of an image's own text features, are alive at a time.
    numbers = 6 if learner.kind == "global" else 6 + 3 * x.shape[1]
    numbers *= (1 + len(learner.eval_noise)) * len(classnames)  # of one image
    chunk = max(1, int(clip.memory_gb * 1e9 / 4 / (numbers * x.element_size())))
    shared = text_features(x[:1]) if learner.kind == "global" else None
    parts = []
    for part in common.progress(x.split(chunk), "evaluate"):
        text = text_features(part) if shared is None else shared
        logits = sample_logits(part, text, clip.scale)  # [1 + L, B, C]
        samples = logits[1:] if len(logits) > 1 else logits
        entropy, disagreement = uncertainty(samples)
        parts.append({
            "tuned": log_mean_prob(samples), "mean_residual": logits[0].log_softmax(dim=-1),
            "entropy": entropy, "mutual_information": disagreement,
        })  # fmt: skip
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


# tools/ call these two of each method file alike: `template` and `args` are for the other methods.
def class_logits(learner: PromptDistribution, clip: Clip, classnames: list[str], x, template=""):
    """Log-probabilities [N, C] of unit image features x [N, D]; they serve as logits."""
    return predict(learner, clip, classnames, x)["tuned"]


def read_learner(folder: str | Path, args: argparse.Namespace, clip: Clip) -> PromptDistribution:
    """The trained distribution of a run folder, ready for any class names."""
    # WHY not args: posterior, u, L, --ctx-init and the noise's seed are those of the training.
    trained = argparse.Namespace(**common.read_run(folder)["settings"])
    learner = new_learner(trained, clip, initial_context(clip, trained.ctx_init))
    common.load_checkpoint(folder, learner)
    return learner


def fit(args, clip: Clip, task: data.Task, views, encoded, out: Path, baseline=None) -> dict:
    """Train (or read the run to evaluate), test on `encoded`, write the run folder → its result."""
    if (out / "result.json").exists():  # a resumed run, or its baseline, that is finished
        return common.read_json(out / "result.json")
    start = time.time()
    learner = (read_learner(args.eval, args, clip) if args.eval
               else train(args, clip, task, views, out))  # fmt: skip
    found = []
    for frozen in encoded:
        row = predict(learner, clip, frozen.test.classnames, frozen.x)
        row["arrays"] = {key: row[key] for key in ("entropy", "mutual_information")}
        if args.samples:
            row["extra"] = {"mean_residual": common.evaluate(row["mean_residual"], frozen.labels)}
        found.append(row)
    name = method_name(args)
    return common.write_result(out, name, args, clip, task, encoded, found, start, baseline)


# 6. MAIN ------------------------------------------------------------------------------------------
def method_name(args: argparse.Namespace) -> str:
    """What these settings are called in tables."""
    return "VPT" if args.samples else DETERMINISTIC[args.posterior]


def main(argv: list[str] | None = None) -> dict:
    """Run the script with these flags → what result.json holds."""
    args = common.settle(build_parser(), argv, "vpt", defaults)
    compare = args.compare and args.samples and not args.eval
    task = data.load_task(args)
    task.notes[:0] = common.warmup_notes(args)
    clip = common.load_run_clip(args, task)
    if args.samples:
        task.notes.append("mean residual: VPT's prediction by one prompt, that of r = μ")
    against = f"{DETERMINISTIC[args.posterior]} and zero-shot" if compare else "zero-shot"
    out = common.open_run(args, task, clip, f"{method_name(args)} against {against}")
    views = common.training_views(args, clip, task.train)
    encoded = [common.encode_test(args, clip, test) for test in task.tests]
    baseline = None
    if compare:  # deterministic, from the same start on the same batches
        plain = argparse.Namespace(**vars(args) | {"samples": 0})
        baseline = fit(plain, clip, task, views, encoded, out / "baseline")
    result = fit(args, clip, task, views, encoded, out, baseline)
    common.report(result, out)
    return result


if __name__ == "__main__":
    common.run(main)
