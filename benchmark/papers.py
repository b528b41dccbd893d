"""What was published beside what was measured: `table.py RUNS --papers`.

papers.csv has a published figure a row, and the public file in which it was read. It stands beside
ours where protocol, backbone, method, dataset, classes, test set, shots, template and all settings
that matter are the paper's. Where they are not, no figure is shown, but what differs.
"""

import csv
import statistics
from pathlib import Path

import table

import common
import data

SHIFTED = {"imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"}
# Settings that a column of papers.csv speaks of, or that change no figure.
SAID = {"dataset", "shots", "classes", "test_on", "template", "model", "pretrained", "paper",
        "method", "precision"} | table.FREE  # fmt: skip
# CoOp is λ = 0 from a random start; ProGrad++ a ProGrad with many templates.
OWN = {"CoOp": {"lam": 0.0, "init": "random"}, "ProGrad++": {"teacher": "ensemble"}}
UNREAD = {"CoOp": {"rule", "teacher", "temperature", "lam"}}  # settings that it does not use


def read_papers() -> list[dict]:
    """The rows of papers.csv. What zero-shot CLIP is tested on stands as its dataset."""
    with open(Path(__file__).with_name("papers.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["method"] == "zero-shot" and row["test_on"]:
            row |= {"dataset": row["test_on"], "test_on": ""}
        row["source"] += f" ({row['note']})" if row["note"] else ""
    return rows


def method_of(row: table.Row, kind: str) -> str | None:
    """The method's name in papers.csv; None where its training is not a published one's."""
    name, settings = row.titles()[kind], row.example["settings"]
    scripts = {"CoOp": ["prograd"]}.get(name, table.SCRIPTS)  # vpt.py's base is trained as VPT is
    if kind != "zero_shot" and settings["method"] not in scripts:
        return None
    many = name == "ProGrad" and settings["teacher"] == "ensemble"
    return "ProGrad++" if many else name


def place(row: table.Row, column: str, kind: str) -> dict[str, str]:
    """Where in papers.csv a figure of ours stands."""
    tests, dataset = tests_of(row, column), row.example["training"]["dataset"]
    test_on = tests[0]["dataset"] if tests[0]["dataset"] != dataset else ""
    if len(tests) > 1:
        test_on = column.removesuffix(" others")
    elif kind == "zero_shot":  # what it is tested on is all that counts
        dataset, test_on = tests[0]["dataset"], ""
    if row.parts:
        eleven = {part.dataset for part in row.parts} == set(table.ELEVEN)
        dataset = "mean of 11" if eleven else row.dataset
    classes = "H" if column == "H of means" else tests[0]["classes"]
    method = method_of(row, kind)
    return {"method": method, "dataset": dataset, "test_on": test_on, "classes": classes}


def tests_of(row: table.Row, column: str) -> list[dict]:
    """The test sets that a column of the table is of."""
    return table.columns_of(row.example)[table.SIDES[0] if column == "H of means" else column]


def gaps(row: table.Row, column: str, kind: str, paper: dict) -> list[str]:
    """What differs between a figure of ours and a published one."""
    settings, trained = row.example["settings"], row.example["training"]
    local = Path(settings["pretrained"] or "").exists()  # zero-shot tells whose weights it has
    pairs = [
        ("backbone", settings["model"].removesuffix("-quickgelu"), paper["backbone"]),
        ("pretrained", "openai" if local else settings["pretrained"], "openai"),
        ("test_part", settings["test_part"], "test"),
    ]
    templates = [(test["dataset"], test["template"]) for test in tests_of(row, column)]
    if kind != "zero_shot":
        own = data.SOURCES[trained["dataset"]].template
        templates.append((trained["dataset"], trained["template"] or own))
        away = {test["dataset"] for test in row.example["tests"]} - {trained["dataset"]}
        inside = "base-to-new" if trained["classes"] == "base" else "few-shot"
        outside = "domain-generalisation" if away <= SHIFTED else "cross-dataset"
        pairs.append(("protocol", outside if away else inside, paper["protocol"]))
        pairs.append(("shots", str(trained["shots"]), paper["shots"]))
        script = table.SCRIPTS[settings["method"]]
        usual = common.DEFAULTS | script.defaults(settings | {"paper": True})
        usual |= OWN.get(paper["method"], {})
        unread = SAID | UNREAD.get(paper["method"], set())
        pairs += [(k, v, usual.get(k)) for k, v in settings.items() if k not in unread]
    for dataset, template in templates:
        own = data.SOURCES[dataset].template
        pairs.append(("template", template, paper["template"].replace("dataset", own)))
    return [f"{what} {ours} (published: {its})" for what, ours, its in pairs if ours != its]


def compare(row: table.Row, column: str, kind: str, published: list[dict]) -> list[tuple]:
    """Lines of the table: a figure of ours beside each published one, or beside what differs."""
    result, test = row.example, tests_of(row, column)[0]
    here, where = statistics.mean(row.figures[column, kind].values()), place(row, column, kind)
    # Zero-shot stands in many rows: without their labels its lines are the same.
    label = f"{row.dataset}, {result['settings']['model']}" if kind == "zero_shot" else row.label
    ours = (label, f"{row.titles()[kind]}, {column}", f"{here:.2f}")
    lines, differ = [], []
    for paper in [paper for paper in published if paper | where == paper]:
        gap = [text for part in row.parts or [row] for text in gaps(part, column, kind, paper)]
        if gap:
            differ.append("; ".join(dict.fromkeys(gap)))
            continue
        off = here - float(paper["accuracy"])
        doubt = (f"; other weights, template or test images? Here: {result['clip'][:8]}, "
                 f"{test['template']!r}, {test['n']} of {test['dataset']}")  # fmt: skip
        doubt *= kind == "zero_shot" and abs(off) > 0.5
        lines.append((*ours, paper["accuracy"], f"{off:+.2f}", paper["source"] + doubt))
    if differ and not lines:
        lines.append((*ours, f"none: {min(differ, key=len)}", "", ""))
    return lines


def beside(rows: list[table.Row]) -> list[str]:
    """Our figures beside the published ones, as lines of text."""
    published = read_papers()
    lines = {("", "", "here", "published", "difference", "source"): None}
    for row in rows:
        for column, kind in row.figures:
            if kind in ("zero_shot", "baseline", "tuned") and column != "H":
                lines |= dict.fromkeys(compare(row, column, kind, published))
    return [table.markdown([*lines]), "Of what is not listed, papers.csv has no figure."]
