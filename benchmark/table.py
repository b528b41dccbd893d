"""Tables and plots from run folders: mean ± standard deviation over seeds, and paired differences.

    python benchmark/table.py runs/few-shot/*                       # with means over datasets
    python benchmark/table.py runs/few-shot/* --papers              # beside published figures
    python benchmark/table.py runs/few-shot/* --plot accuracy.svg
    python benchmark/table.py --list runs.txt                       # what of it is finished

A row is of runs that are equal in all that a figure comes from (settings, CLIP, what was trained,
test images) but the seed and its draw. benchmark/README.md says what the columns are.
"""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import shlex
import statistics
import sys
from collections import defaultdict
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
DRAWN = {"run", "seed", "split"}  # what a draw decides of "training" in result.json
MEASURES = {  # its key in result.json, and what a table is headed
    "accuracy": ("accuracy", "accuracy, %"), "nll": ("nll", "NLL, nats"), "ece": ("ece", "ECE, %"),
    "class-mean": ("mean_class_accuracy", "mean of classes, %"), "H": ("accuracy", "H, %"),
}  # fmt: skip
SIDES = ("in distribution", "the others' mean")  # columns that H is of
ELEVEN = ["imagenet", "fgvc_aircraft", *(k for k, source in data.SOURCES.items() if source.split)]


@dataclasses.dataclass
class Row:
    """Runs that are averaged; or a mean of such rows over datasets."""

    dataset: str  # or "mean of N datasets"
    what: dict  # all that its figures come from, but the draw; of a mean, but the dataset
    example: dict  # result.json of one of its runs
    figures: dict[tuple, dict]  # {(column, "zero-shot" or a method or ..): {seed: value}}
    seeds: list[int]
    parts: list["Row"] = ()  # of a mean: the rows
    lacks: list[str] = ()  # what is missing in a mean
    words: list[str] = ()  # what is not equal in other rows of the method
    label: str = ""


def read_rows(folders: list[str], measure: str) -> list[Row]:
    """UserError for runs that do not say what they come from, and for a seed twice in a row."""
    rows = {}
    for folder in folders:
        path = Path(folder, "result.json")
        require(path.exists(), f"{folder} is not finished: there is no {path}")
        result = data.read_json(path)
        require({"clip", "training", "name"} <= result.keys(), f"{folder} is of an older version")
        differ = result["name"] != result["baseline_name"]
        require(differ, f"{folder}: method and baseline are both called {result['name']}")
        what, dataset = identity(result), result["settings"]["dataset"]
        row = rows.setdefault(as_text(what), Row(dataset, what, result, defaultdict(dict), []))
        seed = result["training"]["seed"]
        twice = f"{folder} has the training or the seed ({seed}) of another run with equal settings"
        require(seed not in row.seeds, twice)
        row.seeds.append(seed)
        for key, value in figures_of(result, MEASURES[measure][0]).items():
            row.figures[key][seed] = value
    return label([*rows.values()])


def as_text(what: dict) -> str:
    return json.dumps(what, sort_keys=True)


def identity(result: dict) -> dict:
    """All that a figure comes from, but the seed and its draw; of settings what is not default."""
    settings = result["settings"]
    usual = defaults_of(settings | {"dataset": result["training"]["dataset"]})
    what = {"name": result["name"], "dataset": settings["dataset"], "shots": settings["shots"]}
    what |= {k: v for k, v in settings.items() if k not in FREE and v != usual.get(k, ...)}
    for key, value in result["training"].items():
        if key not in DRAWN and value != settings.get(key):
            what[f"trained with {key}"] = value
    for test in result["tests"]:
        what[f"images of {test['dataset']} {test_name(test)}"] = test["images"]
    return what | {"baseline": result["baseline_name"], "clip": result["clip"]}


def defaults_of(settings: dict) -> dict:
    script = SCRIPTS.get(settings["method"])  # none of a method of one's own
    return common.DEFAULTS | (script.defaults(settings) if script else {})


