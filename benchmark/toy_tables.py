"""What toy_study.py measured: tables.md and the pictures, from its .jsonl files alone (toy_claims.py: claims.md)."""

import contextlib
import io
import json
import statistics
from pathlib import Path

import plots
import table
from toy_study import CONTEXTS, LONG, SWEEP, UNBIASED, U

SHOTS = (1, 2, 4, 8, 16)
HALVES = ("base", "new", "H")


# ----------------------------------------------------------------------------------------------------------------------
# 1. Reading: figures by method, test, task and shots; the mean over tasks is a task called "mean"
# ----------------------------------------------------------------------------------------------------------------------
class Figures:
    """The runs of one .jsonl, checked as table.py checks runs. `by`: settings that make another method of a run."""

    def __init__(self, path: Path, by: list[str] = (), extras: bool = False):
        self.runs = table.read_runs([path])
        with contextlib.redirect_stderr(io.StringIO()):  # a note, where runs are of several commits
            self.groups = table.check(self.runs, by)
        self.index, self.of = {}, {}
        self.tasks = list(dict.fromkeys(run["dataset"] for run in self.runs))
        self.seeds = len({run["seed"] for run in self.runs})
        self.rows = {metric: table.tabulate(self.groups, metric, extras) for metric in table.DIGITS}
        for metric, rows in self.rows.items():
            for row in rows:
                places = (
                    ["mean"] if len(row["of"]) > 1 else [row["dataset"], *(["mean"] if len(self.tasks) == 1 else [])]
                )
                for kind, name in (("tuned", row["method"]), ("zero_shot", "zero-shot")):
                    for place in places:
                        key = (metric, name, place, row["shots"], row["test"])
                        if key not in self.index:
                            self.index[key], self.of[key] = row["values"][kind], row["of"]

    def get(self, method, test, task="mean", shots=16, metric="accuracy") -> dict[int, float]:
        """{seed: value}; empty where there is nothing."""
        return self.index.get((metric, method, task, shots, test), {})

    def share(self, method, test, shots) -> str:
        """ "3 of 6 tasks", for a method that was not run on all of them."""
        n = len(self.of.get(("accuracy", method, "mean", shots, test), self.tasks))
        return "" if n == len(self.tasks) else f" ({n} of {len(self.tasks)} tasks)"

    def cell(self, method, test, *args, **at) -> str:
        digits = {"nll": 3}.get(at.get("metric"), 1)
        return table.cell(*table.mean_std(self.get(method, test, *args, **at).values())[:2], digits)

    def cells(self, method, tests=HALVES, *args, **at) -> str:
        return " / ".join(self.cell(method, test, *args, **at) for test in tests)

    def diff(self, a, b, test, task="mean", shots=16, metric="accuracy") -> tuple[float | None, float | None, int]:
        """Of means over tasks: only where both are over the same tasks."""
        keys = [(metric, name, task, shots, test) for name in (a, b)]
        if len({tuple(self.of.get(key, ())) for key in keys}) > 1:
            return None, None, 0
        return table.paired(*(self.index.get(key, {}) for key in keys))

    def diffs(self, a, b, tests=HALVES, *args, **at) -> str:
        digits = {"nll": 3}.get(at.get("metric"), 1)
        return " / ".join(table.cell(*self.diff(a, b, test, *args, **at)[:2], digits, "+") for test in tests)

    def process(self, method: str, key: str, part: int = 2) -> dict[int, float]:
        """{seed: mean over tasks} of what was logged in training: part 0, 1, 2 is the first, middle, last third."""
        values = {}
        for (name, *_), runs in self.groups.items():
            for run in runs if name == method else ():
                if key in run["process"]:
                    values.setdefault(run["seed"], []).append(run["process"][key][part])
        return {seed: statistics.fmean(found) for seed, found in values.items()}


def show(values: dict, digits: int = 2) -> str:
    return table.cell(*table.mean_std(values.values())[:2], digits)


def short(task: str) -> str:
    return task.removeprefix("toy_").replace("_", " ")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Tables
