"""The dull parts of a run: flags and defaults, the run folder, checkpoints, results and the table. No method in here.

A run folder holds config.json, metrics.jsonl (a line an epoch), checkpoint.pt, predictions.npz and result.json. Each is
written under a temporary name and renamed, so a killed run leaves the old file or the new one, never half of one.
"""

import argparse
import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import common
import data
import vision
from common import Clip, evaluate, harmonic_mean, log
from data import UserError
from files import check_settings, load_checkpoint, read_config, read_result, restore, restore_optimizer, write_atomic
from layouts import read_text

# ----------------------------------------------------------------------------------------------------------------------
# 1. Flags and settings: a typed flag wins, then a paper's exception (--paper), then the file's DEFAULTS, then COMMON
# ----------------------------------------------------------------------------------------------------------------------
COMMON = {"data_root": "data", "shots": 16, "seed": 1, "classes": "all", "test_on": [], "test_part": "test",
          "label_noise": 0.0, "download": False, "domains": False, "paper": False, "max_steps": 0, "device": "auto",
          "precision": "auto", "cache_dir": "cache", "resume": False, "eval_only": False,
          "checkpoint_seconds": 30.0, "eval_every": 0}  # fmt: skip
# Flags that do not change a result: a resumed run may be given other values.
FREE = {"data_root", "download", "device", "workers", "cache_dir", "out_dir", "resume", "checkpoint", "eval_only",
        "checkpoint_seconds"}  # fmt: skip


