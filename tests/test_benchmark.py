"""benchmark/: kernels a step, equal numbers, tables that refuse to mix, the papers' commands."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, TEXT, tiny_model

import data
import prograd
import proreg
import vpt
from data import UserError

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmark"))
import speed  # noqa: E402
import table  # noqa: E402
import toy_study  # noqa: E402

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}


@pytest.fixture(scope="module")
def deep():
    """As many layers, heads and names as ViT-B/16's text tower, but narrow: kernels are as many."""
    text = TEXT | {"width": 64, "heads": 8, "layers": 12}
    model = tiny_model("deep", config=CONFIG | {"text_cfg": text}).requires_grad_(False)
    import open_clip

    clip = speed.common.Clip(model, None, open_clip.get_tokenizer("deep"), "random")
    return clip, open_clip.IMAGENET_CLASSNAMES


def test_kernels_of_a_prograd_step(deep):
    """C = 100, M = 16: forward, both gradients, projection."""
    clip, names = deep
    steps = speed.prograd_steps(clip, names[:100], argparse.Namespace())
    ours, plain = (speed.count_kernels(steps[which]) for which in ("ours", "plain"))
    assert ours <= 1000 and ours <= 0.75 * plain


@pytest.mark.parametrize("kind", ["global", "image"])
def test_kernels_of_a_vpt_step(deep, kind):
    clip, names = deep
    steps = speed.vpt_steps(clip, names[:50], argparse.Namespace(), kind)
    assert speed.count_kernels(steps["ours"]) <= 700


def test_counting_kernels():
    x = torch.randn(8, 8)
    assert speed.count_kernels(lambda: (x @ x).softmax(dim=-1).view(-1).sin()) == 3


def test_speed_quick(capsys):
    """All cases at small sizes: the two ways give the same, or it says so."""
    rows = speed.main(["--quick", "--repeat", "1", "--out", "speed.json"])
    assert len(rows) == 7 and all(row["ratio"] > 0 for row in rows)
    assert json.loads(Path("speed.json").read_text())["torch"] == torch.__version__
    steps = {"plain": lambda: (torch.ones(2), torch.ones(2)), "ours": lambda: (torch.ones(2),) * 2}
    steps["ours"] = lambda: (1.1 * torch.ones(2), torch.ones(2))
    args = argparse.Namespace(precision="fp32", repeat=1, device="cpu")
    with pytest.raises(AssertionError, match="the two ways differ"):
        speed.compare("wrong", steps, args)


def result(folder: str, seed: int, tuned: float, shots: int = 4, **settings) -> str:
    """A run folder with this result."""
    measures = {"accuracy": tuned, "nll": 1.0, "ece": 1.0}
    test = {"dataset": "dtd", "domain": "", "classes": "all", "n": 10, "extra": {}}
    test |= {"zero_shot": measures | {"accuracy": 50.0}, "tuned": measures}
    test["baseline"] = measures | {"accuracy": tuned - seed}
    found = {"method": "prograd", "dataset": "dtd", "shots": shots, "lam": 1.0, "seed": seed}
    content = {"tests": [test], "harmonic_mean": {}, "settings": found | settings}
    data.write(Path(folder, "result.json"), json.dumps(content).encode())
    return folder


def test_table(capsys):
    """Mean ± std over seeds; paired differences ± standard error; other settings another row."""
    folders = [result("a", 1, 60.0), result("b", 2, 62.0), result("c", 1, 70.0, lam=0.5)]
    table.main(folders)
    out = capsys.readouterr().out
    assert "| prograd dtd 4 shots lam 1.0 | 2 | tuned | 61.0 ± 1.4 |" in out
    assert "| prograd dtd 4 shots lam 1.0 | 2 | tuned − baseline | +1.5 ± 0.5 |" in out
    assert "| prograd dtd 4 shots lam 0.5 | 1 | tuned | 70.0 |" in out
    with pytest.raises(UserError, match="seed 1 is there twice in runs with equal settings"):
        table.main([*folders, result("d", 1, 61.0)])
    with pytest.raises(UserError, match="nothing is not finished"):
        table.main(["nothing"])


def test_table_keeps_kinds_of_runs_apart(capsys):
    """With and without a baseline; trained on one dataset and evaluated on another."""
    for name, dataset in {"trained": "dtd", "elsewhere": "sun397"}.items():
        data.write(
            Path(name, "config.json"), json.dumps({"settings": {"dataset": dataset}}).encode()
        )
    folders = [result("a", 1, 60.0, compare=False), result("b", 2, 62.0, compare=True)]
    folders += [result("c", 3, 64.0, compare=True, eval="trained")]
    folders += [result("d", 4, 66.0, compare=True, eval="elsewhere")]
    table.main(folders)
    rows = [line for line in capsys.readouterr().out.splitlines() if "| tuned |" in line]
    assert [row.split("|")[2].strip() for row in rows] == ["1"] * 4
    assert sum("trained on sun397" in row for row in rows) == 1