# ----------------------------------------------------------------------------------------------------------------------
def choice_tables(found: dict) -> str:
    lines, text = [], ""
    for family, methods in found["chosen"].items():
        for method, setting in methods.items():
            described = "; ".join(f"{key}: {value}" for key, value in setting.items()) if setting else ""
            lines.append([family, method, described])
    text += "## Settings, chosen on the validation parts\n\n"
    text += (
        f"Means over {len(found['tasks'])} tasks and seeds {found['seeds']}; the whole grid is in `choices.json`.\n\n"
    )
    text += table.markdown(["protocol", "method", "chosen"], lines) + "\n\n"
    for family in ("base-to-new", "vpt global", "vpt image"):
        grid = found["grid"][family]
        points = [(row["lr"], row["epochs"]) for row in next(iter(grid.values()))]
        lines = [[lr, epochs, *(f"{r['base']:.1f} / {r['new']:.1f} / {r['H']:.1f}" for rows in grid.values()
                 for r in rows if (r["lr"], r["epochs"]) == (lr, epochs))] for lr, epochs in points]  # fmt: skip
        text += f"{family}, base / new / H on validation images:\n\n"
        text += table.markdown(["lr", "epochs", *grid], lines) + "\n\n"
    return text


def base_to_new_tables(f: Figures) -> str:
    names = ["zero-shot", "CoOp", "ProGrad", "CE + KL"]
    tasks = [*f.tasks, "mean"]
    text = f"## ProGrad, base to new, 16 shots\n\nBase / new / H, mean ± std over {f.seeds} seeds.\n\n"
    lines = [[short(task), *(f.cells(name, task=task) for name in names)] for task in tasks]
    text += (
        table.markdown(["task", *names], lines) + "\n\nDifferences seed by seed ± standard error, base / new / H.\n\n"
    )
    pairs = [("ProGrad", "CoOp"), ("ProGrad", "CE + KL"), ("ProGrad", "zero-shot")]
    lines = [[short(task), *(f.diffs(*pair, task=task) for pair in pairs)] for task in tasks]
    return text + table.markdown(["task", *(" - ".join(pair) for pair in pairs)], lines) + "\n\n"


CONTROLS = ["lam", "init", "teacher"]


def control(rule="ProGrad", lam=1.0, init="template", teacher="template") -> str:
    return f"{rule}, lam {lam}, init {init}, teacher {teacher}"


def control_tables(f: Figures) -> str:
    rows = {"λ = 0 (CoOp)": control("CoOp", 0.0), "λ = 0.3": control(lam=0.3), "λ = 0.6": control(lam=0.6),
            "λ = 0.8": control(lam=0.8), "λ = 1 (ProGrad)": control(), "CE + 0.3 KL": control("CE + KL", 0.3),
            "CE + KL": control("CE + KL"), "λ = 1, ensemble teacher": control("ProGrad++", teacher="ensemble"),
            "λ = 0, random start": control("CoOp", 0.0, "random"),
            "λ = 1, random start": control(init="random")}  # fmt: skip
    text = "## ProGrad: one thing changed at a time, at ProGrad's setting, 16 shots\n\n"
    text += "Mean over tasks; difference to λ = 1; then H on each task.\n\n"
    lines = [[label, f.cells(name), f.diffs(name, control()), *(f.cell(name, "H", task) for task in f.tasks)]
             for label, name in rows.items()]  # fmt: skip
    text += table.markdown(["", "base / new / H", "difference ± se", *map(short, f.tasks)], lines) + "\n\n"
    text += "Cosine of g_d and g_g and share of projected steps, by third of training (mean over tasks):\n\n"
    lines = []
    for label, name in list(rows.items())[:5]:
        keys = [(key, part) for key in ("cosine", "projected") for part in range(3)]
        lines.append([label, *(show(f.process(name, key, part)) for key, part in keys)])
    header = ["", *(f"{key}, {part}" for key in ("cosine", "projected") for part in ("first", "middle", "last"))]
    return text + table.markdown(header, lines) + "\n\n"


def few(method: str, noise: float = 0.0, init: str = "template") -> str:
    return f"{method}, label_noise {noise}, init {init}"


