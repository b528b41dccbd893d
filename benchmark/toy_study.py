"""The toy-world study: every claim of the papers that a toy can test, 5 seeds, on a laptop without a GPU.

    python benchmark/toy_study.py choose         # settings, on the validation parts → choices.json
    python benchmark/toy_study.py run            # all that is reported, on the test parts → a .jsonl for each group
    python benchmark/toy_study.py tables         # tables.md, claims.md and pictures, from these files alone
    python benchmark/toy_study.py run --dry-run  # how many runs, and about how long

Settings are chosen for each method over one grid, by means over all tasks; no test image decides anything. A run is a
call of a script's main() in a worker process, one thread each. What is finished is not run again: the same command goes
on after an interruption. Run folders go to --scratch. A .jsonl's first line holds what its runs share, each other line
the rest of one result.json; `python benchmark/table.py FILE.jsonl --by ...` reads them too.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]  # as a script, and in the worker processes

SEEDS, FEW_SEEDS, CHOICE_SEEDS = [1, 2, 3, 4, 5], [1, 2, 3], [1]
RATES, EPOCHS = [0.005, 0.02, 0.08], [10, 30, 100]
PROGRAD = {"CoOp": {"lam": 0}, "ProGrad": {"lam": 1}, "CE + KL": {"rule": "add", "lam": 1}}
# Pairs of a distribution and its deterministic base share rate and epochs. L = 4 for the image posterior: it costs
# L prompts an image and class.
VPT = {"global": {"samples": [8, 0], "epochs": [10, 20, 40], "tasks": 6},
       "image": {"samples": [4, 0], "epochs": [10, 30], "tasks": 3}}  # fmt: skip
SWEEP, LONG = {"lr": 0.08, "epochs": 40}, {"lr": 0.08, "epochs": 100}
U = 0.2  # vpt.py's --residual-scale on toy data
CONTEXTS = {4: "a photo of a",
            8: "click to see more a photo of a",
            16: "nice shot my favourite one taken last summer click to see more a photo of a"}  # fmt: skip
KD, MIX = [0.1, 0.3, 0.5, 0.7, 0.9], [0.1, 0.3, 0.5, 0.7, 0.9]
ALPHA = {1: [1, 2, 4, 8, 16], 10: [1, 4, 16, 64]}  # by power
UNBIASED = 0.125  # toy_shapes_biased's share of images in their class's own scene, if scenes are drawn at random


# ----------------------------------------------------------------------------------------------------------------------
# 1. Jobs: one run of one script
# ----------------------------------------------------------------------------------------------------------------------
def job(group: str, file: str, dataset: str, seed: int, **flags) -> dict:
    return {"group": group, "file": file, "flags": {"dataset": dataset, "seed": seed, "compare": False, **flags}}


def argv(flags: dict) -> list[str]:
    """{"lr": 0.02, "compare": False} → ["--lr", "0.02", "--no-compare"]"""
    words = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        words += [f"--no-{name}" if value is False else f"--{name}", *map(str, values)]
    return words


def folder(scratch: Path, job: dict) -> Path:
    name = hashlib.sha1(" ".join(argv(job["flags"])).encode()).hexdigest()[:12]
    return scratch / f"{job['file']}-{job['flags']['dataset']}-{name}"


def work(task: tuple[dict, str]) -> tuple[dict, str]:
    """One run, in a worker process → the job and "", or why it gave no numbers."""
    job, scratch = task
    import torch

    torch.set_num_threads(1)
    out, flags = folder(Path(scratch), job), dict(job["flags"])
    if "checkpoint" in flags:  # of another job
        flags["checkpoint"] = str(folder(Path(scratch), flags["checkpoint"]))
    where = ["--resume", "--out-dir", str(out), "--cache-dir", str(Path(scratch) / "cache")]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(job["file"]).main([*argv(flags), *where])
    except FloatingPointError as error:  # a rate too large: no numbers, and not chosen
        return job, str(error)
    return job, ""


def run_all(jobs: list[dict], scratch: Path, processes: int) -> list[dict]:
    """Run what is not finished, `processes` at a time; returns the jobs that have a result."""
    scratch.mkdir(parents=True, exist_ok=True)
    waiting = {folder(scratch, job): job for job in jobs if not (folder(scratch, job) / "result.json").exists()}
    waiting = sorted(waiting.values(), key=lambda job: (job["flags"].get("eval_only", False), job["flags"]["dataset"]))
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker imports torch
    start, failed = time.time(), set()
    trained = [job for job in waiting if "checkpoint" not in job["flags"]]
    for part in (trained, [job for job in waiting if "checkpoint" in job["flags"]]):  # checkpoints come first
        if not part:
            continue
        with multiprocessing.get_context("spawn").Pool(min(processes, len(part))) as pool:
            for i, (job, error) in enumerate(pool.imap_unordered(work, [(job, str(scratch)) for job in part]), 1):
                failed |= {folder(scratch, job)} if error else set()
                if error or i % 25 == 0 or i == len(part):
                    minutes = (time.time() - start) / 60
                    print(f"{i} of {len(part)} runs, {minutes:.1f} minutes {error}".rstrip(), flush=True)
            pool.close()
            pool.join()
    return [job for job in jobs if folder(scratch, job) not in failed]


def check_defaults(jobs: list[dict], scratch: Path) -> None:
    """Stop if a default of a script has changed between these runs: they would not belong together."""
    import table

    for file in dict.fromkeys(job["file"] for job in jobs):
        mine = [job for job in jobs if job["file"] == file]
        typed, first = (
            {key for job in mine for key in job["flags"]} | table.FREE | {"alpha", "eval_samples"},
            {},
        )  # two follow others
        for path in {folder(scratch, job) for job in mine}:
            settings = json.loads((path / "result.json").read_text(encoding="utf-8"))["settings"]
            for key, value in settings.items():
                if key not in typed and first.setdefault(key, (value, path))[0] != value:
                    old, other = first[key]
                    sys.exit(f"error: {key} is {old} in {other} and {value} in {path}: delete the older one, run again")


def cost(job: dict) -> float:
    """Roughly the seconds of one idle core: measured once, to tell a coffee from a lunch."""
    from toyclip import world

    f = job["flags"]
    C = len(world.TASKS[f["dataset"]].classnames)
    tests = 60 * C
    if job["file"] == "proreg":
        mixtures = len(f.get("wise_ft", []))
        return (
            0.5 + (0 if "checkpoint" in f else 0.45 * 8) + 1.0 * (1 + mixtures) * (1 if "test_part" not in f else 0.4)
        )
    C = C // 2 if f.get("classes") == "base" else C
    batch, L = (32, 1) if job["file"] == "prograd" else (8, max(1, f["samples"]))
    steps = f["epochs"] * max(1, f["shots"] * C // batch)
    if f.get("posterior") == "image":
        return 0.3 + steps * (0.003 + 7e-5 * L * 8 * C) + tests * (1 + f["samples"]) * C * 5e-5
    return 0.3 + steps * (0.0025 + 1e-4 * L * C)


def estimate(jobs: list[dict], scratch: Path, processes: int) -> None:
    """Print runs and minutes of each group."""
    unique = {folder(scratch, job): job for job in jobs}
    groups = {}
    for job in unique.values():
        groups.setdefault(job["group"], []).append(cost(job) / 60 / processes)
    for group, minutes in groups.items():
        print(f"{group:32} {len(minutes):5} runs  about {sum(minutes):5.1f} minutes with {processes} processes")
    total = sum(map(sum, groups.values()))
    done = sum((path / "result.json").exists() for path in unique)
    print(f"{'all':32} {len(unique):5} runs  about {total:5.1f} minutes; {done} are finished")


# ----------------------------------------------------------------------------------------------------------------------
# 2. choose: the same grid for every method, on the validation parts
# ----------------------------------------------------------------------------------------------------------------------
def choice_jobs(tasks: list[str], biased: str) -> list[dict]:
    """Each job also carries "family", "method" and "setting": what it is a point of."""
    jobs = []

    def add(family, method, setting, *args, **flags):
        jobs.append(job("choose " + family, *args, **flags, test_part="val"))
        jobs[-1] |= {"family": family, "method": method, "setting": setting}

    for rate in RATES:
        for task in tasks:
            for epochs in EPOCHS:
                setting = {"lr": rate, "epochs": epochs}
                for method, flags in PROGRAD.items():
                    for seed in CHOICE_SEEDS:
                        place = (setting, "prograd", task, seed)
                        add("base-to-new", method, *place, classes="base", shots=16, **flags, **setting)
                        add("few-shot", method, *place, classes="all", shots=4, **flags, **setting)
            for posterior, pair in VPT.items():
                for epochs in pair["epochs"]:
                    setting = {"lr": rate, "epochs": epochs}
                    for seed in CHOICE_SEEDS if task in tasks[: pair["tasks"]] else []:
                        for samples in pair["samples"]:
                            flags = {"classes": "base", "shots": 16, "posterior": posterior, "samples": samples}
                            member = "distribution" if samples else "deterministic"
                            add(f"vpt {posterior}", member, setting, "vpt", task, seed, **flags, **setting)
    for seed in CHOICE_SEEDS:
        for method, flags, setting in proreg_grid():
            add("proreg", method, setting, "proreg", biased, seed, **flags)
            trained = jobs[-1]
            mixtures = {key: flags[key] for key in ("ensemble", "wise_ft") if key in flags}
            # The same weights on validation images without the shortcut, for those who know that there is one.
            more = {"eval_only": True, "checkpoint": trained, "toy_bias": UNBIASED}
            add("proreg unbiased val", method, setting, "proreg", biased, seed, **mixtures, **more)
    return jobs


def proreg_grid() -> list[tuple[str, dict, dict]]:
    """(method, flags, what is chosen) of all fine-tuning runs."""
    rows = [("fine-tuning", {"loss": "ce", "ensemble": MIX, "wise_ft": MIX}, {})]
    rows += [("fixed KD", {"loss": "kd", "alpha": a}, {"alpha": a}) for a in KD]
    rows += [(f"ProReg, power {p}", {"power": p, "alpha": a}, {"alpha": a}) for p in ALPHA for a in ALPHA[p]]
    return rows


def choose(jobs: list[dict], scratch: Path) -> dict:
    """The whole grid's figures, and of each method the setting with the best mean score."""
    points = {}
    for job in jobs:
        result = json.loads((folder(scratch, job) / "result.json").read_text(encoding="utf-8"))
        names = {None: job["setting"]}
        for name in result["tests"][0]["extra"] if job["file"] == "proreg" else ():  # "ensemble 0.3", "wise-ft 0.3"
            names[name] = {"share": float(name.split()[1])}
        for name, setting in names.items():
            tests = [test["extra"][name] if name else test["tuned"] for test in result["tests"]]
            accuracy = [test["accuracy"] for test in tests]
            method = name.split()[0] if name else job["method"]
            point = points.setdefault((job["family"], method, json.dumps(setting)), [])
            point.append([result["harmonic_mean"]["tuned"] if len(tests) > 1 else accuracy[0], *accuracy])
    grid = {}
    for (family, method, setting), rows in points.items():
        means = [round(statistics.fmean(column), 2) for column in zip(*rows)]
        names = ["H", "base", "new"] if len(means) == 3 else ["accuracy", ""]
        row = json.loads(setting) | {name: mean for name, mean in zip(names, means) if name} | {"runs": len(rows)}
        grid.setdefault(family, {}).setdefault(method, []).append(row)
    for method, rows in grid["proreg"].items():
        for row, other in zip(rows, grid["proreg unbiased val"][method], strict=True):
            a, b = row["accuracy"], other["accuracy"]
            row |= {"unbiased": b, "H": round(2 * a * b / (a + b), 2)}
    del grid["proreg unbiased val"]
    chosen = {}
    for family, methods in grid.items():
        # A setting that gave no numbers in some run (a rate too large) is shown, and not chosen.
        methods = {m: [r for r in rows if r["runs"] == max(r["runs"] for r in rows)] for m, rows in methods.items()}
        scores = {"proreg": ("accuracy", "H"), "few-shot": ("accuracy",)}.get(family, ("H",))
        for method, rows in methods.items():
            best = [max(rows, key=lambda row: row[score]) for score in scores]
            best = [{k: v for k, v in row.items() if k in ("lr", "epochs", "alpha", "share")} for row in best]
            chosen.setdefault(family, {})[method] = best[0] if len(best) == 1 else dict(zip(("by ID", "by H"), best))
        if family.startswith("vpt"):  # the setting that is best for the two together
            pairs = itertools.product(methods["distribution"], methods["deterministic"])
            pairs = [(a, b) for a, b in pairs if (a["lr"], a["epochs"]) == (b["lr"], b["epochs"])]
            best = max(pairs, key=lambda pair: pair[0]["H"] + pair[1]["H"])[0]
            chosen[family] = {"pair": {key: best[key] for key in ("lr", "epochs")}}
    return {"chosen": chosen, "grid": grid}


