"""Tables and pictures from result.json files: mean ± sample standard deviation over the seeds.

    python benchmark/table.py runs                                 # files or folders, searched all the way down
    python benchmark/table.py runs --metric nll --csv              # or ece; CSV for a spreadsheet
    python benchmark/table.py runs --by lam                        # a row for each value of a setting
    python benchmark/table.py runs --pair ProGrad CoOp             # differences seed by seed, with standard error
    python benchmark/table.py runs --plot fig.svg --kind few-shot  # or learning, ood, reliability

Runs are gathered by method, dataset, shots, classes and test sets. Over one mean everything but the seed and the paths
must agree, and for one dataset, shots, seed and classes all methods must have trained on the same images: else nothing
is printed but the difference. A run's baseline/ is not read again: the run's own result.json holds its figures.
"""

import argparse
import collections
import csv
import json
import math
import statistics
import sys
from pathlib import Path

import plots

# What may differ within one mean: the seed, paths, and what changes no result (runs.FREE, a test compares).
FREE = {"seed", "data_root", "download", "device", "workers", "cache_dir", "out_dir", "resume", "checkpoint",
        "eval_only", "checkpoint_seconds", "eval_every", "memory_gb", "compare"}  # fmt: skip
# Settings that ask for other training images: runs that differ in them need not share a split.
DATA = ("label_noise", "toy_bias", "train_domain", "test_domain")
KINDS = ("zero_shot", "baseline", "tuned")
DIGITS = {"accuracy": 2, "nll": 3, "ece": 2}

# The papers' figures that were seen, in the paper or in another's restatement of it; all others stay empty.
# (method, model, shots, classes): {(dataset, test): (accuracy %, its protocol and source)}
BPL = "BPL Table 1, 3 seeds; global or image not said"
BPL_NEW = {"caltech101": 94.93, "dtd": 60.80, "eurosat": 75.30, "fgvc_aircraft": 35.00, "oxford_flowers": 70.40,
           "food101": 92.13, "imagenet": 70.93, "oxford_pets": 98.00, "stanford_cars": 73.23, "sun397": 77.87,
           "ucf101": 75.77, "mean of 11": 74.94}  # fmt: skip
BPL_NEW = {(dataset, "new"): (figure, BPL) for dataset, figure in BPL_NEW.items()}
BPL_DG = {("imagenet", "mean of imagenetv2, imagenet_sketch, imagenet_a, imagenet_r"): (60.44, "BPL, from a review")}
KG = {"base": 82.48, "new": 70.75, "H": 76.16}
PAPER = {
    ("ProGrad", "RN50", 16, "all"): {("mean of 11", "all"): (74.28, "ProGrad, 3 seeds, restated")},
    ("ProGrad++", "RN50", 16, "all"): {("mean of 11", "all"): (75.03, "ProGrad, 3 seeds, restated")},
    ("ProGrad", "ViT-B-16", 16, "base"): {("mean of 11", k): (v, "KgCoOp's rerun of ProGrad") for k, v in KG.items()},
    ("VPT image", "ViT-B-16", 16, "base"): BPL_NEW,
    ("VPT global", "ViT-B-16", 16, "base"): BPL_NEW | {("fgvc_aircraft", "new"): (33.80, "BPL Table 4, restated")},
    ("VPT image", "ViT-B-16", 16, "all"): BPL_DG,
    ("VPT global", "ViT-B-16", 16, "all"): BPL_DG,
}


