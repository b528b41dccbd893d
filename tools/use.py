"""Use a finished run: predict your own images, export the classifier, look at the learned words. Any of the methods.

    python tools/use.py predict RUN photo.jpg more_photos/            top classes, zero-shot beside tuned
    python tools/use.py predict RUN photo.jpg --classes cat,dog,emu   other names than those trained on
    python tools/use.py export RUN pets.safetensors                   class weights for plain open_clip, as below
    python tools/use.py words RUN                                     tokens nearest to the learned context vectors

RUN is a run folder or its checkpoint.pt. What `export` wrote is used with open_clip alone, without a file of ours:

    file = safetensors.safe_open("pets.safetensors", "pt")
    clip, _, preprocess = open_clip.create_model_and_transforms(file.metadata()["model"], file.metadata()["pretrained"])
    x = F.normalize(clip.eval().encode_image(preprocess(Image.open("photo.jpg").convert("RGB"))[None]), dim=-1)
    probabilities = (float(file.metadata()["scale"]) * x @ file.get_tensor("classifier").T).softmax(dim=-1)

in the order of json.loads(file.metadata()["classnames"]). VPT's prediction is the mean over its sampled classifiers:

    probabilities = (float(file.metadata()["scale"]) * x @ file.get_tensor("samples").mT).softmax(dim=-1).mean(dim=0)

Where open_clip cannot get the weights by itself (ProReg's tuned encoder; toyclip), a whole model is written beside it,
pets.clip.safetensors, and "pretrained" names that file. toyclip's architecture open_clip does not know: a line goes
first, open_clip.add_model_config("toyclip/toyclip.json").
"""

import argparse
import json
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# ruff: noqa: E402
import common
import data
import files
import layouts
import prograd
import proreg
import runs
import vision
import vpt
from data import UserError

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
BATCH = 64  # images encoded at once
UNCERTAINTIES = ("entropy", "mutual_information")


# -------------------- 1. A RUN: its checkpoint, CLIP, and class names
@dataclass
class Run:
    """A trained learner with the names and the template it is used with. CLIP is fp32 here, whatever it trained in."""

    method: str
    settings: argparse.Namespace
    clip: common.Clip
    learner: torch.nn.Module
    classnames: list[str]
    template: str


def open_run(path: str, classes: str | None = None, device: str = "auto") -> Run:
    """The run of a folder or checkpoint; `classes`: names, separated by commas, or a file with one a line."""
    state = runs.load_checkpoint(path)
    method, script = state["method"], SCRIPTS.get(state["method"])
    if script is None:
        raise UserError(f"{path} was made by {method[:20]!r}, which is none of {', '.join(SCRIPTS)}")
    settings = argparse.Namespace(**files.check_settings(script.build_parser(), state["settings"], path))
    chosen = read_names(classes) if classes else None
    classnames, template = trained_on(state, settings, chosen)
    if chosen and method == "prograd" and settings.csc and chosen != classnames:
        raise UserError("--classes: this run learned a context for each of its own classes (--csc), none for others")
    clip = common.load_clip(settings.model, settings.pretrained, common.start_processes(device))
    clip.memory_gb = settings.memory_gb
    return Run(method, settings, clip, script.read_learner(path, clip).eval(), chosen or classnames, template)


def read_names(classes: str) -> list[str]:
    text = layouts.read_text(classes) if os.path.isfile(classes) else classes.replace(",", "\n")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"--classes {classes!r} names no class: use a,b,c or a file with a name on each line")
    return names


def trained_on(state: dict, settings: argparse.Namespace, chosen: list[str] | None) -> tuple[list[str], str]:
    """The training classes' names and the template: noted in the checkpoint, else read again from the dataset."""
    if noted := state.get("trained_on"):
        return noted["classnames"], noted["template"]
    try:
        task = data.load_from_args(settings)
        return task.classnames, task.template
    except UserError as error:
        if not chosen:
            raise UserError(f"{error}; or name the classes yourself, with --classes") from error
        return chosen, settings.template or "a photo of a {}."


