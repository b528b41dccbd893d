"""Use a run: predict images, export its classifier or features, read its prompt as words.

python tools/use.py predict RUN photo.jpg FOLDER       # top classes, zero-shot beside tuned
python tools/use.py predict RUN FOLDER --csv FILE.csv  # of folders called as classes: scores
python tools/use.py export RUN FILE.safetensors        # and classify.py, which runs anywhere
python tools/use.py export RUN --features FILE.npz     # what people plot of a test set
python tools/use.py words RUN                          # each context vector's nearest tokens
"""

import argparse
import csv
import dataclasses
import importlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
from data import require

TITLES = ("zero-shot", "tuned")
BLOCK = 4096  # images whose features are held at once


class Run:
    """A run: its settings, its CLIP, what it learned, its class names and template."""

    def __init__(self, folder: str, args: argparse.Namespace):
        config = common.read_run(folder)
        if not Path(folder, "result.json").exists():
            print(f"note: {folder} has not finished training: this is its last checkpoint")
        self.script = find_script(config["method"], args.script)
        self.classnames, self.template = config["classnames"], config["template"]
        self.settings = argparse.Namespace(**config["settings"])
        self.settings.pretrained = args.pretrained or self.settings.pretrained
        vars(self.settings).update(device=args.device, workers=0, precision="fp32")
        common.settle_device(self.settings)
        self.clip = common.load_clip(self.settings.model, self.settings.pretrained, args.device)
        same = self.clip.weights == config["weights"]
        require(same, f"{folder}: its CLIP had other weights; name their file with --pretrained")
        self.learner = self.script.read_learner(folder, self.settings, self.clip)

    @torch.no_grad()
    def blocks(self, classnames: list[str], items: list[data.Item]):
        """Blocks of unit features [n, D], frozen and of the run, logits [n, C] of both."""
        classifier = common.zero_shot_classifier(self.clip, classnames, [self.template])
        for start in range(0, len(items), BLOCK):
            what = (items[start : start + BLOCK], self.clip.preprocess, self.settings)
            x = F.normalize(common.encode_images(self.clip, *what, cache=False)[0], dim=-1)
            own = x
            if hasattr(self.learner, "encode_image"):
                clip = dataclasses.replace(self.clip, model=self.learner)
                own = common.encode_images(clip, *what, cache=False)[0]
            named = (classnames, own, self.template)
            tuned = self.script.class_logits(self.learner, self.clip, *named)
            yield x, F.normalize(own, dim=-1), self.clip.scale * x @ classifier.T, tuned


def find_script(method: str, named: str | None):
    """The module that made a run. A run that somebody sent must not decide which code runs here."""
    path = Path(named or Path(common.__file__).with_name(f"{Path(method).name}.py"))
    require(path.is_file(), f"there is no {path}: name the script of the run by --script")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.import_module(path.stem)
    whole = hasattr(module, "read_learner") and hasattr(module, "class_logits")
    text = "read_learner(folder, args, clip), class_logits(learner, clip, classnames, x, template)"
    require(whole, f"{path} must define {text}, as prograd.py does")
    return module


def find_images(paths: list[str]) -> list[str]:
    """Files, and the images in folders."""
    images = []
    for path in paths:
        folder = data.Found(f"folder:{path}", data.Source("", " ".join(data.ENDINGS)), path)
        rows = data.walk(folder, argparse.Namespace()) if Path(path).is_dir() else [(path,)]
        images += [address for address, *_ in rows]
        for note in folder.notes:
            print(f"note: {path}: {note}")
    return images


def predict(run: Run, args: argparse.Namespace) -> None:
    """Print the likeliest classes of each image, or write the first of them; then the scores."""
    classnames = [name.replace("_", " ") for name in args.classes or run.classnames]
    lower = [name.lower() for name in classnames]
    if args.classes:
        fixed = getattr(run.settings, "csc", False) or getattr(run.settings, "head", "") == "mlp"
        require(not fixed, "--csc and --head mlp know their own classes: no --classes")
        once = len(set(lower)) == len(lower) > 1
        require(once, "--classes needs two names or more, each of them once")
    paths = find_images(args.paths)
    tops = []
    for *_, zero_shot, tuned in run.blocks(classnames, [(path, 0) for path in paths]):
        both = torch.stack([zero_shot, tuned]).softmax(dim=-1)  # [2, n, C]
        tops.append(both.topk(max(1, min(args.top, len(classnames)))))
    shares, best = (torch.cat(parts, dim=1).cpu().numpy() for parts in zip(*tops))  # [2, N, K]
    names = np.array(classnames)[best]
    if args.csv:
        head = "path zero_shot zero_shot_probability tuned tuned_probability".split()
        columns = [paths, names[0, :, 0], shares[0, :, 0], names[1, :, 0], shares[1, :, 0]]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([head, *zip(*columns)])
        data.write(Path(args.csv), text.getvalue().encode("utf-8", "surrogateescape"))
        print(f"written to {args.csv}: {len(paths)} images")
    for i, path in enumerate([] if args.csv else paths):
        print(path)
        for title, name, share in zip(TITLES, names[:, i], shares[:, i]):
            text = ", ".join(f"{n} {100 * p:.1f} %" for n, p in zip(name, share))
            print(f"  {title:9}  {text}")
    folders = [Path(path).parent.name.replace("_", " ").lower() for path in paths]
    truth = np.array([dict(zip(lower, classnames)).get(folder, "") for folder in folders])
    if any(truth):
        print_scores(truth, names[..., 0])