def few_shot_tables(f: Figures) -> str:
    text = f"## ProGrad, few-shot, all classes\n\nAccuracy, mean over tasks and {f.seeds} seeds, by shots.\n\n"
    shots = [f"{k}" for k in SHOTS]
    lines = [["zero-shot", *(f.cell("zero-shot", "all", shots=k) for k in SHOTS)]]
    kinds = [(0.0, "template", ""), (0.3, "template", ", 30 % wrong labels"), (0.0, "random", ", random start")]
    for noise, init, label in kinds:
        for m in ("CoOp", "ProGrad", "CE + KL"):
            name = few(m, noise, init)
            lines.append([m + label + f.share(name, "all", 1), *(f.cell(name, "all", shots=k) for k in SHOTS)])
    text += table.markdown(["", *shots], [line for line in lines if any(line[1:])]) + "\n\n"
    text += "Differences seed by seed ± standard error:\n\n"
    lines = []
    for noise, init, label in kinds:
        for a, b in (("ProGrad", "CoOp"), ("CE + KL", "CoOp"), ("ProGrad", "CE + KL"), ("CoOp", "zero-shot"),
                     ("ProGrad", "zero-shot")):  # fmt: skip
            other = b if b == "zero-shot" else few(b, noise, init)
            row = [f.diffs(few(a, noise, init), other, ["all"], shots=k) for k in SHOTS]
            lines.append([f"{a} - {b}{label}", *row])
    text += table.markdown(["", *shots], [line for line in lines if any(line[1:])]) + "\n\nEach task:\n\n"
    lines = []
    for task in f.tasks:
        for name in ("zero-shot", few("CoOp"), few("ProGrad"), few("CE + KL"), few("CoOp", 0.3), few("ProGrad", 0.3)):
            label = name.replace(", label_noise 0.0, init template", "").replace(
                ", label_noise 0.3, init template", ", 30 %"
            )
            lines.append([short(task), label, *(f.cell(name, "all", task, shots=k) for k in SHOTS)])
    return text + table.markdown(["task", "", *shots], lines) + "\n\n"


def drops(f: Figures) -> dict[str, dict[int, tuple[float, int]]]:
    """{method: {seed: (highest - last validation accuracy, epoch of the highest)}} of the curve averaged over tasks."""
    found = {}
    for (method, *_), runs in f.groups.items():
        for run in runs:
            found.setdefault(method, {}).setdefault(run["seed"], []).append(plots.curves(run)["tuned"])
    result = {}
    for method, seeds in found.items():
        for seed, curves in seeds.items():
            mean = {epoch: statistics.fmean(curve[epoch] for curve in curves) for epoch in curves[0]}
            peak = max(mean, key=mean.get)
            result.setdefault(method, {})[seed] = (mean[peak] - mean[max(mean)], peak)
    return result


def curve_tables(f: Figures) -> str:
    text = "## Learning curves, 4 shots, all classes, lr 0.02, 100 epochs\n\n"
    text += "Validation accuracy, mean over tasks, and test accuracy of the last epoch.\n\n"
    lines = [[method, show({s: drop for s, (drop, _) in seeds.items()}),
              show({s: float(peak) for s, (_, peak) in seeds.items()}, 0), f.cell(method, "all", shots=4)]
             for method, seeds in drops(f).items()]  # fmt: skip
    return text + table.markdown(["", "highest - last", "epoch of the highest", "test accuracy"], lines) + "\n\n"


PAIRS = [("VPT global", "CoOp (as VPT's)"), ("VPT image", "CoCoOp-like")]