# ----------------------------------------------------------------------------------------------------------------------
# 3. run: what is reported, on the test parts
# ----------------------------------------------------------------------------------------------------------------------
def plan(tasks: list[str], biased: str, chosen: dict) -> list[dict]:
    jobs = []

    def add(group, file, seeds=SEEDS, where=tasks, **flags):
        jobs.extend(job(group, file, task, seed, **flags) for task in where for seed in seeds)

    # ProGrad: base to new, each method at its own choice; then one setting changed at a time, at ProGrad's choice.
    own = {"classes": "base", "shots": 16, **chosen["base-to-new"]["ProGrad"]}
    for method, flags in PROGRAD.items():
        add("prograd_base_to_new", "prograd", classes="base", shots=16, **flags, **chosen["base-to-new"][method])
    for lam in (0, 0.3, 0.6, 0.8, 1):
        add("prograd_controls", "prograd", **{"lam": lam} | own)
    for flags in ({"rule": "add", "lam": 0.3}, {"rule": "add", "lam": 1}, {"teacher": "ensemble", "lam": 1},
                  {"init": "random", "lam": 0}, {"init": "random", "lam": 1}):  # fmt: skip
        add("prograd_controls", "prograd", **flags, **own)
    # Few-shot on all classes, with and without wrong labels; CoOp's own random start as a control.
    for method, flags in PROGRAD.items():
        few = {"classes": "all", **chosen["few-shot"][method]}
        for shots in (1, 2, 4, 8, 16):
            add("prograd_few_shot", "prograd", FEW_SEEDS, tasks[::2], shots=shots, **flags, **few)
            add("prograd_few_shot", "prograd", FEW_SEEDS, tasks[::2], shots=shots, **flags, **few, label_noise=0.3)
        for shots in (1, 4, 16) if method != "CE + KL" else ():
            add("prograd_few_shot", "prograd", FEW_SEEDS, tasks[::2], shots=shots, init="random", **flags, **few)
        add(
            "prograd_curves",
            "prograd",
            FEW_SEEDS,
            tasks[::2],
            shots=4,
            classes="all",
            lr=0.02,
            epochs=100,
            eval_every=5,
            **flags,
        )
    # VPT: each pair at its choice, and trained long; then one setting changed at a time, trained long, on fewer tasks.
    base = {"classes": "base", "shots": 16}
    for posterior, pair in VPT.items():
        for samples in pair["samples"]:
            flags = {"posterior": posterior, "samples": samples, **base}
            add("vpt", "vpt", SEEDS, tasks[: pair["tasks"]], **flags, **chosen[f"vpt {posterior}"]["pair"])
            if posterior == "global":
                add("vpt_long", "vpt", FEW_SEEDS, tasks[::3], **flags, **LONG)
    sweep = {"posterior": "global", **base, **SWEEP}
    knobs = {"samples": (1, 2, 5, 8, 10, 20), "residual_scale": (0.02, 0.08, 1), "kl_weight": (0, 0.1, 1)}
    knobs = [{"samples": 8} | {name: value} for name, values in knobs.items() for value in values]
    knobs += [{"samples": L, "ctx_init": words} for L in (8, 0) for M, words in CONTEXTS.items() if (L, M) != (8, 4)]
    for flags in knobs:
        add("vpt_sweeps", "vpt", FEW_SEEDS, tasks[::3], **flags, **sweep)
    # ProReg: the whole trade-off; then, without the shortcut in the training images, the chosen settings.
    for _, flags, _ in proreg_grid():
        add("proreg", "proreg", where=[biased], **flags)
    picks = chosen["proreg"]
    for method, flags, setting in proreg_grid():
        if method == "fine-tuning" or setting in picks[method].values():
            add("proreg", "proreg", where=[biased], **flags, toy_bias=UNBIASED)
    return jobs


