"""Do the papers' claims hold on the toy world? Every run, its tables and pictures.

    python benchmark/toy_study.py run --jobs 2     # goes on where it was; results/toy/runs.jsonl
    python benchmark/toy_study.py tables           # results/toy/tables.md and three pictures

toy_study.csv has a kind of run a line. What no flag says is the scripts' default, which follows the
papers' regime. Test sets are read once. Paired: the same seed, images and batches.
"""

import contextlib
import csv
import io
import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds common.py
import table

import common
import data

RESULTS = Path(__file__).resolve().parent / "results" / "toy"
TASKS = {"shortcut": list(data.world.SHORTCUT)}
TASKS["prompt"] = [name for name in data.world.TASKS if name not in data.world.SHORTCUT]
SEEDS = (1, 2, 3, 4, 5)
WHAT_IS_SHOWN = """Mean ± standard deviation over seeds, of each seed's mean over tasks; differences
are paired, ± standard error (pictures: standard errors). "H" is the mean of each run's H, "H of
means" the papers': of accuracies averaged over tasks and seeds. An ensemble averages logits."""
PLANES = {  # tables whose first two columns are drawn: file, axes
    "VPT, six tasks": ("base_new", "new classes, accuracy in %", "base classes, accuracy in %"),
    "ProReg 3e-4, toy_shapes_biased": (
        "all_ood", "other scenes and styles, accuracy in %", "in distribution, accuracy in %"),
}  # fmt: skip


# 1. RUNS ------------------------------------------------------------------------------------------
def study() -> list[tuple[str, dict, list[str]]]:
    """(script, what the run is, its flags), for each line of toy_study.csv, task and seed."""
    runs = []
    plan = data.read_text(Path(__file__).with_suffix(".csv"))
    for line in csv.DictReader(plan.splitlines()):
        for task, seed in itertools.product(TASKS[line["tasks"]], SEEDS):
            what = {"part": line["part"], "method": line["method"], "task": task, "seed": seed}
            flags = ["--dataset", task, "--seed", str(seed), "--no-compare"]
            flags += shlex.split(line["flags"])
            if line["shots"]:
                what["shots"] = int(line["shots"])
                flags += ["--shots", line["shots"]]
            runs.append((line["script"], what, flags))
    return runs


