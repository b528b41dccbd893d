"""Use a finished run: predict images, export its classifier or features, read its prompt as words.

    python tools/use.py predict RUN photo.jpg folder/         # top classes, zero-shot beside tuned
    python tools/use.py export RUN classifier.safetensors     # class weights for plain open_clip
    python tools/use.py export RUN --features features.npz    # what people plot of a test set
    python tools/use.py words RUN                             # each context vector's nearest tokens

Only --features needs the dataset. With plain open_clip an exported classifier predicts so:

    file = safetensors.safe_open("classifier.safetensors", "pt")
    note, W = file.metadata(), file.get_tensor("classifier")
    clip, _, preprocess = open_clip.create_model_and_transforms(
        note["model"], note["pretrained"], force_quick_gelu=note["activation"] == "QuickGELU")
    x = F.normalize(clip.eval().encode_image(preprocess(image)[None]), dim=-1)
    p = (float(note["scale"]) * x @ W.T).softmax(dim=-1)

ProReg's image encoder is tuned, too, and exported as visual/NAME, for clip.visual. VPT's is
"samples" [L, C, D]: p = (scale * x @ W.mT).softmax(dim=-1).mean(dim=0).
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
import prograd
import proreg
import vpt
from data import require

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}


class Run:
    """A finished run: its settings, its CLIP, what it learned, its class names and template."""

    def __init__(self, folder: str, pretrained: str | None, device: str):
        config = common.read_run(folder)
        self.settings = argparse.Namespace(**config["settings"])
        self.settings.pretrained = pretrained or self.settings.pretrained
        vars(self.settings).update(device=device, workers=0, precision="fp32")
        common.settle_device(self.settings)
        self.method = SCRIPTS[config["method"]]
        self.classnames, self.template = config["classnames"], config["template"]
        self.clip = common.load_clip(self.settings.model, self.settings.pretrained, device)
        same = self.clip.weights == config["weights"]
        require(same, f"{folder}: its CLIP had other weights; name their file with --pretrained")
        self.learner = self.method.read_learner(folder, self.settings, self.clip)

    def features(self, items: list, tuned: bool) -> torch.Tensor:
        """Unit image features [N, D] of the frozen encoder, or of the one that the run tuned."""
        clip = self.clip
        if tuned and self.method is proreg:
            clip = argparse.Namespace(**vars(clip) | {"model": self.learner})
        x, _ = common.encode_images(clip, items, self.clip.preprocess, self.settings, cache=False)
        return F.normalize(x, dim=-1)

    def zero_shot(self, classnames: list[str], x: torch.Tensor) -> torch.Tensor:
        """Zero-shot CLIP's logits [N, C]."""
        classifier = common.zero_shot_classifier(self.clip, classnames, [self.template])
        return self.clip.scale * x @ classifier.T

    @torch.no_grad()
    def tuned(self, classnames: list[str], items: list) -> torch.Tensor:
        """The run's logits [N, C]. ProReg's head may want features that are not normalised."""
        if self.method is proreg:
            test = data.Test("", "", "all", classnames, self.template, items)
            return proreg.tuned_logits(self.settings, self.clip, self.learner, test)[0]
        x = self.features(items, tuned=False)
        return self.method.class_logits(self.learner, self.clip, classnames, x)