class UserError(Exception):
    """A mistake the user can mend: one line on stderr, exit status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. Read runs, and refuse to average what does not belong together
# ----------------------------------------------------------------------------------------------------------------------
def read_runs(paths: list[str]) -> list[dict]:
    """Every result.json named or below a folder; of a .jsonl each line, completed by "common" of its first line."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: give result.json files, or folders that hold them")
        found = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        named = path.name == "baseline" or path.is_file()
        files += [f for f in found if named or f.parent.name != "baseline" or not (f.parents[1] / f.name).exists()]
    runs = []
    for file in dict.fromkeys(file.resolve() for file in files):
        try:
            text = file.read_text(encoding="utf-8")
            lines = [json.loads(line) for line in (text.splitlines() if file.suffix == ".jsonl" else [text])]
            common = lines.pop(0)["common"] if "common" in lines[0] else {}
            shared = common.pop("zero_shot", {})  # "TASK CLASSES DOMAIN": zero-shot CLIP's figures
            for line in lines:
                run = common | line | {"settings": common.get("settings", {}) | line["settings"], "path": str(file)}
                for t in run["tests"]:
                    t.setdefault("dataset", run["dataset"])
                    t.setdefault("zero_shot", shared.get(f"{t['dataset']} {t['classes']} {t.get('domain')}"))
                _ = run["tests"][0]["tuned"]["accuracy"], run["method"], run["shots"], run["seed"], run["split"]
                labels = test_labels(run["dataset"], run["classes"], run["tests"])
                runs.append(run | {"labels": labels, "folder": file.parent})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no result of these scripts: {type(error).__name__} {error}") from error
    if not runs:
        raise UserError(f"no result.json in {', '.join(map(str, paths))}: has a run finished there?")
    return runs


def test_labels(dataset: str, classes: str, tests: list[dict]) -> list[str]:
    """base, new or all; ID and the domains' names where there are several domains; the names of other datasets."""
    own, labels = tests[0].get("domain"), []
    several = len({test.get("domain") for test in tests if test["dataset"] == dataset}) > 1
    for test in tests:
        domain = test.get("domain")
        if test["dataset"] != dataset:
            labels.append(test["dataset"] + (f" {domain}" if domain else ""))
        elif several:
            labels.append(("ID" if domain == own else domain) + ("" if classes == "all" else f" {test['classes']}"))
        else:
            labels.append(test["classes"])
    return labels


def baseline_name(run: dict) -> str:
    prompt = "CoCoOp-like" if run["settings"].get("posterior") == "image" else "CoOp (as VPT's)"
    return {"prograd": "CoOp", "vpt": prompt, "proreg": "fine-tuning"}.get(run["method"], "baseline")


def method_name(run: dict, by: list[str] = ()) -> str:
    """What the rows of a run are called: plain baselines and controls get names of their own; `by` adds settings."""
    s = run["settings"].get
    name = {
        "prograd": "CE + KL" if s("rule") == "add" else "ProGrad++" if s("teacher") == "ensemble" else "ProGrad",
        "vpt": f"VPT {s('posterior', 'global')}",
        "proreg": "fixed KD" if s("loss") == "kd" else "ProReg",
    }
    plain = {"prograd": s("lam") == 0, "vpt": s("samples") == 0, "proreg": s("loss") == "ce"}  # fmt: skip
    name = baseline_name(run) if plain.get(run["method"]) else name.get(run["method"], run["method"])
    for key in by:
        if key not in run["settings"] and key not in run:
            raise UserError(f"--by {key}: {run['path']} has no such setting, only {', '.join(run['settings'])}")
        name += f", {key} {run['settings'].get(key, run.get(key))}"
    return name


def facts(run: dict) -> dict:
    """All that must agree within one mean: {"lr": 0.02, "protocol.n_train": 96, ...}. Of a path its name counts."""
    found = {"model": run.get("model")} | {key: v for key, v in run["settings"].items() if key not in FREE}
    found["pretrained"] = Path(str(run.get("pretrained") or found.get("pretrained"))).name
    found |= {f"{part}.{k}": v for part in ("protocol", "versions") for k, v in run.get(part, {}).items()}
    tests = zip(run["labels"], run["tests"])
    return found | {f"tests.{label}.{key}": test.get(key) for label, test in tests for key in ("n", "template")}


