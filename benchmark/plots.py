"""The pictures of table.py and toy_study.py: runs and rows go in, panels come out, draw() makes one figure of them.

Readable in print and by the colour-blind: lines differ in colour (Okabe and Ito's), marker and dash.
"""

import collections
import json
import re
import statistics
from pathlib import Path

LOOKS = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."), ("#CC79A7", "D", ":"),
         ("#E69F00", "v", "-"), ("#56B4E9", "P", "--"), ("#000000", "X", "-."), ("#999999", "<", ":")]  # fmt: skip


def draw(path: str | Path, panels: list[dict]) -> None:
    """Write one figure. A panel: {title, x, y, lines: {name: [(x, y, error or None), ...]}, log: shots on the x axis,
    diagonal: where confidence is accuracy}. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "table", "axes.grid": True,
                                "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})  # fmt: skip
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))  # one look in all panels
    size = (4.2 * len(panels), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels):
        for name, points in panel["lines"].items():
            color, marker, dash = LOOKS[names.index(name) % len(LOOKS)]
            x, y, error = zip(*points)
            error = [e or 0 for e in error] if any(error) else None
            style = {"color": color, "linestyle": dash, "linewidth": 1.4, "markersize": 5, "capsize": 2}
            ax.errorbar(x, y, error, label=name, marker=marker, markevery=max(1, len(x) // 12), **style)
        if panel.get("diagonal"):
            ax.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        if panel.get("log"):
            ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
            ax.set_xscale("log", base=2)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set(title=panel["title"], xlabel=panel["x"], ylabel=panel["y"])
        ax.legend(fontsize=7.5)
    figure.savefig(path, dpi=200, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    plt.close(figure)


def summary(values) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def kinds_of(row: dict) -> list[tuple[str, dict]]:
    """(name, {seed: value}) of a table row's zero-shot, baseline and method, as far as it has them."""
    names = {"zero_shot": "zero-shot", "baseline": row["baseline"], "tuned": row["method"]}
    return [(name, row["values"][kind]) for kind, name in names.items() if row["values"][kind]]


# ----------------------------------------------------------------------------------------------------------------------
# Panels from the rows of table.tabulate
# ----------------------------------------------------------------------------------------------------------------------
def few_shot_panels(rows: list[dict]) -> list[dict]:
    """Accuracy against shots: the mean over datasets where there are several, else a panel for each dataset."""
    rows = [row for row in rows if row["test"] in ("all", "H") and row["shots"] != "all"]
    panels = {}
    for row in sorted([row for row in rows if row["dataset"].startswith("mean of ")] or rows, key=lambda r: r["shots"]):
        y, x = "accuracy %" if row["test"] == "all" else "H %", "shots (training images a class)"
        panel = {"title": row["dataset"], "x": x, "y": y, "log": True, "lines": {}}
        panel = panels.setdefault((row["dataset"], row["test"]), panel)
        for name, values in kinds_of(row):
            line, (mean, std) = panel["lines"].setdefault(name, []), summary(values.values())
            if row["shots"] not in [point[0] for point in line]:
                line.append((row["shots"], mean, std if name != "zero-shot" else None))
    return list(panels.values())


def ood_panels(rows: list[dict]) -> list[dict]:
    """Mean out-of-distribution against in-distribution accuracy. "ProReg, alpha 2" and "ProReg, alpha 4" are points of
    one line."""
    table, panels = collections.defaultdict(dict), {}
    for row in rows:
        if row["test"] in ("ID", "mean OOD"):
            table[row["dataset"], row["method"], row["shots"]][row["test"]] = row
    for (dataset, method, _), pair in table.items():
        panel = {"title": dataset, "x": "in-distribution accuracy %", "y": "mean out-of-distribution accuracy %"}
        lines = panels.setdefault(dataset, panel | {"lines": {}})["lines"]
        for (name, values), (_, others) in zip(kinds_of(pair["ID"]), kinds_of(pair["mean OOD"])):
            family = re.sub(r",.*| [\d.]+$", "", name.split(": ")[-1])
            if name == method or family not in lines:
                lines.setdefault(family, []).append((summary(values.values())[0], *summary(others.values())))
    return list(panels.values())


# ----------------------------------------------------------------------------------------------------------------------
# Panels from runs: (method's name, baseline's name, run). A run of toy_study.py's .jsonl carries what else is in files.
# ----------------------------------------------------------------------------------------------------------------------
def curves(run: dict, key: str = "val_accuracy") -> dict[str, dict[int, float]]:
    """{kind: {epochs done: value}} of a run and its baseline, from metrics.jsonl."""
    if key in run.get("curves", {}):
        return {kind: {int(epoch): v for epoch, v in line.items()} for kind, line in run["curves"][key].items()}
    found = {}
    for kind, folder in (("baseline", run["folder"] / "baseline"), ("tuned", run["folder"])):
        if (folder / "metrics.jsonl").exists():
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            found[kind] = {line["epoch"] + 1: line[key] for line in lines if line.get(key) is not None}
    return {kind: line for kind, line in found.items() if line}


def learning_panels(runs: list[tuple[str, str, dict]], key="val_accuracy", y="validation accuracy %") -> list[dict]:
    """A metric of metrics.jsonl against epochs: the mean over seeds and datasets."""
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for method, baseline, run in runs:
        for kind, points in curves(run, key).items():
            for epoch, value in points.items():
                values[method if kind == "tuned" else baseline][epoch].append(value)
    lines = {name: [(e, statistics.fmean(v), None) for e, v in sorted(line.items())] for name, line in values.items()}
    return [{"title": "learning curves", "x": "epochs", "y": y, "lines": lines}] if lines else []


def reliability(run: dict) -> dict[str, dict[str, list]]:
    """{test: {kind: 15 bins of [images, sum of confidence, right]}} of a run and its baseline, from predictions.npz."""
    if "reliability" in run:
        return run["reliability"]
    import numpy as np

    found = collections.defaultdict(dict)
    for kind, folder, key in (
        ("zero_shot", "", "zero_shot"),
        ("baseline", "baseline", "tuned"),
        ("tuned", "", "tuned"),
    ):
        if (path := run["folder"] / folder / "predictions.npz").exists():
            with np.load(path) as file:
                for i, label in enumerate(run["labels"]):
                    p, labels = file[f"{i}/{key}"], file[f"{i}/labels"]
                    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
                    bins = np.minimum((confidence * 15).astype(int), 14)
                    sums = [np.bincount(bins, weights, 15) for weights in (None, confidence, right)]
                    found[label][kind] = np.stack(sums, axis=1).round(2).tolist()
    return found


def reliability_panels(runs: list[tuple[str, str, dict]]) -> list[dict]:
    """Accuracy against confidence in 15 bins, all runs of a method pooled; bins of under 10 images are left out."""
    pooled = collections.defaultdict(lambda: collections.defaultdict(list))
    for method, baseline, run in runs:
        names = {"zero_shot": "zero-shot", "baseline": baseline, "tuned": method}
        for test, kinds in reliability(run).items():
            for kind, bins in kinds.items():
                pooled[test][names[kind]].append(bins)
    panels = []
    for test, methods in pooled.items():
        lines = {}
        for name, tables in methods.items():
            sums = [[sum(column) for column in zip(*rows)] for rows in zip(*tables)]
            lines[name] = [(confidence / n, right / n, None) for n, confidence, right in sums if n >= 10]
        panels.append({"title": test, "x": "confidence", "y": "share that is right", "diagonal": True})
        panels[-1]["lines"] = {name: line for name, line in lines.items() if line}
    return panels