def test_name(test: dict) -> str:
    return f"{test['domain']} {test['classes']}".strip()


def label(rows: list[Row]) -> list[Row]:
    """Call each row by its method, dataset and shots, and what is not equal in all of the method.
    That others lack a test set goes without saying, that it was trained elsewhere never does."""
    for row in rows:
        name, shots = row.what["name"], row.what["shots"]
        others = [other.what for other in rows if other.what["name"] == name]
        row.words = []
        for key in row.what.keys() - {"dataset", "shots"}:
            values = [o.get(key) for o in others if key in o or not key.startswith("images")]
            if key == "trained with dataset" or any(value != row.what[key] for value in values):
                row.words.append(f"{key} {row.what[key]}")
        row.words.sort()
        row.label = ", ".join([name, row.dataset, f"{shots} shots", *row.words])
    return rows


def columns_of(result: dict) -> dict[str, list[dict]]:
    """{column: the test sets whose mean it is}."""
    first, *rest = result["tests"]
    own = [test for test in rest if test["dataset"] == first["dataset"]]
    away = [test for test in rest if test["dataset"] != first["dataset"]]
    new = [test for test in own if test["classes"] == "new" and not test["domain"]]
    domains = [test for test in own if test["domain"] and test["classes"] == first["classes"]]
    found = {test_name(test): [test] for test in [first, *own]}
    found |= {f"{test['dataset']} {test_name(test)}": [test] for test in away}
    if len(away) > 1:
        found[f"mean of {len(away)} others"] = away
    if result["harmonic_mean"]:
        found |= {SIDES[0]: [first], SIDES[1]: new or domains}
    return found


def figures_of(result: dict, measure: str) -> dict[tuple[str, str], float]:
    """{(column, title): the run's figure}."""
    titles = dict(zero_shot="zero-shot", baseline=result["baseline_name"], tuned=result["name"])
    found = {}
    for column, tests in columns_of(result).items():
        key = "accuracy" if column in SIDES else measure
        for kind in common.measures(tests[0]):
            values = [common.measures(test)[kind][key] for test in tests]
            found[column, kind] = statistics.mean(values)
    found |= {("H", kind): h for kind, h in result["harmonic_mean"].items()}
    return {(column, titles.get(kind, kind.replace("_", " "))): value
            for (column, kind), value in found.items()}  # fmt: skip


def finish(row: Row) -> None:
    """Put the papers' H in the place of what it is of, and add paired differences."""
    figures, name, plain = row.figures, row.example["name"], row.example["baseline_name"]
    for title in [title for column, title in figures if column == "H"]:
        a, b = (statistics.mean(figures.pop((side, title)).values()) for side in SIDES)
        figures["H of means", title] = {0: common.harmonic_mean(a, b)}
    for column in [column for column, title in figures if title == plain]:
        base = figures[column, plain]
        pairs = {seed: value - base[seed] for seed, value in figures[column, name].items()}
        figures[column, f"{name} − {plain}"] = pairs


# Means over datasets ------------------------------------------------------------------------------
def variant(row: Row) -> dict:
    """What must be equal over datasets: all that is not a dataset's own."""
    own = ("dataset", "images", "trained with template")
    return {key: value for key, value in row.what.items() if not key.startswith(own)}


