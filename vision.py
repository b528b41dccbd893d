"""Image features: a list of images goes through the frozen image encoder once, shared by processes and cached on disk.

What the prompt methods read (training views, test sets) is made here; proreg.py, which tunes the encoder, takes images.
"""

import argparse
import functools
import hashlib
import json
import os
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

import common
import data
from common import (
    SECONDS,
    Clip,
    autocast,
    broadcast,
    gather_rows,
    log,
    progress,
    rank,
    versions,
    world_size,
)
from data import UserError, draw_seed
from files import write_atomic


# ----------------------------------------------------------------------------------------------------------------------
# 1. One view of a list of images → features
# ----------------------------------------------------------------------------------------------------------------------
class ImageBlock(ResidualAttentionBlock):
    """A block of CLIP's ViT by common.py's functions: the same numbers, on an AMD CPU in half the time."""

    kept = slice(None)  # the tokens whose output is read

    def forward(self, x, attn_mask=None):
        q, k, v = (part.transpose(1, 2) for part in common.heads(self, x))
        mixed = F.scaled_dot_product_attention(q[:, :, self.kept], k, v)
        return common.finish_block(self, x[:, self.kept], mixed.transpose(1, 2).flatten(2))


class LastImageBlock(ImageBlock):
    """Of the last block's output only the class token is read: the MLP need not see the others."""

    kept = slice(1)


def hasten(visual: torch.nn.Module) -> torch.nn.Module:
    """The same image tower, faster: CLIP's ViT with these blocks, its ResNets with the channels last in memory.

    Weights, their names and the features stay. Not toyclip: what was recorded with it is to be had to the last bit."""
    if isinstance(visual, ModifiedResNet) and visual.output_dim >= 512:
        return visual.to(memory_format=torch.channels_last)
    if not isinstance(visual, VisionTransformer) or visual.pool_type != "tok" or visual.attn_pool is not None:
        return visual
    blocks = visual.transformer.resblocks
    if visual.transformer.batch_first and {type(block) for block in blocks} == {ResidualAttentionBlock}:
        for block in blocks:
            block.__class__ = LastImageBlock if block is blocks[-1] else ImageBlock
    return visual


class ImageSet(torch.utils.data.Dataset):
    """items → (image [3, H, W], label, position). View `view` of image i is a pure function of (seed, view, i)."""

    def __init__(self, items: list[data.Item], transform, seed: int = 0, view: int = 0):
        self.items, self.transform, self.seed, self.view = items, transform, seed, view

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        address, label = self.items[i]
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator: lend it this image's
            torch.manual_seed(draw_seed(self.seed, "view", self.view, i))
            try:
                return self.transform(data.read_image(address)), label, i
            except UserError as error:
                raise UserError(f"{error}; python data.py --check-images with your --dataset lists all") from error