def number(kind: type, low: float, high: float, expected: str):
    """An argparse type: a number within [low, high]; argparse reports others as "invalid EXPECTED value"."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    parse.__name__ = expected
    return parse


positive_int, count = number(int, 1, 10**9, "positive integer"), number(int, 0, 10**9, "whole number")
positive_float, non_negative = (
    number(float, 1e-12, 1e12, "positive number"),
    number(float, 0, 1e12, "non-negative number"),
)
fraction = number(float, 0, 1, "number from 0 to 1")
below_one = number(float, 0, 1 - 1e-7, "number from 0 to below 1")
few, exponent = number(int, 0, 1_000, "whole number up to 1,000"), number(float, -100, 100, "number from -100 to 100")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered by one line and not by the whole usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the flags every script has. All default to None, so that settle() can tell what was typed."""
    parser = OneLineParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    data.add_data_flags(parser)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="toyclip, or an open_clip name: RN50, ViT-B-16, ...")
    add("--pretrained", help="an open_clip tag (openai, laion2b_s34b_b88k, ...) or a local weights file")
    add = parser.add_argument_group("optimisation").add_argument
    add("--paper", action="store_true", default=None, help="apply the paper's per-dataset exceptions")
    add("--epochs", type=positive_int, help="passes over the training images")
    add("--batch-size", type=positive_int, help="images a step")
    add("--lr", type=positive_float, help="peak learning rate")
    add("--augment", choices=["crop", "none", "randaugment"], help="crop: CoOp's; none: the test transform")
    add("--views", type=count, help="0: a fresh augmented view every epoch; V: V cached views, used in turn")
    add("--max-steps", type=count, help="stop after so many steps, to try things out (0: no limit)")
    add = parser.add_argument_group("run").add_argument
    add("--device", help="auto, cpu, cuda, cuda:1, mps (untested)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="of the frozen towers; what is learned is fp32")
    add("--memory-gb", type=positive_float, help="bound on the text pass [4 on the CPU, half of a GPU's total]")
    add("--workers", type=few, help="processes that decode images [0 for toy data, else up to 8]")
    add("--cache-dir", help="folder of cached image features, or none")
    add("--out-dir", help="run folder [runs/METHOD-DATASET-SHOTSshot-seedN]")
    add("--resume", action="store_true", default=None, help="go on with the unfinished run in --out-dir")
    add("--checkpoint", help="with --eval-only: a run folder or its checkpoint.pt")
    add("--checkpoint-seconds", type=non_negative, help="at most one checkpoint in so many seconds; 0: every epoch")
    add("--eval-only", action="store_true", default=None, help="evaluate --checkpoint instead of training")
    add("--eval-every", type=count, help="accuracy on the validation part every so many epochs; it selects nothing")
    add("--compare", action=argparse.BooleanOptionalAction, help="also train the plain baseline from the same start")
    return parser


def in_words(value) -> str:
    """A default as --help shows it; of {shots: value} all values."""
    if isinstance(value, dict):
        return ", ".join(f"{v} from {k} shots on" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None or value is False else str(value)


def with_defaults(parser: argparse.ArgumentParser, defaults: dict) -> argparse.ArgumentParser:
    """Add to each flag's help the value it takes when it is left out."""
    for action in parser._actions:
        toy, paper = (in_words((COMMON | defaults[kind]).get(action.dest)) for kind in ("toy", "paper"))
        shown = toy if toy == paper or action.dest == "dataset" else f"toy: {toy or 'no'}, else: {paper or 'no'}"
        action.help = re.sub(r" \(default: .*\)$", "", action.help) + f" [{shown}]" if shown else action.help
    return parser


def settle(parser: argparse.ArgumentParser, argv, method: str, defaults: dict, paper=None) -> argparse.Namespace:
    """Parse the flags and fill in the rest, so that every flag has a value; args.sources says where each came from.

    `defaults`: {"toy": ..., "paper": ..., "fixed": flags a checkpoint cannot be read without}; of a value {shots: v}
    the entry of the largest number of shots not above ours is meant. `paper(settings)` gives --paper's exceptions.
    """
    typed = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    if typed.get("resume") and typed.get("eval_only"):
        raise UserError("--resume goes on with training, --eval-only does not train: leave one of them out")
    if typed.get("resume") and "out_dir" not in typed:
        raise UserError("--resume needs --out-dir: the folder of the run to go on with")
    refuse_overwriting(typed)
    if bool(typed.get("eval_only")) != ("checkpoint" in typed):
        raise UserError("--eval-only and --checkpoint RUN go together (to go on with training: --resume --out-dir RUN)")
    settings = dict.fromkeys(vars(parser.parse_args([])))
    stored, origin, fixed = {}, "", set()
    if typed.get("eval_only"):
        stored, origin = load_checkpoint(typed["checkpoint"], method)["settings"], "the checkpoint"
        fixed = {"model", "pretrained", *defaults["fixed"]}
    elif typed.get("resume"):
        stored, origin, fixed = read_config(Path(typed["out_dir"]), method), "the resumed run", set(settings) - FREE
    stored = check_settings(parser, stored, typed.get("checkpoint", typed.get("out_dir")))
    for key in fixed & set(typed) & set(stored):
        if typed[key] != stored[key]:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {typed[key]}: {origin} has {stored[key]}; leave {flag} out")
    stored = {k: v for k, v in stored.items() if v is not None and (k not in FREE or k == "data_root")}
    dataset = (stored | typed).get("dataset", defaults["toy"]["dataset"])
    kind = "toy" if dataset.startswith("toy_") else "paper"
    layers = [(COMMON, "default"), (defaults[kind], f"{kind} default"), (stored, origin), (typed, "typed")]
    sources = {key: source for layer, source in layers for key in layer}
    settings |= COMMON | defaults[kind] | stored | typed | {"dataset": dataset}
    if settings["model"] == "toyclip" and "pretrained" not in stored | typed:  # toyclip on your own images
        settings["pretrained"] = None
    shots = math.inf if settings["shots"] == "all" else settings["shots"]
    for key, value in settings.items():
        if isinstance(value, dict):
            settings[key] = value[max(k for k in value if k <= shots)]
    if settings["paper"] and paper:
        exceptions = {key: value for key, value in paper(settings).items() if key not in stored | typed}
        settings |= exceptions
        sources |= dict.fromkeys(exceptions, "the paper's exception")
    settings["workers"] = typed.get("workers", 0 if kind == "toy" else min(8, os.cpu_count() or 1))
    args = argparse.Namespace(**settings, sources=sources)
    args.device = common.start_processes(args.device)
    args.precision, sources["precision"] = choose_precision(args.precision, args.device, sources["precision"])
    if args.memory_gb is None:  # WHY the total and not what is free: block sizes change the last bits of a result
        cuda = torch.device(args.device).type == "cuda"
        args.memory_gb = torch.cuda.get_device_properties(args.device).total_memory / 2e9 if cuda else 4.0
    return args


def choose_precision(precision: str, device: str, origin: str) -> tuple[str, str]:
    """(precision, why) of a --precision; where nothing was chosen for the user, why is its origin."""
    kind = torch.device(device).type
    if kind == "cpu" and precision == "fp16":
        raise UserError("--precision fp16 is for GPUs: use fp32 or bf16 on the CPU")
    if precision != "auto" or kind != "cuda":
        return (precision, origin) if precision != "auto" else ("fp32", f"auto on {kind}")
    return ("bf16", "auto: the GPU has it") if torch.cuda.is_bf16_supported(False) else ("fp16", "auto: no bf16 here")


# ----------------------------------------------------------------------------------------------------------------------
# 2. What comes before training, and the run folder
# ----------------------------------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace) -> tuple[data.Task, Clip]:
    """Load data and CLIP, and print what a reader needs to trust or repeat the numbers."""
    common.SECONDS.clear()
    start = time.time()
    task, clip = data.load_from_args(args), common.load_clip(args.model, args.pretrained, args.device)
    common.SECONDS["load"] += time.time() - start
    clip.precision, clip.memory_gb = args.precision, args.memory_gb
    if clip.name == "toyclip":  # so small that a second thread costs time; and one gives the same bits on any machine
        torch.set_num_threads(1)
    for origin in dict.fromkeys(args.sources.values()):
        keys = [key for key, source in args.sources.items() if source == origin and key != "sources"]
        log(f"{origin}: " + ", ".join(f"{key.replace('_', '-')} {getattr(args, key)}" for key in keys))
    log(f"model: {clip.name}, {clip.pretrained}, {clip.activation}, scale {clip.scale:.2f}, on {clip.device}")
    names = f"{len(task.classnames)} classes, {len(task.train)} training images"
    log(f"data: {task.name}, {names}, split {task.split[:12]}, template {task.template!r}")
    for note in task.notes:
        log(f"note: {note}")
    args.trained_on = {"classnames": task.classnames, "template": task.template}  # for tools/use.py
    return task, clip


def open_run(args: argparse.Namespace, method: str) -> Path:
    """Make or find the run folder, write config.json; on every process the same folder."""
    return Path(common.broadcast(make_folder(args, method) if common.rank() == 0 else None))


def make_folder(args: argparse.Namespace, method: str) -> str:
    if args.out_dir is None:
        name = f"folder_{Path(args.dataset[7:]).resolve().name}" if args.dataset.startswith("folder:") else args.dataset
        stem, k = f"{method}-{name}-{args.shots}shot-seed{args.seed}", 1
        while args.out_dir is None:
            out = Path("runs", stem if k == 1 else f"{stem}-{k}")
            try:
                out.mkdir(parents=True)
                args.out_dir = str(out)
            except FileExistsError:
                k += 1
    out = Path(args.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "predictions.npz", "result.json"):
        for left in out.glob(f".{name}.[0-9]*"):  # by a run that was killed while it wrote
            left.unlink()
    if not (out / "config.json").exists():
        write_json(out / "config.json", {"method": method, "settings": settings_of(args)})
    return args.out_dir


def refuse_overwriting(typed: dict) -> None:
    out = Path(typed.get("out_dir", ""))
    if "out_dir" in typed and not typed.get("resume") and (out / "config.json").exists():
        state = "a finished" if (out / "result.json").exists() else "an unfinished"
        raise UserError(f"{out} holds {state} run: choose another --out-dir, or go on with it by --resume")


def open_baseline(args: argparse.Namespace, out: Path, method: str, **plain) -> argparse.Namespace | None:
    """Open OUT/baseline → its settings: `args` but for `plain`. None: the evaluated checkpoint has no baseline."""
    changed = {"out_dir": str(out / "baseline"), "resume": True, "compare": False, **plain}
    if args.eval_only:
        changed["checkpoint"] = str(Path(args.checkpoint, "baseline"))
        if not Path(changed["checkpoint"], "checkpoint.pt").exists():
            return None
    args = argparse.Namespace(**vars(args) | changed)
    open_run(args, method)
    return args


def settings_of(args: argparse.Namespace) -> dict:
    return {key: value for key, value in vars(args).items() if key not in ("sources", "trained_on")}


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=1).encode())


