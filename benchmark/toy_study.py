"""Do the papers' claims hold on the toy world? Every run, its tables, and how far a run moves.

    python benchmark/toy_study.py run --jobs 2     # goes on where it was; results/toy/runs.jsonl
    python benchmark/toy_study.py tables           # results/toy/tables.md and four pictures
    python benchmark/toy_study.py stable           # each default under 1e-6 and other kernels
    python benchmark/toy_study.py choose           # the same for three sizes of VPT's noise

Settings are the defaults, which follow the papers' regime; of VPT's --residual-scale `choose` shows
how little a run moves. Test sets are read once. Paired: the same seed, images and batches.
"""

import contextlib
import io
import itertools
import json
import os
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
    kept["tests"] = {}
    for test in result["tests"]:
        found = {kind: [round(m[name], 4) for name in ("accuracy", "nll", "ece")]
                 for kind, m in common.measures(test).items()}  # fmt: skip
        kept["tests"][test["domain"] or test["classes"]] = found
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
def by_seed(rows: list[dict], value) -> dict[int, float]:
    """{seed: mean over tasks of value(row)}."""
    found = defaultdict(list)
    for row in rows:
        found[row["what"]["seed"]].append(value(row))
    return {seed: statistics.mean(values) for seed, values in sorted(found.items())}


def measure(column: str, kind: str = "tuned"):
    """A function row → what the column names: accuracy (%), "base NLL" (0.01 nats), "new ECE" (%);
    "H" of accuracies; "OOD", their mean over the other domains."""
    test, _, what = column.partition(" ")
    index, factor = {"NLL": (1, 100), "ECE": (2, 1)}.get(what, (0, 1))

    def read(row: dict) -> float:
        if test == "H":
            return row["H"][kind]
        names = [name for name in row["tests"] if name not in ("all", "base", "new")]
        found = [row["tests"][name][kind][index] for name in (names if test == "OOD" else [test])]
        return factor * statistics.mean(found)

    return read


def mean_and_error(rows: list[dict], column: str, kind: str = "tuned") -> tuple[float, float]:
    values = list(by_seed(rows, measure(column, kind)).values())
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def select(runs: dict, **wanted) -> list[dict]:
    return [row for row in runs.values() if wanted.items() <= row["what"].items()]


def lines_of(runs: dict, methods: list, tests: list[str], base: str, rival="", **wanted) -> list:
    """A table: zero-shot, each (title, method, kind), and its paired difference to `base`; of those
    that are neither to `rival`, too."""
    first = select(runs, method=base, **wanted)
    zero = [list(by_seed(first, measure(test, "zero_shot")).values()) for test in tests]
    out = [["", *tests], ["zero-shot", *[table.spread(values).split(" ±")[0] for values in zero]]]
    for title, method, kind in methods:
        found = [by_seed(select(runs, method=method, **wanted), measure(t, kind)) for t in tests]
        if not found[0]:
            continue
        cells = [table.spread(list(values.values())) for values in found]
        out.append([f"{title} ({len(found[0])} seeds)", *cells])
        others = [base, rival] if rival and method not in (base, rival) else [base]
        for other in others if (method, kind) != (base, "tuned") else ():
            rest = [by_seed(select(runs, method=other, **wanted), measure(t)) for t in tests]
            pairs = [[a[seed] - b[seed] for seed in a.keys() & b.keys()]
                     for a, b in zip(found, rest)]  # fmt: skip
            out.append([f"… minus {other}", *[table.difference(pair) for pair in pairs]])
    return out


def curves_of(runs: dict, methods: list[str]) -> tuple[list, dict]:
    """A table of what a run's epochs show, means over tasks and seeds; and accuracy to be drawn."""
    lines, drawn = [], {}
    for method in methods:
        points = list(zip(*(row["curve"] for row in select(runs, part="curves", method=method))))
        epochs = [rows[0][0] for rows in points]
        for k, what in enumerate(("accuracy on validation images, %", "cosine", "conflicts"), 1):
            values = [statistics.mean(row[k] for row in rows) for rows in points]
            cells = [f"{value:.1f}" if k == 1 else f"{value:.2f}" for value in values]
            lines.append([f"{method}: {what}", *cells])
            if k == 1:
                drawn[method] = [(epoch, value, 0.0) for epoch, value in zip(epochs, values)]
    return [["epoch", *map(str, epochs)], *lines], drawn


