"""Make one page of a finished run, for a browser: classes, images, sureness, training, errors.

    python tools/page.py RUN [FILE.html]      # RUN/page.html, unless another file is named

The page holds its figures and thumbnails itself: no script, and nothing is loaded from elsewhere.
Images are found again by the run's settings. Where they have moved, --data-root says where to; else
the page is made without them and says so. matplotlib draws the figures.
"""

import argparse
import base64
import html
import io
import re
import sys
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
MANY = 100  # of more classes the table shows those that changed most
CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2126; --soft: #616973; --rule: #e2e5e9;
  --shade: #f5f6f8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --ink: #e4e7eb; --soft: #9ba3ad; --rule: #30363d; --shade: #1d2126 } }
* { box-sizing: border-box; min-width: 0 }
body { margin: auto; max-width: 1100px; padding: 24px 20px 60px; overflow-wrap: anywhere;
  background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", sans-serif }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 8px } h3 { font-size: 16px; margin: 24px 0 4px }
h2 { font-size: 20px; margin: 44px 0 4px; padding-top: 14px; border-top: 1px solid var(--rule) }
h4 { font-size: 14px; margin: 20px 0 6px } p { margin: 4px 0 10px; max-width: 80ch }
.soft, th { color: var(--soft) } nav { margin: 14px 0 20px } li { max-width: 80ch }
nav a { color: var(--soft); margin-right: 16px; display: inline-block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
.wide { overflow-x: auto; margin: 10px 0 } th { font-weight: 500; vertical-align: bottom }
th, td { padding: 3px 20px 3px 0; text-align: right; white-space: nowrap }
td { border-top: 1px solid var(--rule) } td svg { display: block; margin: auto; stroke: var(--soft);
  background: linear-gradient(var(--rule), var(--rule)) center/100% 1px no-repeat }
.name { text-align: left; white-space: normal; min-width: 9em; max-width: 28em }
i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 5px }
.key span { margin-right: 16px } figure { margin: 0; max-width: 100% }
.plots { display: flex; flex-wrap: wrap; gap: 18px 30px } .plots svg { width: 100%; height: auto }
.plots text { font-family: inherit !important }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px }
.cards figure { padding: 9px; background: var(--shade); border-radius: 6px }
.cards img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; font-size: 12px }
.cards p { font-size: 12.5px; line-height: 1.4; margin: 5px 0 0; display: -webkit-box;
  -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden }
"""


# 1. HTML: a cell is HTML already; esc is for whatever a person wrote ------------------------------
def esc(text: object) -> str:
    """Text that stays in its place whatever it holds: <b>, quotes, letters from right to left."""
    return f"<bdi>{html.escape(str(text))}</bdi>"


def said(classname: str) -> str:
    return esc(classname.replace("_", " "))


def dotted(titles: dict[str, str]) -> list[str]:
    """Names of columns, behind dots of their colours."""
    return [
        f'<span><i style="background:{COLOUR.get(column, "none")}"></i>{esc(title)}</span>'
        for column, title in titles.items()
    ]


def table(head: list[str], rows: list[list[str]], names: int = 1) -> str:
    """The first `names` columns hold words, the others numbers."""
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        kinds = [" class=name"] * names + [""] * len(cells)
        texts = [f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells)]
        lines.append(f"<tr>{''.join(texts)}</tr>\n")
    return f"<div class=wide><table>\n{''.join(lines)}</table></div>\n"


def axes(title: str, x: str, size=(3.3, 2.2), **more):
    """An empty plot, or several above each other."""
    from matplotlib.figure import Figure

    plot = Figure(size, layout="constrained").subplots(**more)
    np.ravel(plot)[0].set_title(title)
    np.ravel(plot)[-1].set_xlabel(x)
    return plot


def plots(drawn: list) -> str:
    """Plots as SVG in the page's own colours and letters."""
    texts = []
    for figure in (plot.get_figure() for plot in drawn):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>", "", buffer.getvalue())
        text = re.sub(r' id="[a-z.0-9]+_[0-9]+"', "", text).replace(INK, "currentColor")
        texts.append(f'<figure style="width:{96 * figure.get_figwidth():.0f}px">{text}</figure>')
    return f"<div class=plots>{''.join(texts)}</div>\n"


