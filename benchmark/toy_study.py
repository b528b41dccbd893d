"""Do the papers' claims hold on the toy world? Every run, its tables, and how far a run moves.

    python benchmark/toy_study.py run --jobs 2     # goes on where it was; results/toy/runs.jsonl
    python benchmark/toy_study.py tables           # results/toy/tables.md and four pictures
    python benchmark/toy_study.py stable           # each default under 1e-6 and other kernels

Settings are the defaults, which follow the papers' regime. Test sets are read once. Paired: the
same seed, images and batches.
"""

import contextlib
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # finds table.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import table

import common
import data
import prograd
import proreg
import vpt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "toy"
SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
PROMPT_TASKS = [name for name in data.world.TASKS if name not in data.world.SHORTCUT]
SEEDS = (1, 2, 3, 4, 5)
KERNELS = {  # as other processors have: another order of rounding
    "other kernels": ("avx2", "AVX2", "AVX2"),
    "older kernels": ("default", "COMPATIBLE", "SSE41"),
}
WHAT_IS_SHOWN = """Mean ± standard deviation over seeds, of each seed's mean over tasks; differences
are paired, ± standard error (pictures: standard errors). "H" is the mean of each run's H, "H of
means" the papers': of accuracies averaged over tasks and seeds. An ensemble averages logits."""
PLANES = {  # tables whose first two columns are drawn: file, axes
    "VPT, six tasks": ("base_new", "base classes, accuracy in %", "new classes, accuracy in %"),
    "ProReg 3e-4, toy_shapes_biased": (
        "all_ood", "in distribution, accuracy in %", "other scenes and styles, accuracy in %"),
}  # fmt: skip
SHOTS = {1: 50, 2: 100, 4: 200, 8: 200, 16: 200}  # and epochs that take the default's steps
MORE_SHOTS = ["--shots", "16", "--epochs", "10"]
MIXTURES = ["--ensemble", "0.3", "0.5", "0.7", "--wise-ft", "0.3", "0.5", "0.7"]


# 1. RUNS ------------------------------------------------------------------------------------------
# fmt: off
def study() -> list[tuple[str, dict, list[str]]]:
    """(script, what the run is, its flags), the most important first."""
    rules = {"ProGrad": [], "CoOp": ["--lam", "0"], "CE + KL": ["--rule", "add"]}
    shares = {f"ProGrad, λ = {lam}": ["--lam", lam] for lam in ("0.5", "0.8")}
    losses = {"ProReg": ["--loss", "proreg"], "KD": ["--loss", "kd"],
              "fine-tuning": ["--loss", "ce", *MIXTURES]}
    vpt = {"VPT": [], "deterministic": ["--samples", "0"]}
    scales = {f"VPT u = {u}": ["--residual-scale", u] for u in ("0.2", "10")}
    shots = {k: {"part": "base to new", "shots": k} for k in SHOTS}
    # Twice as many classes take half of the epochs for as many steps; so does VPT with 16 shots.
    whole = {k: ["--classes", "all", "--epochs", str(epochs)] for k, epochs in SHOTS.items()}
    curves = {"part": "curves", "shots": 4}
    views = {f"{name}, {title} views": [*rules[name], "--views", v]
             for name in ("ProGrad", "CoOp") for v, title in (("0", "fresh"), ("10", "10"))}
    # As released: the head at 100 times a rate of 1e-5. Batches and epochs are the prompts'.
    probe = {"linear probe": ["--train", "head", "--loss", "ce", "--lr", "1e-5",
                              "--head-lr-factor", "100", "--batch-size", "32"]}
    plans = [  # script, tasks, methods, flags of all, what the runs are
        ("prograd", PROMPT_TASKS, rules | shares, [], shots[4]),
        *[("proreg", data.world.SHORTCUT, losses, ["--lr", rate], {"part": f"ProReg {rate}"})
          for rate in ("3e-4", "1e-4")],
        ("vpt", PROMPT_TASKS, vpt | scales, [], {"part": "VPT"}),
        *[("prograd", PROMPT_TASKS, rules, [], shots[k]) for k in (1, 2, 8)],
        ("prograd", PROMPT_TASKS, rules | shares, [], shots[16]),
        ("vpt", PROMPT_TASKS, vpt, ["--posterior", "image"], {"part": "VPT, image posterior"}),
        ("prograd", PROMPT_TASKS, rules, ["--eval-every", "40"], curves),
        ("vpt", PROMPT_TASKS, vpt, MORE_SHOTS, {"part": "VPT, 16 shots"}),
        *[("prograd", PROMPT_TASKS, rules, whole[k], {"part": "all classes", "shots": k})
          for k in SHOTS],
        ("vpt", PROMPT_TASKS, vpt, [*MORE_SHOTS, "--posterior", "image"],
         {"part": "VPT, image posterior, 16 shots"}),
        ("prograd", PROMPT_TASKS, views, ["--augment", "crop"], {"part": "views", "shots": 4}),
        *[("proreg", PROMPT_TASKS, probe, whole[k], {"part": "all classes", "shots": k})
          for k in SHOTS],
    ]
    runs = []
    for script, tasks, methods, flags, what in plans:
        shared = [*flags, "--shots", str(what["shots"])] if "shots" in what else flags
        for task, (method, own), seed in itertools.product(tasks, methods.items(), SEEDS):
            typed = ["--dataset", task, "--seed", str(seed), "--no-compare", *own, *shared]
            runs.append((script, what | {"task": task, "method": method, "seed": seed}, typed))
    return runs
