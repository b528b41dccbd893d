"""Make one page of a finished run, for a browser: classes, images, sureness, training, errors.

    python tools/page.py RUN [FILE.html]      # RUN/page.html, unless another file is named

The page holds its figures and thumbnails itself: no script, and nothing is loaded from elsewhere.
Images are found again by the run's settings; where they have moved, the page is made without them
and says so. matplotlib draws the figures; page.html is its frame.
"""

import argparse
import base64
import html
import io
import re
import string
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds common.py and data.py
import common
import data
from data import require

# fmt: off
COLOUR = {"zero_shot": "#8a8f98", "baseline": "#cc7a00", "tuned": "#2f83d0",  # told apart by the
          "right": "#1f9d78", "wrong": "#b5589a"}  # colour-blind, and seen on white and on black
INK = "#010203"  # in a figure: the page's own text colour
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "page", "savefig.transparent": True,
         "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
         "ytick.color": INK, "axes.linewidth": 0.6, "axes.spines.top": False, "font.size": 9,
         "axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left",
         "legend.frameon": False, "axes.formatter.useoffset": False}
MEASURES = {"accuracy": "accuracy %", "nll": "NLL nats", "ece": "ECE %",
            "mean_class_accuracy": "class mean %"}
CURVES = {"loss": "loss", "loss_ce": "loss of the labels, nats", "cosine": "cosine of g_d and g_g",
          "loss_task": "loss of the labels, nats", "loss_kl": "KL to the zero-shot prompt, nats",
          "conflict": "share of steps in conflict", "kl": "KL of q to N(0, I), mean, nats",
          "sigma": "σ of q, mean", "w_mean": "weight w, mean", "w_above_half": "share of w > 0.5",
          "train_accuracy": "accuracy in training %", "val_accuracy": "validation accuracy %"}
# fmt: on


# 1. HTML: a cell is HTML already; esc is for whatever a person wrote ------------------------------
def esc(text: object) -> str:
    """Text that stays in its place whatever it holds: <b>, quotes, letters from right to left."""
    return f"<bdi>{html.escape(str(text))}</bdi>"


def dotted(titles: dict[str, str]) -> list[str]:
    """Names of columns, behind dots of their colours."""
    dots = [f'<i style="background:{COLOUR.get(column, "none")}"></i>' for column in titles]
    return [f"<span>{dot}{esc(title)}</span>" for dot, title in zip(dots, titles.values())]


def key_to(titles: dict[str, str]) -> str:
    return f"<p class='key'>{''.join(dotted(titles))}</p>"


def table(head: list[str], rows: list[list[str]], names: int = 1) -> str:
    """The first `names` columns hold words, the others numbers."""
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        kinds = [' class="name"'] * names + [""] * len(cells)
        texts = [f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells)]
        lines.append(f"<tr>{''.join(texts)}</tr>\n")
    return f"<div class='wide'><table>\n{''.join(lines)}</table></div>\n"


def axes(title: str, x: str, height: float = 2.2, **more):
    """An empty plot, or several above each other."""
    from matplotlib.figure import Figure

    plot = Figure((3.3, height), layout="constrained").subplots(**more)
    np.ravel(plot)[0].set_title(title)
    np.ravel(plot)[-1].set_xlabel(x)
    return plot


def plots(drawn: list) -> str:
    """Plots as SVG in the page's own colours and letters."""
    texts = []
    for plot in drawn:
        buffer = io.StringIO()
        plot.get_figure().savefig(buffer, format="svg", metadata={"Date": None})
        text = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue())
        text = re.sub(r' id="[a-z.0-9]+_[0-9]+"', "", text).replace(INK, "currentColor")
        texts.append(f'<figure style="width:320px">{text}</figure>')
    return f"<div class='plots'>{''.join(texts)}</div>\n"


# 2. READING ---------------------------------------------------------------------------------------
def arrays(path: Path) -> np.lib.npyio.NpzFile:
    try:
        return np.load(path)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise data.UserError(f"{path} is damaged: {error}") from error