def test_plot():
    folders = [result(f"{k}{s}", s, 50.0 + k, k) for k in (1, 4, 16) for s in (1, 2)]
    table.main([*folders, "--plot", "x.svg"])
    svg = Path("x.svg").read_text()
    assert svg.count("<polyline") == 3 and svg.count("<circle") == 9
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)][:3]
    assert abs((xs[1] - xs[0]) - (xs[2] - xs[1])) < 0.2  # powers of 2 are as far apart
    with pytest.raises(UserError, match="prograd zero-shot is there twice at 4 shots"):
        table.main([*folders, result("other", 1, 60.0, 4, lam=0.5), "--plot", "x.svg"])


PROTOCOLS = {
    "prograd few-shot": 165,
    "prograd base-to-new": 33,
    "prograd cross-dataset": 3,
    "prograd domain-generalisation": 3,
    "vpt base-to-new": 33,
    "vpt cross-dataset": 3,
    "vpt domain-generalisation": 3,
    "proreg id-ood": 72,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_papers_commands(protocol):
    """Every line is a command that its script takes, with a folder of its own."""
    script = str(REPO / "benchmark/papers.sh")
    done = subprocess.run(
        ["bash", script, *protocol.split(), "/data"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == PROTOCOLS[protocol] and len(set(lines)) == len(lines)
    folders = set()
    for line in lines:
        python, file, *flags = shlex.split(line)
        method = SCRIPTS[file.removesuffix(".py")]
        typed = vars(method.build_parser().parse_args(flags))
        assert python == "python" and typed["dataset"] in data.SOURCES and typed["paper"]
        folders.add(typed["resume"])
    assert len(folders) == len(lines)


def test_papers_mistake():
    script = str(REPO / "benchmark/papers.sh")
    done = subprocess.run(["bash", script, "vpt", "few-shot"], capture_output=True, text=True)
    assert done.returncode == 2 and "no protocol 'few-shot' of 'vpt'" in done.stderr


def test_toy_study(monkeypatch, tmp_path, capsys):
    """Runs are kept one by one, and never done twice; tables pair by seed."""
    monkeypatch.setattr(toy_study, "RESULTS", tmp_path / "toy")
    monkeypatch.setattr(toy_study, "SEEDS", (1, 2))
    monkeypatch.setattr(toy_study, "PROMPT_TASKS", ["toy_colorfills_dark"])
    jobs = toy_study.study()
    assert len({toy_study.key(what) for _, what, _ in jobs}) == len(jobs) > 100
    for script, _what, flags in jobs:
        SCRIPTS[script].build_parser().parse_args(flags)
    rows = []
    kinds = ["zero_shot", "tuned", "mean_residual"]
    kinds += [f"{k} {a}" for k in ("ensemble", "wise-ft") for a in (0.3, 0.5, 0.7)]
    for script, what, _ in jobs:
        shift = what["seed"] + (what["method"] == "ProGrad")
        m = {kind: [60.0 + shift, 1.0, 5.0] for kind in kinds}
        tests = ("all", "x") if script == "proreg" else ("base", "new", "all")
        h = {kind: 60.0 + shift for kind in kinds}
        row = {"what": what, "H": h, "tests": dict.fromkeys(tests, m)}
        rows.append(row | {"curve": [[40, 70.0, 0.5, 0.1], [80, 71.0, 0.4, 0.2]]})
    data.write(tmp_path / "toy/runs.jsonl", (json.dumps(rows[0]) + "\n").encode())
    with pytest.raises(data.UserError, match=f"{len(jobs) - 1} runs are not done yet"):
        toy_study.write_tables()
    data.write(tmp_path / "toy/runs.jsonl", "".join(json.dumps(r) + "\n" for r in rows).encode())
    toy_study.write_tables()
    out = (tmp_path / "toy/tables.md").read_text()
    assert "| ProGrad (2 seeds) | 62.5 ± 0.7 |" in out
    assert "| … minus CoOp | +1.0 ± 0.0 | +1.0 ± 0.0 | +1.0 ± 0.0 | +0.0 ± 0.0 |" in out
    assert "| ProGrad: cosine | 0.50 | 0.40 |" in out
    pictures = {path.stem for path in (tmp_path / "toy").glob("*.svg")}
    assert pictures == {"shots", "base_new", "all_ood", "curves"}
    done = toy_study.read_runs()
    assert all(toy_study.key(row["what"]) in done for row in rows)


def test_one_run_of_the_study():
    script, what, flags = next(job for job in toy_study.study() if job[1]["part"] == "curves")
    kept = toy_study.perform((script, what, [*flags, "--epochs", "40"]))
    assert kept["what"] == what and set(kept["tests"]) == {"base", "new"}
    ((epoch, accuracy, cosine, conflict),) = kept["curve"]
    assert epoch == 40 and 0 < accuracy < 100 and -1 <= cosine <= 1 and 0 <= conflict <= 1