def image_files(paths: list[str]) -> list[tuple[str, int]]:
    """Files, and the images in folders, as items."""
    found = []
    for path in map(Path, paths):
        require(path.exists(), f"{path}: there is no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(data.ENDINGS))
        found += inside if path.is_dir() else [path]
    require(found, f"{', '.join(paths)}: no images there ({' '.join(data.ENDINGS)})")
    return [(str(path), 0) for path in found]


def predict(run: Run, args: argparse.Namespace) -> None:
    """Print the most probable classes of each image."""
    classnames = args.classes or run.classnames
    own = getattr(run.settings, "csc", False) or getattr(run.settings, "head", "") == "mlp"
    require(not (args.classes and own), "--csc and --head mlp know their own classes: no --classes")
    items = image_files(args.paths)
    zero_shot = run.zero_shot(classnames, run.features(items, tuned=False))
    both = {"zero-shot": zero_shot, "tuned": run.tuned(classnames, items)}
    for i, (path, _) in enumerate(items):
        print(path)
        for name, logits in both.items():
            top = logits[i].softmax(dim=-1).topk(min(args.top, len(classnames)))
            text = ", ".join(f"{classnames[c]} {100 * p:.1f} %" for p, c in zip(*top))
            print(f"  {name:9}  {text}")


@torch.no_grad()
def text_features(run: Run, classnames: list[str]) -> torch.Tensor:
    """The run's unit text features: [C, D], or [L, C, D] of VPT's samples."""
    learner = run.learner
    if run.method is prograd:
        return F.normalize(learner(learner.names(classnames)), dim=-1)
    if run.method is proreg:
        require(learner.cls_head is None, "--head mlp has no text features: nothing to export")
        return F.normalize(learner.text_features, dim=-1)
    require(learner.kind == "global", "image: a classifier for each image: nothing to export")
    mu, logvar = learner.posterior(torch.zeros(1, run.clip.model.visual.output_dim))
    residual = vpt.sample_residual(mu, logvar, learner.eval_noise)
    residual = residual if len(residual) else mu[None]
    names = common.name_tokens(run.clip, classnames, len(learner.context))
    return F.normalize(learner(names, residual), dim=-1)[:, 0]


def export(run: Run, args: argparse.Namespace) -> None:
    """Class weights as safetensors; with --features a test set's features as npz."""
    if args.features:
        return export_features(run, args)
    require(len(args.paths) == 1, "export needs a file to write, or --features FILE.npz")
    weights = text_features(run, run.classnames)
    tensors = {"classifier" if weights.dim() == 2 else "samples": weights.contiguous()}
    scale = run.clip.scale
    if run.method is proreg:
        scale = run.learner.logit_scale.exp().item()
        state = run.learner.visual.state_dict()
        tensors |= {f"visual/{key}": value.contiguous() for key, value in state.items()}
    name = run.clip.name.removesuffix("-quickgelu")  # "activation" says it
    note = {"model": name, "pretrained": run.clip.pretrained, "scale": str(scale)}
    note |= {"classnames": json.dumps(run.classnames), "template": run.template}
    note["activation"] = common.activation(run.clip.model)  # of "openai" open_clip has the other
    data.write(Path(args.paths[0]), safetensors.torch.save(tensors, note))
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in tensors.items() if "/" not in k)
    print(f"written to {args.paths[0]}: {shapes}")


def export_features(run: Run, args: argparse.Namespace) -> None:
    """Of the run's first test set: features, labels, text features, predicted labels of both."""
    test = data.load_task(run.settings).tests[0]
    x = run.features(test.items, tuned=False)
    arrays = {
        "x": x,
        "x_tuned": run.features(test.items, tuned=True),
        "labels": torch.tensor([label for _, label in test.items]),
        "text_zero_shot": common.zero_shot_classifier(run.clip, test.classnames, [test.template]),
        "predicted_zero_shot": run.zero_shot(test.classnames, x).argmax(dim=-1),
        "predicted_tuned": run.tuned(test.classnames, test.items).argmax(dim=-1),
    }
    if run.method is not vpt or run.learner.kind == "global":
        arrays["text_tuned"] = text_features(run, test.classnames)
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classnames=np.array(test.classnames), **arrays)
    data.write(Path(args.features), buffer.getvalue())
    print(f"written to {args.features}: {', '.join(arrays)}, classnames")


@torch.no_grad()
def words(run: Run, args: argparse.Namespace) -> None:
    """Print each context vector's nearest tokens, of its own model's vocabulary."""
    require(hasattr(run.learner, "context"), "a run of proreg.py has no context: nothing to read")
    table = common.text_tower(run.clip.model).token_embedding.weight
    seen = table.any(dim=1).nonzero()[:, 0]  # toyclip knows few words
    for i, vector in enumerate(run.learner.context.flatten(0, -2)):
        distance = (table[seen] - vector).norm(dim=-1)
        near = distance.topk(min(args.top, len(seen)), largest=False)
        texts = [run.clip.tokenizer.decode([i]).strip() for i in seen[near.indices].tolist()]
        pairs = [f"{text} {d:.2f}" for text, d in zip(texts, near.values.tolist())]
        print(f"{i:3}  length {vector.norm():.2f}  nearest: {', '.join(pairs)}")


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["predict", "export", "words"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("paths", nargs="*", help="images or folders; of export the file to write")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="predict among these")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many to show [3]")
    parser.add_argument("--features", metavar="FILE.npz", help="export features of its test set")
    parser.add_argument("--pretrained", metavar="W", help="where the CLIP's weights are now")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    args = parser.parse_args(argv)
    require(args.top > 0, f"--top {args.top}: it must be more than 0")
    require(args.action != "predict" or args.paths, "predict needs images or folders of images")
    action = {"predict": predict, "export": export, "words": words}[args.action]
    action(Run(args.run, args.pretrained, args.device), args)


if __name__ == "__main__":
    data.run(main)