def image_loader(images: torch.utils.data.Dataset, workers: int, **batching) -> torch.utils.data.DataLoader:
    """A DataLoader; short lists are decoded in this process, for starting another one costs more than 64 images do."""
    return torch.utils.data.DataLoader(images, num_workers=min(workers, len(images) // 64), **batching)


def encode_images(clip: Clip, items: list, transform, args, *, view: int = 0, keep: bool = True, what: str = "images"):
    """Image features [N, D] (fp32, unnormalised, on clip.device) and labels [N] of one view of `items`.

    Reads args.seed, args.workers and args.cache_dir. Cached (if `keep`) under a key of all that changes a feature. Of
    several processes each encodes its share and all get the whole. FloatingPointError if a feature is not finite.
    """
    labels, world = torch.tensor([label for _, label in items], device=clip.device), world_size()
    path = None
    if keep and args.cache_dir != "none":
        path = Path(args.cache_dir, f"{feature_key(clip, items, transform, args.seed, view)}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
    found = broadcast(read_features(path, (len(items), clip.dim)) if path and rank() == 0 else None)
    if found:
        log(f"{what}: {len(items)} features from the cache, {found[1]:.1f} s saved")
        return found[0].to(clip.device), labels
    start, rows = time.time(), [torch.zeros(0, clip.dim, device=clip.device)]
    mine = torch.utils.data.Subset(ImageSet(items, transform, args.seed, view), range(rank(), len(items), world))
    hasten(clip.model.visual)
    on_cpu = torch.device(clip.device).type == "cpu"
    with torch.no_grad(), autocast(clip):
        for images, _, _ in progress(image_loader(mine, args.workers, batch_size=256), f"encode {what}"):
            at_once = max(1, 2**19 // images[0, 0].numel()) if on_cpu else len(images)  # a cache's worth of pixels
            rows += [clip.model.encode_image(part.to(clip.device)).float() for part in images.split(at_once)]
    features = gather_rows(torch.cat(rows), len(items))
    SECONDS["encode"] += time.time() - start
    if not features.isfinite().all():
        address = items[int((~features.isfinite()).any(dim=1).nonzero()[0])][0]
        raise FloatingPointError(
            f"the image feature of {address} is not finite: try --precision fp32, check the weights"
        )
    if path and rank() == 0:
        note = {"seconds": f"{time.time() - start:.2f}", "sha1": sha1(features)}
        write_atomic(path, safetensors.torch.save({"features": features.cpu().contiguous()}, note))
    return features, labels


def feature_key(clip: Clip, items: list, transform, seed: int, view: int) -> str:
    """Hash of all that decides features: weights, activation, precision, device, versions, transform, draw, files."""

    def stamp(address: str):
        try:
            status = os.stat(data.world.__file__ if address.startswith("toy:") else address)
        except OSError:  # gone: whoever reads it will say so, along with all others that are broken
            return address, None, None
        return address, status.st_size, status.st_mtime_ns

    weights = [sha1(value) for value in clip.model.visual.state_dict().values()]
    parts = [weights, clip.activation, clip.precision, torch.device(clip.device).type, versions(), repr(transform)]
    parts += [seed, view] if transform is not clip.preprocess else []  # the test transform draws nothing
    return hashlib.sha1(json.dumps([parts, [stamp(address) for address, _ in items]]).encode()).hexdigest()


def read_features(path: Path, shape: tuple[int, int]) -> tuple[torch.Tensor, float] | None:
    """Cached features and the seconds they took, or None; a truncated or damaged file is named and made again."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            features, note = file.get_tensor("features"), file.metadata()
        fits = features.shape == shape and features.dtype == torch.float32 and features.isfinite().all()
        if fits and sha1(features) == note["sha1"]:
            return features, float(note["seconds"])
    except Exception as error:  # any damage at all: the cache is only a copy
        log(f"note: {error}")
    log(f"warning: the cached features in {path} are damaged; encoding again")
    return None


def sha1(tensor: torch.Tensor) -> str:
    return hashlib.sha1(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# 2. What a run reads
# ----------------------------------------------------------------------------------------------------------------------
def encode(args: argparse.Namespace, clip: Clip, items: list, transform, all_items: list, **which):
    """Unit features [N, D] and labels [N]. If an image is broken, all broken ones of `all_items` are named at once."""
    try:
        x, labels = encode_images(clip, items, transform, args, **which)
    except UserError as error:
        bad = [f"{address}: {reason}" for address, reason in data.bad_images(all_items)]
        raise UserError(f"{len(bad)} broken images, mend or remove them: {'; '.join(bad) or error}") from error
    return F.normalize(x, dim=-1), labels


def training_views(args: argparse.Namespace, clip: Clip, items: list):
    """A function epoch → unit features [N, D], labels [N]: one view, V cached views in turn, or always a fresh one."""
    transform, fresh = data.train_transform(clip.preprocess, args.augment), args.augment != "none" and args.views == 0

    @functools.lru_cache(maxsize=1 if fresh else None)
    def encode_view(view: int):
        what = f"training images, view {view}"
        return encode(args, clip, items, transform, items, view=view, keep=not fresh, what=what)

    return lambda epoch: encode_view(epoch if fresh else 0 if args.augment == "none" else epoch % args.views)


def encode_tests(args: argparse.Namespace, clip: Clip, task: data.Task) -> list[dict]:
    """For each test set: {test, x: unit features [N, D], labels [N], zero_shot: logits [N, C]}."""
    rows, every = [], task.train + [item for test in task.tests for item in test.items]
    for test in task.tests:
        what = f"{args.test_part} images of {test.name}, {test.domain or test.classes}"
        classifier = common.zero_shot_classifier(clip, test.classnames, test.template)  # a bad name is found at once
        x, labels = encode(args, clip, test.items, clip.preprocess, every, what=what)
        rows.append({"test": test, "x": x, "labels": labels, "zero_shot": clip.scale * x @ classifier.T})
    return rows


def encode_val(args: argparse.Namespace, clip: Clip, task: data.Task):
    """Unit features and labels of the validation part for --eval-every: for curves, they select nothing. None without.

    WHY before training: the processes encode together, and afterwards only the first one trains."""
    if not args.eval_every:
        return None
    if not task.val:
        raise UserError(f"--eval-every needs a validation part, and {task.name} has none")
    return encode(args, clip, task.val, clip.preprocess, task.val, what="validation images")