# 2. READING ---------------------------------------------------------------------------------------
class Part:
    """What a run predicts of its test set i: N images, C classes. By column: [N] each."""

    def __init__(self, folder: Path, i: int, row: dict, title: str, titles: dict[str, str]):
        self.title = title
        self.titles = {column: name for column, name in titles.items() if row[column]}
        own = np.load(folder / "predictions.npz")
        self.labels = own[f"{i}/labels"]
        self.predicted, self.confidence, self.right = {}, {}, {}
        for column in self.titles:
            file = np.load(folder / "baseline/predictions.npz") if column == "baseline" else own
            key = f"{i}/{column.replace('baseline', 'tuned')}"
            self.predicted[column] = file[f"{key}_predicted"]
            self.confidence[column] = file[f"{key}_confidence"]
            self.right[column] = self.predicted[column] == self.labels
        kinds = ("entropy", "mutual_information")  # VPT's
        self.spread = {kind: own[f"{i}/{kind}"] for kind in kinds if f"{i}/{kind}" in own}
        largest = [values.max() for values in [self.labels, *self.predicted.values()]]
        self.classnames = [f"class {k}" for k in range(max(largest) + 1)]  # until they are known
        self.items = []  # the images, if they are found; else
        self.missing = "the images there are not those that were measured"


def read_parts(folder: Path, result: dict, config: dict, data_root: str | None) -> list[Part]:
    """One for each test set, with its images where they are found."""
    settings = argparse.Namespace(**result["settings"])
    settings.data_root = data_root or settings.data_root
    tests, why = [], ""
    try:
        tests = data.load_task(settings).tests
    except (data.UserError, OSError) as error:
        why = str(error)
    found = {test.images: test for test in tests}
    titles = {"zero_shot": "zero-shot", "baseline": result["baseline_name"]}
    titles["tuned"] = result["name"]
    parts = []
    for i, row in enumerate(result["tests"]):
        words = [row["dataset"], row["domain"], row["classes"]]
        words = [word for word in words if word not in (settings.dataset, "", "all")]
        part = Part(folder, i, row, " ".join(words) or row["dataset"], titles)
        if row["images"] in found:
            part.items = found[row["images"]].items
            part.classnames = found[row["images"]].classnames
        elif row["dataset"] == settings.dataset and row["classes"] != "new":
            part.classnames = config["classnames"]
        part.missing = why or part.missing
        parts.append(part)
    return parts


