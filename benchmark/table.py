"""Tables and plots from run folders: mean ± standard deviation over seeds, and paired differences.

    python benchmark/table.py runs/few-shot/*                       # with means over datasets
    python benchmark/table.py runs/few-shot/* --papers              # beside published figures
    python benchmark/table.py runs/few-shot/* --plot accuracy.svg
    python benchmark/table.py --list runs.txt                       # what of it is finished

A row is of runs that are equal in all that a figure comes from (settings, CLIP, what was trained,
test images) but the seed and its draw. What differs in more gets a row of its own, which says in
what. "mean of N datasets" is first over datasets for each seed, then over seeds. "H" is the mean of
each run's H; "H of means" is the papers': of the mean accuracies, over seeds and datasets.
"""

import io
import itertools
import json
import shlex
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the scripts
import common
import data
import prograd
import proreg
import vpt
from data import require

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
# What may differ between the runs of a row.
FREE = {"seed", "out_dir", "resume", "eval", "workers", "cache_dir", "data_root", "download"}
FREE |= {"device", "memory_gb", "compare", "eval_every"}
# Of "training" in result.json: what a draw decides, and what the settings say, too.
DRAWN = {"run", "seed", "split", "template", "precision"}
MEASURES = {"accuracy": "accuracy", "class-mean": "mean_class_accuracy", "nll": "nll", "ece": "ece",
            "H": "accuracy"}  # fmt: skip
UNITS = {"nll": "NLL, nats", "ece": "ECE, %", "class-mean": "mean of classes, %", "H": "H, %"}
H = ("H", "H of means")
SIDES = ("in distribution", "the others' mean")  # that H is of; not shown
ELEVEN = ["imagenet", "fgvc_aircraft", *(k for k, source in data.SOURCES.items() if source.split)]


@dataclass
class Row:
    """Runs that are averaged; or a mean of such rows over datasets."""

    name: str  # of the method
    baseline: str | None
    dataset: str  # or "mean of N"
    shots: int | str
    results: dict[int, dict] = field(default_factory=dict)  # {seed: result.json}
    parts: list["Row"] = field(default_factory=list)  # of a mean: the rows
    label: str = ""
    figures: dict[tuple, dict] = field(default_factory=dict)  # {(test set, column): {seed: value}}


def read_rows(folders: list[str], measure: str) -> list[Row]:
    """UserError for runs that are not finished or do not say what they come from, and for a seed
    twice in a row."""
    rows = {}
    for folder in folders:
        path = Path(folder, "result.json")
        require(path.exists(), f"{folder} is not finished: there is no {path}")
        result = data.read_json(path)
        told = {"clip", "training", "name"} <= result.keys()
        require(told, f"{folder} is of an older version and does not say what its figures are of")
        settings, seed = result["settings"], result["training"]["seed"]
        name = result["name"] if settings.get("epochs", 1) else "untrained start"
        row = Row(name, result["baseline_name"], settings["dataset"], settings["shots"])
        row = rows.setdefault(json.dumps(identity(result), sort_keys=True), row)
        twice = f"{folder} has the training or the seed ({seed}) of another run with equal settings"
        require(seed not in row.results, twice)
        row.results[seed] = result
    for key, row in rows.items():
        kind = [row.name, row.dataset, row.shots]
        alike = [json.loads(k) for k, o in rows.items() if [o.name, o.dataset, o.shots] == kind]
        row.label = " ".join(["{} {} {} shots".format(*kind), *differing(json.loads(key), alike)])
        row.figures = figures_of(row.results, MEASURES[measure])
    return list(rows.values())


def identity(result: dict) -> dict:
    """All that a figure comes from, but the seed and its draw."""
    settings = result["settings"]
    kept = {key: value for key, value in settings.items() if key not in FREE}
    trained = {key: value for key, value in result["training"].items() if key not in DRAWN}
    kept |= {f"trained with {k}": v for k, v in trained.items() if settings.get(k) != v}
    kept |= {f"images of {test_name(test, '')}": test["images"] for test in result["tests"]}
    return kept | {"baseline": result["baseline_name"], "clip": result["clip"]}


def test_name(test: dict, own: str) -> str:
    """What a test set is called; the dataset `own` goes without saying."""
    dataset = "" if test["dataset"] == own else test["dataset"]
    return " ".join(filter(None, [dataset, test["domain"], test["classes"]]))