def check(runs: list[dict], by: list[str] = (), allow: list[str] = ()) -> dict[tuple, list[dict]]:
    """Runs by (method, dataset, shots, classes, tests), in order of seeds; UserError names what does not fit."""
    splits, groups = {}, collections.defaultdict(list)
    for run in runs:
        key = {name: run[name] for name in ("dataset", "shots", "seed", "classes")}
        first = splits.setdefault((*key.values(), *(str(run["settings"].get(name)) for name in DATA)), run)
        if first["split"] != run["split"]:
            what = ", ".join(f"{name} {value}" for name, value in key.items())
            both = " and ".join(f"{one['split'][:12]} in {one['path']}" for one in (first, run))
            raise UserError(f"{what}: other training images, split {both}")
        groups[method_name(run, by), run["dataset"], run["shots"], run["classes"], tuple(run["labels"])].append(run)
    for (method, dataset, *_), group in groups.items():
        group.sort(key=lambda run: run["seed"])
        first, seeds = group[0], {}
        for run in group:
            a, b = facts(first), facts(run)
            for name in sorted(k for k in a | b if a.get(k) != b.get(k) and k not in (*by, *allow)):
                hint = f"--allow {name}" if "." in name else f"--by {name} makes two rows of them"
                raise UserError(f"{method}, {dataset}: no mean over both, {name} is {a.get(name)} in {first['path']} "
                                f"and {b.get(name)} in {run['path']}; {hint}, or leave one out")  # fmt: skip
            if seeds.setdefault(run["seed"], run) is not run:
                both = f"{seeds[run['seed']]['path']} and {run['path']}"
                raise UserError(f"{method}, {dataset}: seed {run['seed']} is there twice, {both}; leave one out")
        if len(commits := {run.get("commit", "") for run in group}) > 1:
            print(f"note: {method}, {dataset}: made by commits {', '.join(sorted(commits))}", file=sys.stderr)
    return groups


# ----------------------------------------------------------------------------------------------------------------------
# 2. Numbers
# ----------------------------------------------------------------------------------------------------------------------
def scores(run: dict, metric: str, extra: str | None = None) -> dict[str, dict[str, float]]:
    """{test: {kind: value}} of one run, with H and the means over out-of-distribution tests and over other datasets.
    With `extra`, the figures of that name in the tests' "extra" stand for the tuned ones."""
    table, others, tests = {}, {"OOD": [], "targets": []}, run["tests"]
    for label, test in zip(run["labels"], tests):
        sources = test | {"tuned": test["extra"].get(extra)} if extra else test
        table[label] = {kind: sources[kind][metric] for kind in KINDS if isinstance(sources.get(kind), dict)}
        if test["dataset"] != run["dataset"]:
            others["targets"].append(label)
        elif test.get("domain") != tests[0].get("domain") and test["classes"] == tests[0]["classes"]:
            others["OOD"].append(label)
    for name, labels in others.items():
        if len(labels) > 1 or name == "OOD" and labels:
            kinds = [kind for kind in KINDS if all(kind in table[label] for label in labels)]
            means = {kind: statistics.fmean(table[label][kind] for label in labels) for kind in kinds}
            table["mean OOD" if name == "OOD" else f"mean of {', '.join(labels)}"] = means
    if metric == "accuracy" and (h := run.get("harmonic_mean")):
        table["H"] = {kind: h[kind] for kind in KINDS if h.get(kind) is not None}
        if extra:
            pair = ("base", "new") if "base" in table else (run["labels"][0], "mean OOD")
            a, b = (table.get(label, {}).get("tuned", 0) for label in pair)
            table["H"]["tuned"] = 2 * a * b / (a + b) if a + b else 0.0
    return table


