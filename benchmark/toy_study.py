"""Do the papers' claims hold on the toy world? Every run, its tables, and how far a run moves.

    python benchmark/toy_study.py run --jobs 2     # goes on where it was; results/toy/runs.jsonl
    python benchmark/toy_study.py tables           # results/toy/tables.md and two pictures
    python benchmark/toy_study.py stable           # each default under 1e-6 and other kernels

Settings are the scripts' defaults, which follow the papers' regime; nothing is chosen here. Test
sets are read once, at the last step. Differences are paired: the same seed, images and batches.
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

import torch

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
KERNELS = {  # what ../shared/as-another-cpu sets: other kernels, another order of rounding
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
    torch.set_num_threads(1)
    flags = [*flags, "--workers", "0"]  # a pool's processes may not start others
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        cache = str(Path(tempfile.gettempdir(), "toy-study-cache"))
        with contextlib.redirect_stdout(io.StringIO()):
            result = SCRIPTS[script].main([*flags, "--out-dir", str(out), "--cache-dir", cache])
        lines = common.read_metrics(out)
    last = lines[-1]
    kept = {"H": result["harmonic_mean"], "seconds": result["seconds"]}
    points = [(e + 1, line) for e, line in enumerate(lines) if "val_accuracy" in line]
    names = ("val_accuracy", "cosine", "conflict")
    kept["curve"] = [[e, *(round(line[name], 4) for name in names)] for e, line in points]
    kept |= {name: round(last[name], 4) for name in ("cosine", "conflict") if name in last}
    kept["tests"] = {}
    for test in result["tests"]:
        measures = {"zero_shot": test["zero_shot"], "tuned": test["tuned"]} | test["extra"]
        kept["tests"][test["domain"] or test["classes"]] = {
            name: [round(m["accuracy"], 3), round(m["nll"], 4), round(m["ece"], 2)]
            for name, m in measures.items()
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
    with get_context("spawn").Pool(jobs) as pool:
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


def accuracy(test: str, kind: str = "tuned", measure: int = 0):
    """A function row → accuracy (%), NLL (nats) or ECE (%) of a test set; "H", "OOD" are means."""

    def read(row: dict) -> float:
        if test == "H":
            return row["H"][kind]
        if test == "OOD":
            domains = [name for name in row["tests"] if name not in ("all", "base", "new")]
            return statistics.mean(row["tests"][name][kind][measure] for name in domains)
        return row["tests"][test][kind][measure]

    return read


def select(runs: dict, **wanted) -> list[dict]:
    return [row for row in runs.values() if wanted.items() <= row["what"].items()]


def lines_of(runs: dict, methods: list, tests: list[str], base: str, rival="", **wanted) -> list:
    """A table: zero-shot, each (title, method, kind), and its paired difference to `base`; of those
    that are neither to `rival`, too."""
    first = select(runs, method=base, **wanted)
    if not first:
        return []
    out = [["", *tests]]
    zero = [table.spread(list(by_seed(first, accuracy(t, "zero_shot")).values())) for t in tests]
    out.append(["zero-shot", *[text.split(" ±")[0] for text in zero]])
    for title, method, kind in methods:
        rows = select(runs, method=method, **wanted)
        if not rows:
            continue
        found = {t: by_seed(rows, accuracy(t, kind)) for t in tests}
        n = len(found[tests[0]])
        out.append(
            [f"{title} ({n} seeds)", *[table.spread(list(found[t].values())) for t in tests]]
        )
        others = [base, rival] if rival and method not in (base, rival) else [base]
        for other in others if (method, kind) != (base, "tuned") else ():
            rest = select(runs, method=other, **wanted)
            plain = {t: by_seed(rest, accuracy(t)) for t in tests}
            shared = sorted(found[tests[0]].keys() & plain[tests[0]].keys())
            pairs = [[found[t][s] - plain[t][s] for s in shared] for t in tests]
            out.append([f"… minus {other}", *[table.difference(pair) for pair in pairs]])
    return out


def write_tables() -> None:
    """tables.md, accuracy against shots, and ID against OOD."""
    runs = read_runs()
    parts = ["# The toy study: accuracy in %, mean ± standard deviation over seeds"]
    parts.append("Differences are paired over seeds, ± standard error.")
    rules = [(name, name, "tuned") for name in ("CoOp", "ProGrad", "CE + KL")]
    tests = ["base", "new", "H"]
    curves = defaultdict(list)
    for shots in (1, 2, 4, 8, 16):
        what = {"part": "base to new", "shots": shots}
        lines = lines_of(runs, rules, tests, "CoOp", "CE + KL", **what)
        if lines:
            parts += [f"\n## ProGrad, {shots} shots, six tasks", table.markdown(lines)]
        for title, method, _ in rules:
            found = by_seed(select(runs, method=method, **what), accuracy("H"))
            values = list(found.values())
            if len(values) > 1:
                error = statistics.stdev(values) / len(values) ** 0.5
                curves[title].append((shots, statistics.mean(values), error))
    kinds = [(m, m, "tuned") for m in ("deterministic", "VPT", "VPT u = 0.2", "VPT u = 10")]
    lines = lines_of(runs, kinds, tests, "deterministic", part="VPT")
    if lines:
        parts += ["\n## VPT, global posterior, 4 shots, six tasks", table.markdown(lines)]
    points = {}
    for task in data.world.SHORTCUT:
        for rate in ("3e-4", "1e-4"):
            mixed = [(f"{kind} {a} zero-shot", "fine-tuning", f"{kind} {a}")
                     for kind in ("ensemble", "wise-ft") for a in (0.3, 0.5, 0.7)]  # fmt: skip
            kinds = [(m, m, "tuned") for m in ("fine-tuning", "ProReg", "KD")] + mixed
            what = {"part": f"ProReg {rate}", "task": task}
            lines = lines_of(runs, kinds, ["all", "OOD", "H"], "fine-tuning", "KD", **what)
            if lines:
                parts += [f"\n## ProReg, {task}, rate {rate}", table.markdown(lines)]
            shown = task == data.world.BIASED and rate == "3e-4"
            for title, method, kind in kinds if shown else ():
                rows = select(runs, method=method, **what)
                if rows:
                    x, y = (by_seed(rows, accuracy(t, kind)).values() for t in ("all", "OOD"))
                    points[title] = [(statistics.mean(x), statistics.mean(y), 0.0)]
    data.write(RESULTS / "tables.md", ("\n".join(parts) + "\n").encode())
    if curves:
        svg = table.plot(curves, "training images a class", "H of base and new, %", log=True)
        data.write(RESULTS / "shots.svg", svg.encode())
    if points:
        svg = table.plot(points, "in-distribution accuracy, %", "mean OOD accuracy, %")
        data.write(RESULTS / "id_ood.svg", svg.encode())
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
result = script.main(["--cache-dir", "none", "--out-dir", sys.argv[3]])
kinds = ("baseline", "tuned")
print(json.dumps([[t["n"], {{k: t[k]["accuracy"] for k in kinds}}] for t in result["tests"]]))
"""
START = {"prograd": "initial_context", "vpt": "initial_context", "proreg": "common.prompt_features"}


def stable() -> None:
    """Print by how many images each accuracy of a default run moves."""
    cases = [(f"start × (1 + 1e-6 noise {d})", d, {}) for d in (1, 2, 3)]
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    cases += [(name, 0, dict(zip(names, values))) for name, values in KERNELS.items()]
    for script, start in START.items():
        code = SHAKEN.format(script=script, start=start)
        first = None
        for name, draw, kernels in [("as it is", 0, {}), *cases]:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", code, str(ROOT), str(draw), f"{folder}/run"]
                done = subprocess.run(command, capture_output=True, text=True, check=True,
                                      env=os.environ | kernels)  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found
            moved = [f"{kind} {round((m[kind] - m0[kind]) * n / 100):+d}"
                     for (n, m), (_, m0) in zip(found, first) for kind in m]  # fmt: skip
            print(f"{script:8} {name:26} images: {', '.join(moved)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("action", choices=["run", "tables", "stable"])
    parser.add_argument("--jobs", type=int, default=2, help="processes [2]")
    args = parser.parse_args(argv)
    if args.action == "run":
        run_study(args.jobs)
    if args.action == "stable":
        stable()
    else:
        write_tables()


if __name__ == "__main__":
    data.run(main)
