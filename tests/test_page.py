"""tools/page.py: its numbers are those of result.json and predictions.npz; nothing breaks out."""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import data
import prograd
import proreg
import vpt

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import page  # noqa: E402

FAST = "--test-part val --workers 0 --cache-dir none --out-dir".split()
SHORT = ["--epochs", "2", "--max-steps", "2", "--shots", "2", *FAST]
KINDS = {
    "prograd": (prograd, ["--eval-every", "1"], ["cosine", "val accuracy"]),
    "vpt": (vpt, ["--samples", "2", "--batch-size", "8"], ["sigma", "entropy"]),
    "proreg": (proreg, ["--augment", "none", "--ensemble", "0.5"], ["w mean", "ensemble 0.5"]),
    "eval": (vpt, [], ["sigma", "mutual information"]),
}
NAMES = ["<b>bold", "\"a\" 'b'</td>", "日本語", "x" * 200, "$x_1$ $\\frac", "&lt;", "\u202eabc"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A short run of each script, and an evaluation of VPT's on a second dataset."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("prograd", "vpt", "proreg"):
        KINDS[name][0].main([*KINDS[name][1], *SHORT, str(root / name)])
    flags = ["--test-on", "toy_colorfills_dark", *FAST, str(root / "eval")]
    vpt.main(["--eval", str(root / "vpt"), *flags])
    return root


def read(folder: Path) -> tuple[str, list[list[list[str]]]]:
    """A run's page, and the cells of its tables. Like XML it is well-formed: nothing breaks out."""
    page.main([str(folder)])
    text = (folder / "page.html").read_text(encoding="utf-8")
    tables = []
    for rows in ET.fromstring(text).iter("table"):
        tables.append([["".join(cell.itertext()) for cell in row] for row in rows])
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("data:image/", "#")) for link in links)
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    return text, tables


@pytest.mark.parametrize("name", KINDS)
def test_sections_and_numbers(name, runs, capsys):
    """The run's table; of its origin; of each test set its classes, and the pairs it confuses."""
    folder = runs / name
    result = json.loads((folder / "result.json").read_text())
    text, (origin, *tables) = read(folder)
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert titles == ["Classes", "Images", "Sureness", "Errors in common", "Training"]
    assert all(word in text for word in KINDS[name][2])
    told = str(origin)
    assert result["clip"] in told and result["split"] in told and str(folder) in told
    capsys.readouterr()
    common.report(result, folder)
    assert capsys.readouterr().out.split("written to")[0] in html.unescape(text)
    own, plain = np.load(folder / "predictions.npz"), folder / "baseline" / "predictions.npz"
    tests = data.load_task(argparse.Namespace(**result["settings"])).tests
    for i, test in enumerate(result["tests"]):
        labels = own[f"{i}/labels"]
        guesses = [own[f"{i}/zero_shot_predicted"], own[f"{i}/tuned_predicted"]]
        guesses += [np.load(plain)[f"{i}/tuned_predicted"]] if plain.exists() else []
        wrong = np.stack(guesses) != labels  # [columns, N]
        assert test["images"] in told and f"{wrong[1].sum()} mistakes" in text
        names = tests[i].classnames
        _, *rows = tables[2 * i]
        changes = [float(row[-1]) for row in rows]
        assert changes == sorted(changes, reverse=True) and {row[0] for row in rows} == set(names)
        for cls, count, *cells in rows:
            right = 100 * (~wrong[:, labels == names.index(cls)]).mean(axis=1)
            assert cells == [*(f"{share:.1f}" for share in right), f"{right[1] - right[0]:+.1f}"]
            assert int(count) == (labels == names.index(cls)).sum()
        for row, one in zip(tables[2 * len(tests) + i][1:], wrong, strict=True):
            assert row[1:] == [str((one & other).sum()) for other in wrong]
        for true, taken, *cells in tables[2 * i + 1][1:]:
            mixed = (labels == names.index(true)) & (np.stack(guesses) == names.index(taken))
            assert cells == [str(k) for k in mixed.sum(axis=1)]