def finished(out: str | Path | None) -> dict | None:
    """result.json of a finished run folder, or None."""
    path = Path(out or "", "result.json")
    return read_result(path) if out and path.exists() else None


def save_checkpoint(out: Path, method: str, args, tensors: dict, epoch: int, optimizer=None) -> None:
    """checkpoint.pt: learned tensors, settings and, while training goes on, the optimiser's state. No class count in a
    tensor: names and template are a note, so that prediction works without the dataset."""
    state = {"method": method, "settings": settings_of(args), "epoch": epoch}
    state["trained_on"] = getattr(args, "trained_on", None)
    state["tensors"] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    torch.save(state, buffer := io.BytesIO())
    write_atomic(out / "checkpoint.pt", buffer.getvalue())


def resume(out: Path, method: str, module: torch.nn.Module, optimizer) -> int:
    """Put the folder's checkpoint, if there is one, into module and optimiser → the epoch to go on with."""
    if not (out / "checkpoint.pt").exists():
        return 0
    state = load_checkpoint(out, method)
    restore(module, state["tensors"], out)
    if "optimizer" in state:
        restore_optimizer(optimizer, state["optimizer"], out)
    log(f"{out}: going on after epoch {state['epoch']}")
    return state["epoch"]


def end_epoch(args, out: Path, method: str, epoch: int, module: torch.nn.Module, optimizer, line: dict) -> None:
    """Write the epoch to metrics.jsonl, and a checkpoint if it is the last or --checkpoint-seconds have passed."""
    path = out / "metrics.jsonl"
    old = read_text(str(path)).splitlines() if path.exists() else []
    lines = [*old[:epoch], json.dumps({"epoch": epoch, **line})]  # an interrupted run's later lines go
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    last = out / "checkpoint.pt" if (out / "checkpoint.pt").exists() else out / "config.json"
    if epoch + 1 == args.epochs or time.time() - last.stat().st_mtime >= args.checkpoint_seconds:
        save_checkpoint(out, method, args, module.state_dict(), epoch + 1, optimizer)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Results
