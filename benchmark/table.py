"""Tables and plots from run folders: mean ± standard deviation over seeds, and paired differences.

    python benchmark/table.py runs/prograd-dtd-* runs/vpt-dtd-*
    python benchmark/table.py runs/few-shot/prograd-dtd-* --plot accuracy.svg

Runs that differ in more than their seed are not averaged: they get rows of their own, and if two of
a row share a seed, that is an error. A row's "tuned − baseline" is paired: of the same runs.
"""

import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds data.py
import data
from data import require

# What may differ between the runs of a row.
FREE = {"seed", "out_dir", "resume", "eval", "workers", "cache_dir", "data_root", "download"}
FREE |= {"device", "memory_gb"}
KIND = ("method", "dataset", "shots")  # a row's name; what else differs among such rows follows


def read_results(folders: list[str]) -> dict[str, list[dict]]:
    """{row: results of its seeds}. UserError for unfinished runs and for a seed twice in a row."""
    rows = defaultdict(list)
    for folder in folders:
        path = Path(folder, "result.json")
        require(path.exists(), f"{folder} is not finished: there is no {path}")
        result = data.read_json(path)
        kept = {k: v for k, v in result["settings"].items() if k not in FREE}
        if trained := result["settings"].get("eval"):  # its settings say what it is tested on
            kept["trained on"] = data.read_json(Path(trained, "config.json"))["settings"]["dataset"]
        rows[json.dumps(kept, sort_keys=True)].append(result)
    named = {}
    for key, results in rows.items():
        settings = json.loads(key)
        ((seed, times),) = Counter(r["settings"]["seed"] for r in results).most_common(1)
        what = [settings[k] for k in KIND]
        require(times == 1, f"seed {seed} is there twice in runs with equal settings: {what}")
        alike = [o for o in map(json.loads, rows) if [o[k] for k in KIND] == what]
        more = [f"{k} {v}" for k, v in settings.items() if any(o.get(k) != v for o in alike)]
        named[" ".join(["{} {} {} shots".format(*what), *more])] = results
    return named


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; of one value itself."""
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def difference(values: list[float]) -> str:
    """Mean of paired differences ± its standard error."""
    mean = statistics.mean(values)
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{mean:+.1f}{error}"


def columns(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """{test set or "H": {zero_shot, baseline, tuned, or a name in extra: a value a seed}}."""
    found = defaultdict(lambda: defaultdict(list))
    for result in results:
        for test in result["tests"]:
            own = test["dataset"] == result["tests"][0]["dataset"]
            words = ["" if own else test["dataset"], test["domain"], test["classes"]]
            measures = {k: test[k] for k in ("zero_shot", "baseline", "tuned") if test[k]}
            for kind, m in (measures | test["extra"]).items():
                found[" ".join(filter(None, words))][kind].append(m["accuracy"])
        for kind, value in result["harmonic_mean"].items():
            found["H"][kind].append(value)
    return found


def table(rows: dict[str, list[dict]]) -> list[list[str]]:
    """Header and a line for each row and kind: accuracies in %, mean ± std over seeds."""
    lines = []
    tests = list(dict.fromkeys(t for results in rows.values() for t in columns(results)))
    for name, results in rows.items():
        found = columns(results)
        kinds = list(dict.fromkeys(kind for values in found.values() for kind in values))
        for kind in kinds:
            cells = [spread(found[t][kind]) if found[t][kind] else "" for t in tests]
            lines.append([name, str(len(results)), kind.replace("_", "-"), *cells])
        if "baseline" in kinds:
            pairs = [list(zip(found[t]["tuned"], found[t]["baseline"])) for t in tests]
            cells = [difference([a - b for a, b in pair]) if pair else "" for pair in pairs]
            lines.append([name, str(len(results)), "tuned − baseline", *cells])
    return [["accuracy, %", "seeds", "", *tests], *lines]


def markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


# Plots: small SVGs, written by hand ---------------------------------------------------------------
COLOURS = "#1f77b4 #d62728 #2ca02c #9467bd #ff7f0e #8c564b #e377c2 #7f7f7f #bcbd22 #17becf".split()


def plot(series: dict[str, list[tuple]], x_title: str, y_title: str, log: bool = False) -> str:
    """An SVG of {name: [(x, y, standard error), ...]}, joined by lines; log: x by powers of 2."""
    points = [point for line in series.values() for point in line]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys) - 1, max(ys) + 1
    left, right = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        if log:
            share = math.log2(x / left) / max(1e-9, math.log2(right / left))
        else:
            share = (x - left) / max(1e-9, right - left)
        return 60 + 420 * share, 260 - 220 * (y - low) / (high - low)

    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 310" font-family="sans-serif"'
           ' font-size="12">', '<rect width="640" height="310" fill="white"/>',
           '<path d="M60 40V260H480" fill="none" stroke="black"/>',
           f'<text x="270" y="300" text-anchor="middle">{x_title}</text>',
           f'<text x="60" y="25">{y_title}</text>']  # fmt: skip
    for y in range(int(low) + 1, int(high) + 1, max(1, int((high - low) / 6))):
        out.append(f'<text x="52" y="{place(left, y)[1] + 4:.1f}" text-anchor="end">{y}</text>')
    for x in sorted(set(xs)) if log else (left, right):
        out.append(f'<text x="{place(x, low)[0]:.1f}" y="276" text-anchor="middle">{x:.4g}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _ in line)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, error in line:
            (cx, top), (_, bottom) = place(x, y + error), place(x, y - error)
            out.append(f'<path d="M{cx:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}"/>')
            out.append(f'<circle cx="{cx:.1f}" cy="{place(x, y)[1]:.1f}" r="3" fill="{colour}"/>')
        out.append(f'<text x="492" y="{50 + 18 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*out, "</svg>\n"])


def against_shots(rows: dict[str, list[dict]]) -> dict[str, list[tuple]]:
    """Accuracy of the first test set against shots, a line for each kind."""
    lines = defaultdict(dict)
    for results in rows.values():
        shots = results[0]["settings"]["shots"]
        for kind in ("zero_shot", "baseline", "tuned"):
            values = [r["tests"][0][kind]["accuracy"] for r in results if r["tests"][0][kind]]
            if values and shots != "all":
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
                name = f"{results[0]['settings']['method']} {kind}".replace("_", "-")
                require(shots not in lines[name], f"--plot: {name} is there twice at {shots} shots")
                lines[name][shots] = (shots, statistics.mean(values), error)
    require(lines, "--plot draws accuracy against shots: name runs of few shots")
    return {name: sorted(line.values()) for name, line in lines.items()}


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw accuracy against shots")
    args = parser.parse_args(argv)
    rows = read_results(args.runs)
    print(markdown(table(rows)))
    if args.plot:
        svg = plot(against_shots(rows), "training images a class", "accuracy, %", log=True)
        data.write(Path(args.plot), svg.encode())


if __name__ == "__main__":
    data.run(main)
