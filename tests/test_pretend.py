"""The scripts as if on a GPU (tests/pretend.py): nothing mixes places, no step waits for a number
of the device, and the figures are the CPU's."""

import contextlib
import dataclasses
import inspect
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pretend
import pytest
import safetensors.numpy

import common
import data
import prograd
import proreg
import vpt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import use  # noqa: E402

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
SHORT = "--model toyclip --shots 8 --batch-size 4 --epochs 2 --workers 0 --cache-dir none --lr 1e-3"
EPOCH_END = 3  # waits that an epoch's end may take: its numbers, finite or not, the checkpoint
CASES = {
    "prograd --compare --classes base --augment crop --views 2 --eval-every 1",
    "prograd --csc --augment crop --views 0 --memory-gb 1e-3",
    "prograd --rule add --teacher ensemble --init random --augment none",
    "vpt --compare --classes base --samples 3 --augment crop --views 2",
    "vpt --posterior image --samples 2 --augment none --bound elbo --memory-gb 1e-3 --eval-every 1",
    "vpt --posterior image --samples 0 --augment crop --views 0",
    "proreg --compare --accumulate 2 --select val --ensemble 0.5 --wise-ft 0.3 0.5 --augment crop",
    "proreg --loss kd --alpha 0.5 --views 2 --train head --classes base",
    "proreg --head mlp --augment none --memory-gb 1e-3",
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """folder:PATH of four classes: 8 training images each, 2 for each of the other parts."""
    root = tmp_path_factory.mktemp("photos")
    names = data.world.task_items("toy_fillshapes_sketch")[0]
    for part, n in {"train": 8, "val": 2, "test": 2, "ood/elsewhere": 2}.items():
        kind = part if part in ("train", "val") else "test"
        for i in range(4 * n):
            path = root / part / names[i % 4] / f"{part[:3]}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            at = i // 4 * len(names) + i % 4 + len(names) * 9 * part.startswith("ood")
            data.read_image(f"toy:toy_fillshapes_sketch/{kind}/{at}").save(path)
    return f"folder:{root}"


def run(case: str, photos: str, out: str, device: str = "cpu", steps: int = 4) -> dict:
    """A short run of "SCRIPT FLAGS", silently → its result."""
    name, *flags = case.split()
    flags += ["--max-steps", str(steps), "--device", device, "--precision", "fp32"]
    with contextlib.redirect_stdout(io.StringIO()):
        return SCRIPTS[name].main([*SHORT.split(), "--dataset", photos, "--out-dir", out, *flags])


def pretended(case: str, photos: str, out: str, steps: int = 4) -> tuple[dict, dict]:
    with pretend.pretended() as reads:
        return run(case, photos, out, "cuda", steps), dict(reads)


def test_time(photos):
    import time
    for case in CASES:
        t = time.time(); run(case, photos, "cpu"+str(t)); t2 = time.time()
        try:
            _, r = pretended(case, photos, "x"+str(t))
            _, r2 = pretended(case, photos, "y"+str(t), 2)
        except Exception as e:
            import traceback; traceback.print_exc(limit=-4); r=None
        print(case, t2-t, time.time()-t2)
        if r: 
            print({k: v for k,v in r.items()})
            print("DIFF", {k: (r.get(k),r2.get(k)) for k in r.keys()|r2.keys() if r.get(k)!=r2.get(k)})