def print_scores(truth: np.ndarray, names: np.ndarray) -> None:
    """Of images in folders called as classes: truth [N], "" for others; names [2, N], as taken."""
    known = truth != ""
    truth = truth[known]
    print(f"in folders of {len(set(truth))} classes: {len(truth)} of {len(known)} images")
    for title, taken in zip(TITLES, names[:, known]):
        right = taken == truth
        pairs = Counter(zip(truth[~right], taken[~right])).most_common(5)
        text = ", ".join(f"{true} as {name} {n}" for (true, name), n in pairs) or "none"
        mean = np.mean([right[truth == name].mean() for name in set(truth)])
        scores = f"accuracy {100 * right.mean():.1f} %, class mean {100 * mean:.1f} %"
        print(f"  {title:9}  {scores}, most often confused: {text}")


@torch.no_grad()
def text_features(run: Run, classnames: list[str]) -> torch.Tensor:
    """The run's unit text features: [C, D], or [L, C, D] of VPT's samples."""
    learner = run.learner
    if hasattr(learner, "names"):  # ProGrad's
        return F.normalize(learner(learner.names(classnames)), dim=-1)
    if hasattr(learner, "posterior"):  # VPT's
        require(learner.kind == "global", "image: a classifier for each image: nothing to export")
        mu, logvar = learner.posterior(None)
        residual = run.script.sample_residual(mu, logvar, learner.eval_noise)
        residual = residual if len(residual) else mu[None]
        names = common.name_tokens(run.clip, classnames, len(learner.context))
        return F.normalize(learner(names, residual), dim=-1)[:, 0]
    known = hasattr(learner, "text_features")  # ProReg's
    require(known, "the learner (--head mlp) has no text features: nothing to export")
    return F.normalize(learner.text_features, dim=-1)


@torch.no_grad()
def export(run: Run, args: argparse.Namespace) -> None:
    """The class weights and the image encoder, and classify.py; or with --features: features."""
    one = len(args.paths) + bool(args.features) == 1
    require(one, "export needs a file to write: FILE.safetensors, or --features FILE.npz")
    if args.features:
        return export_features(run, args)
    text = text_features(run, run.classnames)
    encoder = run.learner if hasattr(run.learner, "encode_image") else run.clip.model  # ProReg's
    tensors = encoder.visual.state_dict() | {"classifier": encoder.logit_scale.exp() * text}
    config = open_clip.get_model_config(run.clip.name)
    vision = config["vision_cfg"] | {"timm_model_pretrained": False, "output_tokens": False}
    quick = common.activation(run.clip.model) == "QuickGELU"
    note = {
        "model": {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": quick},
        "preprocess": run.clip.model.visual.preprocess_cfg,
        "classnames": [name.replace("_", " ") for name in run.classnames],
    }
    note = {key: json.dumps(value) for key, value in note.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    path = Path(args.paths[0])
    program, ours = path.with_name("classify.py"), Path(__file__).with_name("classify.py")
    other = path == program or (program.exists() and program.read_bytes() != ours.read_bytes())
    require(not other, f"{program} is another program or version: name another file or folder")
    data.write(path, safetensors.torch.save(tensors, note))
    data.write(program, ours.read_bytes())
    print(f"written to {path}; try next: python {program} {path} IMAGE")


def export_features(run: Run, args: argparse.Namespace) -> None:
    """Of the run's first test set: features, labels, text features."""
    test = data.load_task(run.settings).tests[0]
    x, own, *_ = map(torch.cat, zip(*run.blocks(test.classnames, test.items)))
    arrays = {"x": x, "x_tuned": own, "labels": torch.tensor([label for _, label in test.items])}
    text = common.zero_shot_classifier(run.clip, test.classnames, [test.template])
    arrays["text_zero_shot"] = text
    if getattr(run.learner, "kind", "global") == "global":  # else each image has its own
        arrays["text_tuned"] = text_features(run, test.classnames)
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    arrays["classnames"] = np.array(test.classnames)
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    data.write(Path(args.features), buffer.getvalue())
    print(f"written to {args.features}: {', '.join(arrays)}")


@torch.no_grad()
def words(run: Run, args: argparse.Namespace) -> None:
    """Print each context vector's nearest tokens, of its own model's vocabulary."""
    require(hasattr(run.learner, "context"), "this run has no context: there is nothing to read")
    table = common.text_tower(run.clip.model).token_embedding.weight
    seen = table.any(dim=1).nonzero()[:, 0]  # toyclip knows few words
    for i, vector in enumerate(run.learner.context.flatten(0, -2)):
        distance = (table[seen] - vector).norm(dim=-1)
        near = distance.argsort()[: args.top]
        texts = [run.clip.tokenizer.decode([token]).strip() for token in seen[near].tolist()]
        pairs = [f"{text} {d:.2f}" for text, d in zip(texts, distance[near])]
        empty = vector.norm() < distance.min()  # zero is nearer than any token
        nearest = "zero" if empty else ", ".join(pairs)
        print(f"{i:3}  length {vector.norm():.2f}  nearest: {nearest}")


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["predict", "export", "words"])
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("paths", nargs="*", help="images or folders; of export the file to write")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="predict among these")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many to show [3]")
    parser.add_argument("--csv", metavar="FILE.csv", help="write the predictions, a line an image")
    parser.add_argument("--features", metavar="FILE.npz", help="export features of its test set")
    parser.add_argument("--script", metavar="FILE.py", help="of the run, where it is your own")
    parser.add_argument("--pretrained", metavar="W", help="where the CLIP's weights are now")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    args = parser.parse_intermixed_args(argv)
    require(args.action != "predict" or args.paths, "predict needs images or folders of images")
    action = {"predict": predict, "export": export, "words": words}[args.action]
    action(Run(args.run, args), args)


if __name__ == "__main__":
    data.run(main)