# ----------------------------------------------------------------------------------------------------------------------
def write_result(out: Path, method: str, args, task: data.Task, clip: Clip, rows: list[dict], seconds: dict) -> dict:
    """predictions.npz, then result.json → the result. A row: what encode_tests gave and tuned logits [N, C], baseline
    (an M = {accuracy, nll, ece} or None), extra (a dict of Ms and numbers), arrays (per-image arrays to store)."""
    tests, arrays = [], {}
    for i, row in enumerate(rows):
        test, m = row["test"], {key: evaluate(row[key], row["labels"]) for key in ("zero_shot", "tuned")}
        entry = {"dataset": test.name, "classes": test.classes, "domain": test.domain, "n": len(row["labels"])}
        extra = {"baseline": row.get("baseline"), "extra": row.get("extra", {})}
        tests.append(entry | {"template": test.template} | m | extra)
        stored = (
            {key: row[key].float().softmax(dim=-1) for key in m} | row.get("arrays", {}) | {"labels": row["labels"]}
        )
        arrays |= {f"{i}/{key}": value.cpu().numpy() for key, value in stored.items()}
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    write_atomic(out / "predictions.npz", buffer.getvalue())
    result = {"schema": 1, "method": method} | {k: getattr(args, k) for k in ("dataset", "shots", "seed", "classes")}
    result |= {"model": clip.name, "pretrained": clip.pretrained, "split": task.split}
    chosen = "best epoch on the validation part" if getattr(args, "select", "last") == "val" else "last step"
    result["protocol"] = {"template": task.template, "transform": args.augment, "n_train": len(task.train),
                          "checkpoint": chosen, "tests": args.test_part, "precision": clip.precision,
                          "activation": clip.activation}  # fmt: skip
    result |= {"tests": tests, "harmonic_mean": harmonic_means(tests)}
    seconds = {"load": common.SECONDS["load"], "encode": common.SECONDS["encode"]} | seconds
    result |= {"seconds": {k: round(v, 2) for k, v in seconds.items()}, "peak_memory_mb": peak_memory_mb(args.device)}
    result |= {"settings": settings_of(args), "versions": common.versions(), "commit": commit(), "warnings": task.notes}
    write_json(out / "result.json", result)
    return result


def harmonic_means(tests: list[dict]) -> dict | None:
    """H of base and new accuracy, or of in-distribution accuracy and the mean of the other domains; None if neither."""
    first = tests[0]
    others, of = [t for t in tests[1:] if t["domain"] is not None], "ID/mean OOD"
    if first["classes"] == "base":
        others, of = [t for t in tests if t["classes"] == "new" and t["dataset"] == first["dataset"]][:1], "base/new"
    if not others:
        return None
    means = {"of": of}
    for key in ("zero_shot", "tuned", "baseline"):
        rest = [t[key]["accuracy"] for t in others if t[key]]
        means[key] = harmonic_mean(first[key]["accuracy"], sum(rest) / len(rest)) if first[key] else None
    return means