def vpt_tables(f: Figures, title: str) -> str:
    columns = [("base", "accuracy"), ("new", "accuracy"), ("H", "accuracy"), ("base", "nll"), ("new", "nll"),
               ("base", "ece"), ("new", "ece")]  # fmt: skip
    header = ["", "base", "new", "H", "NLL base", "NLL new", "ECE base", "ECE new", "AUROC base", "AUROC new"]
    names = ["zero-shot", *(name for pair in PAIRS for name in pair[::-1])]
    names = [name for name in names if f.get(name, "base")]
    lines = [
        [name, *(f.cell(name, test, metric=metric) for test, metric in columns), *aurocs(f, name)] for name in names
    ]
    text = f"## VPT, {title}\n\nMean over {', '.join(map(short, f.tasks))}, ± std over {f.seeds} seeds, 16 shots. "
    text += "AUROC: how well the entropy of a prediction tells wrong from right.\n\n"
    text += table.markdown(header, lines) + "\n\nDifferences seed by seed ± standard error:\n\n"
    lines = [[f"{a} - {b}", *(f.diffs(a, b, [test], metric=metric) for test, metric in columns)]
             for pair in PAIRS if f.get(pair[0], "base") for a, b in (pair, (pair[0], "zero-shot"))]  # fmt: skip
    text += table.markdown(header[:8], lines) + "\n\nEach task, base / new / H:\n\n"
    lines = [[short(task), *(f.cells(name, task=task) for name in names)] for task in f.tasks]
    return text + table.markdown(["task", *names], lines) + "\n\n"


def aurocs(f: Figures, name: str) -> list[str]:
    """Mean over all runs of the AUROC of entropy, on base and new."""
    cells = []
    for test in ("base", "new"):
        values = [t["extra"].get("auroc_zero_shot" if name == "zero-shot" else "auroc_tuned")
                  for (method, *_), runs in f.groups.items() for run in runs for t in run["tests"]
                  if t["classes"] == test and (method == name or name == "zero-shot")]  # fmt: skip
        values = [value for value in values if value is not None]
        cells.append(f"{statistics.fmean(values):.3f}" if values else "")
    return cells


KNOBS = ["samples", "residual_scale", "kl_weight", "ctx_init"]


def knob(samples=8, u=U, kl=0.001, words="a photo of a", name="VPT global") -> str:
    return f"{name}, samples {samples}, residual_scale {u}, kl_weight {kl}, ctx_init {words}"


def sweep_tables(f: Figures, contexts: dict[int, str]) -> str:
    plain = "CoOp (as VPT's)"
    rows = {f"L = {L}": knob(L) for L in (1, 2, 5, 8, 10, 20)}
    rows |= {f"L = {L}, mean residual": f"{knob(L)}: mean_residual" for L in (1, 2, 5, 8, 10, 20)}
    rows |= {f"u = {u:g}": knob(u=u) for u in (0.02, 0.08, U, 1.0)}
    rows |= {f"KL weight {k:g}": knob(kl=k) for k in (0.0, 0.001, 0.1, 1.0)}
    rows |= {f"M = {m}": knob(words=text) for m, text in contexts.items()}
    rows |= {f"M = {m}, deterministic": knob(0, words=text, name=plain) for m, text in contexts.items()}
    text = f"## VPT (global): one thing changed at a time, lr {SWEEP['lr']}, {SWEEP['epochs']} epochs\n\n"
    text += f"Mean over {', '.join(map(short, f.tasks))}, {f.seeds} seeds. Default: L = 8, u = {U}, KL weight 0.001, "
    text += "M = 4. Difference to the default.\n\n"
    lines = []
    for label, name in rows.items():
        nll = " / ".join(f.cell(name, test, metric="nll") for test in ("base", "new"))
        sigma = show(f.process(name, "sigma")) if "residual" not in label else ""
        lines.append([label, f.cells(name), f.diffs(name, knob()), nll, sigma])
    lines = [line for line in lines if line[1].strip(" /")]
    return (
        text
        + table.markdown(["", "base / new / H", "difference ± se", "NLL base / new", "σ, last third"], lines)
        + "\n\n"
    )


def proreg_name(loss: str, setting: dict, bias) -> str:
    """Its name in Figures; setting: {"alpha": ..} or {"share": ..}."""
    if "share" in setting:
        return f"{proreg_name('fine-tuning', {}, bias)}: {loss} {setting['share']:g}"
    alpha = {"fine-tuning": 0.0}.get(loss, setting.get("alpha", 0))
    power = float(loss.split()[-1]) if loss.startswith("ProReg") else 1.0
    return f"{loss.split(', ')[0]}, power {power}, alpha {float(alpha)}, toy_bias {bias}"