def mean_rows(rows: list[Row]) -> list[Row]:
    """A row for each set of rows that differ in the dataset alone, of the seeds that all have."""
    means = []
    for parts in data.group(rows, lambda row: as_text(variant(row))).values():
        names = [row.dataset for row in parts]
        if len(set(names)) == 1:
            continue
        every = set.union(*(set(row.seeds) for row in parts))
        seeds = sorted(set.intersection(*(set(row.seeds) for row in parts)))
        if len(set(names)) < len(names):
            print(f"no mean of {', '.join(names)}: one is there twice")
            continue
        mean = dataclasses.replace(parts[0], parts=parts, seeds=seeds, what=variant(parts[0]))
        mean.dataset = f"mean of {len(parts)} datasets"
        mean.figures = {
            key: {seed: statistics.mean(row.figures[key][seed] for row in parts) for seed in seeds}
            for key in parts[0].figures
            if all(key in row.figures for row in parts)
        }
        mean.lacks = [f"seed {seed} of {row.dataset} (left out of all)"
                      for row in parts for seed in sorted(every - set(row.seeds))]  # fmt: skip
        if set(names) < set(ELEVEN):
            lacking = [name for name in ELEVEN if name not in names]
            mean.lacks.append(f"of the papers' eleven {', '.join(lacking)}")
        means.append(mean)
    return label(means)


# The table ----------------------------------------------------------------------------------------
def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error (of one value 0)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def spread(values: list[float], digits: int = 1, paired: bool = False) -> str:
    """Mean ± standard deviation; of paired differences ± standard error; of one value itself."""
    mean, error = mean_and_error(values)
    text = f"{mean:{'+' if paired else ''}.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {error if paired else statistics.stdev(values):.{digits}f}"


def table(rows: list[Row], measure: str) -> list[list[str]]:
    """Header and a line for each row and column: mean ± std over seeds."""
    lines, digits = [], 3 if measure == "nll" else 1
    tests = list(dict.fromkeys(test for row in rows for test, _ in row.figures))
    if measure != "accuracy":
        tests = [test for test in tests if (test in ("H", "H of means")) == (measure == "H")]
    for row in rows:
        for title in dict.fromkeys(title for _, title in row.figures):
            found = [list(row.figures.get((test, title), {}).values()) for test in tests]
            cells = [spread(v, digits, " − " in title) if v else "" for v in found]
            lines.append([row.label, str(len(row.seeds)), title, *cells])
    return [[MEASURES[measure][1], "seeds", "", *tests], *lines]


def markdown(lines: list[list[str]]) -> str:
    rule = ["---"] * len(lines[0])
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def list_runs(file: str) -> list[str]:
    """Print which lines of a list of commands are finished → the folders of these."""
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


# Published figures --------------------------------------------------------------------------------
# A figure of papers.csv stands beside ours where protocol, backbone, method, dataset, classes, test
# set, shots, template and all settings that matter are the paper's; else what differs does.
SHIFTED = {"imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"}
# Settings that a column of papers.csv speaks of, or that change no figure.
SAID = {"dataset", "shots", "classes", "test_on", "template", "model", "pretrained", "paper",
        "precision"} | FREE  # fmt: skip
# Settings that are not the script's defaults. CoOp is λ = 0 from a random start.
OWN = {"CoOp": {"method": "prograd", "lam": 0.0, "init": "random"},
       "ProGrad": {"method": "prograd"}, "VPT": {"method": "vpt"}}  # fmt: skip
UNREAD = {"CoOp": {"rule", "teacher", "temperature", "lam"}}  # settings that it does not use


def place(row: Row, column: str, title: str) -> dict[str, str]:
    """Where in papers.csv a figure of ours stands."""
    tests = columns_of(row.example).get(column, row.example["tests"][:1])  # of H the first
    dataset = row.example["training"]["dataset"]
    test_on = tests[0]["dataset"] if tests[0]["dataset"] != dataset else ""
    if len(tests) > 1:
        test_on = column.removesuffix(" others")
    if row.parts:
        eleven = {part.dataset for part in row.parts} == set(ELEVEN)
        dataset = "mean of 11" if eleven else row.dataset
    classes = "H" if column == "H of means" else tests[0]["classes"]
    return {"method": title, "dataset": dataset, "test_on": test_on, "classes": classes}