def tabulate(groups: dict[tuple, list[dict]], metric: str, extras: bool = False) -> list[dict]:
    """Rows {method, baseline: its name, dataset, shots, classes, test, values: {kind: {seed: value}}, ...}; averages
    over datasets come last."""
    rows = []
    for (method, dataset, shots, classes, _), runs in groups.items():
        named = {
            k: 0 for run in runs for t in run["tests"] for k, m in t.get("extra", {}).items() if isinstance(m, dict)
        }
        for extra in [None, *(named if extras else [])]:
            head = {"method": f"{method}: {extra}" if extra else method, "baseline": baseline_name(runs[0])}
            held_out = runs[0]["settings"].get("test_domain")  # PACS is four tasks, one for each domain held out
            shown = f"{dataset} ({', '.join(held_out)})" if held_out else dataset
            head |= {"dataset": shown, "shots": shots, "classes": classes, "model": runs[0].get("model", "")}
            tests = collections.defaultdict(lambda: {kind: {} for kind in KINDS})
            for run in runs:
                for label, row in scores(run, metric, extra).items():
                    for kind, value in row.items():
                        tests[label][kind][run["seed"]] = value
            foreign = [test["dataset"] for test in runs[0]["tests"] if test["dataset"] != dataset]
            rows += [head | {"test": t, "values": v, "foreign": foreign, "of": [dataset]} for t, v in tests.items()]
    gathered = collections.defaultdict(list)
    for row in rows:
        gathered[row["method"], row["shots"], row["classes"], row["test"], tuple(row["foreign"])].append(row)
    for group in gathered.values():
        if len(group) > 1:
            values = {}
            for kind in KINDS:  # a seed's mean over the datasets; of seeds that all datasets have
                seeds = set.intersection(*(set(row["values"][kind]) for row in group))
                values[kind] = {s: statistics.fmean(row["values"][kind][s] for row in group) for s in sorted(seeds)}
            of = sorted(row["dataset"] for row in group)
            rows.append(group[0] | {"dataset": f"mean of {len(group)}", "values": values, "of": of})
    return rows


def mean_std(values) -> tuple[float | None, float | None, int]:
    """(mean, sample standard deviation, n); None where there is nothing to tell it from."""
    n = len(values := list(values))
    return statistics.fmean(values) if n else None, statistics.stdev(values) if n > 1 else None, n


def paired(a: dict, b: dict) -> tuple[float | None, float | None, int]:
    """(mean, standard error, n) of the differences a - b over the seeds that both have."""
    mean, std, n = mean_std(a[seed] - b[seed] for seed in sorted(set(a) & set(b)))
    return mean, std / math.sqrt(n) if std is not None else None, n


def pair_rows(rows: list[dict], a: str, b: str) -> list[dict]:
    """{dataset, shots, classes, test, n, mean, se} of method a minus method b, wherever there are both. zero-shot and a
    run's baseline count as methods, unless there are runs of that name."""
    series = collections.defaultdict(dict)
    for kind, name in (("tuned", "method"), ("baseline", "baseline"), ("zero_shot", None)):
        for row in rows:
            key = (row["dataset"], row["shots"], row["classes"], row["test"], *row["of"])
            if row["values"][kind]:
                series[row[name] if name else "zero-shot"].setdefault(key, row["values"][kind])
    for name in (a, b):
        if name not in series:
            raise UserError(f"--pair {name!r}: no such method here; there are {', '.join(sorted(series))}")
    fields = ("dataset", "shots", "classes", "test", "mean", "se", "n")
    pairs = [(key, paired(series[a][key], series[b][key])) for key in series[a] if key in series[b]]
    return [dict(zip(fields, (*key[:4], *numbers))) for key, numbers in pairs]


# ----------------------------------------------------------------------------------------------------------------------
# 3. The command
# ----------------------------------------------------------------------------------------------------------------------
def cell(mean: float | None, spread: float | None = None, digits: int = 2, sign: str = "") -> str:
    text = "" if mean is None else f"{mean:{sign}.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def markdown(header: list[str], lines: list[list]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |" for line in table)


