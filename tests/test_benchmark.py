"""benchmark/: kernels a step, equal numbers, tables that refuse to mix, the papers' commands."""

import argparse
import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import CONFIG, TEXT, tiny_model

import common
import data
import prograd
from data import UserError

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmark"))
import speed  # noqa: E402
import table  # noqa: E402
import toy_study  # noqa: E402


def test_kernels_of_a_step():
    """As many layers and heads as ViT-B/16's text tower: as many kernels. Plain is one piece."""
    x = torch.randn(8, 8)
    assert speed.count_kernels(lambda: (x @ x).softmax(dim=-1).view(-1).sin()) == 3
    text = TEXT | {"width": 64, "heads": 8, "layers": 12}
    model = tiny_model("deep", config=CONFIG | {"text_cfg": text}).requires_grad_(False)
    clip = common.Clip(model, None, open_clip.get_tokenizer("deep"), "random")
    names = open_clip.IMAGENET_CLASSNAMES
    steps = speed.prograd_steps(clip, names[:100])
    ours, plain = (speed.count_kernels(steps[which]) for which in ("ours", "plain"))
    assert ours <= 600 and ours <= 0.75 * plain
    bound = dataclasses.replace(clip, memory_gb=1e-3)
    assert speed.count_kernels(speed.prograd_steps(bound, names[:100])["plain"]) == plain
    for kind in ("global", "image"):
        assert speed.count_kernels(speed.vpt_steps(clip, names[:50], kind)["ours"]) <= 450


def test_speed_quick():
    """All cases at small sizes: the two ways give the same, or it says so."""
    rows = speed.main(["--quick", "--repeat", "1", "--out", "speed.json"])
    assert len(rows) == 7 and all(row["ratio"] > 0 for row in rows)
    assert json.loads(Path("speed.json").read_text())["torch"] == torch.__version__
    steps = {"plain": lambda: [torch.ones(2)], "ours": lambda: [1.1 * torch.ones(2)]}
    args = argparse.Namespace(precision="fp32", repeat=1, device="cpu")
    with pytest.raises(AssertionError, match="the two ways differ"):
        speed.compare("wrong", steps, args)


def result(folder: str, dataset="dtd", tuned=60.0, *, images="same", train=None, **typed) -> str:
    """A run folder of prograd.py with these settings, and accuracies around `tuned`."""
    first = {"dataset": dataset, "method": "prograd", "paper": True, "compare": True} | typed
    settings = common.DEFAULTS | prograd.defaults(first) | first
    own = settings["template"] or data.SOURCES[dataset].template
    tests = []
    for part in ("base", "new") if settings["classes"] == "base" else ("all",):
        test = {"dataset": dataset, "domain": "", "classes": part, "template": own, "n": 10}
        test |= {"images": images + part, "extra": {}}
        for kind, shift in {"zero_shot": -10, "baseline": -settings["seed"], "tuned": 0}.items():
            a = tuned + shift + 4 * (part == "new")
            test[kind] = {"accuracy": a, "nll": a / 100, "ece": 5.0, "mean_class_accuracy": a - 1}
        tests.append(test if settings["compare"] else test | {"baseline": None})
    training = {key: settings[key] for key in ("dataset", "classes", "shots", "seed")}
    training |= {"run": folder, "split": folder, "template": settings["template"]} | (train or {})
    content = {"settings": settings, "tests": tests, "training": training, "clip": "c" * 40}
    content["name"] = "ProGrad" if settings["lam"] else "CoOp"
    content["baseline_name"] = "CoOp" if settings["compare"] else None
    content["harmonic_mean"] = common.harmonic_means(tests)
    data.write(Path(folder, "result.json"), json.dumps(content).encode())
    return folder


def printed(capsys, *argv: str) -> str:
    table.main(list(argv))
    return capsys.readouterr().out