def gaps(row: Row, column: str, title: str, paper: dict) -> list[str]:
    """What differs between a figure of ours and a published one."""
    settings, trained = row.example["settings"], row.example["training"]
    local = Path(settings["pretrained"] or "").exists()  # zero-shot tells whose weights it has
    pairs = [
        ("backbone", settings["model"].removesuffix("-quickgelu"), paper["backbone"]),
        ("pretrained", "openai" if local else settings["pretrained"], "openai"),
        ("test_part", settings["test_part"], "test"),
    ]
    tests = columns_of(row.example).get(column, row.example["tests"][:1])
    templates = [(test["dataset"], test["template"]) for test in tests]
    if title != "zero-shot":
        own = trained["template"] or data.SOURCES[trained["dataset"]].template
        templates.append((trained["dataset"], own))
        away = {test["dataset"] for test in row.example["tests"]} - {trained["dataset"]}
        protocol = "base-to-new" if trained["classes"] == "base" else "few-shot"
        if away:
            protocol = "domain-generalisation" if away <= SHIFTED else "cross-dataset"
        pairs += [("protocol", protocol, paper["protocol"])]
        pairs += [("shots", str(trained["shots"]), paper["shots"])]
        usual = defaults_of(settings | {"paper": True, "dataset": trained["dataset"]})
        usual |= OWN.get(paper["method"], {})
        unread = SAID | UNREAD.get(paper["method"], set())
        pairs += [(k, v, usual.get(k)) for k, v in settings.items() if k not in unread]
    for dataset, template in templates:
        own = data.SOURCES[dataset].template if dataset in data.SOURCES else ""
        pairs.append(("template", template, paper["template"].replace("dataset", own)))
    return [f"{what} {ours} (published: {its})" for what, ours, its in pairs if ours != its]


def compare(row: Row, column: str, title: str, published: list[dict]) -> list[tuple]:
    """Lines of the table: a figure of ours beside each published one, or beside what differs."""
    here, where = statistics.mean(row.figures[column, title].values()), place(row, column, title)
    # Zero-shot stands in many rows: without their labels its lines are the same.
    model = f"{row.dataset}, {row.example['settings']['model']}"
    ours = (model if title == "zero-shot" else row.label, f"{title}, {column}", f"{here:.2f}")
    lines, differ = [], []
    for paper in [paper for paper in published if paper | where == paper]:
        gap = [text for part in row.parts or [row] for text in gaps(part, column, title, paper)]
        if gap:
            differ.append("; ".join(dict.fromkeys(gap)))
            continue
        off, note = here - float(paper["accuracy"]), paper["note"]
        if title == "zero-shot" and abs(off) > 0.5:
            note = f"other weights, template or test images? {note}"
        lines.append((*ours, paper["accuracy"], f"{off:+.2f}", paper["source"], note))
    if differ and not lines:
        lines.append((*ours, f"none: {min(differ, key=len)}", "", "", ""))
    return lines


def beside(rows: list[Row]) -> list[str]:
    """Our figures beside the published ones, as lines of text."""
    text = data.read_text(Path(__file__).with_name("papers.csv"))
    published = list(csv.DictReader(text.splitlines()))
    lines = {("", "", "here", "published", "difference", "source", "note"): None}
    for row in rows:
        for column, title in row.figures:
            if column != "H":
                lines |= dict.fromkeys(compare(row, column, title, published))
    return [markdown([*lines]), "Of what is not listed, papers.csv has no figure."]


# Plots --------------------------------------------------------------------------------------------
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9".split()  # Okabe's and Ito's
MARKERS = "osD^vPX*"  # one more, so that both together repeat late
STYLE = {"svg.hashsalt": "table", "svg.fonttype": "none", "font.size": 9, "axes.grid": True,
         "grid.alpha": 0.3, "lines.markersize": 4, "errorbar.capsize": 2}  # fmt: skip


