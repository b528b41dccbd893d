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
    return rows


def method_of(row: table.Row, kind: str) -> str | None:
    """The method's name in papers.csv; None where its training is not a published one's."""
    name = {"zero_shot": "zero-shot", "baseline": row.baseline, "tuned": row.name}[kind]
    settings = row.example["settings"]
    scripts = {"CoOp": ["prograd"]}.get(name, table.SCRIPTS)  # vpt.py's base is trained as VPT is
    if kind != "zero_shot" and settings["method"] not in scripts:
        return None
    many = name == "ProGrad" and settings["teacher"] == "ensemble"
    return "ProGrad++" if many else name


def tests_of(row: table.Row, column: str) -> list[dict]:
    """The test sets that a column of the table is of."""
    return table.columns_of(row.example)[table.SIDES[0] if column == "H of means" else column]


def place(row: table.Row, column: str, kind: str) -> tuple:
    """Where a figure of ours stands in papers.csv: (dataset, test_on, classes)."""
    test = tests_of(row, column)[0]
    trained = row.example["training"]["dataset"]
    classes = "H" if column == "H of means" else test["classes"]
    if row.parts:
        eleven = {part.dataset for part in row.parts} == set(table.ELEVEN)
        own = column in ("all", "base", "new", "H of means")
        return "mean of 11" if eleven else row.dataset, "" if own else column, classes
    if column.startswith("mean of "):
        return trained, column.removesuffix(" others"), classes
    if kind == "zero_shot":  # what it is tested on is all that counts
        return test["dataset"], "", classes
    return trained, "" if test["dataset"] == trained else test["dataset"], classes


def gaps(row: table.Row, kind: str, column: str, paper: dict) -> dict[str, None]:
    """What differs between a figure of ours and a published one, as {text: None}."""
    if row.parts:
        return {gap: None for part in row.parts for gap in gaps(part, kind, column, paper)}
    settings, trained = row.example["settings"], row.example["training"]
    local = Path(settings["pretrained"] or "").exists()  # zero-shot tells whose weights it has
    pairs = [
        ("backbone", settings["model"].removesuffix("-quickgelu"), paper["backbone"]),
        ("pretrained", "openai" if local else settings["pretrained"], "openai"),
        ("test_part", settings["test_part"], "test"),
    ]
    tests = tests_of(row, column)
    templates = [(test["dataset"], test["template"]) for test in tests]
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
    return {f"{what} {ours} (published: {its})": None for what, ours, its in pairs if ours != its}


def beside(rows: list[table.Row]) -> list[str]:
    """Our figures beside the published ones, as lines of text; then the sources."""
    published = read_papers()
    lines, warnings = [["", "", "here", "published", "difference"]], []
    sources, shown = {}, set()
    columns = [(row, *column) for row in rows for column in row.figures]
    for row, column, kind in columns:
        if kind not in ("zero_shot", "baseline", "tuned") or column in ("H", *table.SIDES):
            continue
        here = statistics.mean(row.figures[column, kind].values())
        where = place(row, column, kind)
        zero_shot = (row.example["clip"], where, here) if kind == "zero_shot" else None
        if zero_shot in shown:  # it stands in many rows
            continue
        shown |= {zero_shot} - {None}
        method = method_of(row, kind)
        at = ("method", "dataset", "test_on", "classes")
        alike = [paper for paper in published if [paper[k] for k in at] == [method, *where]]
        told = [(list(gaps(row, kind, column, paper)), paper) for paper in alike]
        told.sort(key=lambda pair: len(pair[0]))
        name = [row.label, f"{table.title_of(row, kind)}, {column}", f"{here:.2f}"]
        same = [paper for gap, paper in told if not gap]
        for paper in same:
            mark = sources.setdefault((paper["source"], paper["note"]), len(sources) + 1)
            off = here - float(paper["accuracy"])
            lines.append([*name, f"{paper['accuracy']} [{mark}]", f"{off:+.2f}"])
        if told and not same:
            lines.append([*name, f"none: {'; '.join(told[0][0])}", ""])
        off = [abs(here - float(paper["accuracy"])) for paper in same]
        if kind == "zero_shot" and off and min(off) > 0.5:
            settings, test = row.example["settings"], tests_of(row, column)[0]
            warnings.append(
                f"warning: {row.label}: zero-shot is {here:.2f}, published {same[0]['accuracy']}: "
                f"other weights, template or test images? Here: {settings['model']} "
                f"{settings['pretrained']}, fingerprint {row.example['clip'][:8]}; "
                f"{test['template']!r}; {test['n']} images of {test['dataset']}"
            )
    marks = [f"[{i}] {source}{f' ({note})' * bool(note)}" for (source, note), i in sources.items()]
    none = "Of what is not listed, papers.csv has no figure."
    return [table.markdown(lines), none, "", *marks, *warnings]