@torch.no_grad()
def class_weights(run: Run) -> tuple[torch.Tensor, float]:
    """Unit class weights [1 + L, C, D] and their scale. Row 0 is the classifier; VPT's, at the mean residual, is
    followed by those of its L samples. UserError where no such weights describe the predictions."""
    learner, clip, names = run.learner, run.clip, run.classnames
    if run.method == "proreg":
        if learner.cls_head is not None:
            raise UserError("--head mlp is a network, which no class weights [C, D] describe: use predict instead")
        rows = learned_rows(run)
        text = learner.text_features[rows] if rows else proreg.prompt_features(clip, names, run.template)
        return F.normalize(text, dim=-1)[None], learner.logit_scale.exp().item()
    tokens = common.name_tokens(clip, names, learner.context.shape[-2])
    if run.method == "prograd":
        return F.normalize(learner(tokens).float(), dim=-1)[None], clip.scale
    if learner.kind == "image":
        raise UserError("--posterior image has no classifier to export: each image has its own; use predict instead")
    residual = vpt.sample_residual(learner.mean, learner.logvar, learner.eval_noise)  # [L, 1, W]
    text = learner(tokens, torch.cat([learner.mean[None], residual]))[:, 0]
    return F.normalize(text.float(), dim=-1), clip.scale


def learned_rows(run: Run) -> list[int] | None:
    """ProReg: where the learned classifier has these names; None if it lacks one (then prompts are used for all)."""
    learned = run.learner.classnames
    if run.classnames == learned:
        return list(range(len(learned)))
    return [learned.index(name) for name in run.classnames] if set(run.classnames) <= set(learned) else None


# -------------------- 2. PREDICT
class Images(torch.utils.data.Dataset):
    """Paths → (path, image [3, H, W]), or (path, reason) where there is none: one bad file must not stop the rest."""

    def __init__(self, paths: list[str], transform):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        try:
            return self.paths[i], self.transform(data.read_image(self.paths[i]))
        except UserError as error:
            return self.paths[i], str(error).removeprefix(f"{self.paths[i]}: ")


def find_images(names: list[str]) -> list[str]:
    """Files as they are, and of each folder its images at any depth, sorted."""
    paths = []
    for name in names:
        if not os.path.exists(name):
            raise UserError(f"no image and no folder at {name}")
        found = layouts.list_images(name) if os.path.isdir(name) else [name]
        if not found:
            raise UserError(f"{name} holds no image (looked for {', '.join(sorted(layouts.ENDINGS))[:60]}, ...)")
        paths += found
    return paths