def proreg_tables(f: Figures, found: dict, unbiased: float) -> str:
    chosen, tests = found["chosen"]["proreg"], ["ID", "background", "style", "mean OOD", "H"]
    text = (
        "## ProReg, toy_shapes_biased\n\nChosen: a by ID validation accuracy; h by the harmonic mean of it and of the "
    )
    text += "accuracy on unbiased validation images. w: weight of the zero-shot loss, last third of training.\n\n"
    for bias, title in ((None, "Training images with the shortcut (bias 0.95)"), (unbiased, "without it (0.125)")):
        lines = [["zero-shot", "", "", *(zero_shot(f, bias, test) for test in tests), "", ""]]
        for loss, points in found["grid"]["proreg"].items():
            for point in points:
                setting = {key: point[key] for key in ("alpha", "share") if key in point}
                name, picks = proreg_name(loss, setting, bias), chosen[loss]
                mark = " ".join(letter for letter, rule in (("a", "by ID"), ("h", "by H")) if picks[rule] == setting)
                w = (
                    [show(f.process(name, key)) for key in ("w_mean", "w_above_half")]
                    if "share" not in setting
                    else ["", ""]
                )
                value = next(iter(setting.values()), "")
                lines.append(
                    [loss, value, mark if setting else "", *(f.cell(name, test, shots="all") for test in tests), *w]
                )
        lines = [line for line in lines if any(line[3:8])]
        text += f"{title}:\n\n"
        text += table.markdown(["", "α or share", "chosen", *tests, "mean w", "share of w > 0.5"], lines) + "\n\n"
        text += equal_id_table(f, found["grid"]["proreg"]) if bias is None else ""
    return text


def at_equal_id(f: Figures, grid: dict, name: str, rival: str) -> tuple[float | None, float | None, int]:
    """Mean OOD accuracy of a run minus the rival's at the run's ID accuracy, on lines between the rival's points."""
    settings = [{key: point[key] for key in ("alpha", "share") if key in point} for point in grid[rival]]
    names = ["zero-shot", proreg_name("fine-tuning", {}, None)]  # both ends of every rival's curve
    names += [proreg_name(rival, setting, None) for setting in settings]
    curve = [[f.get(other, test, shots="all") for test in ("ID", "mean OOD")] for other in names]
    x, y = (f.get(name, test, shots="all") for test in ("ID", "mean OOD"))
    theirs = {seed: between([(a[seed], b[seed]) for a, b in curve], x[seed]) for seed in x}
    return table.paired(y, {seed: value for seed, value in theirs.items() if value is not None})


def equal_id_table(f: Figures, grid: dict) -> str:
    rivals, lines = ("fixed KD", "ensemble", "wise-ft"), []
    for method in (method for method in grid if method.startswith("ProReg")):
        for point in grid[method]:
            name = proreg_name(method, {"alpha": point["alpha"]}, None)
            cells = [f.cell(name, test, shots="all") for test in ("ID", "mean OOD")]
            for rival in rivals:
                mean, se, n = at_equal_id(f, grid, name, rival)
                cells.append(table.cell(mean, se, 1, "+") + (f" (n = {n})" if n < f.seeds else ""))
            lines.append([method, point["alpha"], *cells])
    text = "Mean OOD accuracy of ProReg minus a rival's at the same ID accuracy, on lines between the rival's points, "
    text += "seed by seed ± se (n: seeds within the rival's range):\n\n"
    return text + table.markdown(["", "α", "ID", "mean OOD", *(f"- {rival}" for rival in rivals)], lines) + "\n\n"


def between(points: list[tuple[float, float]], x: float) -> float | None:
    """The y at x on the straight lines between neighbouring points; None outside of them."""
    points = sorted(points)
    for (x1, y1), (x2, y2) in zip(points, points[1:]):
        if x1 <= x <= x2:
            return y1 + (y2 - y1) * (x - x1) / (x2 - x1) if x2 > x1 else (y1 + y2) / 2
    return None


