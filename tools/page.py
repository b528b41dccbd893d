"""Make one page of a finished run, for a browser: classes, images, sureness, training.

    python tools/page.py RUN [FILE.html]      # RUN/page.html, unless another file is named

It holds all that it shows. Where the run's images have moved, it is made without them.
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
    lines = [f"<tr><td>{'</td><td>'.join(row)}</td></tr>\n" for row in rows]
    return f"<div class='wide'><table>\n{''.join(lines)}</table></div>\n"


def figure(content: bytes, kind: str, title: str, text: str = "") -> str:
    """An image inside the page; of an empty one a browser shows the title."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(title)}"/>{text}</figure>\n'


def plot(title: str, x_title: str, lines: dict) -> str:
    """lines: {what the legend calls it: (x values, y values)}"""
    from matplotlib.figure import Figure

    drawing = Figure((3.4, 2.6), layout="constrained")
    axes = drawing.subplots()
    for label, (x, y) in lines.items():
        axes.plot(x, y, ".-", markersize=3, linewidth=1, label=label)
    axes.set(title=title, xlabel=x_title)
    axes.legend()
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="svg")
    return figure(buffer.getvalue(), "svg+xml", f"{title}, {x_title}")


# 2. READING ---------------------------------------------------------------------------------------
class Part:
    """Test set i of a run: what zero-shot CLIP, the run and its baseline say of every image."""

    def __init__(self, folder: Path, result: dict, i: int, found: dict[str, list[data.Item]]):
        test = result["tests"][i]
        self.title = esc(" ".join([test["dataset"], test["domain"], test["classes"]]))
        self.items = found.get(test["images"], [])
        own = np.load(folder / "predictions.npz")
        kept = [(own, "zero_shot"), (own, "tuned")]
        self.titles = ["zero-shot", html.escape(result["name"])]
        if test["baseline"]:
            kept.append((np.load(folder / "baseline/predictions.npz"), "tuned"))
            self.titles.append(html.escape(result["baseline_name"]))
        self.labels = own[f"{i}/labels"]  # [N]
        self.names = [esc(name.replace("_", " ")) for name in own[f"{i}/classnames"]]  # [C], HTML
        self.predicted = [file[f"{i}/{column}_predicted"] for file, column in kept]
        self.confidence = [file[f"{i}/{column}_confidence"] for file, column in kept]
        self.right = [predicted == self.labels for predicted in self.predicted]
        kinds = ("entropy", "mutual_information")  # VPT's
        self.uncertainty = {kind: own[f"{i}/{kind}"] for kind in kinds if f"{i}/{kind}" in own}


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
    rows = []
    for k, name in enumerate(part.names):
        images = part.labels == k
        if images.any():
            shares = [100 * right[images].mean() for right in part.right]
            numbers = [f"{share:.1f}" for share in shares]
            rows.append([name, str(images.sum()), *numbers, f"{shares[1] - shares[0]:+.1f}"])
    rows.sort(key=lambda cells: float(cells[-1]), reverse=True)
    if len(rows) > 100:
        rows = rows[:30] + rows[-30:]
    text = table([["class", "images", *part.titles, "change"], *rows])
    counts = []  # of each column {(true label, predicted label): number of images}
    for predicted, right in zip(part.predicted, part.right):
        counts.append(Counter(zip(part.labels[~right], predicted[~right])))
    rows = [["true class", "taken for", *part.titles]]
    for pair, _ in (counts[0] + counts[1]).most_common(10):
        rows.append([part.names[k] for k in pair] + [str(count[pair]) for count in counts])
    return f"{text}<h4>Most often confused, number of images</h4>{table(rows)}"


def images(part: Part) -> str:
    """A dozen each of those that tuning mended and broke, and of its mistakes, the surest first."""
    before, after, *_ = part.right
    kinds = {"mended": ~before & after, "broken": before & ~after, "mistakes": ~after}
    order = np.argsort(-part.confidence[1], kind="stable")
    text = ""
    for title, chosen in kinds.items():
        shown = order[chosen[order]][:12] if part.items else []
        cards = "".join(card(part, n) for n in shown)
        text += f"<h4>{chosen.sum()} {title}</h4><div class='cards'>{cards}</div>\n"
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
    for column in (0, 1):
        mark, p = "✗✓"[int(part.right[column][n])], 100 * part.confidence[column][n]
        guess = part.names[part.predicted[column][n]]
        text += f"<p>{part.titles[column]} {mark} {p:.0f} % {guess}</p>"
    return figure(buffer.getvalue(), "jpeg", address, text)