# 3. SECTIONS: each shows one test set -------------------------------------------------------------
def classes(part: Part) -> str:
    """Each class's accuracy, sorted by the change; then the pairs most often confused."""
    C = len(part.classnames)
    count = np.bincount(part.labels, minlength=C)
    hits = np.array([np.bincount(part.labels, right, C) for right in part.right.values()])
    accuracy = 100 * hits / count.clip(1)  # [columns, C]
    change = accuracy[-1] - accuracy[0]
    order = [k for k in np.argsort(-change, kind="stable") if count[k]]
    gained, lost = sum(change > 0), sum(change < 0)
    text = f"{gained} classes gained, {lost} lost, {len(order) - gained - lost} stayed the same."
    if len(order) > MANY:
        order = order[: min(30, gained)] + order[len(order) - min(30, lost) :]
        text += " Shown are the 30 that gained most and the 30 that lost most."
    rows = []
    for k in order:
        at = [5 + 2 * value for value in accuracy[:, k]]
        drawn = f'<line x1="{at[0]:.0f}" x2="{at[-1]:.0f}" y1="7" y2="7"/>' + "".join(
            f'<circle cx="{x:.0f}" cy="7" r="4" stroke="none" fill="{COLOUR[column]}"/>'
            for x, column in zip(at, part.titles)
        )
        numbers = [*(f"{value:.1f}" for value in accuracy[:, k]), f"{change[k]:+.1f}"]
        drawn = f'<svg width="210" height="14">{drawn}</svg>'
        rows.append([said(part.classnames[k]), f"{count[k]:,}", *numbers, drawn])
    head = ["class", "images", *dotted(part.titles), "change", "0 to 100 %"]

    pairs = [part.labels * C + guess for guess in part.predicted.values()]
    pairs = [pair[pair // C != pair % C] for pair in pairs]
    counts = np.array([np.bincount(pair, minlength=C * C) for pair in pairs])
    order = np.argsort(-(counts[0] + counts[-1]), kind="stable")[:10]
    mixed = [
        [said(part.classnames[k // C]), said(part.classnames[k % C]), *map("{:,}".format, found)]
        for k, found in zip(order, counts[:, order].T)
        if found.any()
    ]
    pairs = table(["true class", "taken for", *dotted(part.titles)], mixed, names=2)
    return f"<p>{text}</p>{table(head, rows)}<h4>Most often confused (images)</h4>{pairs}"


def images(part: Part) -> str:
    """A dozen each of those that tuning mended and broke, and of the surest mistakes."""
    if not part.items:
        return f"<p>Made without images: {esc(part.missing)}.</p>"
    before, after = part.right["zero_shot"], part.right["tuned"]
    order = np.argsort(-part.confidence["tuned"], kind="stable")
    kinds = {"Mended": ~before & after, "Broken": before & ~after, "Surest mistakes, of": ~after}
    texts = []
    for title, chosen in kinds.items():
        cards = [card(part, n) for n in order[chosen[order]][:12]]
        texts.append(f"<h4>{title} {chosen.sum():,}</h4><div class=cards>{''.join(cards)}</div>\n")
    return "".join(texts)


def card(part: Part, n: int) -> str:
    """Image n, its true name, and both predictions."""
    address, label = part.items[n]
    buffer = io.BytesIO()
    try:
        image = data.read_image(address)
        image.thumbnail((160, 160))
        image.save(buffer, "jpeg", quality=80)
    except (data.UserError, OSError):
        pass  # a browser then shows the text that stands for the image
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    lines = [f"<b>{said(part.classnames[label])}</b>"]
    for column, title in zip(part.titles, dotted(part.titles)):
        name = said(part.classnames[part.predicted[column][n]])
        mark = "✓" if part.right[column][n] else "✗"
        share = f"{100 * part.confidence[column][n]:.0f}&nbsp;%"
        lines += [f"{title} {mark} {name} {share}"] if column != "baseline" else []
    text = "".join(f"<p>{line}</p>" for line in lines)
    return f'<figure><img src="{source}" alt="{html.escape(address)}">{text}</figure>\n'


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple:
    """Of 15 bins the share of images, mean confidence and accuracy; 0 where there is no image."""
    which = (confidence * 15).astype(int).clip(0, 14)
    count = np.bincount(which, minlength=15)
    sure, hits = (np.bincount(which, x, 15) / count.clip(1) for x in (confidence, right))
    return count / len(right), sure, hits


def sureness(part: Part) -> str:
    more = {"nrows": 2, "height_ratios": [3, 1], "sharex": True}
    upper, lower = axes("accuracy % against confidence, 15 bins", "confidence %", (3.3, 3), **more)
    answered = axes("accuracy % of the surest images", "coverage: % of the images", (3.3, 3))
    upper.plot([0, 100], [0, 100], color=INK, lw=0.7, ls=":")
    lower.set_ylabel("images %")
    for column in part.titles:
        confidence, right = part.confidence[column], part.right[column]
        if column != "baseline":
            share, sure, hits = 100 * np.array(reliability(confidence, right))
            upper.plot(sure[share > 0], hits[share > 0], "o-", ms=3.5, color=COLOUR[column])
            at = 100 / 15 * (np.arange(15) + (0.3 if column == "zero_shot" else 0.7))
            lower.bar(at, share, 2.6, color=COLOUR[column])
        kept = np.linspace(len(right) / 100, len(right), 100).astype(int).clip(1)
        hits = right[np.argsort(-confidence, kind="stable")].cumsum()
        answered.plot(100 * kept / len(right), 100 * hits[kept - 1] / kept, color=COLOUR[column])
    drawn = [upper, answered]
    for kind, values in part.spread.items():
        plot = axes(f"{kind.replace('_', ' ')} of VPT, nats: images %", "", (3.3, 3))
        for word, chosen in {"right": part.right["tuned"], "wrong": ~part.right["tuned"]}.items():
            weights = np.full(chosen.sum(), 100 / max(1, chosen.sum()))
            mean = values[chosen].mean() if chosen.any() else np.nan
            look = {"color": COLOUR[word], "alpha": 0.55, "label": f"{word}: mean {mean:.3f}"}
            plot.hist(
                values[chosen], np.linspace(0, values.max() + 1e-9, 25), weights=weights, **look
            )
        plot.margins(y=0.3)
        plot.legend()
        drawn.append(plot)
    return f"<p class=key>{' '.join(dotted(part.titles))}</p>{plots(drawn)}"


def training(folder: Path, titles: dict[str, str]) -> str:
    """The curves of metrics.jsonl, of a run and of its baseline."""
    lines = {"tuned": common.read_metrics(folder)}
    lines["baseline"] = common.read_metrics(folder / "baseline")
    drawn = []
    for key, title in CURVES.items():
        plot = axes(title, "epoch")
        for column, epochs in lines.items():
            points = [(line["epoch"] + 1, line[key]) for line in epochs if key in line]
            look = {"marker": "o", "ms": 3.5} if len(points) < 20 else {}
            if points:
                plot.plot(*zip(*points), color=COLOUR[column], **look)
        drawn += [plot] if plot.lines else []
    shown = {column: titles.get(column) or "baseline" for column in lines if lines[column]}
    text = f"<p class=key>{' '.join(dotted(shown))}</p>{plots(drawn)}"
    return text if drawn else f"<p>{esc(folder)} has no metrics.jsonl.</p>"


def errors(part: Part) -> str:
    """Of the images that one has wrong, how many each other has wrong; and those that all have."""
    wrong = {column: ~right for column, right in part.right.items()}
    rows = []
    for title, one in zip(dotted(part.titles), wrong.values()):
        both = [(one & other).sum() for other in wrong.values()]
        alone = (one & (sum(wrong.values()) == 1)).sum()
        shares = [f"{k:,} ({100 * k / max(1, one.sum()):.0f} %)" for k in both]
        rows.append([title, f"{one.sum():,}", *shares, f"{alone:,}"])
    every = np.all([*wrong.values()], axis=0).sum()
    head = ["wrong for", "images", *(f"{title}, too" for title in dotted(part.titles)), "only"]
    return f"<p>Wrong for all: {every:,} images.</p>{table(head, rows)}"


# 4. THE PAGE --------------------------------------------------------------------------------------
def summary(folder: Path, result: dict, config: dict, parts: list[Part]) -> str:
    """What was run, the run's table, its notes, and where its figures came from."""
    s, first = result["settings"], common.measures(result["tests"][0])
    titles = {column: column.replace("_", " ") for column in first} | parts[0].titles
    rows = []
    for part, row in zip(parts, result["tests"]):
        rows.append([f"<b>{esc(part.title)}</b>, {row['n']:,} images", *[""] * len(titles)])
        for kind, title in MEASURES.items():
            digits = 3 if kind == "nll" else 1
            found = [f"{column[kind]:.{digits}f}" for column in common.measures(row).values()]
            rows.append([title, *found])
    means = [f"{mean:.1f}" for mean in result["harmonic_mean"].values()]
    rows += [["<b>H</b>, harmonic mean %", *means]] if means else []
    notes = "".join(f"<li>{esc(note)}</li>" for note in result["notes"])
    training = result["training"]
    origin = {"run": folder.absolute(), "trained in": training["run"]}
    origin |= {"training images": training["split"], "CLIP": result["clip"]}
    origin |= {f"test images: {p.title}": row["images"] for p, row in zip(parts, result["tests"])}
    origin["versions"] = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    words = filter(None, [s["model"], s["pretrained"], s["precision"], f"on {s['device']}"])
    return f"""<h1>{esc(result["name"])} on {esc(s["dataset"])}</h1>
<p>{len(config["classnames"]):,} classes, {esc(config["template"])}, {len(config["train"]):,} training
images (shots: {training["shots"]}, seed: {training["seed"]}), {s["epochs"]:,} epochs.<br>
{esc(" ".join(words))}; tested on {sum(row["n"] for row in result["tests"]):,} images.</p>
{table(["", *dotted(titles)], rows)}
<p class=soft>NLL: mean of -log p of the true class. ECE: by how much confidence and accuracy differ.
Less is better of both.</p>
{f"<h4>Notes</h4><ul>{notes}</ul>" if notes else ""}
<h4>Where these figures come from</h4>
{table(["", ""], [[esc(key), esc(value)] for key, value in origin.items()], 2)}"""


def page(folder: Path, data_root: str | None) -> str:
    done = (folder / "result.json").exists()
    config = common.read_run(folder)
    require(done, f"{folder} is not finished: it has no result.json")
    result = data.read_json(folder / "result.json")
    parts = read_parts(folder, result, config, data_root)
    each = {"Classes": classes, "Images": images, "Sureness": sureness, "Errors in common": errors}
    texts = {}
    for title, show in each.items():
        heads = [f"<h3>{esc(part.title)}</h3>\n" * (len(parts) > 1) for part in parts]
        texts[title] = "".join(head + show(part) for head, part in zip(heads, parts))
    texts["Training"] = training(Path(result["training"]["run"]), parts[0].titles)
    order = ["Classes", "Images", "Sureness", "Training", "Errors in common"]
    nav = "".join(f'<a href="#{title[:6]}">{title}</a>' for title in order)
    body = [f'<h2 id="{title[:6]}">{title}</h2>\n{texts[title]}' for title in order]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(f"{result['name']} on {result['settings']['dataset']}")}</title>
<style>{CSS}</style></head>
<body>{summary(folder, result, config, parts)}
<nav>{nav}</nav>
{"".join(body)}
</body></html>
"""


def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("file", nargs="?", help="the page to write [RUN/page.html]")
    parser.add_argument("--data-root", metavar="DIR", help="where the images are now")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError as error:
        raise data.UserError("the figures need matplotlib: pip install matplotlib") from error
    file = Path(args.file or Path(args.run, "page.html"))
    with matplotlib.rc_context(STYLE):
        data.write(file, page(Path(args.run), args.data_root).encode("utf-8", "replace"))
    print(f"written to {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    data.run(main)