def differing(what: dict, others: list[dict]) -> list[str]:
    """ "key value" of what is not equal in all; a test set that others lack goes without saying."""

    def differs(key: str, other: dict) -> bool:
        return other.get(key) != what[key] and (key in other or not key.startswith("images"))

    keys = [key for key in what if any(differs(key, other) for other in others)]
    return [f"{key} {str(what[key])[: 40 if ' ' in str(what[key]) else 12]}" for key in keys]


def figures_of(results: dict[int, dict], measure: str) -> dict[tuple, dict]:
    found = defaultdict(dict)
    for seed, result in results.items():
        first, *rest = result["tests"]
        away = [test for test in rest if test["dataset"] != first["dataset"]]
        own = [test for test in rest if test["dataset"] == first["dataset"]]
        new = [test for test in own if test["classes"] == "new" and not test["domain"]]
        means = {f"mean of {len(away)} others": away, SIDES[1]: new or own, SIDES[0]: [first]}
        means |= {test_name(test, first["dataset"]): [test] for test in result["tests"]}
        for kind in common.measures(first):
            for name, tests in means.items():
                key = "accuracy" if name in SIDES else measure
                if tests:
                    values = [common.measures(test)[kind][key] for test in tests]
                    found[name, kind][seed] = statistics.mean(values)
            if kind in result["harmonic_mean"]:
                found["H", kind][seed] = result["harmonic_mean"][kind]
    return found


# Means over datasets ------------------------------------------------------------------------------
def variant(row: Row) -> dict:
    """What must be equal over datasets: the settings that are not their dataset's own default."""
    (result, *_) = (row.parts or [row])[0].results.values()
    settings, trained = result["settings"], result["training"]
    usual = common.DEFAULTS | defaults_of(settings) | {"dataset": settings["dataset"]}
    kept = {k: v for k, v in settings.items() if k not in FREE and v != usual.get(k, ...)}
    if trained["dataset"] != settings["dataset"]:
        kept["trained on"] = trained["dataset"]
    return kept | {"name": row.name, "shots": row.shots, "baseline": row.baseline,
                   "clip": result["clip"]}  # fmt: skip


def defaults_of(settings: dict) -> dict:
    """What the method's script takes where no flag says otherwise; {} of another's script."""
    script = SCRIPTS.get(settings["method"])
    return script.defaults(settings) if script else {}


