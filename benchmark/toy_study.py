"""Do the papers' claims hold on the toy world? Every run, its tables and pictures.

    python benchmark/toy_study.py run --jobs 2     # goes on where it was; results/toy/runs.jsonl
    python benchmark/toy_study.py tables           # results/toy/tables.md and four pictures

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
    "VPT, six tasks": ("base_new", "base classes, accuracy in %", "new classes, accuracy in %"),
    "ProReg 3e-4, toy_shapes_biased": (
        "all_ood", "in distribution, accuracy in %", "other scenes and styles, accuracy in %"),
}  # fmt: skip


# 1. RUNS ------------------------------------------------------------------------------------------
def read_plan() -> list[dict]:
    """The lines of toy_study.csv: a kind of run each, that every task and seed has."""
    with open(Path(__file__).with_suffix(".csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def study() -> list[tuple[str, dict, list[str]]]:
    """(script, what the run is, its flags) of every run."""
    runs = []
    for line in read_plan():
        shared = ["--no-compare", *shlex.split(line["flags"])]
        for task, seed in itertools.product(TASKS[line["tasks"]], SEEDS):
            what = {"part": line["part"], "method": line["method"], "task": task, "seed": seed}
            flags = ["--dataset", task, "--seed", str(seed), *shared]
            if line["shots"]:
                what["shots"] = int(line["shots"])
                flags += ["--shots", line["shots"]]
            runs.append((line["script"], what, flags))
    return runs


def key(what: dict) -> str:
    return json.dumps(what, sort_keys=True)


def perform(job: tuple[str, dict, list[str]]) -> dict:
    """One run in a folder that is thrown away → what is kept of it."""
    script, what, flags = job
    flags = [*flags, "--workers", "0"]  # a pool's processes may not start others
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        cache = str(Path(tempfile.gettempdir(), "toy-study-cache"))
        with contextlib.redirect_stdout(io.StringIO()):
            result = table.SCRIPTS[script].main(
                [*flags, "--out-dir", str(out), "--cache-dir", cache]
            )
        lines = common.read_metrics(out)
    kept = {"H": result["harmonic_mean"], "seconds": result["seconds"]}
    points = [(e + 1, line) for e, line in enumerate(lines) if "val_accuracy" in line]
    names = ("val_accuracy", "cosine", "conflict")
    kept["curve"] = [[e, *(round(line[name], 4) for name in names)] for e, line in points]
    kept["tests"] = {
        test["domain"] or test["classes"]: {
            kind: [round(m[name], 4) for name in ("accuracy", "nll", "ece")]
            for kind, m in common.measures(test).items()
        }
        for test in result["tests"]
    }
    return {"what": what, **kept}


def read_runs() -> dict[str, dict]:
    path = RESULTS / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(row["what"]): row for row in map(json.loads, lines)}


def run_study(jobs: int) -> None:
    """Every run that is not done yet; each is kept as soon as it is finished."""
    done = read_runs()
    todo = [job for job in study() if key(job[1]) not in done]
    print(f"{len(done)} of {len(done) + len(todo)} runs are done", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with get_context("spawn").Pool(max(1, jobs)) as pool:
        for row in pool.imap_unordered(perform, todo):
            with open(RESULTS / "runs.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


# 2. TABLES ----------------------------------------------------------------------------------------
def value(row: dict, column: str, kind: str) -> float:
    """What the column names of a run: accuracy (%), "base NLL" (0.01 nats), "new ECE" (%); "H" of
    accuracies; "OOD", their mean over the other domains."""
    test, _, what = column.partition(" ")
    if test == "H":
        return row["H"][kind]
    index, factor = {"NLL": (1, 100), "ECE": (2, 1)}.get(what, (0, 1))
    others = [name for name in row["tests"] if name not in ("all", "base", "new")]
    found = [row["tests"][name][kind][index] for name in (others if test == "OOD" else [test])]
    return factor * statistics.mean(found)


def by_seed(rows: list[dict], column: str, method: str, kind: str = "tuned") -> dict[int, float]:
    """{seed: mean over tasks}; "H of means", of accuracies averaged before: {0: H}."""
    rows = [row for row in rows if row["what"]["method"] == method]
    if column == "H of means":
        sides = ("base", "new") if "base" in rows[0]["tests"] else ("all", "OOD")
        found = [statistics.mean(value(row, side, kind) for row in rows) for side in sides]
        return {0: common.harmonic_mean(*found)}
    seeds = data.group(rows, lambda row: row["what"]["seed"])
    return {seed: statistics.mean(value(row, column, kind) for row in seeds[seed])
            for seed in sorted(seeds)}  # fmt: skip


def lines_of(rows: list[dict], methods: list[str], columns: list[str]) -> list[list[str]]:
    """A table of these rows: zero-shot, each method and what it has as "extra", and the paired
    differences to the first method and to a method that does without projection or weights."""
    rivals = [methods[0], *(method for method in ("CE + KL", "KD") if method in methods)]
    out = [["", *columns]]
    for method, kind in kinds_of(rows, methods):
        found = [by_seed(rows, column, method, kind) for column in columns]
        if kind == "zero_shot":
            means = [f"{statistics.mean(values.values()):.1f}" for values in found]
            out.append(["zero-shot", *means])
            continue
        cells = [table.spread([*values.values()]) for values in found]
        out.append([f"{title(method, kind)} ({len(found[0])} seeds)", *cells])
        for rival in rivals[:1] if method in rivals else rivals:
            rest = [by_seed(rows, column, rival) for column in columns]
            pairs = [[a[seed] - b[seed] for seed in a] for a, b in zip(found, rest)]
            if (method, kind) != (rivals[0], "tuned"):
                out.append([f"… minus {rival}", *map(table.difference, pairs)])
    return out


def kinds_of(rows: list[dict], methods: list[str]) -> list[tuple[str, str]]:
    """(method, what was measured of it): the tuned ones, then extras of the first two methods."""
    found = [(methods[0], "zero_shot"), *((method, "tuned") for method in methods)]
    for method in methods[:2]:
        row = next(row for row in rows if row["what"]["method"] == method)
        measured = next(iter(row["tests"].values()))
        found += [(method, kind) for kind in measured if kind not in ("zero_shot", "tuned")]
    return found


def title(method: str, kind: str) -> str:
    return {"tuned": method, "zero_shot": "zero-shot"}.get(
        kind, f"{method}, {kind.replace('_', ' ')}"
    )


def curves_of(runs: dict, methods: list[str]) -> tuple[list, dict]:
    """A table of what a run's epochs show, means over tasks and seeds; and accuracy to be drawn."""
    lines, drawn = [], {}
    for method in methods:
        rows = [row for row in runs.values() if ("curves", method) == (
            row["what"]["part"], row["what"]["method"])]  # fmt: skip
        points = [list(zip(*epoch)) for epoch in zip(*(row["curve"] for row in rows))]
        epochs = [point[0][0] for point in points]
        for k, what in enumerate(("accuracy on validation images, %", "cosine", "conflicts"), 1):
            values = [statistics.mean(point[k]) for point in points]
            lines.append([f"{method}: {what}", *[f"{v:.{1 if k == 1 else 2}f}" for v in values]])
            if k == 1:
                drawn[method] = [(*point, 0, 0) for point in zip(epochs, values)]
    return [["epoch", *map(str, epochs)], *lines], drawn