def draw(panels: dict, path: Path, y_title: str, x_title: str = "") -> None:
    """{panel: {line: [(x, y, standard error of y, of x), ...]}} to FILE.{svg,png,pdf}; errors may
    be left out. Without x_title x is the number of shots."""
    require(importlib.util.find_spec("matplotlib"), "plots need matplotlib: pip install matplotlib")
    import matplotlib.figure

    kind = path.suffix[1:]
    require(kind in ("svg", "png", "pdf"), f"{path}: a plot is a FILE.svg, FILE.png or FILE.pdf")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    size = (max(6.8, 2.6 * across + 1.6), max(3.8, 2.3 * down + 0.6))
    names = list(dict.fromkeys(itertools.chain(*panels.values())))
    drawn = {}
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(size, layout="constrained", dpi=150)
        for i, (title, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(down, across, i, title=title)
            for name, points in lines.items():
                k = names.index(name)
                look = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
                drawn[name] = axes.errorbar(*zip(*points), elinewidth=0.8, **look)
            if not x_title:
                xs = sorted({point[0] for points in lines.values() for point in points})
                axes.set_xscale("log", base=2)
                axes.set_xticks(xs, [f"{x:g}" for x in xs])
        figure.legend(drawn.values(), drawn, loc="outside right center", frameon=False)
        x_title = x_title or "training images a class"
        figure.supxlabel(f"{x_title}\n(bars: ± standard error over seeds)", fontsize=9)
        figure.supylabel(y_title, fontsize=9)
        buffer = io.BytesIO()
        undated = {"Date": None} if kind == "svg" else None  # the same bytes each time
        figure.savefig(buffer, format=kind, metadata=undated)
    data.write(path, buffer.getvalue())


def against_shots(rows: list[Row], measure: str) -> dict:
    """{dataset or mean: {line: points}} of the first test set, or of H, for `draw`. A line joins
    rows that differ in their shots alone; of zero-shot, that have the same CLIP."""
    few = [row for row in rows if row.what["shots"] != "all"]
    require(few, "--plot draws accuracy against shots: name runs of few shots")
    panels = {}
    for row in sorted(few, key=lambda row: (len(row.parts), row.what["shots"])):
        column = "H" if measure == "H" else next(iter(row.figures))[0]
        name, plain = row.example["name"], row.example["baseline_name"]
        clip = [word for word in row.words if word.startswith("clip")]
        lines = {"zero-shot": ["zero-shot", *clip], name: [name, *row.words]}
        lines[plain] = [f"{plain} beside {name}", *row.words]
        for title, words in lines.items():
            if values := list(row.figures.get((column, title), {}).values()):
                line, point = " ".join(words), (row.what["shots"], *mean_and_error(values))
                points = panels.setdefault(row.dataset, {}).setdefault(line, [])
                # Zero-shot is there with every method, and is the same.
                other = [y for x, y, *_ in points if x == point[0] and abs(y - point[1]) > 1e-9]
                other = other or (title != "zero-shot" and point[0] in [x for x, *_ in points])
                require(not other, f"--plot: two lines are called {line}: name fewer runs")
                points += [point] if point not in points else []
    require(panels, f"--plot: these runs have no {measure}")
    return panels


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
    if not folders:
        return
    rows = read_rows(folders, args.measure)
    means = mean_rows(rows)
    rows += [mean for mean in means if mean.seeds]
    for row in rows:
        finish(row)
    lines = table(rows, args.measure)
    print(markdown(lines))
    for mean in means:
        if mean.lacks:
            print(f"note: {mean.label}: missing: {', '.join(mean.lacks)}")
    if args.papers:
        require(args.measure == "accuracy", "--papers has accuracies: leave out --measure")
        print("\n".join(["", *beside(rows)]))
    if args.plot:
        what = lines[0][0] if args.measure == "H" else f"{lines[0][0]} ({lines[0][3]})"
        draw(against_shots(rows, args.measure), Path(args.plot), what)


if __name__ == "__main__":
    data.run(main)
