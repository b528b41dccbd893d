"""Fine-tune in float64 with proreg.train, alone or under torchrun (test_processes.py).

    torchrun --nproc-per-node 3 tests/processes_worker.py FOLDER OUT '[["--flag", "value", ...], ...]'

FOLDER is one of write_photos; process r writes OUT/0/r.pt for the first list of flags, and so on; the last run is
interrupted and resumed. Model, images and teacher are converted to float64: then K processes must agree with one to the
rounding of float64, which no float32 run can show.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import data  # noqa: E402
import proreg  # noqa: E402
import runs  # noqa: E402
from toyclip import world  # noqa: E402

WEIGHTS = str(common.HERE / "toyclip" / "weights.safetensors")
CLASSES = 4


def write_photos(folder: Path, train: int = 10, other: int = 3) -> Path:
    """A dataset in files: `train` images in all, `other` a class in val, test and two domains, of the toy world."""
    task = world.TASKS["toy_shapes_biased"]
    names = sorted(task.classnames)[:CLASSES]
    for place, part, count in (
        ("train", "train", train), ("val", "val", other * len(names)), ("test", "test", other * len(names)),
        ("ood/background", "background", other * len(names)), ("ood/style", "style", other * len(names)),
    ):  # fmt: skip
        labels = world.task_labels("toy_shapes_biased", part)
        for i in range(count):
            name = names[i % len(names)]
            found = [k for k, label in enumerate(labels) if task.classnames[label] == name]
            picture = world.task_image("toy_shapes_biased", part, found[i // len(names)])
            path = folder / place / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    """Quick settings on that dataset. A later flag wins."""
    settings = {"--dataset": f"folder:{folder}", "--model": "toyclip", "--pretrained": WEIGHTS, "--cache-dir": "none",
                "--epochs": "3", "--batch-size": "4", "--workers": "0", "--lr": "1e-3", "--head-lr-factor": "1",
                "--checkpoint-seconds": "0", "--device": "cpu"}  # fmt: skip
    return [*sum(([key, value] for key, value in settings.items()), []), *more]


def settings(folder: Path, *more: str):
    args = runs.settle(proreg.build_parser(), flags(folder, *more), "proreg", proreg.DEFAULTS, proreg.paper_exceptions)
    args.alpha = 1.5 if args.alpha is None else args.alpha
    return args


def float64_clip() -> common.Clip:
    """The toy CLIP and its images in float64."""
    clip = common.load_clip("toyclip", WEIGHTS)
    clip.model.double()
    clip.preprocess = transforms.Compose([clip.preprocess, torch.Tensor.double])
    return clip


def float64_train(folder: Path, out: Path, *more: str) -> proreg.PromptedClassifier:
    args = settings(folder, "--out-dir", str(out), *more)
    return proreg.train(args, float64_clip(), data.load_from_args(args), runs.open_run(args, "proreg"))


class Interrupted(Exception):
    pass


def interrupted(folder: Path, out: Path, epochs: int, *more: str) -> None:
    """The same, but stopped after so many epochs."""

    def end_epoch(args, clip, task, out, epoch, *rest, ended=proreg.end_epoch):
        ended(args, clip, task, out, epoch, *rest)
        if epoch + 1 == epochs:
            raise Interrupted

    with mock.patch("proreg.end_epoch", end_epoch), contextlib.suppress(Interrupted):
        float64_train(folder, out, *more)


def main() -> None:
    folder, runs_folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    for i, more in enumerate(cases):
        out = runs_folder / str(i)
        if i + 1 == len(cases):
            interrupted(folder, out, 1, *more)
        learner = float64_train(folder, out, "--resume", *more)
        torch.save(learner.state_dict(), out / f"{common.rank()}.pt")


if __name__ == "__main__":
    runs.run(main)