def test_curves(runs, monkeypatch):
    """What is drawn: reliability in 15 bins, coverage, and the curves of a run and its baseline."""
    drawn = {}
    monkeypatch.setattr(
        page, "plot", lambda title, x, lines: drawn.update({(title, x): lines}) or ""
    )
    folder = runs / "prograd"
    result = json.loads((folder / "result.json").read_text())
    part = page.Part(folder, result, 0, {})
    page.sureness(part)
    page.training(folder, result)
    sure, hits = drawn["accuracy, in 15 bins", "confidence"]["ProGrad"]
    share = drawn["share of the images", "confidence"]["ProGrad"][1]
    assert abs(share.sum() - 1) < 1e-9 and np.nansum(share * hits) == pytest.approx(
        part.right[1].mean()
    )
    ece = 100 * np.nansum(share * abs(sure - hits))
    assert ece == pytest.approx(result["tests"][0]["tuned"]["ece"], abs=1e-3)
    covered, right = drawn["accuracy of the surest", "share of the images"]["ProGrad"]
    assert covered[-1] == 1 and right[-1] == pytest.approx(part.right[1].mean())
    for kind in ("loss ce", "cosine", "conflict"):
        assert set(drawn[kind, "epochs"]) == {"ProGrad", "CoOp"}


def test_hostile_names(tmp_path):
    """Folders, files and classes that are called anything; then the images are gone."""
    root = tmp_path / "<i>&'\" $x$ 写真"
    for k, part in [(k, part) for k in range(len(NAMES)) for part in ("train", "test")]:
        (root / part / str(k)).mkdir(parents=True)
        Image.new("RGB", (30, 20), (k, 9, len(part))).save(root / part / str(k) / "<b>'\".png")
    lines = [f"{k}\t{name}\n" for k, name in enumerate(NAMES)]
    (root / "classnames.txt").write_text("".join(lines), encoding="utf-8")
    flags = f"--model toyclip --out-dir {tmp_path}/run --dataset".split()
    flags.append(f"folder:{root}")
    args = common.settle(prograd.build_parser(), flags, "prograd", prograd.defaults)
    task, clip, eye = data.load_task(args), common.load_clip(), torch.eye(len(NAMES))
    out = common.open_run(args, task, clip, "")  # toyclip knows none of these words: no training
    encoded = [common.EncodedTest(task.tests[0], eye, torch.arange(len(NAMES)), eye)]
    found = [{"tuned": eye.roll(1, 0)}]
    common.write_result(out, "ProGrad", args, clip, task, encoded, found, 0.0)
    for shown in (2 * len(NAMES), 0):  # all are broken, and mistakes
        text, tables = read(out)
        assert {row[0] for row in tables[1][1:]} == {name.replace("_", " ") for name in NAMES}
        assert text.count("image/jpeg") == shown and ("without images" in text) == (not shown)
        shutil.rmtree(root, ignore_errors=True)


def test_mistakes(tmp_path, runs, monkeypatch, capsys):
    for folder, text in ((tmp_path, "is no finished run"), (runs / "vpt", "need matplotlib")):
        with pytest.raises(SystemExit) as stopped:
            data.run(lambda folder=folder: page.main([str(folder)]))
        assert stopped.value.code == 2 and text in capsys.readouterr().err
        monkeypatch.setattr(page, "find_spec", lambda name: None)


def test_in_a_browser(runs, tmp_path):
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("there is no chromium: the page was not rendered")
    page.main([str(runs / "prograd"), "page.html"])
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--user-data-dir=home"]
    shot = ["--screenshot=page.png", "--window-size=400,6000", Path("page.html").resolve().as_uri()]
    subprocess.run([browser, *flags, *shot], check=True, capture_output=True, timeout=120)
    drawn = np.asarray(Image.open("page.png").convert("L")).std(axis=1) > 1  # by row of pixels
    assert drawn[:1000].mean() > 0.3 and drawn[3000:5000].mean() > 0.3
