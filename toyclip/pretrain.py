"""Train the toy CLIP from nothing: the CLIP objective on freshly drawn (image, caption) pairs of the toy world.

    python toyclip/pretrain.py                          writes toyclip/weights.safetensors, in about 32 minutes
    python toyclip/pretrain.py --device cuda --workers 8
    python toyclip/pretrain.py --steps 150 --out /tmp/try.safetensors

The model is open_clip's own CLIP class with the sizes of toyclip.json, its captions are tokenised by open_clip's own
tokenizer, and its logit scale is learned. No picture is seen twice. Two things keep it fast and small without changing
what is computed: only the ~150 tokens that captions can hold have a trained row in the token table, and the text tower
stops at the last end-of-text token (it is causal: nothing after that matters).

The batch of step s is a pure function of (seed, s), so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # finds toyclip/ when this file is run as a script
from toyclip import world

HERE = Path(__file__).resolve().parent
VOCABULARY = 49408  # rows of open_clip's token table

# ----------------------------------------------------------------------------------------------------------------------
# BATCHES
# ----------------------------------------------------------------------------------------------------------------------


class Tokens:
    """open_clip's tokenizer for the words of the world, with rows of the compact token table in place of ids.

    Texts are split at blanks, and each piece is tokenised once: the result is the tokenizer's own, faster.
    """

    def __init__(self):
        self.tokenizer = open_clip.SimpleTokenizer()
        self.start, self.end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        words = {word for text in world.vocabulary() for word in text.split()}
        ids = {token for word in words for token in self.tokenizer.encode(word)}
        self.ids = sorted(ids | {self.start, self.end})  # row -> token id
        self.row = {token: row for row, token in enumerate(self.ids)}  # token id -> row
        self.rows_of_piece = {}

    def __call__(self, texts):
        """Texts -> (rows [n, longest], position of the end-of-text token [n]); padded with row 0."""
        sequences = []
        for text in texts:
            sequence = [self.row[self.start]]
            for piece in text.split():
                if piece not in self.rows_of_piece:
                    self.rows_of_piece[piece] = [
                        self.row[token] for token in self.tokenizer.encode(piece)
                    ]
                sequence += self.rows_of_piece[piece]
            sequences.append(torch.tensor([*sequence, self.row[self.end]]))
        rows = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        return rows, torch.tensor([len(sequence) - 1 for sequence in sequences])


def make_easier(factors, share, generator):
    """Make a share of the pictures easy to read: plain, large photos on a calm scene.

    WHY: style, scene and colour alone nearly solve the contrastive task of a batch, and a model that starts on the full
    world stops there, blind to shapes. Starting on easy pictures, it learns shapes first and keeps them.
    """
    n, device = len(factors["shape"]), generator.device
    easy = torch.rand(n, generator=generator, device=device) < share
    calm = torch.tensor(
        [world.SCENES.index(scene) for scene in ("snow", "night", "sky", "grass")], device=device
    )
    scene = calm[torch.randint(0, 4, (n,), generator=generator, device=device)]
    scale = 0.38 + 0.08 * torch.rand(n, generator=generator, device=device)
    photo, plain = world.STYLES.index("photo"), world.FILLS.index("plain")
    for name, value in {"style": photo, "fill": plain, "scene": scene, "scale": scale}.items():
        factors[name] = torch.where(easy, value, factors[name])
    return factors


class Pairs(Dataset):
    """Item s is the whole batch of step s, a pure function of (seed, s): uint8 images, token rows, ends of text."""

    def __init__(self, tokens, steps, batch_size, seed):
        self.tokens, self.steps, self.batch_size, self.seed = tokens, steps, batch_size, seed

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        rng = random.Random(f"{self.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        factors = world.sample_factors(self.batch_size, generator)
        # All pictures are easy until 15 % of the steps, none from 45 % on.
        share = min(max((0.45 - step / self.steps) / 0.30, 0.0), 1.0)
        factors = make_easier(factors, share, generator)
        return world.render(factors, generator), *self.tokens(world.captions(factors, rng))


# ----------------------------------------------------------------------------------------------------------------------
# MODEL
# ----------------------------------------------------------------------------------------------------------------------


def build_model(n_tokens):
    """open_clip's CLIP with toyclip.json's sizes and a token table of n_tokens rows in place of 49,408."""
    config = json.loads((HERE / "toyclip.json").read_text())
    config["text_cfg"]["vocab_size"] = n_tokens
    return open_clip.CLIP(**config)


def image_features(model, images):
    """uint8 [n, 3, 32, 32] -> normalised features [n, 64]."""
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD, device=images.device).view(1, 3, 1, 1)
    images = ((images.float() / 255 - mean) / std).contiguous(
        memory_format=torch.channels_last
    )  # faster convolutions
    return model.encode_image(images, normalize=True)


def text_features(model, rows, ends, chunks=4):
    """Token rows [n, length] -> normalised features [n, 64], as model.encode_text gives them, cheaper: the texts are
    sorted by length, and each chunk is cut after its own longest."""
    order = ends.argsort()
    features = []
    for part in order.chunk(chunks):
        length = int(ends[part[-1]]) + 1
        x = model.token_embedding(rows[part, :length]) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        features.append(
            x[torch.arange(len(part), device=x.device), ends[part]] @ model.text_projection
        )
    return F.normalize(torch.cat(features)[order.argsort()], dim=-1)


@torch.no_grad()
def probe(model, tokens, device, n=600):
    """Zero-shot accuracy, in percent, of each factor in three styles: {"photo/shape": 88.3, ...}."""
    model.eval()
    questions = {
        "shape": "a photo of a {}.",
        "color": "a photo of a {} object.",
        "fill": "a photo of a {} object.",
        "scene": "a photo of an object on {}.",
    }
    accuracy = {}
    for style in ("photo", "sketch", "grainy"):
        generator = torch.Generator().manual_seed(7)
        factors = world.sample_factors(n, generator, style=style)
        images = image_features(model, world.render(factors, generator).to(device))
        for factor, template in questions.items():
            rows, ends = tokens([template.format(name) for name in world.NAMES[factor]])
            guesses = (
                (images @ text_features(model, rows.to(device), ends.to(device)).T).argmax(1).cpu()
            )
            accuracy[f"{style}/{factor}"] = round(
                100 * (guesses == factors[factor]).float().mean().item(), 1
            )
    model.train()
    return accuracy


# ----------------------------------------------------------------------------------------------------------------------
# TRAINING
# ----------------------------------------------------------------------------------------------------------------------


def build_optimizer(model, lr):
    """AdamW; weight decay on matrices only; the logit scale, one number with far to go, moves three times as fast."""
    named = [(name, p) for name, p in model.named_parameters() if name != "logit_scale"]
    decayed = [p for name, p in named if p.ndim >= 2 and "embedding" not in name]
    free = [p for name, p in named if p.ndim < 2 or "embedding" in name]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": 0.05},
        {"params": free, "lr": lr, "weight_decay": 0.0},
        {"params": [model.logit_scale], "lr": 3 * lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def replace_file(path, write, *contents):
    """Write under a temporary name, then rename: an interrupted run leaves the old file, never half of a new one."""
    temporary = path.with_name(path.name + ".tmp")
    write(*contents[:1], temporary, *contents[1:])
    temporary.replace(path)


def save_weights(model, tokens, path, metadata):
    """fp16, as open_clip reads it. A word that captions never use has a row of zeros in the token table."""
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in state.items()
    }
    rows = state["token_embedding.weight"]  # [T, 64], of the words in use
    state["token_embedding.weight"] = rows.new_zeros(VOCABULARY, rows.shape[1])
    state["token_embedding.weight"][tokens.ids] = rows
    state = {name: value.contiguous() for name, value in state.items()}
    replace_file(path, save_file, state, metadata)


def train(args):
    torch.manual_seed(args.seed)  # the initial weights; the batches have generators of their own
    tokens = Tokens()
    model = build_model(len(tokens.ids)).to(args.device)
    model.visual.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / 100, 1) * (0.5 + 0.5 * math.cos(math.pi * min(s / args.steps, 1))),
    )
    checkpoint_path = args.out.with_suffix(".checkpoint.pt")
    settings = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
    }
    start, spent, average = 0, 0.0, None
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path, map_location=args.device, weights_only=True)
        if saved["settings"] != settings:
            sys.exit(
                f"{checkpoint_path} is of a run with {saved['settings']}: remove it, or give the same settings"
            )
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, spent, average = saved["step"], saved["seconds"], saved["loss"]

    pairs = Pairs(tokens, args.steps, args.batch_size, args.seed)
    batches = DataLoader(
        pairs, batch_size=None, sampler=range(start, args.steps), num_workers=args.workers,
        prefetch_factor=4 if args.workers else None, pin_memory=args.device.type == "cuda",
    )  # fmt: skip
    began = time.perf_counter() - spent
    model.train()
    for step, (images, rows, ends) in enumerate(batches, start):
        images, rows, ends = (x.to(args.device, non_blocking=True) for x in (images, rows, ends))
        logits = (
            model.logit_scale.exp()
            * image_features(model, images)
            @ text_features(model, rows, ends).T
        )
        target = torch.arange(len(images), device=args.device)  # caption i belongs to image i
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP does; it is never reached here
            average = loss.detach() if average is None else 0.95 * average + 0.05 * loss.detach()

        done = step + 1
        if done % 100 == 0 or done == args.steps:
            seconds = time.perf_counter() - began
            line = f"step {done} loss {average.item():.3f} scale {model.logit_scale.exp().item():.1f} {seconds:.0f} s"
            if done % 1000 == 0 or done == args.steps:
                line += f" zero-shot {json.dumps(probe(model, tokens, args.device))}"
            print(line, file=sys.stderr, flush=True)
        if done % args.checkpoint_every == 0 and done < args.steps:
            saved = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                "step": done, "seconds": time.perf_counter() - began, "loss": average, "settings": settings,
            }  # fmt: skip
            replace_file(checkpoint_path, torch.save, saved)
    metadata = {name: str(value) for name, value in settings.items()} | {
        "torch": torch.__version__,
        "format": "pt",
    }
    save_weights(model, tokens, args.out, metadata)
    checkpoint_path.unlink(missing_ok=True)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24000, help="training steps (24000)")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs per step (128)")
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="peak learning rate of AdamW (0.002)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial weights and of all batches (0)"
    )
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument(
        "--workers", type=int, default=1, help="extra processes that draw batches (1)"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, help="steps between checkpoints (500)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "weights.safetensors", help="file to write"
    )
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