def tables_of(runs: dict) -> list[tuple]:
    """(title, rows, methods, columns) of every table: of a part of the study, or of its tasks."""
    both = ["base", "new", "H", "H of means", "base NLL", "new NLL", "base ECE", "new ECE"]
    found = []
    parts = data.group(read_plan(), lambda line: (line["part"], line["shots"], line["tasks"]))
    for (part, shots, tasks), lines in parts.items():
        rows = [row for row in runs.values() if row["what"]["part"] == part
                and str(row["what"].get("shots", "")) == shots]  # fmt: skip
        methods = [line["method"] for line in lines]
        name = f"{part}, {shots} shots" if shots else part
        if tasks == "shortcut":
            for task, own in data.group(rows, lambda row: row["what"]["task"]).items():
                found.append((f"{name}, {task}", own, methods, ["all", "OOD", "H", "H of means"]))
        elif part != "curves":
            columns = ["all", "all NLL", "all ECE"] if part == "all classes" else both
            found.append((f"{name}, six tasks", rows, methods, columns))
    return found


def write_tables() -> None:
    runs = read_runs()
    missing = sum(key(what) not in runs for _, what, _ in study())
    data.require(not missing, f"{missing} runs are not done yet: go on with toy_study.py run")
    parts = ["# The toy study: accuracy in %, NLL in 0.01 nats, ECE in %", WHAT_IS_SHOWN]
    shots, planes = defaultdict(list), {}
    for name, rows, methods, columns in tables_of(runs):
        parts += [f"\n## {name}", table.markdown(lines_of(rows, methods, columns))]
        kinds = kinds_of(rows, methods)
        if name.startswith("base to new"):
            for which in kinds[:4]:  # zero-shot, CoOp, ProGrad, CE + KL
                point = (rows[0]["what"]["shots"], *mean_and_error(rows, "H", *which), 0)
                shots[title(*which)].append(point)
        if name in PLANES:
            planes[name] = defaultdict(list)
            for which in kinds:
                x, y = (mean_and_error(rows, column, *which) for column in columns[:2])
                line = re.sub(r"^.*, (.*) 0\.[357]$", r"\1 with zero-shot", title(*which))
                planes[name][line].append((x[0], *y, x[1]))
    lines, curves = curves_of(runs, ["CoOp", "ProGrad", "CE + KL"])
    parts += ["\n## Learning curves, base classes, 4 shots", table.markdown(lines)]
    data.write(RESULTS / "tables.md", ("\n".join(parts) + "\n").encode())
    print("\n".join(parts))
    bars = "(bars: ± standard error over 5 seeds)"
    table.draw({"": shots}, RESULTS / "shots.svg", table.SHOTS,
               "H of base and new accuracy, %", bars, shots=True)  # fmt: skip
    table.draw({"": curves}, RESULTS / "curves.svg", "epoch",
               "accuracy on validation images of base classes, %",
               "(mean of six tasks and 5 seeds)")  # fmt: skip
    for name, (file, x_title, y_title) in PLANES.items():
        table.draw({"": planes[name]}, RESULTS / f"{file}.svg", x_title, y_title, bars)


def mean_and_error(rows: list[dict], column: str, *which: str) -> tuple[float, float]:
    values = list(by_seed(rows, column, *which).values())
    return statistics.mean(values), table.standard_error(values)


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["run", "tables"])
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    args = parser.parse_args(argv)
    if args.action == "run":
        run_study(args.jobs)
    write_tables()


if __name__ == "__main__":
    data.run(main)