def perform(job: tuple[str, dict, list[str]]) -> dict:
    """One run in a folder that is thrown away → what is kept of it."""
    script, what, flags = job
    flags = [*flags, "--workers", "0"]  # a pool's processes may not start others
    flags += ["--cache-dir", f"{tempfile.gettempdir()}/toy-study-cache"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = table.SCRIPTS[script].main([*flags, "--out-dir", f"{folder}/run"])
        lines = common.read_metrics(Path(folder, "run"))
    kept = {"what": what, "H": result["harmonic_mean"], "seconds": result["seconds"]}
    kept |= {"curve": [], "tests": {}}
    for line in lines:
        if "val_accuracy" in line:
            numbers = [line["val_accuracy"], line["cosine"], line["conflict"]]
            kept["curve"].append([line["epoch"] + 1, *numbers])
    for test in result["tests"]:
        kept["tests"][test["domain"] or test["classes"]] = {
            kind: [found["accuracy"], found["nll"], found["ece"]]
            for kind, found in common.measures(test).items()
        }
    return kept


def read_runs() -> dict[str, dict]:
    path = RESULTS / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {table.as_text(row["what"]): row for row in map(json.loads, lines)}


# 2. TABLES ----------------------------------------------------------------------------------------
def value(row: dict, kind: str, column: str) -> float:
    """A figure of a run: accuracy of a test set in %, "base NLL" in 0.01 nats, "new ECE" in %;
    "OOD" is the mean over the other domains."""
    if column == "H":
        return row["H"][kind]
    test, _, what = column.partition(" ")
    index, factor = {"": (0, 1), "NLL": (1, 100), "ECE": (2, 1)}[what]
    others = [name for name in row["tests"] if name not in ("all", "base", "new")]
    names = others if test == "OOD" else [test]
    return factor * statistics.mean(row["tests"][name][kind][index] for name in names)


def by_seed(rows: list[dict], kind: str, column: str) -> list[float]:
    """Means over tasks, one a seed; of "H of means" one, of accuracies that are averaged before."""
    if column == "H of means":
        sides = ("base", "new") if "base" in rows[0]["tests"] else ("all", "OOD")
        means = [statistics.mean(value(row, kind, side) for row in rows) for side in sides]
        return [common.harmonic_mean(*means)]
    seeds = data.group(rows, lambda row: row["what"]["seed"])
    shown = SEEDS if kind != "zero_shot" else SEEDS[:1]  # it has none
    return [statistics.mean(value(row, kind, column) for row in seeds[seed]) for seed in shown]


def titled(rows: list[dict]) -> dict[str, tuple[list[dict], str]]:
    """{title: runs, and what was measured of them}: zero-shot, each method as it was tuned, and
    what the first two have as "extra"."""
    methods = data.group(rows, lambda row: row["what"]["method"])
    found = {"zero-shot": (next(iter(methods.values())), "zero_shot")}
    found |= {method: (runs, "tuned") for method, runs in methods.items()}
    for method in list(methods)[:2]:
        for kind in next(iter(methods[method][0]["tests"].values())):
            if kind not in ("zero_shot", "tuned"):
                found[f"{method}, {kind.replace('_', ' ')}"] = (methods[method], kind)
    return found


def lines_of(rows: list[dict], columns: list[str]) -> list[list[str]]:
    """A table of runs, with paired differences to the first method and to a method that does
    without projection or weights."""
    figures = {title: [by_seed(*which, column) for column in columns]
               for title, which in titled(rows).items()}  # fmt: skip
    _, first, *_ = figures
    rivals = [first, *(method for method in ("CE + KL", "KD") if method in figures)]
    lines = [["", *columns]]
    for title, found in figures.items():
        seeds = f" ({len(SEEDS)} seeds)" if title != "zero-shot" else ""
        lines.append([f"{title}{seeds}", *map(table.spread, found)])
        if title not in ("zero-shot", first):
            for rival in rivals[:1] if title.startswith(tuple(rivals)) else rivals:
                pairs = [np.subtract(*both).tolist() for both in zip(found, figures[rival])]
                cells = [table.spread(pair, paired=True) for pair in pairs]
                lines.append([f"… minus {rival}", *cells])
    return lines


def curves_of(runs: list[dict]) -> list[list[str]]:
    """A table of what a run's epochs show, means over tasks and seeds."""
    lines = []
    shown = {"accuracy on validation images, %": 1, "cosine": 2, "conflicts": 2}
    for method, rows in data.group(runs, lambda row: row["what"]["method"]).items():
        epochs, *means = np.mean([row["curve"] for row in rows], axis=0).T
        for (what, digits), values in zip(shown.items(), means):
            lines.append([f"{method}: {what}", *(f"{x:.{digits}f}" for x in values)])
    return [["epoch", *map("{:.0f}".format, epochs)], *lines]


def table_of(row: dict) -> str:
    """Which table a run stands in: of its part of the study, or of its task there."""
    what = row["what"]
    shots = f"{what['shots']} shots" if "shots" in what else ""
    task = what["task"] if what["task"] in data.world.SHORTCUT else "six tasks"
    return ", ".join(filter(None, [what["part"], shots, task]))


def write_tables() -> None:
    done, wanted = read_runs(), [table.as_text(what) for _, what, _ in study()]
    missing = sum(what not in done for what in wanted)
    data.require(not missing, f"{missing} runs are not done yet: go on with toy_study.py run")
    parts = ["# The toy study: accuracy in %, NLL in 0.01 nats, ECE in %", WHAT_IS_SHOWN]
    shots = defaultdict(list)
    groups = data.group([done[what] for what in wanted], table_of)
    curves = curves_of(groups.pop("curves, 4 shots, six tasks"))
    for name, rows in groups.items():
        columns = ["base", "new", "H", "H of means", "base NLL", "new NLL", "base ECE", "new ECE"]
        if rows[0]["what"]["task"] in data.world.SHORTCUT:
            columns = ["all", "OOD", "H", "H of means"]
        if name.startswith("all classes"):
            columns = ["all", "all NLL", "all ECE"]
        parts += [f"\n## {name}", table.markdown(lines_of(rows, columns))]
        which = titled(rows)
        if name.startswith("base to new"):
            for title in ("zero-shot", "CoOp", "ProGrad", "CE + KL"):
                h = table.mean_and_error(by_seed(*which[title], "H"))
                shots[title].append((rows[0]["what"]["shots"], *h))
        if name in PLANES:
            file, *axes = PLANES[name]
            lines = defaultdict(list)
            for title, runs in which.items():
                x, y = (table.mean_and_error(by_seed(*runs, column)) for column in columns[:2])
                line = re.sub(r"^.*, (.*) 0\.[357]$", r"\1 with zero-shot", title)
                lines[line].append((x[0], *y, x[1]))
            table.draw({"": lines}, RESULTS / f"{file}.svg", *axes)
    parts += ["\n## Learning curves, base classes, 4 shots", table.markdown(curves)]
    data.write(RESULTS / "tables.md", ("\n".join(parts) + "\n").encode())
    print("\n".join(parts))
    table.draw({"": shots}, RESULTS / "shots.svg", "H of base and new accuracy, %")


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["run", "tables"])
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    args = parser.parse_args(argv)
    if args.action == "run":
        done = read_runs()
        todo = [job for job in study() if table.as_text(job[1]) not in done]
        print(f"{len(done)} of {len(done) + len(todo)} runs are done", flush=True)
        with get_context("spawn").Pool(max(1, args.jobs)) as pool:
            for row in pool.imap_unordered(perform, todo):  # kept as soon as it is finished
                with open(RESULTS / "runs.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
    write_tables()


if __name__ == "__main__":
    data.run(main)