def thirds(lines: list[dict], keys: tuple[str, ...]) -> dict:
    """Means over the first, middle and last third of the epochs of some columns of metrics.jsonl."""
    cuts = [0, math.ceil(len(lines) / 3), math.ceil(2 * len(lines) / 3), len(lines)]
    parts = [lines[a:b] or lines[-1:] for a, b in zip(cuts, cuts[1:])]
    return {key: [statistics.fmean(line[key] for line in part) for part in parts] for key in keys if key in lines[0]}


def rounded(value, digits: int = 3):
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return round(value, digits) if isinstance(value, float) else value


def record(job: dict, path: Path) -> dict:
    """What the tables need of a run: less than result.json, and a little of metrics.jsonl and predictions.npz."""
    import plots
    import table

    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    keep = ("method", "dataset", "shots", "seed", "classes", "model", "split", "protocol", "harmonic_mean", "versions")
    row = {"command": " ".join(["python", f"{job['file']}.py", *argv(job["flags"])])} | {k: result[k] for k in keep}
    row["split"] = row["split"][:16]
    if row["harmonic_mean"]:
        row["harmonic_mean"] = {kind: row["harmonic_mean"][kind] for kind in ("zero_shot", "tuned")}
    row |= {"pretrained": Path(result["pretrained"]).name, "commit": result["commit"]}
    row["seconds"] = {key: result["seconds"][key] for key in ("train", "evaluate") if key in result["seconds"]}
    same = {"dataset": result["dataset"], "template": result["protocol"]["template"], "domain": None, "baseline": None}
    row["tests"] = [{k: v for k, v in t.items() if v != same.get(k, {})} for t in result["tests"]]
    measured = {"prograd_controls": ("cosine", "projected"), "vpt_sweeps": ("sigma", "kl"),
                "proreg": ("w_mean", "w_10", "w_50", "w_90", "w_above_half")}  # fmt: skip
    row["process"] = thirds(lines, measured.get(job["group"], ()))
    run = result | {"folder": path, "labels": table.test_labels(result["dataset"], result["classes"], result["tests"])}
    if job["group"] == "prograd_curves":
        row["curves"] = {"val_accuracy": plots.curves(run)}
    if job["group"] == "vpt_long":
        found = plots.reliability(run)  # zero-shot CLIP is the same in all runs of a task: once is enough
        kinds = ("zero_shot", "tuned") if job["flags"]["samples"] == 0 and job["flags"]["seed"] == 1 else ("tuned",)
        row["reliability"] = {test: {k: rounded(bins[k], 1) for k in kinds} for test, bins in found.items()}
    left_out = table.FREE - {"device", "compare"} | {"pretrained", *row}
    settings = {key: value for key, value in result["settings"].items() if key not in left_out}
    return rounded(row) | {"settings": settings}