def make_predictor(run: Run):
    """A function: images [B, 3, H, W] → {zero_shot, tuned: probabilities [B, C], and VPT's two uncertainties [B]}."""
    clip, learner, names = run.clip, run.learner, run.classnames
    zero_shot = common.zero_shot_classifier(clip, names, run.template)
    vision.hasten(clip.model.visual)
    by_image = run.method == "vpt" and learner.kind == "image"
    mlp = run.method == "proreg" and learner.cls_head is not None
    if mlp and not learned_rows(run):
        raise UserError("--classes: this run's --head mlp has no prompt, and knows the classes it was trained on alone")
    weights, scale = (None, 0.0) if by_image or mlp else class_weights(run)

    @torch.no_grad()
    def look(images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.normalize(clip.model.encode_image(images), dim=-1)  # [B, D]
        found = {"zero_shot": (clip.scale * x @ zero_shot.T).softmax(dim=-1)}
        if by_image:
            more = vpt.predict(learner, clip, names, x)
            return found | more | {"tuned": more["tuned"].exp()}
        features = learner.encode_image(images) if run.method == "proreg" else x
        if mlp:
            return found | {"tuned": learner(features)[:, learned_rows(run)].softmax(dim=-1)}
        samples = weights[1:] if len(weights) > 1 else weights
        logits = scale * F.normalize(features, dim=-1) @ samples.mT  # [L, B, C]
        found["tuned"] = vpt.log_mean_prob(logits).exp()
        return found | (dict(zip(UNCERTAINTIES, vpt.uncertainty(logits))) if run.method == "vpt" else {})

    return look


def predict(args: argparse.Namespace) -> None:
    """Images in batches through both models, a result at a time: memory does not grow with their number."""
    paths = find_images(args.image)
    run, bad = open_run(args.run, args.classes, args.device), 0
    look = make_predictor(run)
    loader = vision.image_loader(Images(paths, run.clip.preprocess), args.workers, batch_size=BATCH, collate_fn=list)
    with common.progress(paths, "predict") as bar:
        for batch in loader:
            good = [(path, image) for path, image in batch if torch.is_tensor(image)]
            for path, reason in batch:
                if isinstance(reason, str):
                    tqdm.write(f"bad: {path}: {reason}", file=sys.stderr)
            bad += len(batch) - len(good)
            if good:
                found = look(torch.stack([image for _, image in good]).to(run.clip.device))
                found = {key: value.cpu() for key, value in found.items()}
                rows = [{key: value[i] for key, value in found.items()} for i in range(len(good))]
                rows = [describe(path, row, run.classnames, args.top) for (path, _), row in zip(good, rows)]
                tqdm.write("\n".join(json.dumps(row) if args.json else as_text(row) for row in rows))
            bar.update(len(batch))
    if bad:
        raise UserError(f"{bad} of {len(paths)} images cannot be read, and were left out: they are named above")


def describe(path: str, found: dict, classnames: list[str], top: int) -> dict:
    """One image's result, ready for JSON."""
    row = {"image": path}
    for key in ("zero_shot", "tuned"):
        chances, labels = found[key].topk(min(top, len(classnames)))
        best = zip(labels.tolist(), chances.tolist())
        row[key] = [{"class": classnames[c], "label": c, "probability": p} for c, p in best]
    return row | {key: found[key].item() for key in UNCERTAINTIES if key in found}


def as_text(row: dict) -> str:
    lines = [row["image"], f"  {'zero-shot':38}  tuned"]
    for pair in zip(row["zero_shot"], row["tuned"]):
        left, right = (f"{item['probability']:.3f}  {item['class']}" for item in pair)
        lines.append(f"  {left:38}  {right}")
    if "entropy" in row:
        lines.append("  entropy {entropy:.3f} nats, mutual information {mutual_information:.3f}".format(**row))
    return "\n".join(lines)


# -------------------- 3. EXPORT
def export(args: argparse.Namespace) -> None:
    """FILE.safetensors: `classifier` [C, D] and, of VPT, `samples` [L, C, D]; names, scale and model as metadata."""
    file = Path(args.file)
    if file.suffix != ".safetensors" or file.exists():
        raise UserError(f"{file} " + ("exists: choose another name" if file.exists() else "must end in .safetensors"))
    run = open_run(args.run, args.classes, args.device)
    clip, (weights, scale) = run.clip, class_weights(run)
    tensors = {"classifier": weights[0]} | ({"samples": weights[1:]} if len(weights) > 1 else {})
    # WHY: open_clip builds GELU for a plain name even where the weights want QuickGELU; the twin's name says which.
    twin = clip.activation == "quickgelu" and not common.open_clip.get_model_config(clip.name).get("quick_gelu")
    note = {"model": clip.name + "-quickgelu" * twin, "pretrained": str(clip.pretrained), "scale": repr(scale),
            "classnames": json.dumps(run.classnames), "template": run.template, "method": run.method,
            "dataset": run.settings.dataset, "activation": clip.activation}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    if run.method == "proreg" or not open_clip_can_load(clip):
        note["pretrained"] = str(file.with_suffix(".clip.safetensors"))
        state = clip.model.state_dict()
        if run.method == "proreg":
            state |= {f"visual.{key}": value for key, value in run.learner.visual.state_dict().items()}
            state["logit_scale"] = run.learner.logit_scale.detach()
        write(Path(note["pretrained"]), state, {})
    write(file, tensors, note)
    common.log(f"{file}: " + ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items()))
    common.log(f"for open_clip's {note['model']}, pretrained {note['pretrained']}; tools/use.py shows the four lines")