def report(result: dict, out: Path, baseline: str, method: str) -> None:
    """Print the run's one table: accuracy, NLL and ECE of zero-shot, baseline and method on every test set, and H."""
    names = {"zero_shot": "zero-shot", "baseline": baseline, "tuned": method}
    keys = [key for key in names if result["tests"][0][key]]
    rows = [["", "images", "", *(names[key] for key in keys)]]
    for test in result["tests"]:
        parts = [test["dataset"]] if test["dataset"] != result["dataset"] else []
        parts += [test["domain"]] if test["domain"] else []
        parts += [test["classes"]] if test["classes"] != "all" or not parts else []
        head = [", ".join(parts), str(test["n"])]
        for metric, text, digits in (("accuracy", "accuracy %", 1), ("nll", "NLL nats", 3), ("ece", "ECE %", 1)):
            rows.append([*head, text, *(f"{test[key][metric]:.{digits}f}" for key in keys)])
            head = ["", ""]
    if h := result["harmonic_mean"]:
        if h["of"] == "ID/mean OOD":
            others = [test for test in result["tests"][1:] if test["domain"] is not None]
            means = [sum(test[key]["accuracy"] for test in others if test[key]) / len(others) for key in keys]
            rows.append(["mean OOD", "", "accuracy %", *(f"{mean:.1f}" for mean in means)])
        rows.append(["H", "", f"of {h['of']}", *(f"{h[key]:.1f}" for key in keys)])
    print_aligned(rows)
    if result["dataset"].startswith("toy_") and result["dataset"] != data.world.BIASED:
        log("This task was chosen by zero-shot accuracy alone, before any method was run: toyclip/README.md has all.")
    log(f"written to {out}")


def print_aligned(rows: list[list[str]]) -> None:
    """A small table: first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        log("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def peak_memory_mb(device: str) -> float | None:
    """Peak memory of this process, in MiB: allocated on a GPU, resident elsewhere; None if the system cannot tell."""
    if torch.device(device).type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


def commit() -> str:
    """The repository's commit, with + if files differ from it; empty without git."""
    call = ["git", "-C", str(common.HERE), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def zero_shot_table(argv: list[str] | None = None) -> dict:
    """`python common.py`: accuracy, NLL and ECE of zero-shot CLIP on all, base and new classes of a dataset."""
    defaults = {"toy": {"dataset": "toy_fillshapes_sketch", "model": "toyclip"}, "fixed": set()}
    defaults["paper"] = {"model": "RN50", "pretrained": "openai"}
    args = settle(with_defaults(new_parser(common.__doc__), defaults), argv, "zero_shot", defaults)
    args.shots = "all"
    task, clip = prepare(args)
    rows, result = [["", "images", "accuracy %", "NLL nats", "ECE %"]], {}
    for classes in ("all", "base"):
        args.classes, wanted = classes, {"all"} if classes == "all" else {"base", "new"}
        for row in vision.encode_tests(args, clip, data.load_from_args(args)):
            if row["test"].classes in wanted:
                m, name = evaluate(row["zero_shot"], row["labels"]), row["test"].domain or row["test"].name
                result[name := f"{name} {row['test'].classes}"] = m
                cells = [f"{m['accuracy']:.1f}", f"{m['nll']:.3f}", f"{m['ece']:.1f}"]
                rows.append([name, str(len(row["labels"])), *cells])
    print_aligned(rows)
    return result


def run(main) -> None:
    """Run a script's main. No traceback is shown: one line on stderr and the status 2 (yours to mend), 1 or 130."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # class names may hold what the terminal cannot show
    try:
        main()
        return
    except KeyboardInterrupt:
        status, text = 130, "interrupted; the same command with --resume --out-dir and the run's folder goes on"
    except UserError as error:  # from a process that decodes images it comes with a traceback above its last line
        status, text = 2, str(error).split("UserError: ")[-1].strip()
    except FloatingPointError as error:
        status, text = 1, str(error)
    except (MemoryError, RuntimeError) as error:
        status, text = 1, "out of memory: try a smaller --memory-gb or --batch-size"
        if "gloo" in str(error):
            text = "stopped because another process did: see its own message"
        elif not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
    except OSError as error:
        status, text = 2, f"{error.strerror or error}: {error.filename or 'stdout'}"
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            status, text = 1, f"{text}; the last checkpoint is kept: make room, then add --resume --out-dir RUN"
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it, or it goes to the full disk: drop the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print("error:", re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text), file=sys.stderr)
    raise SystemExit(status)
