"""benchmark/speed.py compares like with like: the plain way and ours give the same numbers. Speed itself is no test."""

import importlib.util

import open_clip
import pytest

import common

spec = importlib.util.spec_from_file_location("speed", common.HERE / "benchmark" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


@pytest.fixture(scope="module")
def clip():
    open_clip.add_model_config(common.HERE / "toyclip" / "toyclip.json")
    return speed.random_clip("toyclip", "cpu")


CASES = {
    "prograd": lambda clip: speed.prograd_case(clip, C=12, M=16, batch=8),
    "vpt global": lambda clip: speed.vpt_case(clip, "global", C=7, L=3),
    "vpt image": lambda clip: speed.vpt_case(clip, "image", C=7, L=3),
    "vpt evaluation": lambda clip: speed.vpt_evaluation_case(clip, C=7, L=3, N=5),
    "proreg": lambda clip: speed.proreg_case(clip, C=7, batch=4, steps=2),
}


@pytest.mark.parametrize("block", [10**6, 64], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(clip, monkeypatch, name, block):
    monkeypatch.setattr(speed, "BLOCK", block)
    found = CASES[name](clip).check()
    assert found and max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", CASES)
def test_each_part_gives_its_seconds(clip, name):
    case = CASES[name](clip)
    seconds = {part: work() for part, work in case.parts.items()}
    assert all(value > 0 for value in seconds.values())
    assert {part for _, over, under, _ in case.ratios for part in over + under} == set(seconds)
