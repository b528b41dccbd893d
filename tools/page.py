"""Make one page of a finished run, for a browser: classes, images, sureness, training.

    python tools/page.py RUN [FILE.html]      # RUN/page.html, unless another file is named

The page holds its plots and thumbnails itself: no script, and nothing is loaded from elsewhere.
Images are found again by the run's settings; where they have moved, the page is made without them
and says so. matplotlib draws the plots; page.html is its frame.
"""

import argparse
import base64
import contextlib
import html
import io
import string
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds common.py and data.py
import common
import data
from data import require


# 1. HTML: a cell is HTML already; esc is for whatever a person wrote ------------------------------
def esc(text: object) -> str:
    """Text that stays in its place whatever it holds: <b>, quotes, letters from right to left."""
    return f"<bdi>{html.escape(str(text))}</bdi>"


def table(rows: list[list[str]]) -> str:
    lines = ""
    for row in rows:
        lines += "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n"
    return f"<div class='wide'><table>\n{lines}</table></div>\n"


def figure(content: bytes, kind: str, title: str, text: str = "") -> str:
    """An image inside the page; of an empty one a browser shows the title."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(title)}"/>{text}</figure>\n'


def plot(title: str, x_title: str, lines: dict) -> str:
    """lines: {what the legend calls it: (x values, y values)}"""
    import matplotlib.style
    from matplotlib.figure import Figure

    own = {"svg.fonttype": "none", "text.parse_math": False}  # a name may have dollar signs
    with matplotlib.style.context(["tableau-colorblind10", own]):
        drawing = Figure((3.4, 2.6), layout="constrained")
        axes = drawing.subplots()
        for label, (x, y) in lines.items():
            axes.plot(x, y, ".-", markersize=3, label=label)
        axes.set(title=title, xlabel=x_title)
        axes.legend()
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="svg")
    return figure(buffer.getvalue(), "svg+xml", title)


# 2. READING ---------------------------------------------------------------------------------------
class Column:
    """What zero-shot CLIP, the baseline or the tuned one says of the N images of test set i."""

    def __init__(self, title: str, run: Path, key: str, i: int):
        kept = np.load(run / "predictions.npz")
        self.title = title
        self.predicted = kept[f"{i}/{key}_predicted"]  # labels [N]
        self.confidence = kept[f"{i}/{key}_confidence"]
        self.right = self.predicted == kept[f"{i}/labels"]


class Part:
    """Test set i of a run: N images, C classes, and what each column says of them."""

    def __init__(self, folder: Path, result: dict, i: int, found: dict[str, list[data.Item]]):
        test = result["tests"][i]
        self.title = esc(" ".join([test["dataset"], test["domain"], test["classes"]]))
        self.items = found.get(test["images"], [])
        own = np.load(folder / "predictions.npz")
        self.labels = own[f"{i}/labels"]  # [N]
        self.names = [esc(name.replace("_", " ")) for name in own[f"{i}/classnames"]]  # [C], HTML
        self.zero_shot = Column("zero-shot", folder, "zero_shot", i)
        self.tuned = Column(result["name"], folder, "tuned", i)
        self.columns = [self.zero_shot, self.tuned]
        if test["baseline"]:
            plain = Column(result["baseline_name"], folder / "baseline", "tuned", i)
            self.columns.insert(1, plain)
        self.sureness = {"confidence": self.tuned.confidence}
        for key in ("entropy", "mutual_information"):  # VPT's
            if f"{i}/{key}" in own:
                self.sureness[f"{key.replace('_', ' ')}, nats"] = own[f"{i}/{key}"]


def find_images(result: dict) -> tuple[dict[str, list[data.Item]], str]:
    """{hash of a test set's images: the images}, and why some are not found."""
    settings = argparse.Namespace(**result["settings"] | {"download": False})
    try:
        tests = data.load_task(settings).tests
    except (data.UserError, OSError) as error:
        return {}, str(error)
    return {test.images: test.items for test in tests}, "they are not those that were measured"


# 3. SECTIONS: each shows one test set -------------------------------------------------------------
def classes(part: Part) -> str:
    """Each class's accuracy, sorted by the change, and the pairs most often confused."""
    titles = [esc(column.title) for column in part.columns]
    rows = []
    for k, name in enumerate(part.names):
        images = part.labels == k
        if images.any():
            shares = [100 * column.right[images].mean() for column in part.columns]
            numbers = [f"{share:.1f}" for share in shares]
            rows.append([name, f"{images.sum():,}", *numbers, f"{shares[-1] - shares[0]:+.1f}"])
    rows.sort(key=lambda cells: float(cells[-1]), reverse=True)
    text = table([["class", "images", *titles, "change"], *rows])
    counts = []  # of each column {(true label, predicted label): number of images}
    for column in part.columns:
        wrong = ~column.right
        counts.append(Counter(zip(part.labels[wrong], column.predicted[wrong])))
    rows = [["true class", "taken for", *titles]]
    for pair, _ in (counts[0] + counts[-1]).most_common(10):
        rows.append([*(part.names[k] for k in pair), *(f"{count[pair]:,}" for count in counts)])
    return f"{text}<h4>Most often confused, number of images</h4>{table(rows)}"


def images(part: Part) -> str:
    """A dozen each of those that tuning mended and broke, and of its mistakes, the surest first."""
    before = part.zero_shot.right
    after = part.tuned.right
    kinds = {"mended": ~before & after, "broken": before & ~after, "mistakes": ~after}
    order = np.argsort(-part.tuned.confidence, kind="stable")
    text = ""
    for title, chosen in kinds.items():
        shown = order[chosen[order]][:12] if part.items else []
        cards = "".join(card(part, n) for n in shown)
        text += f"<h4>{chosen.sum():,} {title}</h4><div class='cards'>{cards}</div>\n"
    return text


def card(part: Part, n: int) -> str:
    """Image n, its true name, and both predictions."""
    address, label = part.items[n]
    buffer = io.BytesIO()
    with contextlib.suppress(data.UserError):  # it is gone
        image = data.read_image(address)
        image.thumbnail((160, 160))
        image.save(buffer, "jpeg")
    text = f"<p><b>{part.names[label]}</b></p>"
    for column in (part.zero_shot, part.tuned):
        mark = "✓" if column.right[n] else "✗"
        guess = f"{100 * column.confidence[n]:.0f} % {part.names[column.predicted[n]]}"
        text += f"<p>{esc(column.title)} {mark} {guess}</p>"
    return figure(buffer.getvalue(), "jpeg", address, text)


def sureness(part: Part) -> str:
    """How sure the tuned one is where it is right, and where it is wrong."""
    text = ""
    for kind, values in part.sureness.items():
        lines = {}
        for word, chosen in {"right": part.tuned.right, "wrong": ~part.tuned.right}.items():
            count, edges = np.histogram(values[chosen], 25, (0, values.max()))
            lines[word] = ((edges[1:] + edges[:-1]) / 2, count)
        text += plot(f"{part.tuned.title}: number of images", kind, lines)
    return f"<div class='plots'>{text}</div>\n"


def training(run: Path, result: dict) -> str:
    """The curves of metrics.jsonl, of a run and of its baseline."""
    epochs = {result["name"]: common.read_metrics(run)}
    epochs[result["baseline_name"]] = common.read_metrics(run / "baseline")
    text = ""
    for kind in dict.fromkeys(kind for line in epochs[result["name"]] for kind in line):
        lines = {}
        for title, read in epochs.items():
            points = [(line["epoch"] + 1, line[kind]) for line in read if kind in line]
            if points:
                lines[title] = zip(*points)
        text += plot(kind.replace("_", " "), "epoch", lines)
    return f"<div class='plots'>{text or f'{esc(run)} has no metrics.jsonl.'}</div>\n"


# 4. THE PAGE --------------------------------------------------------------------------------------
def origin(folder: Path, config: dict, result: dict) -> str:
    """Where the figures came from."""
    s = result["settings"]
    of = result["training"]
    told = {
        "run": folder.absolute(),
        "trained in": of["run"],
        "training images": f"{len(config['train']):,} of {of['dataset']}, {of['split']}",
        "shots, seed, epochs": f"{of['shots']}, {of['seed']}, {s['epochs']:,}",
        "model": f"{s['model']} {s['pretrained'] or ''} {s['precision']} on {s['device']}",
        "CLIP": result["clip"],
        "classes": f"{len(config['classnames']):,}, “{config['template']}”",
        "test images": ", ".join(test["images"] for test in result["tests"]),
        "versions": ", ".join(map(" ".join, result["versions"].items())),
    }
    return table([[key, esc(value)] for key, value in told.items()])


def page(folder: Path) -> str:
    config = common.read_run(folder)
    require((folder / "result.json").exists(), f"{folder} has not finished: no result.json")
    result = data.read_json(folder / "result.json")
    found, why = find_images(result)
    parts = [Part(folder, result, i, found) for i in range(len(result["tests"]))]
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        common.report(result, folder)
    measures, *_ = report.getvalue().rpartition("written to")
    fields = {
        "title": html.escape(f"{result['name']} on {result['settings']['dataset']}"),
        "measures": html.escape(measures),
        "notes": "".join(f"<li>{esc(note)}</li>" for note in result["notes"]),
        "origin": origin(folder, config, result),
        "missing": "" if all(p.items for p in parts) else f"Made without images: {esc(why)}.",
        "training": training(Path(result["training"]["run"]), result),
    }
    for show in (classes, images, sureness):
        fields[show.__name__] = "".join(f"<h3>{part.title}</h3>\n{show(part)}" for part in parts)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return string.Template(template).substitute(fields)


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("file", type=Path, nargs="?", help="the page to write [RUN/page.html]")
    args = parser.parse_args(argv)
    require(find_spec("matplotlib"), "the plots need matplotlib: pip install matplotlib")
    file = args.file or args.run / "page.html"
    data.write(file, page(args.run).encode("utf-8", "replace"))
    print(f"written to {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    data.run(main)
