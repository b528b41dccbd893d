"""Use a run: predict images, export its classifier or features, read its prompt as words.

    python tools/use.py predict RUN photo.jpg FOLDER       # top classes, zero-shot beside tuned
    python tools/use.py predict RUN FOLDER --csv FILE.csv  # of FOLDER/CLASS/*: how many are right
    python tools/use.py export RUN FILE.safetensors        # and classify.py, which runs anywhere
    python tools/use.py export RUN --features FILE.npz     # what people plot of a test set
    python tools/use.py words RUN                          # each context vector's nearest tokens

Only --features needs the dataset. The script of the run is looked for beside prograd.py.
"""

import argparse
import collections
import csv
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
from data import require

BLOCK = 4096  # images whose features are held at once
TITLES = ("zero-shot", "tuned")


class Run:
    """A run: its settings, its CLIP, what it learned, its class names and template."""

    def __init__(self, folder: str, args: argparse.Namespace):
        config = common.read_run(folder)
        if not Path(folder, "result.json").exists():
            begun = any(Path(folder).glob("*.safetensors"))
            require(begun, f"{folder} has not finished training, and has no checkpoint yet")
            print(f"note: {folder} has not finished training: this is its last checkpoint")
        self.script = find_script(config, args.script)
        own = getattr(self.script, "SETTINGS", {}) | config["settings"]
        self.settings = argparse.Namespace(**own)
        require(not self.settings.eval, f"{folder} evaluates {self.settings.eval}: name that run")
        self.settings.pretrained = args.pretrained or self.settings.pretrained
        vars(self.settings).update(device=args.device, workers=0, precision="fp32")
        common.settle_device(self.settings)
        self.classnames, self.template = config["classnames"], config["template"]
        self.lines = config["train"]  # "path below the root<tab>label" of each training image
        self.clip = common.load_clip(self.settings.model, self.settings.pretrained, args.device)
        same = self.clip.weights == config["weights"]
        require(same, f"{folder}: its CLIP had other weights; name their file with --pretrained")
        self.learner = self.script.read_learner(folder, self.settings, self.clip)

    @torch.no_grad()
    def blocks(self, classnames: list[str], items: list[data.Item]):
        """Of a block of images after the other: the frozen encoder's unit features [n, D], those
        that the run classifies (the same, or its own encoder's, unnormalised), zero-shot CLIP's
        logits [n, C] and the run's. So memory does not grow with the number of images."""
        classifier = common.zero_shot_classifier(self.clip, classnames, [self.template])
        for start in tqdm(range(0, len(items), BLOCK), "blocks", leave=False, disable=None):
            what = (items[start : start + BLOCK], self.clip.preprocess, self.settings)
            x = F.normalize(common.encode_images(self.clip, *what, cache=False)[0], dim=-1)
            own = x
            if hasattr(self.learner, "encode_image"):
                clip = dataclasses.replace(self.clip, model=self.learner)
                own = common.encode_images(clip, *what, cache=False)[0]
            named = (classnames, own, self.template)
            tuned = self.script.class_logits(self.learner, self.clip, *named)
            yield x, own, self.clip.scale * x @ classifier.T, tuned


def find_script(config: dict, named: str | None):
    """The module that made a run. WHY not by the path in its config.json: a run that somebody sent
    must not decide which code is run here."""
    root = Path(common.__file__).parent
    path = Path(named or root / f"{Path(str(config['method'])).name}.py")
    made = config.get("script", f"{config['method']}.py")
    require(path.is_file(), f"there is no {path}: name the script of the run, {made}, by --script")
    sys.path.insert(0, str(path.resolve().parent))
    module = importlib.import_module(path.stem)
    whole = hasattr(module, "read_learner") and hasattr(module, "class_logits")
    text = "read_learner(folder, args, clip), class_logits(learner, clip, classnames, x, template)"
    require(whole, f"{path} must define {text}, as prograd.py does")
    return module