def sureness(part: Part) -> str:
    """Is it as sure as it is right? And by VPT's measures: less sure where it is wrong?"""
    calibration, shares, coverage = {"calibrated": ([0, 1], [0, 1])}, {}, {}
    for title, sure, right in zip(part.titles, part.confidence, part.right):
        bins = (15 * sure).astype(int).clip(0, 14)
        count = np.bincount(bins, minlength=15)
        n = np.where(count, count, np.nan)  # an empty bin has no means
        calibration[title] = (np.bincount(bins, sure, 15) / n, np.bincount(bins, right, 15) / n)
        shares[title] = ((np.arange(15) + 0.5) / 15, count / len(bins))
        kept = np.linspace(1, len(bins), 100).astype(int)
        coverage[title] = (kept / len(bins), right[np.argsort(-sure)].cumsum()[kept - 1] / kept)
    text = plot("accuracy, in 15 bins", "confidence", calibration)
    text += plot("share of the images", "confidence", shares)
    text += plot("accuracy of the surest", "share of the images", coverage)
    for kind, values in part.uncertainty.items():
        lines = {}
        for word, chosen in {"right": part.right[1], "wrong": ~part.right[1]}.items():
            count, edges = np.histogram(values[chosen], 25, (0, values.max()))
            lines[word] = ((edges[1:] + edges[:-1]) / 2, count)
        text += plot("number of images", kind.replace("_", " "), lines)
    return f"<div class='plots'>{text}</div>\n"


def errors(part: Part) -> str:
    """Of the images that one has wrong, how many each other has wrong, too."""
    rows = [["wrong for", *(f"{title}, too" for title in part.titles)]]
    for title, right in zip(part.titles, part.right):
        rows.append([title, *(str((~right & ~other).sum()) for other in part.right)])
    return table(rows)


def training(folder: Path, result: dict) -> str:
    """The curves of metrics.jsonl, of a run and of its baseline."""
    run = Path(result["training"]["run"]) if result["settings"]["eval"] else folder
    runs = {result["name"]: run, result["baseline_name"]: run / "baseline"}
    runs = {name: common.read_metrics(path) for name, path in runs.items()}
    text = ""
    for kind in [kind for kind in (runs[result["name"]] or [{}])[-1] if kind != "epoch"]:
        lines = {}
        for name, epochs in runs.items():
            points = [(line["epoch"] + 1, line[kind]) for line in epochs if kind in line]
            lines |= {name: zip(*points)} if points else {}
        text += plot(kind.replace("_", " "), "epochs", lines)
    return f"<div class='plots'>{text or f'There is no {esc(run)}/metrics.jsonl.'}</div>\n"


# 4. THE PAGE --------------------------------------------------------------------------------------
def page(folder: Path) -> str:
    path = folder / "result.json"
    require(path.exists(), f"{folder} is no finished run: there is no {path}")
    result = data.read_json(path)
    found, why = find_images(result)
    parts = [Part(folder, result, i, found) for i in range(len(result["tests"]))]
    with contextlib.redirect_stdout(io.StringIO()) as report:
        common.report(result, folder)
    measures, *_ = report.getvalue().rpartition("written to")
    origin = {"run": folder.absolute(), "CLIP": result["clip"]}
    origin["test images"] = ", ".join(test["images"] for test in result["tests"])
    for kind in ("training", "settings", "versions"):
        origin[kind] = ", ".join(f"{key} {value}" for key, value in result[kind].items())
    fields = {
        "title": html.escape(f"{result['name']} on {result['settings']['dataset']}"),
        "measures": html.escape(measures),
        "notes": "".join(f"<li>{esc(note)}</li>" for note in result["notes"]) or "<li>none</li>",
        "origin": table([[key, esc(value)] for key, value in origin.items()]),
        "missing": "" if all(p.items for p in parts) else f"Made without images: {esc(why)}.",
        "training": training(folder, result),
    }
    for show in (classes, images, sureness, errors):
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
