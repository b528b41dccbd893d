"""Every flag of the three scripts: random combinations of values in and out of range; each flag is read; help is true.

A draw ends with a valid result, or with one line on stderr and status 2 (1: the numbers are not finite). The toy sets
are cut to two images a class, and CLIP is loaded once, so that 600 draws take half a minute.
"""

import argparse
import ast
import dataclasses
import functools
import json
import math
import os
import random
import re
import shlex
import signal
from pathlib import Path

import make_data
import pytest

import common
import data
import prograd
import proreg
import runs
import vpt

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
QUICK = ["--max-steps", "1", "--epochs", "1", "--shots", "1"]
SECONDS = 60  # no draw takes a tenth of it on an idle machine

# What is tried with flags that are numbers, whatever their range.
NUMBERS = ["0", "1", "2", "3", "7", "0.5", "0.1", "1e-3", "1e-12", "-1", "-0.5", "1e12", "1e13", "1000000000", "nan",
           "inf", "-inf", "1e400", "x", "", "1_0", "٣", "10" * 200]  # fmt: skip
WORDS = {
    "--dataset": [*data.world.TASKS, "folder:photos", "folder:domains", "folder:one", "toy_none", "dtd", "imagenet_a",
                  "folder:", "folder:nowhere", "../../etc", "toy_shapes_biased/../../x", "", "folder:finished"],
    "--data-root": [".", "nowhere", "", "garbage.pt"],
    "--shots": [*NUMBERS, "all"],
    "--test-on": ["toy_shapes_biased", "toy_colorfills_dark", "folder:photos", "dtd", "../x", ""],
    "--template": ["a {}.", "{}", "a photo of a red {}", "{} photo", "{} {}", "none", "{0}", "}{", "{", "", "🙂 {}"],
    "--train-domain": ["north", "south", "nowhere", ""],
    "--test-domain": ["north", "south", "nowhere", ""],
    "--model": ["toyclip", "RN50", "ViT-B-16-SigLIP", "nothing", "../x", "", "hf-hub:a/b"],
    "--pretrained": [str(ROOT / "toyclip/weights.safetensors"), "openai", "garbage.pt", "nowhere.pt", "photos", ""],
    "--device": ["auto", "cpu", "cpu:1", "cuda", "cuda:9", "cuda:-1", "mps", "meta", "xla", "gpu", "", "0"],
    "--cache-dir": ["none", "other", "garbage.pt", "/dev/null", "/proc/none", ""],
    "--out-dir": ["a/b", "finished", "unfinished", "garbage.pt", "/proc/none", "x" * 300, "new/../new2", "photos"],
    "--checkpoint": ["finished", "finished/checkpoint.pt", "garbage.pt", "nowhere", "photos", "", "/dev/zero"],
    "--ctx-init": ["a photo of a", "circle", "red", " ", "", "🙂", "a photo " * 50],
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_world(tmp_path_factory):
    """Two images a class and part, one CLIP for all runs, no fsync; nothing is downloaded."""
    cached = functools.cache(common.load_clip)
    create = common.open_clip.create_model

    def no_download(name, pretrained=None, **more):
        if pretrained:
            raise RuntimeError("there is no network in this test")
        return create(name, **more)

    with pytest.MonkeyPatch.context() as patch:
        small = {n: dataclasses.replace(t, parts=dict.fromkeys(t.parts, 2)) for n, t in data.world.TASKS.items()}
        patch.setattr(data.world, "TASKS", small)
        patch.setattr(common, "load_clip", lambda *key: dataclasses.replace(cached(*key)))
        patch.setattr(common.open_clip, "create_model", no_download)
        patch.setattr(common, "versions", functools.cache(common.versions))
        patch.setattr(runs, "commit", lambda: "")
        patch.setattr(os, "fsync", lambda file: None)
        patch.chdir(tmp_path_factory.mktemp("flags"))
        for kind in ("circle", "star"):
            make_data.images(Path("photos", kind), 8)
            for domain in ("north", "south"):
                make_data.images(Path("domains", domain, kind), 8)
        make_data.images(Path("one", "circle"), 8)
        Path("garbage.pt").write_bytes(b"garbage")
        yield


@pytest.fixture(scope="module")
def script(request, quick_world):
    """The script, with a folder in which a finished and an unfinished run of it lie."""
    folder = Path(request.param).absolute()
    folder.mkdir()
    for name in ("photos", "domains", "one", "garbage.pt"):
        (folder / name).symlink_to(folder.parent / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        module = SCRIPTS[request.param]
        module.main([*QUICK, "--out-dir", "finished"])
        module.main([*QUICK, "--out-dir", "unfinished"])
        Path("unfinished/result.json").unlink()
        yield module


def options(module) -> dict[str, argparse.Action]:
    return {action.option_strings[0]: action for action in module.build_parser()._actions if action.dest != "help"}


def values_of(flag: str, action: argparse.Action) -> list[str]:
    """All that is tried as the flag's value; a flag of a new kind must be given some."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [*action.choices, "nothing", ""]
    if flag in WORDS:
        return WORDS[flag]
    assert action.type is not None, f"add values for {flag} to WORDS"
    return NUMBERS


def accepted(flag: str, action: argparse.Action, value: str) -> bool:
    try:
        return action.type is None or action.type(value) is not None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False


def draw(rng: random.Random, actions: dict[str, argparse.Action]) -> list[str]:
    """Up to six flags, each value three times of four one that argparse takes."""
    drawn = []
    for flag in rng.sample(list(actions), rng.randint(1, 6)):
        action, values = actions[flag], values_of(flag, actions[flag])
        if rng.random() < 0.75:
            values = [value for value in values if accepted(flag, action, value)] or values
        n = {None: 1, 0: 0, 2: rng.choice([2, 2, 2, 1]), "+": rng.randint(1, 2)}[action.nargs]
        spelled = rng.choice(action.option_strings)
        drawn.append([spelled, *(rng.choice(values) for _ in range(n))])
    companions = {"--eval-only": "--checkpoint finished", "--checkpoint": "--eval-only",
                  "--resume": "--out-dir unfinished", "folder:photos": "--model toyclip",
                  "folder:domains": "--model toyclip --domains --test-domain north"}  # fmt: skip
    for word in [word for flag in drawn for word in flag]:
        if word in companions and rng.random() < 0.7:
            drawn.append(companions[word].split())
    if any(flag[:2] == ["--epochs", "1000000000"] for flag in drawn):  # would be endless without --max-steps
        drawn = [flag for flag in drawn if flag[0] != "--max-steps"]
    return [word for flag in drawn for word in flag]


def check(result: dict) -> None:
    """A result is complete, finite and JSON."""
    json.dumps(result, allow_nan=False)
    assert result["tests"]
    for test in result["tests"]:
        for key in ("zero_shot", "tuned", "baseline"):
            if test[key]:
                assert 0 <= test[key]["accuracy"] <= 100 and 0 <= test[key]["ece"] <= 100.001
                assert math.isfinite(test[key]["nll"]) and test[key]["nll"] >= 0


def outcome(module, argv: list[str], capsys) -> int:
    """The exit status of this command, after checking what it left and said."""

    def too_slow(*_):
        raise AssertionError(f"over {SECONDS} s: {shlex.join(argv)}")

    found, status = [], 0
    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        runs.run(lambda: found.append(module.main(argv)))
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        raise AssertionError(f"{module.__name__}.py {shlex.join(argv)}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    said = f"{module.__name__}.py {shlex.join(argv)}\n{(err := capsys.readouterr().err)}"
    if status == 0:
        try:
            check(found[0])
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{said}{error}") from error
    else:
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), said
        assert status == 2 or (status == 1 and "not finite" in err), said
    return status


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
@pytest.mark.parametrize("draws", [200, pytest.param(700, marks=pytest.mark.slow)])
def test_any_flags_give_a_result_or_one_line(script, draws, capsys):
    rng, actions = random.Random(f"{script.__name__} {draws}"), options(script)
    seen, statuses, outside = set(), [], [set(os.listdir(folder)) for folder in ("..", ROOT)]
    while len(statuses) < draws:
        flags = draw(rng, actions)
        if "--out-dir" not in flags:
            flags += ["--out-dir", f"draw{draws}-{len(statuses)}"]
        if "--help" in flags or "-h" in flags:
            continue
        seen |= {flag for flag, action in actions.items() if set(action.option_strings) & set(flags)}
        statuses.append(outcome(script, [*QUICK, *flags], capsys))
    assert seen == set(actions)  # nothing was left out
    assert outside == [set(os.listdir(folder)) for folder in ("..", ROOT)]  # whatever --out-dir and --dataset held
    assert 0.1 < statuses.count(0) / draws < 0.9  # neither all refused nor all taken


# ----------------------------------------------------------------------------------------------------------------------
# Every flag is read, and says what is true
# ----------------------------------------------------------------------------------------------------------------------
def names_read(path: Path) -> set[str]:
    """Settings that the file's code reads: args.NAME, settings["NAME"], typed.get("NAME"), getattr(args, "NAME")."""
    found, holders = set(), {"args", "settings", "typed", "stored", "s"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found |= {node.attr} if getattr(node.value, "id", "") in holders else set()
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            found |= {getattr(node.slice, "value", "")} if getattr(node.value, "id", "") in holders else set()
        if isinstance(node, ast.Call) and len(node.args) > 1 and getattr(node.func, "id", "") == "getattr":
            found |= {getattr(node.args[1], "value", "")}
        if isinstance(node, ast.Call) and node.args and getattr(node.func, "attr", "") == "get":
            found |= {getattr(node.args[0], "value", "")} if getattr(node.func.value, "id", "") in holders else set()
        if isinstance(node, ast.FunctionDef) and node.name == "load_dataset":  # called with the flags by name
            body = [name.id for line in node.body for name in ast.walk(line) if isinstance(name, ast.Name)]
            found |= {argument.arg for argument in node.args.args if argument.arg in body}
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    files = ["data.py", "common.py", "vision.py", "runs.py", f"{name}.py"]
    read = set().union(*(names_read(ROOT / file) for file in files))
    flags = {action.dest: flag for flag, action in options(SCRIPTS[name]).items()}
    assert not [flag for dest, flag in flags.items() if dest not in read]


def settled(name: str, *flags: str) -> argparse.Namespace:
    module = SCRIPTS[name]
    return runs.settle(module.build_parser(), list(flags), name, module.DEFAULTS, module.paper_exceptions)


# Defaults that no table holds: what the help says in its own words.
IN_WORDS = {"memory_gb", "workers", "out_dir", "alpha", "eval_samples"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_defaults_that_are_used(name):
    toy, paper = vars(settled(name)), vars(settled(name, "--dataset", "dtd"))
    for flag, action in options(SCRIPTS[name]).items():
        assert action.help and "%" not in action.help.replace("%%", "")
        shown = re.search(r" \[(?:toy: (.*), else: )?(.*)\]$", action.help)
        if action.dest in IN_WORDS:
            assert shown
            continue
        values = [runs.in_words(kind[action.dest]) for kind in (toy, paper)]
        if action.dest == "precision":  # resolved for the device: --device and --precision say auto
            values = ["auto", "auto"]
        if action.dest == "device":
            values = ["auto", "auto"]
        if shown is None:
            assert values == ["", ""], flag
        elif action.dest == "dataset":
            assert shown[2] == values[0]
        elif "shots on" in shown[2]:
            for value, shots in re.findall(r"(\d+) from (\d+) shots on", shown[2]):
                assert getattr(settled(name, "--dataset", "dtd", "--shots", shots), action.dest) == int(value)
            assert shown[1] == values[0]
        else:
            assert [shown[1] or shown[2], shown[2]] == [value or "no" for value in values], flag


def test_help_in_words_is_true():
    assert settled("prograd").memory_gb == 4.0 and settled("prograd").workers == 0
    assert settled("prograd", "--dataset", "dtd").workers == min(8, os.cpu_count())
    for loss, toy, paper in (("proreg", 4, 2), ("kd", 0.5, 0.5)):
        assert (proreg.ALPHA[loss]["toy"], proreg.ALPHA[loss]["paper"]) == (toy, paper)
    assert "[toy: 4 or 0.5, else: 2 or 0.5, --paper: by dataset]" in options(proreg)["--alpha"].help