def find_images(paths: list[str]) -> list[tuple[str, str]]:
    """Files, and the images in folders, each with the first sub-folder on its way, or ""."""
    found = []
    for path in paths:
        require(Path(path).exists(), f"{path}: there is no such file or folder")
        source = data.Source("", " ".join(data.ENDINGS), paths="(?P<cls>[^/]+)/.+|.+")
        folder = data.Found(f"folder:{path}", source, path)
        rows = data.walk(folder, argparse.Namespace()) if Path(path).is_dir() else [(path, "")]
        found += [(address, called(cls)) for address, cls, *_ in rows]
        print(*(f"note: {path}: {note}\n" for note in folder.notes), sep="", end="")
    return found


def called(name: str) -> str:
    return name.replace("_", " ").lower()


def folder_labels(classnames: list[str], lines: list[str]) -> dict[str, int]:
    """{folder: label}: a folder is called as a class, or as one in which this class's training
    images alone lay. What two classes are called is left out."""
    pairs = [(called(name), label) for label, name in enumerate(classnames)]
    for path, label in (line.rsplit("\t", 1) for line in lines):
        pairs += [(called(folder), int(label)) for folder in path.split("/")[:-1]]
    groups = data.group(set(pairs), lambda pair: pair[0])
    return dict(those[0] for those in groups.values() if len(those) == 1)


def predict(run: Run, args: argparse.Namespace) -> None:
    """Print the likeliest classes of each image, or write the first of them; then the scores."""
    own = getattr(run.settings, "csc", False) or getattr(run.settings, "head", "") == "mlp"
    require(not (args.classes and own), "--csc and --head mlp know their own classes: no --classes")
    classnames = args.classes or run.classnames
    once = not args.classes or len({*map(called, classnames)}) == len(classnames) > 1
    require(once, "--classes needs two names or more, each of them once")
    label = folder_labels(classnames, [] if args.classes else run.lines)
    items = [(path, label.get(folder, -1)) for path, folder in find_images(args.paths)]
    names = [name.replace("_", " ") for name in classnames]
    table = [["path", "zero_shot", "zero_shot_probability", "tuned", "tuned_probability"]]
    predicted = []  # [N, 2]
    for *_, zero_shot, tuned in run.blocks(classnames, items):
        both = torch.stack([zero_shot, tuned], dim=1).softmax(dim=-1)  # [n, 2, C]
        top = both.topk(min(args.top, len(names)))
        for classes, shares in zip(top.indices.tolist(), top.values.tolist()):
            row = [items[len(predicted)][0]]
            lines = row[:]
            for title, best, values in zip(TITLES, classes, shares):
                text = ", ".join(f"{names[c]} {100 * p:.1f} %" for c, p in zip(best, values))
                lines.append(f"  {title:9}  {text}")
                row += [names[best[0]], f"{values[0]:.6f}"]
            predicted.append([best[0] for best in classes])
            table.append(row)
            if not args.csv:
                with tqdm.external_write_mode():  # clears the bar for it
                    print(*lines, sep="\n")
    if args.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        data.write(Path(args.csv), text.getvalue().encode("utf-8", "surrogateescape"))
        print(f"written to {args.csv}: {len(items)} images")
    print_scores(np.array([label for _, label in items]), np.array(predicted), names)


def print_scores(labels: np.ndarray, predicted: np.ndarray, names: list[str]) -> None:
    """Of the images in folders called as classes. labels [N], -1 in others; predicted [N, 2]."""
    known = labels >= 0
    truth = labels[known]
    if not known.any():
        return
    print(f"in folders of {len({*truth})} classes: {len(truth)} of {len(labels)} images")
    for title, guess in zip(TITLES, predicted[known].T):
        right = guess == truth
        mean = np.mean([right[truth == c].mean() for c in {*truth}])
        wrong = collections.Counter(zip(truth[~right], guess[~right])).most_common(5)
        text = ", ".join(f"{names[c]} as {names[g]} {n}" for (c, g), n in wrong) or "none"
        shares = f"accuracy {100 * right.mean():.1f} %, class mean {100 * mean:.1f} %"
        print(f"  {title:9}  {shares}, most often confused: {text}")


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
    text = getattr(learner, "text_features", None)  # ProReg's
    require(text is not None, "the learner (--head mlp) has no text features: nothing to export")
    return F.normalize(text, dim=-1)