def zero_shot(f: Figures, bias, test: str) -> str:
    rows = [row for row in f.rows["accuracy"] if row["test"] == test and row["method"].endswith(f"toy_bias {bias}")]
    return table.cell(*table.mean_std(rows[0]["values"]["zero_shot"].values())[:2], 1) if rows else ""


# ----------------------------------------------------------------------------------------------------------------------
# 3. Pictures, and all of it
# ----------------------------------------------------------------------------------------------------------------------
def pictures(out: Path, few_shot: Figures, curves: Figures, long: Figures, proreg: Figures) -> None:
    rows = [row for row in few_shot.rows["accuracy"] if row["method"].endswith("init template")]
    panels = []
    for noise, title in ((0.0, "mean over the toy tasks"), (0.3, "30 % of the labels are wrong")):
        end = f", label_noise {noise}, init template"
        kept = [
            r | {"method": r["method"].removesuffix(end), "baseline": ""} for r in rows if r["method"].endswith(end)
        ]
        panels += [panel | {"title": title} for panel in plots.few_shot_panels(kept)[:1]]
    plots.draw(out / "few_shot.svg", panels)
    runs = [(key[0], "", run) for key, group in curves.groups.items() for run in group]
    plots.draw(out / "learning_curves.svg", [plots.learning_panels(runs)[0] | {"title": "4 shots, mean over tasks"}])
    runs = [(key[0], "", run) for key, group in long.groups.items() for run in group]
    titles = {"base": "base classes", "new": "new classes"}
    panels = [panel | {"title": titles.get(panel["title"], "")} for panel in plots.reliability_panels(runs)]
    plots.draw(out / "reliability.svg", panels)
    end = ", toy_bias None"
    rows = [row | {"baseline": ""} for row in proreg.rows["accuracy"] if end in row["method"]]
    for row in rows:  # "ProReg, power 10.0, alpha 4.0, toy_bias None" → "ProReg power 10, alpha 4.0"
        name = (
            row["method"].replace(end, "").replace(", power 1.0", "" if "ProReg" not in row["method"] else " power 1")
        )
        row["method"] = name.replace(", power 10.0", " power 10")
    plots.draw(out / "id_ood.svg", [panel | {"title": "toy_shapes_biased"} for panel in plots.ood_panels(rows)])


def write(out: Path) -> None:
    import toy_claims

    b2n, vpt, long = (Figures(out / f"{name}.jsonl") for name in ("prograd_base_to_new", "vpt", "vpt_long"))
    controls = Figures(out / "prograd_controls.jsonl", CONTROLS)
    few_shot = Figures(out / "prograd_few_shot.jsonl", ["label_noise", "init"])
    curves = Figures(out / "prograd_curves.jsonl")
    sweeps = Figures(out / "vpt_sweeps.jsonl", KNOBS, extras=True)
    proreg = Figures(out / "proreg.jsonl", ["power", "alpha", "toy_bias"], extras=True)
    choices = json.loads((out / "choices.json").read_text(encoding="utf-8"))
    text = "# The toy world, measured\n\nMade by `python benchmark/toy_study.py tables` from the files beside it.\n\n"
    text += base_to_new_tables(b2n) + control_tables(controls) + few_shot_tables(few_shot) + curve_tables(curves)
    text += vpt_tables(vpt, "rate and epochs chosen on validation images")
    text += vpt_tables(long, f"trained long: lr {LONG['lr']}, {LONG['epochs']} epochs")
    text += sweep_tables(sweeps, CONTEXTS) + proreg_tables(proreg, choices, UNBIASED)
    (out / "tables.md").write_text((text + choice_tables(choices)).rstrip() + "\n", encoding="utf-8")
    claims = toy_claims.prograd(b2n, controls, few_shot, curves) + toy_claims.proreg(proreg, choices)
    claims += toy_claims.vpt(vpt, long, sweeps, CONTEXTS)
    (out / "claims.md").write_text(toy_claims.page(claims), encoding="utf-8")
    pictures(out, few_shot, curves, long, proreg)
    print(f"written to {out}: tables.md, claims.md, few_shot.svg, learning_curves.svg, reliability.svg, id_ood.svg")