def test_table(capsys):
    """Mean ± std over seeds; paired differences ± standard error; other settings another row."""
    folders = [result("a", tuned=60.0, seed=1), result("b", tuned=62.0, seed=2)]
    out = printed(capsys, *folders, result("c", tuned=70.0, seed=1, lam=0.5))
    assert "| ProGrad, dtd, 16 shots | 2 | ProGrad | 61.0 ± 1.4 |" in out
    assert "| ProGrad, dtd, 16 shots | 2 | ProGrad − CoOp | +1.5 ± 0.5 |" in out
    assert "| ProGrad, dtd, 16 shots, lam 0.5 | 1 | ProGrad | 70.0 |" in out
    assert "| 0.610 ± 0.014 |" in printed(capsys, *folders, "--measure", "nll")
    assert "| 60.0 ± 1.4 |" in printed(capsys, *folders, "--measure", "class-mean")
    data.write(Path("old/result.json"), b'{"settings": {}}')
    for folder, fault in {"nothing": "is not finished", "old": "is of an older version"}.items():
        with pytest.raises(UserError, match=f"{folder} {fault}"):
            table.main([folder])


def test_table_averages_only_what_is_equal_in_all_but_the_draw(capsys):
    """One training is one seed, whatever --seed says; what differs is a row, which says so."""
    first = result("a", seed=1)
    with pytest.raises(UserError, match=r"b has the training or the seed \(1\) of another run"):
        table.main([first, result("b", seed=2, eval="a", train={"seed": 1})])
    folders = [first, result("b", seed=2, images="others"), result("c", seed=3, compare=False)]
    folders += [result("d", seed=4, eval="elsewhere", train={"dataset": "sun397", "seed": 4})]
    rows = [line for line in printed(capsys, *folders).splitlines() if "| ProGrad |" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["1"] * 4
    for told in ("images of dtd all others", "trained with dataset sun397", "baseline None"):
        assert sum(told in row for row in rows) == 1
    out = printed(capsys, *folders[:2], result("e", "eurosat", seed=1))
    assert "no mean of dtd, dtd, eurosat: one is there twice" in out and "mean of 3" not in out
    with pytest.raises(UserError, match="method and baseline are both called CoOp"):
        table.main([result("f", lam=0.0)])


def test_means_over_datasets(capsys):
    """First over datasets, then over seeds; H of means is the papers'; what lacks is named."""
    folders = [result(f"{d}{s}", d, a + s, classes="base", seed=s, shots=4)
               for d, a in {"dtd": 50.0, "eurosat": 80.0}.items() for s in (1, 2)]  # fmt: skip
    out = printed(capsys, *folders, result("more", "dtd", 70.0, classes="base", seed=3, shots=4))
    (row,) = [row for row in out.splitlines() if "mean of 2" in row and "| ProGrad |" in row]
    found = [cell.strip() for cell in row.split("|")]
    assert found[2:6] == ["2", "ProGrad", "66.5 ± 0.7", "70.5 ± 0.7"]
    papers, own = 2 * 66.5 * 70.5 / 137, [2 * a * (a + 4) / (2 * a + 4) for a in (51, 52, 81, 82)]
    assert found[6].startswith(f"{sum(own) / 4:.1f} ±") and found[7] == f"{papers:.1f}"
    assert "missing: seed 3 of eurosat (left out of all), of the papers' eleven imagenet" in out


def test_papers_csv():
    fields = "protocol backbone method dataset classes test_on shots template accuracy source note"
    rows = list(csv.DictReader(data.read_text(REPO / "benchmark/papers.csv").splitlines()))
    assert len(rows) == 241 and list(rows[0]) == fields.split()
    for row in rows:
        assert row["source"] and 0 < float(row["accuracy"]) < 100 and row["shots"].isdecimal()
        assert row["dataset"] in {*data.SOURCES, "mean of 11"} and row["template"]
        assert row["test_on"] in {"", "mean of 4", *table.SHIFTED}


def test_published_figures_stand_beside_ours(capsys):
    """Only where all that matters is the paper's, and from every source; else what differs."""
    random = {"lam": 0.0, "init": "random", "compare": False}
    folders = [result("a", tuned=63.0, seed=1, **random), result("b", tuned=64.0, seed=2, **random)]
    out = printed(capsys, *folders, "--papers")
    source = "yangyangyang127/APE@2eed7cb:APE_results.ipynb | CoOp as released"
    assert f"| CoOp, all | 63.50 | 63.70 | -0.20 | {source}" in out
    assert re.search(r"zero-shot, all \| 53.50 \| 42.32 \| \+11.18 .* other weights, template", out)
    for changed, told in {"lr": 0.1, "views": 5, "epochs": 10, "n_ctx": 4}.items():
        out = printed(capsys, result("c", **random | {changed: told}), "--papers")
        assert re.search(rf"none: {changed} {told} \(published: [\d.]+\)", out)
    out = printed(capsys, result("d", seed=1), "--papers")
    assert "| CoOp, all | 59.00 | none: init template (published: random) |" in out
    folders = [result(f"f/{name}", name, 60.0, classes="base", model="ViT-B-16")
               for name in table.ELEVEN]  # fmt: skip
    out = printed(capsys, *folders, "--papers")
    assert "| 82.96 | -22.96 |" in out and "| 82.48 | -22.48 |" in out
    assert "| ProGrad, H of means | 61.94 | 76.16 |" in out and "| ProGrad, H |" not in out


def test_plot():
    """Several datasets: a panel each and their mean; the same bytes at every call."""
    runs = [result(f"{d}{k}{s}", d, 50.0 + k, shots=k, seed=s)
            for d in ("sun397", "ucf101") for k in (1, 4, 16) for s in (1, 2)]  # fmt: skip
    table.main([*runs, "--plot", "x.svg"])
    svg = Path("x.svg").read_text()
    for text in ("sun397", "mean of 2 datasets", "CoOp beside ProGrad", "standard error over"):
        assert text in svg
    table.main([*runs, "--plot", "y.svg"])
    assert Path("y.svg").read_text() == svg
    rows = table.read_rows([*runs, result("lr", "sun397", 66.0, lr=0.1)], "nll")
    panels = table.against_shots(rows, "nll")
    points = panels["sun397"]["ProGrad"]
    assert [x for x, *_ in panels["sun397"]["ProGrad lr 0.1"]] == [16]
    assert [x for x, *_ in points] == [1, 4, 16] and points[0][1:3] == (0.51, 0.0)
    table.main([*runs, "--plot", "x.png", "--measure", "ece"])
    with pytest.raises(UserError, match="two lines are called zero-shot"):
        table.main([*runs, result("template", "sun397", 99.0, template="{}"), "--plot", "z.svg"])
    with pytest.raises(UserError, match="a plot is a FILE.svg, FILE.png or FILE.pdf"):
        table.main([*runs, "--plot", "x.doc"])


def test_list_of_runs(capsys):
    lines = [f"python prograd.py --resume 'my runs/{name}' --seed 1" for name in "abc"]
    data.write(Path("runs.txt"), "\n".join(lines).encode())
    Path("my runs/b").mkdir(parents=True)
    result("my runs/a")
    out = printed(capsys, "--list", "runs.txt")
    assert out.startswith("finished: 1: lines 1\nbegun: 1: lines 2\nmissing: 1: lines 3\n| acc")


PROTOCOLS = {
    "prograd few-shot": 165, "prograd base-to-new": 33, "prograd cross-dataset": 3,
    "prograd domain-generalisation": 3, "vpt base-to-new": 33, "vpt cross-dataset": 3,
    "vpt domain-generalisation": 3, "proreg id-ood": 72, "coop few-shot": 165,
    "coop domain-generalisation": 3, "zero-shot": 17,
}  # fmt: skip


def papers_sh(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", REPO / "benchmark/papers.sh", *words],
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_papers_commands(protocol):
    """Every line is a command that its script takes, with a folder of its own."""
    done = papers_sh(*protocol.split(), "/my data/it's", "--", "--template", "a {}.")
    folders = []
    for line in done.stdout.splitlines():
        python, file, *flags = shlex.split(line)
        method = table.SCRIPTS[file.removesuffix(".py")]
        typed = vars(method.build_parser().parse_args(flags))
        assert python == "python" and typed["dataset"] in data.SOURCES and typed["paper"]
        assert typed["data_root"] == "/my data/it's" and typed["template"] == "a {}."
        folders.append(typed["resume"])
    assert len(set(folders)) == len(folders) == PROTOCOLS[protocol]


def test_papers_mistake():
    done = papers_sh("vpt", "few-shot")
    assert done.returncode == 2 and "no protocol 'few-shot' of 'vpt'" in done.stderr
    done = papers_sh("prograd", "few-shot", "/data", "--workers", "4")
    assert done.returncode == 2 and not done.stdout and "flags stand after --" in done.stderr


def test_toy_study(monkeypatch, tmp_path):
    """Runs are kept one by one, and never done twice; tables pair by seed."""
    monkeypatch.setattr(toy_study, "RESULTS", tmp_path / "toy")
    monkeypatch.setattr(toy_study, "SEEDS", (1, 2))
    monkeypatch.setitem(toy_study.TASKS, "prompt", ["toy_colorfills_dark"])
    jobs = toy_study.study()
    assert len({table.as_text(what) for _, what, _ in jobs}) == len(jobs) > 100
    rows = []
    kinds = ["zero_shot", "tuned", "mean_residual"]
    kinds += [f"{k} {a}" for k in ("ensemble", "wise-ft") for a in (0.3, 0.5, 0.7)]
    for script, what, flags in jobs:
        table.SCRIPTS[script].build_parser().parse_args(flags)
        shift = what["seed"] + (what["method"] == "ProGrad")
        m = {kind: [60.0 + shift, 1.0, 5.0] for kind in kinds}
        tests = ("all", "x") if script == "proreg" else ("base", "new", "all")
        h = {kind: 60.0 + shift for kind in kinds}
        curve = [[40, 70.0, 0.5, 0.1], [80, 71.0, 0.4, 0.2]]
        rows.append({"what": what, "H": h, "tests": dict.fromkeys(tests, m), "curve": curve})
    lines = [json.dumps(row) for row in rows]
    data.write(tmp_path / "toy/runs.jsonl", lines[0].encode())
    with pytest.raises(UserError, match=f"{len(jobs) - 1} runs are not done yet"):
        toy_study.write_tables()
    data.write(tmp_path / "toy/runs.jsonl", "\n".join(lines).encode())
    toy_study.write_tables()
    out = (tmp_path / "toy/tables.md").read_text()
    assert "| ProGrad (2 seeds) | 62.5 ± 0.7 |" in out
    assert "| … minus CoOp | +1.0 ± 0.0 | +1.0 ± 0.0 | +1.0 ± 0.0 | +1.0 | +0.0 ± 0.0 |" in out
    assert "| ProGrad: cosine | 0.50 | 0.40 |" in out
    pictures = sorted(path.stem for path in (tmp_path / "toy").glob("*.svg"))
    assert pictures == ["all_ood", "base_new", "shots"]


def test_one_run_of_the_study():
    script, what, flags = next(job for job in toy_study.study() if job[1]["part"] == "curves")
    kept = toy_study.perform((script, what, [*flags, "--epochs", "40"]))
    assert kept["what"] == what and set(kept["tests"]) == {"base", "new"}
    ((epoch, accuracy, cosine, conflict),) = kept["curve"]
    assert epoch == 40 and 0 < accuracy < 100 and -1 <= cosine <= 1 and 0 <= conflict <= 1