@torch.no_grad()
def export(run: Run, args: argparse.Namespace) -> None:
    """Class weights, a tuned image encoder and a note on the CLIP, as safetensors, and classify.py;
    with --features a test set's features as npz."""
    one = len(args.paths) + bool(args.features) == 1
    require(one, "export needs a file to write: FILE.safetensors, or --features FILE.npz")
    if args.features:
        return export_features(run, args)
    path = Path(args.paths[0])
    beside = path.with_name("classify.py")
    program = Path(__file__).with_name("classify.py").read_bytes()
    free = path != beside and (not beside.exists() or beside.read_bytes() == program)
    require(free, f"{beside} is another file: move it, or export to another folder")
    weights = text_features(run, run.classnames)
    tensors = {"classifier" if weights.dim() == 2 else "samples": weights}
    shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
    clip, scale, encoder = run.clip, run.clip.scale, run.clip.model
    if hasattr(run.learner, "encode_image"):  # ProReg's, or of a script that follows it
        known = hasattr(run.learner, "visual") and hasattr(run.learner, "logit_scale")
        require(known, "a tuned encoder is exported as learner.visual and learner.logit_scale")
        encoder, scale = run.learner, run.learner.logit_scale.exp().item()
        state = encoder.visual.state_dict()
        tensors |= {f"visual/{key}": value for key, value in state.items()}
    red = clip.preprocess(Image.new("RGB", (64, 64), "red"))[None].to(clip.device)
    tensors["red"] = F.normalize(encoder.encode_image(red), dim=-1)  # tells it from other CLIPs
    tag = "" if Path(clip.pretrained).is_file() else clip.pretrained
    note = {"model": clip.name.removesuffix("-quickgelu"), "pretrained": tag, "scale": repr(scale)}
    note |= {"weights": Path(clip.pretrained).name, "activation": common.activation(clip.model)}
    note |= {"classnames": json.dumps(run.classnames), "template": run.template}
    note["preprocess"] = json.dumps(clip.model.visual.preprocess_cfg)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    data.write(path, safetensors.torch.save(tensors, note))
    data.write(beside, program)
    print(f"written to {path}: {shapes}; try next: python {beside} {path} IMAGE (see its head)")


def export_features(run: Run, args: argparse.Namespace) -> None:
    """Of the run's first test set: features, labels, text features, predicted labels of both."""
    test = data.load_task(run.settings).tests[0]
    x, own, zero_shot, tuned = map(torch.cat, zip(*run.blocks(test.classnames, test.items)))
    arrays = {
        "x": x,
        "x_tuned": F.normalize(own, dim=-1),
        "labels": torch.tensor([label for _, label in test.items]),
        "text_zero_shot": common.zero_shot_classifier(run.clip, test.classnames, [test.template]),
        "predicted_zero_shot": zero_shot.argmax(dim=-1),
        "predicted_tuned": tuned.argmax(dim=-1),
    }
    if getattr(run.learner, "kind", "global") == "global":  # else each image has its own
        arrays["text_tuned"] = text_features(run, test.classnames)
    arrays = {key: value.cpu().numpy() for key, value in arrays.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classnames=np.array(test.classnames), **arrays)
    data.write(Path(args.features), buffer.getvalue())
    print(f"written to {args.features}: {', '.join(arrays)}, classnames")


@torch.no_grad()
def words(run: Run, args: argparse.Namespace) -> None:
    """Print each context vector's nearest tokens, of its own model's vocabulary."""
    require(hasattr(run.learner, "context"), "this run has no context: there is nothing to read")
    table = common.text_tower(run.clip.model).token_embedding.weight
    seen = table.any(dim=1).nonzero()[:, 0]  # toyclip knows few words
    for i, vector in enumerate(run.learner.context.flatten(0, -2)):
        distance = (table[seen] - vector).norm(dim=-1)
        near = distance.topk(min(args.top, len(seen)), largest=False)
        texts = [run.clip.tokenizer.decode([i]).strip() for i in seen[near.indices].tolist()]
        pairs = [f"{text} {d:.2f}" for text, d in zip(texts, near.values.tolist())]
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
    require(args.top > 0, f"--top {args.top}: it must be more than 0")
    require(args.action != "predict" or args.paths, "predict needs images or folders of images")
    action = {"predict": predict, "export": export, "words": words}[args.action]
    action(Run(args.run, args), args)


if __name__ == "__main__":
    data.run(main)