def write_records(path: Path, rows: list[dict]) -> None:
    """One line a run; what all share goes to the first line, {"common": ...}, with zero-shot CLIP's figures by task."""

    def shared(dicts):
        return {k: v for k, v in dicts[0].items() if all(k in d and d[k] == v for d in dicts)}

    zero_shot = {}
    for row in rows:
        for test in row["tests"]:
            key = f"{row['dataset']} {test['classes']} {test.get('domain')}"
            if zero_shot.setdefault(key, test["zero_shot"]) == test["zero_shot"]:
                del test["zero_shot"]
    common = shared(rows) | {"settings": shared([row["settings"] for row in rows]), "zero_shot": zero_shot}
    lines = [{"common": common}]
    for row in rows:
        settings = {k: v for k, v in row["settings"].items() if k not in common["settings"]}
        lines.append({k: v for k, v in row.items() if k not in common} | {"settings": settings})
    text = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# 4. The command
# ----------------------------------------------------------------------------------------------------------------------
def build_parser() -> argparse.ArgumentParser:
    import table

    parser = table.OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("step", choices=["choose", "run", "tables"])
    add("--out", type=Path, default=ROOT / "benchmark" / "results" / "toy", help="folder of the figures")
    add("--scratch", type=Path, default=ROOT / "runs" / "toy_study", help="folder of the run folders")
    add("--jobs", type=int, default=2, help="processes [2]")
    add("--dry-run", action="store_true", help="print how many runs there are and about how long they take")
    add("--groups", nargs="+", metavar="GROUP", help="run: only these")
    add("--tasks", nargs="+", metavar="TASK", help="to try the script: these prompt tasks instead of all")
    add("--max-steps", type=int, help="to try the script: stop every run after so many steps")
    add("--pretrained", help="to try the script: other weights")
    return parser