class Part:
    """What a run predicts of test set i: N images, C classes. Columns: zero-shot, baseline, tuned,
    or without a baseline."""

    def __init__(self, folder: Path, i: int, row: dict, found: data.Test | None):
        own, plain = arrays(folder / "predictions.npz"), folder / "baseline/predictions.npz"
        files = [(own, f"{i}/zero_shot"), (own, f"{i}/tuned")]
        files[1:1] = [(arrays(plain), f"{i}/tuned")] if row["baseline"] else []
        self.labels = own[f"{i}/labels"]  # [N]
        self.predicted = np.stack([file[f"{key}_predicted"] for file, key in files])  # [columns, N]
        self.confidence = np.stack([file[f"{key}_confidence"] for file, key in files])
        self.right = self.predicted == self.labels
        kinds = ("entropy", "mutual_information")  # VPT's
        self.spread = {kind: own[f"{i}/{kind}"] for kind in kinds if f"{i}/{kind}" in own}
        self.items = found.items if found else []
        names = own[f"{i}/classnames"].tolist()
        self.names = [esc(name.replace("_", " ")) for name in names]  # as HTML


def read_parts(folder: Path, result: dict) -> tuple[list[Part], str]:
    """One for each test set, with its images where they are found; and why some are not."""
    settings = argparse.Namespace(**result["settings"] | {"download": False})
    tests, why = [], "the images there are not those that were measured"
    try:
        tests = data.load_task(settings).tests
    except (data.UserError, OSError) as error:
        why = str(error)
    found = {test.images: test for test in tests}
    titles = {"zero_shot": "zero-shot", "baseline": result["baseline_name"]}
    titles["tuned"] = result["name"]
    parts = []
    for i, row in enumerate(result["tests"]):
        part = Part(folder, i, row, found.get(row["images"]))
        words = [row["dataset"], row["domain"], row["classes"]]
        words = [word for word in words if word not in (settings.dataset, "", "all")]
        part.title = esc(" ".join(words) or row["dataset"])
        part.titles = {column: title for column, title in titles.items() if row[column]}
        parts.append(part)
    return parts, why


# 3. SECTIONS: each shows one test set -------------------------------------------------------------
def classes(part: Part) -> str:
    """Each class's accuracy, by the change, as numbers and as dots on a line."""
    C = len(part.names)
    count = np.bincount(part.labels, minlength=C)
    hits = np.stack([np.bincount(part.labels, right, C) for right in part.right])
    accuracy = 100 * hits / count.clip(1)  # [columns, C]
    change = accuracy[-1] - accuracy[0]
    order = [k for k in np.argsort(-change, kind="stable") if count[k]]
    gained, lost = sum(change > 0), sum(change < 0)
    same = len(order) - gained - lost
    text = f"Classes that gained: {gained}, lost: {lost}, stayed the same: {same}."
    if len(order) > 100:
        order = order[: min(30, gained)] + order[len(order) - min(30, lost) :]
        text += " Shown are the 30 that gained most and the 30 that lost most."
    rows = []
    for k in order:
        x = [round(5 + 2 * value) for value in accuracy[:, k]]
        drawn = f'<line x1="{x[0]}" x2="{x[-1]}" y1="7" y2="7"/>'
        for at, column in zip(x, part.titles):
            drawn += f'<circle cx="{at}" cy="7" r="4" stroke="none" fill="{COLOUR[column]}"/>'
        numbers = [f"{count[k]:,}", *(f"{value:.1f}" for value in accuracy[:, k])]
        drawn = f'<svg width="210" height="14">{drawn}</svg>'
        rows.append([part.names[k], *numbers, f"{change[k]:+.1f}", drawn])
    head = ["class", "images", *dotted(part.titles), "change", "0 to 100 %"]
    return f"<p>{text}</p>{table(head, rows)}{confusions(part)}"