def sections() -> list[tuple]:
    """(title, methods, columns, base, rival, which runs) of every table."""
    rules = ["CoOp", "ProGrad", "CE + KL", "ProGrad, λ = 0.8", "ProGrad, λ = 0.5"]
    prompts = ["deterministic", "VPT", "VPT u = 0.2", "VPT u = 10"]
    losses = ["fine-tuning", "ProReg", "KD"]
    rules, prompts, losses = ([(m, m, "tuned") for m in ms] for ms in (rules, prompts, losses))
    prompts += [("VPT, mean residual", "VPT", "mean_residual")]
    losses += [(f"{kind} {a} zero-shot", "fine-tuning", f"{kind} {a}")
               for kind in ("ensemble", "wise-ft") for a in (0.3, 0.5, 0.7)]  # fmt: skip
    both = ["base", "new", "H", "base NLL", "new NLL", "base ECE", "new ECE"]
    found = []
    for part, tests in (("base to new", both), ("all classes", ["all", "all NLL", "all ECE"])):
        for shots in SHOTS:
            title = f"ProGrad, {part}, {shots} shots, six tasks"
            found.append((title, rules, tests, "CoOp", "CE + KL", {"part": part, "shots": shots}))
    for part in ("VPT", "VPT, 16 shots", "VPT, image posterior", "VPT, image posterior, 16 shots"):
        found.append((f"{part}, six tasks", prompts, both, "deterministic", "", {"part": part}))
    for task in data.world.SHORTCUT:
        for part in ("ProReg 3e-4", "ProReg 1e-4"):
            tests, runs = ["all", "OOD", "H"], {"part": part, "task": task}
            found.append((f"{part}, {task}", losses, tests, "fine-tuning", "KD", runs))
    return found


def write_tables() -> None:
    runs = read_runs()
    missing = sum(key(what) not in runs for _, what, _ in study())
    data.require(not missing, f"{missing} runs are not done yet: go on with toy_study.py run")
    parts = ["# The toy study: accuracy in %, NLL in 0.01 nats, ECE in %"]
    parts.append("Means ± standard deviation over seeds; differences are paired, ± standard error.")
    shots, pictures = defaultdict(list), {}
    axes = {"VPT": ("base", "new"), "ProReg 3e-4": ("all", "OOD")}
    for title, methods, columns, base, rival, wanted in sections():
        parts.append(f"\n## {title}")
        parts.append(table.markdown(lines_of(runs, methods, columns, base, rival, **wanted)))
        shown = [("zero-shot", base, "zero_shot"), *methods]
        found = {title: (select(runs, method=method, **wanted), k) for title, method, k in shown}
        if wanted["part"] == "base to new":
            for name in ("CoOp", "ProGrad", "CE + KL"):
                shots[name].append((wanted["shots"], *mean_and_error(found[name][0], "H")))
        if wanted["part"] in axes and wanted.get("task") != "toy_shapes_unbiased":
            x, y = axes[wanted["part"]]
            points = {name: [(mean_and_error(rows, x, k)[0], *mean_and_error(rows, y, k))]
                      for name, (rows, k) in found.items()}  # fmt: skip
            pictures[f"{x}_{y}".lower()] = points, f"{x}, accuracy in %", f"{y}, accuracy in %"
    lines, drawn = curves_of(runs, ["CoOp", "ProGrad", "CE + KL"])
    parts += ["\n## Learning curves, base classes, 4 shots", table.markdown(lines)]
    pictures["curves"] = drawn, "epoch", "accuracy on validation images of base classes, %"
    pictures["shots"] = shots, "training images a class", "H of base and new, %", True
    for name, picture in pictures.items():
        data.write(RESULTS / f"{name}.svg", table.plot(*picture).encode())
    data.write(RESULTS / "tables.md", ("\n".join(parts) + "\n").encode())
    print("\n".join(parts))


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
    parser.add_argument("action", choices=["run", "tables", "stable", "choose"])
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    args = parser.parse_args(argv)
    if args.action == "run":
        run_study(args.jobs)
    if args.action in ("run", "tables"):
        write_tables()
    else:
        scales = [f"vpt --residual-scale {u}" for u in (0.2, 4, 10)]
        stable(list(START) if args.action == "stable" else scales)


if __name__ == "__main__":
    data.run(main)