def mean_rows(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """A row for each set of rows that differ in the dataset alone, and what is missing in it."""
    means, notes = [], []
    for group in data.group(rows, lambda row: json.dumps(variant(row), sort_keys=True)).values():
        names = [row.dataset for row in group]
        if len(set(names)) < 2:
            continue
        first = group[0]
        mean = Row(first.name, first.baseline, f"mean of {len(group)}", first.shots, {}, group)
        alike = [variant(m) for m in means if (m.name, m.shots) == (mean.name, mean.shots)]
        words = [f"mean of {len(group)} datasets: {mean.name} {mean.shots} shots"]
        mean.label = " ".join(words + differing(variant(mean), alike))
        seeds = set.intersection(*(set(row.results) for row in group))
        every = set.union(*(set(row.results) for row in group))
        lacks = [f"seed {seed} of {row.dataset} (left out of all)"
                 for row in group for seed in sorted(every - set(row.results))]  # fmt: skip
        if set(names) < set(ELEVEN):
            rest = [name for name in ELEVEN if name not in names]
            lacks.append(f"of the papers' eleven {', '.join(rest)}")
        notes += [f"{mean.label}: missing: {', '.join(lacks)}"] if lacks else []
        if len(set(names)) < len(names):
            notes.append(f"{mean.label}: none, since a dataset is there twice")
        elif seeds:
            mean.results = {seed: first.results[seed] for seed in sorted(seeds)}
            for key in first.figures:
                columns = [row.figures.get(key, {}) for row in group]
                if all(seeds <= set(column) for column in columns):
                    values = {s: statistics.mean(c[s] for c in columns) for s in sorted(seeds)}
                    mean.figures[key] = values
            means.append(mean)
    return means, notes


def add_means_of_h(row: Row) -> None:
    """The papers' H: of accuracies that are averaged first, over seeds and datasets."""
    for kind in [kind for test, kind in row.figures if test == "H"]:
        a, b = (statistics.mean(row.figures[side, kind].values()) for side in SIDES)
        row.figures["H of means", kind] = {0: common.harmonic_mean(a, b)}


# The table ----------------------------------------------------------------------------------------
def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; of one value itself."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def difference(values: list[float], digits: int = 1) -> str:
    """Mean of paired differences ± its standard error."""
    mean = f"{statistics.mean(values):+.{digits}f}"
    return f"{mean} ± {standard_error(values):.{digits}f}" if len(values) > 1 else mean


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def title_of(row: Row, kind: str) -> str:
    titles = {"zero_shot": "zero-shot", "baseline": row.baseline, "tuned": row.name}
    return titles.get(kind) or kind.replace("_", " ")


def table(rows: list[Row], measure: str) -> list[list[str]]:
    """Header and a line for each row and column: mean ± std over seeds."""
    lines, digits = [], 3 if measure == "nll" else 1
    tests = [t for t in dict.fromkeys(t for row in rows for t, _ in row.figures) if t not in SIDES]
    if measure != "accuracy":
        tests = [test for test in tests if (test in H) == (measure == "H")]
    for row in rows:
        kinds = list(dict.fromkeys(kind for _, kind in row.figures))
        head = [row.label, str(len(row.results))]
        for kind in kinds:
            found = [list(row.figures.get((test, kind), {}).values()) for test in tests]
            cells = [spread(values, digits) if values else "" for values in found]
            lines.append([*head, title_of(row, kind), *cells])
        if "baseline" in kinds:
            pairs = [[row.figures.get((test, kind), {}) for kind in ("tuned", "baseline")]
                     for test in tests]  # fmt: skip
            found = [[a[seed] - b[seed] for seed in a] for a, b in pairs]
            cells = [difference(values, digits) if values else "" for values in found]
            lines.append([*head, f"{row.name} − {row.baseline}", *cells])
    return [[UNITS.get(measure, "accuracy, %"), "seeds", "", *tests], *lines]


def markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def list_runs(file: str) -> list[str]:
    """Print which lines of a list of commands are finished, begun, missing → the folders of the
    finished ones."""
    states = {"finished": {}, "begun": {}, "missing": {}}
    for number, line in enumerate(data.read_text(Path(file)).splitlines(), 1):
        _, _, words = line.partition(" --resume ")
        require(words, f"{file}, line {number}: there is no --resume RUN")
        folder = Path(shlex.split(words)[0])
        done = (folder / "result.json").exists()
        states["finished" if done else "begun" if folder.exists() else "missing"][number] = folder
    for state, found in states.items():
        print(f"{state}: {len(found)}{': lines ' * bool(found)}{','.join(map(str, found))}")
    return [str(folder) for folder in states["finished"].values()]


# Plots --------------------------------------------------------------------------------------------
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9".split()  # Okabe's and Ito's
MARKERS = "osD^vPX"
BARS = "bars: ± standard error over seeds"


def draw(panels: dict, path: Path, x_title: str, y_title: str, note=BARS, shots=False) -> None:
    """{panel: {line: [(x, y, standard error of y, of x), ...]}} to FILE.{svg,png,pdf}. shots: x by
    powers of 2. A line's name stands at its end in the last panel."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise data.UserError("plots need matplotlib: pip install matplotlib") from error
    kinds = (".svg", ".png", ".pdf")
    require(path.suffix in kinds, f"{path}: a plot is FILE{', FILE'.join(kinds)}")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    names = list(dict.fromkeys(["zero-shot", *itertools.chain(*panels.values())]))
    size = (6.8, 3.8) if len(panels) == 1 else (2.6 * across + 1.6, 2.3 * down + 0.6)
    style = {"svg.hashsalt": "table", "svg.fonttype": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context(style | {"grid.alpha": 0.3}):
        figure = Figure(size, layout="constrained", dpi=150)
        every = figure.subplots(down, across, squeeze=False).flatten()
        for axes, (title, lines) in zip(every, panels.items()):
            for name, points in lines.items():
                i = names.index(name)
                x, y, y_error, x_error = zip(*points)
                look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
                look |= {"linestyle": "-" if i < len(COLOURS) else "--", "markersize": 4}
                axes.errorbar(x, y, y_error, x_error, capsize=2, elinewidth=0.8, **look)
            axes.set_title(title, fontsize=9)
            if shots:
                xs = sorted({point[0] for points in lines.values() for point in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(xs, [f"{x:g}" for x in xs], minor=False)
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        name_lines(every[len(panels) - 1], list(panels.values())[-1], names)
        figure.supxlabel(f"{x_title}\n({note})" if note else x_title, fontsize=9)
        figure.supylabel(y_title, fontsize=9)
        buffer = io.BytesIO()
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
        figure.savefig(buffer, format=path.suffix[1:], metadata=dates[path.suffix])
    data.write(path, buffer.getvalue())


def name_lines(axes, lines: dict, names: list[str]) -> None:
    """Names right of the axes, each at the height of its line's last point, or as near to it as
    the others leave room, with a thin line to the point."""
    low, high = axes.get_ylim()
    heights = {name: (points[-1][1] - low) / (high - low) for name, points in lines.items()}
    order = sorted(heights, key=heights.get)
    gap = 0.8 / max(10, len(order))
    for _ in range(200):  # neighbours that are too near push each other away
        for below, above in itertools.pairwise(order):
            lack = max(0, gap - (heights[above] - heights[below])) / 2
            heights[below] -= lack
            heights[above] += lack
    for name, points in lines.items():
        colour = COLOURS[names.index(name) % len(COLOURS)]
        thin = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 4}
        axes.annotate(name, points[-1][:2], (1.04, heights[name]), textcoords="axes fraction",
                      color=colour, va="center", arrowprops=thin)  # fmt: skip


def against_shots(rows: list[Row], measure: str) -> dict:
    """{dataset or mean: {line: points}} of the first test set, or of H, for `draw`. A line joins
    rows that differ in their shots alone."""
    panels = defaultdict(lambda: defaultdict(dict))
    few = [row for row in rows if row.shots != "all"]
    require(few, "--plot draws accuracy against shots: name runs of few shots")
    for row in sorted(few, key=lambda row: row.shots):
        test = "H" if measure == "H" else next(test for test, _ in row.figures if test not in SIDES)
        like = variant(row) | {"shots": "", "name": "", "baseline": ""}
        own = {"zero_shot": {"clip": like["clip"]}, "baseline": like | {"beside": row.name}}
        for kind in ("zero_shot", "baseline", "tuned"):
            if values := list(row.figures.get((test, kind), {}).values()):
                key = title_of(row, kind), json.dumps(own.get(kind, like), sort_keys=True)
                point = (row.shots, statistics.mean(values), standard_error(values), 0.0)
                panels[row.dataset][key][row.shots] = point
    keys = list(dict.fromkeys(key for lines in panels.values() for key in lines))
    alike = data.group(keys, lambda key: key[0])
    names = {}
    for title, what in keys:
        more = differing(json.loads(what), [json.loads(other) for _, other in alike[title]])
        names[title, what] = " ".join([title, *more])
    return {panel: {names[key]: list(line.values()) for key, line in lines.items()}
            for panel, lines in panels.items()}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", help="folders of finished runs")
    parser.add_argument("--list", metavar="FILE", help="of commands: which are finished")
    parser.add_argument("--measure", choices=MEASURES, default="accuracy")
    parser.add_argument("--papers", action="store_true", help="published figures beside them")
    parser.add_argument("--plot", metavar="FILE", help="draw it against shots: .svg, .png or .pdf")
    args = parser.parse_args(argv)
    folders = args.runs + (list_runs(args.list) if args.list else [])
    require(folders or args.list, "name folders of finished runs, or --list FILE")
    rows = read_rows(folders, args.measure)
    means, notes = mean_rows(rows)
    rows += means
    for row in rows:
        add_means_of_h(row)
    lines = table(rows, args.measure)
    if rows:
        print("\n".join([markdown(lines), *[f"note: {note}" for note in notes]]))
    if args.papers:
        import papers

        require(args.measure == "accuracy", "--papers has accuracies: leave out --measure")
        print("\n".join(["", *papers.beside(rows)]))
    if args.plot:
        what = lines[0][0] if args.measure == "H" else f"{lines[0][0]} ({lines[0][3]})"
        draw(against_shots(rows, args.measure), Path(args.plot), "shots", what, shots=True)


if __name__ == "__main__":
    data.run(main)