def main(args=None) -> None:
    args = build_parser().parse_args(args)
    if args.step == "tables":
        import toy_tables

        return toy_tables.write(args.out)
    from toyclip import world

    tasks = args.tasks or [name for name in world.TASKS if name != world.BIASED]
    trial = {"max_steps": args.max_steps, "pretrained": args.pretrained}
    trial = {key: value for key, value in trial.items() if value is not None}
    choices = args.out / "choices.json"
    if args.step == "choose":
        jobs = choice_jobs(tasks, world.BIASED)
    else:
        if not choices.exists():
            sys.exit(print(f"error: {choices} is missing: python benchmark/toy_study.py choose makes it") or 2)
        jobs = plan(tasks, world.BIASED, json.loads(choices.read_text(encoding="utf-8"))["chosen"])
        jobs = [job for job in jobs if not args.groups or job["group"] in args.groups]
    for job in jobs:
        job["flags"] |= {k: v for k, v in trial.items() if "checkpoint" not in job["flags"] or k == "max_steps"}
    if args.dry_run:
        return estimate(jobs, args.scratch, args.jobs)
    start = time.time()
    done = run_all(jobs, args.scratch, args.jobs)
    check_defaults(done, args.scratch)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "choose":
        about = {
            "tasks": tasks,
            "seeds": CHOICE_SEEDS,
            "runs": len(jobs),
            "minutes": round((time.time() - start) / 60, 1),
        }
        choices.write_text(json.dumps(about | choose(done, args.scratch), indent=1) + "\n", encoding="utf-8")
        return
    for group in dict.fromkeys(job["group"] for job in done):
        rows = [record(job, folder(args.scratch, job)) for job in done if job["group"] == group]
        write_records(args.out / f"{group}.jsonl", rows)
        print(f"{args.out / group}.jsonl: {len(rows)} runs")
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    import table

    try:
        main()
    except table.UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