def confusions(part: Part) -> str:
    """The ten pairs most often confused, by zero-shot CLIP and the tuned one together."""
    C = len(part.names)
    pairs = part.labels * C + part.predicted  # [columns, N]
    counts = [np.bincount(pair[~right], minlength=C * C) for pair, right in zip(pairs, part.right)]
    both = counts[0] + counts[-1]
    rows = []
    for pair in np.argsort(-both, kind="stable")[:10]:
        cells = [part.names[pair // C], part.names[pair % C], *(f"{n[pair]:,}" for n in counts)]
        rows += [cells] if both[pair] else []
    head = ["true class", "taken for", *dotted(part.titles)]
    return f"<h4>Most often confused, number of images</h4>{table(head, rows, names=2)}"


def images(part: Part) -> str:
    """A dozen each of those that tuning mended and broke, and of the surest mistakes."""
    before, after = part.right[0], part.right[-1]
    order = np.argsort(-part.confidence[-1], kind="stable")
    kinds = {"{:,} mended": ~before & after, "{:,} broken": before & ~after,
             "The surest of {:,} mistakes": ~after}  # fmt: skip
    text = ""
    for title, chosen in kinds.items():
        cards = [card(part, n) for n in order[chosen[order]][:12]] if part.items else []
        text += f"<h4>{title.format(chosen.sum())}</h4><div class='cards'>{''.join(cards)}</div>\n"
    return text


def card(part: Part, n: int) -> str:
    """Image n, its true name, and both predictions."""
    address, label = part.items[n]
    buffer = io.BytesIO()
    try:
        image = data.read_image(address)
        image.thumbnail((160, 160))
        image.save(buffer, "jpeg", quality=80)
    except (data.UserError, OSError):
        pass  # a browser then shows the address in its place
    text = f"<p><b>{part.names[label]}</b></p>"
    for column, title in ((0, dotted(part.titles)[0]), (-1, dotted(part.titles)[-1])):
        name, p = part.names[part.predicted[column, n]], part.confidence[column, n]
        mark = "✓" if part.right[column, n] else "✗"
        text += f"<p>{title} {mark} {100 * p:.0f} % {name}</p>"
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{html.escape(address)}"/>{text}</figure>\n'


def reliability(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of 15 bins the share of images, mean confidence and accuracy, %, [3, 15]"""
    which = (confidence * 15).astype(int).clip(0, 14)
    count = np.bincount(which, minlength=15)
    sure, hits = (np.bincount(which, x, 15) / count.clip(1) for x in (confidence, right))
    return 100 * np.stack([count / len(right), sure, hits])


def sureness(part: Part) -> str:
    more = {"nrows": 2, "height_ratios": [3, 1], "sharex": True}
    upper, lower = axes("accuracy % (dotted: calibrated), 15 bins", "confidence %", 3, **more)
    answered = axes("accuracy % of the surest images", "coverage: % of the images", 3)
    upper.plot([0, 100], [0, 100], color=INK, lw=0.7, ls=":")
    lower.set_ylabel("images %")
    for column, confidence, right in zip(part.titles, part.confidence, part.right):
        if column != "baseline":
            share, sure, hits = reliability(confidence, right)
            upper.plot(sure[share > 0], hits[share > 0], "o-", ms=3.5, color=COLOUR[column])
            at = np.arange(15) + (0.3 if column == "zero_shot" else 0.7)
            lower.bar(at * 100 / 15, share, 2.6, color=COLOUR[column])
        kept = np.linspace(len(right) / 100, len(right), 100).astype(int).clip(1)
        hits = right[np.argsort(-confidence, kind="stable")].cumsum()
        answered.plot(100 * kept / len(right), 100 * hits[kept - 1] / kept, color=COLOUR[column])
    drawn = []
    for kind, values in part.spread.items():
        drawn.append(axes(f"{kind.replace('_', ' ')}, nats: images %", "", 3))
        bins = np.linspace(0, values.max() + 1e-9, 25)
        for word, some in (("right", values[part.right[-1]]), ("wrong", values[~part.right[-1]])):
            share = np.full(len(some), 100 / max(1, len(some)))
            look = {"color": COLOUR[word], "label": f"{word}: mean {some @ share / 100:.3f}"}
            drawn[-1].hist(some, bins, weights=share, alpha=0.55, **look)
        drawn[-1].margins(y=0.3)
        drawn[-1].legend()
    return key_to(part.titles) + plots([upper, answered]) + plots(drawn)


def training(folder: Path, titles: dict[str, str]) -> str:
    """The curves of metrics.jsonl, of a run and of its baseline."""
    lines = {"baseline": common.read_metrics(folder / "baseline")}
    lines["tuned"] = common.read_metrics(folder)
    drawn = []
    for key, title in CURVES.items():
        plot = axes(title, "epoch")
        for column, epochs in lines.items():
            points = [(line["epoch"] + 1, line[key]) for line in epochs if key in line]
            look = "o-" if len(points) < 20 else "-"
            plot.plot(*np.array(points).reshape(-1, 2).T, look, ms=3.5, color=COLOUR[column])
        drawn += [plot] if any(key in line for line in lines["tuned"]) else []
    shown = {column: titles.get(column, column) for column in lines if lines[column]}
    return key_to(shown) + plots(drawn) if drawn else f"<p>{esc(folder)} has no metrics.jsonl.</p>"


def errors(part: Part) -> str:
    """Of the images that one has wrong, how many each other has wrong, too."""
    wrong = (~part.right).astype(int)  # [columns, N]
    both, times = wrong @ wrong.T, wrong.sum(axis=0)
    rows = []
    for title, shared, one in zip(dotted(part.titles), both, wrong):
        of, alone = one.sum(), (one * (times == 1)).sum()
        cells = [f"{n:,} ({100 * n / max(1, of):.0f} %)" for n in shared]
        rows.append([title, f"{of:,}", *cells, f"{alone:,}"])
    head = ["wrong for", "images", *(f"{title}, too" for title in dotted(part.titles)), "alone"]
    return f"<p>Wrong for all: {(times == len(wrong)).sum():,} images.</p>{table(head, rows)}"


# 4. THE PAGE --------------------------------------------------------------------------------------
def summary(folder: Path, result: dict, config: dict, parts: list[Part]) -> dict[str, str]:
    """What was run, the run's table, its notes, and where its figures came from."""
    tests, training, s = result["tests"], result["training"], result["settings"]
    titles = {column: column.replace("_", " ") for column in common.measures(tests[0])}
    rows = []
    for part, test in zip(parts, tests):
        rows.append([f"<b>{part.title}</b>, {test['n']:,} images", *[""] * len(titles)])
        for kind, title in MEASURES.items():
            digits = 3 if kind == "nll" else 1
            found = [f"{column[kind]:.{digits}f}" for column in common.measures(test).values()]
            rows.append([title, *found])
    means = [f"{mean:.1f}" for mean in result["harmonic_mean"].values()]
    rows += [["<b>H</b>, accuracy %", *means]] if means else []
    origin = {"run": folder.absolute(), "trained in": training["run"],
              "training images": training["split"], "CLIP": result["clip"]}  # fmt: skip
    origin = [[esc(key), esc(value)] for key, value in origin.items()]
    origin += [[f"test images: {p.title}", esc(t["images"])] for p, t in zip(parts, tests)]
    origin.append(["versions", esc(", ".join(map(" ".join, result["versions"].items())))])
    words = [s["model"], s["pretrained"] or "", s["precision"], f"on {s['device']}"]
    trained = f"{len(config['train']):,} training images of {training['dataset']}"
    drawn = f"shots: {training['shots']}, seed: {training['seed']}, epochs: {s['epochs']:,}"
    tested = f"{sum(test['n'] for test in tests):,} test images"
    kinds = f"{len(config['classnames']):,} classes, “{config['template']}”"
    return {
        "title": html.escape(f"{result['name']} on {s['dataset']}"),
        "trained": esc(f"{trained} ({drawn}), {' '.join(words)}."),
        "tested": esc(f"{tested}, {kinds}."),
        "table": table(["", *dotted(titles | parts[0].titles)], rows),
        "extra": "Mean residual: one prompt, at VPT's μ." if "mean_residual" in titles else "",
        "notes": "".join(f"<li>{esc(note)}</li>" for note in result["notes"]) or "<li>none</li>",
        "origin": table(["", ""], origin, names=2),
    }


def page(folder: Path) -> str:
    config = common.read_run(folder)
    require((folder / "result.json").exists(), f"{folder} has not finished: no result.json")
    result = data.read_json(folder / "result.json")
    parts, why = read_parts(folder, result)
    fields = summary(folder, result, config, parts)
    for show in (classes, images, sureness, errors):
        heads = [f"<h3>{part.title}</h3>\n" if len(parts) > 1 else "" for part in parts]
        fields[show.__name__] = "".join(head + show(part) for head, part in zip(heads, parts))
    fields["training"] = training(Path(result["training"]["run"]), parts[0].titles)
    found = all(part.items for part in parts)
    fields["missing"] = "" if found else f"<p>Made without images: {esc(why)}.</p>"
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return string.Template(template).substitute(fields)


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("file", type=Path, nargs="?", help="the page to write [RUN/page.html]")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError as error:
        raise data.UserError("the figures need matplotlib: pip install matplotlib") from error
    file = args.file or args.run / "page.html"
    with matplotlib.rc_context(STYLE):
        data.write(file, page(args.run).encode("utf-8", "replace"))
    print(f"written to {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    data.run(main)