def table_lines(rows: list[dict], metric: str) -> list[list]:
    """The cells of tabulate's rows: one line each."""
    lines, digits = [], DIGITS[metric]
    for row in rows:
        zero_shot, baseline, tuned = (row["values"][kind] for kind in KINDS)
        key = (row["method"], row["model"].removesuffix("-quickgelu"), row["shots"], row["classes"])
        figure = PAPER.get(key, {}).get((row["dataset"], row["test"]), ("", "")) if metric == "accuracy" else ("", "")
        few = f", n = {len(baseline)}" if len(baseline) != len(tuned) else ""
        beside = cell(*mean_std(baseline.values())[:2], digits) + (f" ({row['baseline']}{few})" if baseline else "")
        head = [row[name] for name in ("method", "dataset", "shots", "classes", "test")]
        means = [cell(*mean_std(values.values())[:2], digits) for values in (tuned, zero_shot)]
        difference = cell(*paired(tuned, baseline)[:2], digits, "+")
        lines.append([*head, len(tuned), *means, beside, difference, *figure])
    return lines


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="result.json files, or folders that hold them at any depth")
    add("--metric", choices=list(DIGITS), default="accuracy", help="accuracy (%%), nll (nats) or ece (%%) [accuracy]")
    add("--by", nargs="+", default=[], metavar="SETTING", help="also tell runs apart by settings, such as lam")
    add("--extra", action="store_true", help="also rows for the predictions in the tests' extra (ensembles, ...)")
    add("--allow", nargs="+", default=[], metavar="FIELD", help="let it differ within a mean, such as versions.torch")
    add("--pair", nargs=2, metavar=("A", "B"), help="print A - B, seed by seed, instead; quote names with blanks")
    add("--csv", action="store_true", help="comma-separated values in place of Markdown")
    add("--plot", metavar="FILE", help="also draw a picture, .png or .svg")
    kinds = ["few-shot", "learning", "ood", "reliability"]
    add("--kind", choices=kinds, default="few-shot", help="of picture [few-shot]")
    return parser


def make_plot(path: str, kind: str, groups: dict[tuple, list[dict]], extras: bool) -> None:
    runs = [(key[0], baseline_name(run), run) for key, group in groups.items() for run in group]
    makers = {"few-shot": plots.few_shot_panels, "ood": plots.ood_panels, "learning": plots.learning_panels}
    what = tabulate(groups, "accuracy", extras) if kind in ("few-shot", "ood") else runs
    panels = makers.get(kind, plots.reliability_panels)(what)
    if not panels:
        needs = {"learning": "--eval-every", "ood": "out-of-distribution tests", "reliability": "predictions.npz"}
        raise UserError(f"--kind {kind}: none of these runs has {needs.get(kind, 'a number of shots')}")
    try:
        plots.draw(path, panels)
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}; give a .png or .svg in a folder that exists") from error


def main(argv: list[str] | None = None) -> list[dict]:
    """Print the table → its rows."""
    args = build_parser().parse_args(argv)
    groups = check(read_runs(args.runs), args.by, args.allow)
    rows = tabulate(groups, args.metric, args.extra)
    header = ["method", "dataset", "shots", "classes", "test", "n", "mean ± std", "zero-shot", "baseline",
              "mean - baseline ± standard error", "paper", "paper's protocol"]  # fmt: skip
    title = "mean ± sample standard deviation over n seeds"
    if args.pair:
        rows = pair_rows(rows, *args.pair)
        title = f"{args.pair[0]} - {args.pair[1]}, mean ± standard error of n differences seed by seed"
        header, digits = ["dataset", "shots", "classes", "test", "n", "difference"], DIGITS[args.metric]
        lines = [[*(row[k] for k in header[:-1]), cell(row["mean"], row["se"], digits, "+")] for row in rows]
    else:
        lines = table_lines(rows, args.metric)
    if args.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *lines])
    else:
        print(f"{args.metric}, {title}\n\n{markdown(header, lines)}")
    if args.plot:
        make_plot(args.plot, args.kind, groups, args.extra)
    return rows


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