# fmt: on


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
            result = SCRIPTS[script].main([*flags, "--out-dir", str(out), "--cache-dir", cache])
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


def lines_of(rows: list[dict], methods: list, columns: list[str], rivals: list[str]) -> list:
    """A table: zero-shot, each (title, method, kind), and its paired differences to the rivals; a
    rival's to the first of them."""
    zero = [by_seed(rows, column, rivals[0], "zero_shot") for column in columns]
    out = [["", *columns], ["zero-shot", *[f"{statistics.mean(v.values()):.1f}" for v in zero]]]
    for title, method, kind in methods:
        found = [by_seed(rows, column, method, kind) for column in columns]
        cells = [table.spread([*values.values()]) for values in found]
        out.append([f"{title} ({len(found[0])} seeds)", *cells])
        for rival in rivals[:1] if method in rivals else rivals:
            rest = [by_seed(rows, column, rival) for column in columns]
            pairs = [[a[seed] - b[seed] for seed in a] for a, b in zip(found, rest)]
            if (method, kind) != (rivals[0], "tuned"):
                out.append([f"… minus {rival}", *map(table.difference, pairs)])
    return out


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


def sections() -> list[tuple]:
    """(title, (title, method, kind) of each line, columns, rivals, which runs) of every table."""
    rules = ["CoOp", "ProGrad", "CE + KL", "ProGrad, λ = 0.8", "ProGrad, λ = 0.5", "linear probe"]
    prompts = ["deterministic", "VPT", "VPT u = 0.2", "VPT u = 10"]
    losses = ["fine-tuning", "ProReg", "KD"]
    rules, prompts, losses = ([(m, m, "tuned") for m in ms] for ms in (rules, prompts, losses))
    prompts += [("VPT, mean residual", "VPT", "mean_residual")]
    # An ensemble averages logits, WiSE-FT weights; the number is zero-shot's share.
    losses += [(f"{kind} {a} zero-shot", "fine-tuning", f"{kind} {a}")
               for kind in ("ensemble", "wise-ft") for a in (0.3, 0.5, 0.7)]  # fmt: skip
    both = ["base", "new", "H", "H of means", "base NLL", "new NLL", "base ECE", "new ECE"]
    found = []
    for part, columns in (("base to new", both), ("all classes", ["all", "all NLL", "all ECE"])):
        for k in SHOTS:
            what, rivals = {"part": part, "shots": k}, ["CoOp", "CE + KL"]
            found.append((f"ProGrad, {part}, {k} shots, six tasks", rules, columns, rivals, what))
    for part in ("VPT", "VPT, 16 shots", "VPT, image posterior", "VPT, image posterior, 16 shots"):
        found.append((f"{part}, six tasks", prompts, both, ["deterministic"], {"part": part}))
    for task, rate in itertools.product(data.world.SHORTCUT, ("3e-4", "1e-4")):
        what, rivals = {"part": f"ProReg {rate}", "task": task}, ["fine-tuning", "KD"]
        columns = ["all", "OOD", "H", "H of means"]
        found.append((f"ProReg {rate}, {task}", losses, columns, rivals, what))
    for name in ("ProGrad", "CoOp"):
        lines = [(m, m, "tuned") for m in (f"{name}, fresh views", f"{name}, 10 views")]
        title = f"Random crops, fresh in every epoch or 10 in turn, {name}, 4 shots, six tasks"
        found.append((title, lines, both, [lines[0][0]], {"part": "views"}))
    return found


