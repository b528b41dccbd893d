"""Recipes of benchmark/README.md, done as written: a method of one's own; the methods, emptied."""

import doctest
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import test_equations
from golden_world import OWN, world
from test_golden import walk

import common
import data
import prograd
import proreg
import vpt

REPO = Path(__file__).resolve().parent.parent
sys.path += [str(REPO / "tools"), str(REPO / "benchmark")]
import table  # noqa: E402
import use  # noqa: E402

QUICK = ["--shots", "1", "--epochs", "6", "--test-part", "val", "--workers", "0"]
RECORDED = {prograd: "prograd_dtd16.npz", vpt: "vpt_coop_L3_b1.npz", proreg: "proreg.npz"}


def code(section: str, language: str) -> str:
    """The first block of this language in a section of benchmark/README.md."""
    text = (REPO / "benchmark/README.md").read_text(encoding="utf-8")
    text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def change(text: str, diff: str) -> str:
    """Each change is lines that stay or go, which are there once, and lines that come."""
    for old, new in re.findall(r"((?:^[ -].*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        stays = "".join(line for line in old.splitlines(True) if line.startswith(" ")) + new
        old, new = (re.sub("^.", "", lines, flags=re.MULTILINE) for lines in (old, stays))
        assert text.count(old) == 1, f"change benchmark/README.md: once in prograd.py?\n{old}"
        text = text.replace(old, new)
    return text


def test_own_method(tmp_path, monkeypatch, capsys):
    path = tmp_path / "dropout.py"
    changed = change(inspect.getsource(prograd), code("Add a method of your own", "diff"))
    path.write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    dropout = importlib.import_module("dropout")
    assert doctest.testmod(dropout).failed == 0
    env = os.environ | {"PYTHONPATH": str(REPO)}
    told = subprocess.check_output([sys.executable, path, "--help"], env=env)
    assert b"ProGrad with prompt dropout" in told and b"--dropout P" in told
    with pytest.raises(data.UserError, match="--dropout is a share"):
        dropout.main(["--dropout", "1"])
    plain = prograd.main([*QUICK, "--no-compare"])
    whole = dropout.main([*QUICK, "--out-dir", "whole"])
    assert whole["method"] == whole["name"] == "dropout" and whole["baseline_name"] == "ProGrad"
    for test, same in zip(whole["tests"], plain["tests"]):
        assert test["baseline"] == same["tuned"] != test["tuned"]  # dropout 0 is ProGrad

    def kill(out, epoch, *given, kept=common.end_epoch, **named):
        kept(out, epoch, *given, **named)
        if epoch == 2 and out.name == "killed":
            raise KeyboardInterrupt

    with mock.patch.object(common, "end_epoch", kill), pytest.raises(KeyboardInterrupt):
        dropout.main([*QUICK, "--out-dir", "killed"])
    assert dropout.main(["--resume", "killed"])["tests"] == whole["tests"]
    for file in ("checkpoint.safetensors", "metrics.jsonl"):
        assert Path("killed", file).read_bytes() == Path("whole", file).read_bytes()
    data.read_image("toy:toy_fillshapes_sketch/test/0").save("a.png")
    table.main(["whole"])
    use.main(["predict", "killed", "a.png", "--script", str(path)])
    text = capsys.readouterr().out
    assert "| dropout − ProGrad |" in text and "\n  tuned " in text


@pytest.mark.parametrize("module", RECORDED, ids=lambda module: module.__name__)
def test_written_anew(module, tmp_path, monkeypatch):
    """Of each body that is empty an example, an equation and a recording tell, and name it."""
    path = shutil.copy(module.__file__, tmp_path / f"emptied_{module.__name__}.py")
    script = code("Learn it by writing it", "bash").split("END'\n")[1].split("\nEND")[0]
    subprocess.run([sys.executable, "-", path], input=script, text=True, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    emptied = importlib.import_module(path.stem)
    pasted = test_equations.PASTED[module]
    equations = getattr(test_equations, f"test_{module.__name__}_equations")
    assert inspect.getsource(emptied).count("raise NotImplementedError") == len(vars(pasted)) + 1
    for name in [*vars(pasted), "step"]:
        empty, whole = getattr(emptied, name), getattr(module, name)
        assert empty.__doc__ == whole.__doc__
        assert inspect.getfullargspec(empty).args == inspect.getfullargspec(whole).args
        told = pytest.raises(NotImplementedError, match=f"write {name}: Eq. ")
        with mock.patch.object(module, name, empty), told:
            walk(RECORDED[module], world(OWN))
        if name == "step":  # neither an equation by itself, nor an example
            continue
        among = getattr(pasted, name).__globals__  # where the pasted functions find each other
        with mock.patch.dict(among, {name: empty}), mock.patch.object(pasted, name, empty), told:
            equations()
        (test,) = doctest.DocTestFinder(recurse=False).find(empty, name, globs=vars(emptied))
        assert doctest.DocTestRunner().run(test, out=[].append).failed > 0