def write(file: Path, tensors: dict[str, torch.Tensor], note: dict[str, str]) -> None:
    files.write_atomic(file, safetensors.torch.save({k: v.cpu().contiguous() for k, v in tensors.items()}, note))


def open_clip_can_load(clip: common.Clip) -> bool:
    """Whether open_clip itself reads clip.pretrained: not toyclip's cut token table, nor a TorchScript archive."""
    names = zipfile.ZipFile(clip.pretrained).namelist() if zipfile.is_zipfile(clip.pretrained) else []
    return clip.known is None and not any("/code/" in name for name in names)


# -------------------- 4. WORDS
def words(args: argparse.Namespace) -> None:
    """For each context vector the nearest rows of this model's token table (Euclidean distance). Read with care: the
    vectors usually lie far from all tokens, as the last line lets you judge."""
    run = open_run(args.run, None, args.device)
    if run.method == "proreg":
        raise UserError(f"{args.run} is a run of proreg.py, which learns no prompt: there are no words to look at")
    context = run.learner.context.detach()  # [M, W], or [C, M, W] with --csc
    if run.method == "vpt" and run.learner.kind == "global":
        context = context + run.learner.scale * run.learner.mean.detach()
    elif run.method == "vpt":
        common.log("note: the context alone, without the residual, which differs from image to image")
    table = common.text_tower(run.clip.model).token_embedding.weight.detach()
    ids = table.any(dim=1).nonzero()[:, 0]  # rows that are exactly zero were never trained (toyclip)
    table = table[ids]
    titles = [f"vector {m + 1}" for m in range(context.shape[-2])]
    if context.dim() == 3:
        titles = [f"{name}, {title}" for name in run.classnames for title in titles]
    rows = []
    for title, vector in zip(titles, context.flatten(0, -2)):
        distances, nearest = (vector - table).norm(dim=1).topk(min(args.top, len(ids)), largest=False)
        tokens = [token_text(run.clip, i) for i in ids[nearest].tolist()]
        rows.append([title, *(f"{token} {distance:.3f}" for token, distance in zip(tokens, distances.tolist()))])
    runs.print_aligned(rows)
    some = table[torch.randperm(len(table), generator=data.generator(0, "words"))[:200]]
    gap = torch.cdist(some, table).topk(2, largest=False).values[:, 1].median().item()
    common.log(f"{len(ids)} tokens; from a token to the next one it is {gap:.3f} (median)")


def token_text(clip: common.Clip, i: int) -> str:
    """A token as text; a hyphen marks one that a word goes on after."""
    whole = clip.tokenizer.decoder[i].endswith(("</w>", ">"))
    return clip.tokenizer.decode([i]).strip() + ("" if whole else "-")


# -------------------- 5. MAIN
CLASSES = {"metavar": "NAMES", "help": "names separated by commas, or a file with one a line [those trained on]"}


def build_parser() -> argparse.ArgumentParser:
    parser = runs.OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="predict | export | words")

    def command(function, text: str):
        sub = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=function)
        sub.add_argument("run", metavar="RUN", help="a run folder or its checkpoint.pt")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 [auto]")
        return sub.add_argument

    unreadable = "An image that cannot be read is named on stderr and left out; the exit status is then 2."
    add = command(predict, f"Top classes of images, zero-shot beside tuned. {unreadable}")
    add("image", nargs="+", metavar="IMAGE", help="image files, and folders, which are searched for images")
    add("--classes", **CLASSES)
    add("--top", type=runs.positive_int, default=5, help="classes to show [5]")
    add("--json", action="store_true", help="one JSON object a line")
    add("--workers", type=runs.count, default=0, help="processes that decode images [0]")
    add = command(export, "Class weights as a .safetensors file, for plain open_clip.")
    add("file", metavar="FILE.safetensors", help="file to write")
    add("--classes", **CLASSES)
    add = command(words, "Tokens of the model's vocabulary that are nearest to each learned context vector.")
    add("--top", type=runs.positive_int, default=5, help="tokens to show [5]")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        args.command(args)
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no valid text
    runs.run(main)