def write_tables() -> None:
    runs = read_runs()
    missing = sum(key(what) not in runs for _, what, _ in study())
    data.require(not missing, f"{missing} runs are not done yet: go on with toy_study.py run")
    parts = ["# The toy study: accuracy in %, NLL in 0.01 nats, ECE in %", WHAT_IS_SHOWN]
    shots, planes = defaultdict(list), {}
    for title, methods, columns, rivals, wanted in sections():
        rows = [row for row in runs.values() if wanted.items() <= row["what"].items()]
        ran = {row["what"]["method"] for row in rows}
        methods = [line for line in methods if line[1] in ran]
        parts += [f"\n## {title}", table.markdown(lines_of(rows, methods, columns, rivals))]
        shown = [("zero-shot", rivals[0], "zero_shot"), *methods]
        if wanted["part"] == "base to new":
            for name, *which in shown[:4]:
                shots[name].append((wanted["shots"], *mean_and_error(rows, "H", *which), 0))
        if title in PLANES:
            drawn = defaultdict(list)
            for name, *which in shown:
                x, y = (mean_and_error(rows, column, *which) for column in columns[:2])
                share = re.sub(" 0.[357] zero-shot", " with zero-shot", name)  # three joined points
                drawn[share].append((x[0], *y, x[1]))
            planes[title] = drawn
    lines, curves = curves_of(runs, ["CoOp", "ProGrad", "CE + KL"])
    parts += ["\n## Learning curves, base classes, 4 shots", table.markdown(lines)]
    data.write(RESULTS / "tables.md", ("\n".join(parts) + "\n").encode())
    print("\n".join(parts))
    bars = "bars: ± standard error over 5 seeds"
    table.draw({"": shots}, RESULTS / "shots.svg", "training images a class",
               "H of base and new accuracy, %", bars, shots=True)  # fmt: skip
    table.draw({"": curves}, RESULTS / "curves.svg", "epoch",
               "accuracy on validation images of base classes, %", "")  # fmt: skip
    for title, (name, x_title, y_title) in PLANES.items():
        table.draw({"": planes[title]}, RESULTS / f"{name}.svg", x_title, y_title, bars)


def mean_and_error(rows: list[dict], column: str, *which: str) -> tuple[float, float]:
    values = list(by_seed(rows, column, *which).values())
    return statistics.mean(values), table.standard_error(values)


# 3. STABILITY -------------------------------------------------------------------------------------
SHAKEN = """import sys, json, torch
sys.path.insert(0, sys.argv[1])
import {script} as script
draw, start = int(sys.argv[2]), script.{start}
def shaken(*args, **more):
    value = start(*args, **more)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(draw))
    return value * (1 + 1e-6 * noise) if draw else value
script.{start} = shaken
result = script.main(["--cache-dir", "none", "--out-dir", *sys.argv[3:]])
kinds = ("baseline", "tuned")
print(json.dumps([[t["n"], {{k: t[k]["accuracy"] for k in kinds}}] for t in result["tests"]]))
"""
START = {"prograd": "initial_context", "vpt": "initial_context", "proreg": "common.prompt_features"}


def stable(commands: list[str]) -> None:
    """Print by how many images each accuracy of each run (a script and flags) moves."""
    cases = [(f"start × (1 + 1e-6 noise {d})", d, {}) for d in (1, 2, 3)]
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    cases += [(name, 0, dict(zip(names, values))) for name, values in KERNELS.items()]
    for run in commands:
        script, *flags = run.split()
        code, first = SHAKEN.format(script=script, start=START[script]), None
        for name, draw, kernels in [("as it is", 0, {}), *cases]:
            with tempfile.TemporaryDirectory() as folder:
                call = [sys.executable, "-c", code, ROOT, str(draw), f"{folder}/run", *flags]
                out = subprocess.check_output(call, text=True, env=os.environ | kernels)
            found = json.loads(out.splitlines()[-1])
            first = first or found
            moved = [f"{kind} {round((m[kind] - m0[kind]) * n / 100):+d}"
                     for (n, m), (_, m0) in zip(found, first) for kind in m]  # fmt: skip
            print(f"{run:26} {name:26} images: {', '.join(moved)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["run", "tables", "stable"])
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    args = parser.parse_args(argv)
    if args.action == "stable":
        stable([*START, *(f"vpt --residual-scale {u}" for u in (0.2, 10))])
    if args.action == "run":
        run_study(args.jobs)
    if args.action != "stable":
        write_tables()


if __name__ == "__main__":
    data.run(main)
