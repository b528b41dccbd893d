"""Several processes: K of them learn what one alone would, encode each image once, and a failure in one ends them all.

gloo on the CPU, started by torchrun, as a user does. NCCL differs in the transport alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes_worker as worker
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def torchrun(processes: int, *command, timeout: float = 240) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    call = [*launcher, *map(str, command)]
    return subprocess.run(call, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return worker.write_photos(tmp_path_factory.mktemp("photos"))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)).item()


# 10 images. Batches of 5 divide them, and no number of processes does; of 4 the last batch has 2, so that one of three
# processes has nothing to do; of 6 the processes have equal shares of the first batch and not of the second.
CASES = [["--augment", "randaugment", "--epochs", "2", *case.split()] for case in (
    "--batch-size 5",
    "--batch-size 6 --accumulate 2 --select val",
    "--batch-size 4 --loss kd --augment none",
    "--batch-size 4",
)]  # fmt: skip


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_learn_what_one_learns(photos, tmp_path, processes):
    """Weights and logged numbers to 1e-9 in float64, also of an interrupted and resumed run (the last case)."""
    done = torchrun(processes, worker.__file__, photos, tmp_path, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    for i, flags in enumerate(CASES):
        reference = worker.float64_train(photos, tmp_path / f"alone{i}", *flags).state_dict()
        for rank in range(processes):
            learned = torch.load(tmp_path / str(i) / f"{rank}.pt", weights_only=True)
            assert learned.keys() == reference.keys()
            for name, tensor in learned.items():
                assert deviation(tensor, reference[name]) <= 1e-9, f"{flags}, process {rank}, {name}"
        assert close_lines(tmp_path / str(i), tmp_path / f"alone{i}", 1e-6)


def close_lines(out: Path, other: Path, rel: float) -> bool:
    """Are the numbers of two metrics.jsonl close, line by line?"""
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (out, other)]
    return all(a == pytest.approx(b, rel=rel) for a, b in zip(*(map(json.loads, file) for file in lines), strict=True))


def test_command_line(photos, tmp_path):
    """Same logits as one process to 1e-5 in float32, same table and log; only process 0 writes and prints."""
    # A rate at which Adam's first steps, whose sizes do not depend on the gradient's, cannot magnify rounding.
    flags = worker.flags(photos, "--lr", "1e-5", "--ensemble", "0.5", "--wise-ft", "0.5", "--compare")
    proreg = ROOT / "proreg.py"
    one = subprocess.run(
        [sys.executable, proreg, *flags, "--out-dir", tmp_path / "1"], capture_output=True, text=True, timeout=240
    )
    assert one.returncode == 0, one.stderr
    many = torchrun(3, proreg, *flags, "--out-dir", tmp_path / "3")
    assert many.returncode == 0, many.stderr
    for out in ("", "baseline"):
        first, second = (np.load(tmp_path / k / out / "predictions.npz") for k in "13")
        assert set(first) == set(second)
        for key in first:
            if key.endswith("labels"):
                assert (first[key] == second[key]).all()
            else:
                a, b = (torch.from_numpy(file[key]).log() for file in (first, second))  # logits, up to a constant
                assert deviation(a, b) <= 1e-5, key
        assert close_lines(tmp_path / "1" / out, tmp_path / "3" / out, 1e-4)
    tables = [[line for line in done.stdout.splitlines() if "accuracy" in line] for done in (one, many)]
    assert tables[0] == tables[1] and len(tables[0]) > 3


COUNT = f"""import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import common, vision
encode, read, inside = vision.encode_images, vision.ImageSet.__getitem__, []
def encode_images(*args, what="images", **more):
    inside.append(what)
    try:
        return encode(*args, what=what, **more)
    finally:
        inside.pop()
def getitem(images, i):
    if inside:
        with open(os.environ["SEEN"] + str(common.rank()), "a") as file:
            print(inside[-1], images.view, images.items[i][0], file=file)
    return read(images, i)
vision.encode_images, vision.ImageSet.__getitem__ = encode_images, getitem
name = sys.argv[1]
sys.argv = sys.argv[1:]
script = __import__(name)
__import__("runs").run(script.main)
"""
ENCODING = {
    "prograd": "--shots all --augment crop --views 0 --epochs 3 --eval-every 1 --batch-size 4 --no-compare",
    "vpt": "--shots all --augment crop --views 2 --epochs 3 --posterior image --samples 2 --batch-size 4 --compare",
    "proreg": "--augment none --epochs 2 --batch-size 5 --lr 1e-5 --no-compare",
}


@pytest.mark.parametrize("name", ENCODING)
def test_each_image_is_encoded_once_in_all(photos, tmp_path, monkeypatch, name):
    """Every view of every image by one of the processes, in equal shares; the figures are those of one process."""
    (script := tmp_path / "script.py").write_text(COUNT)
    flags = ["--dataset", f"folder:{photos}", "--model", "toyclip", "--workers", "0", "--cache-dir", "none"]
    flags += ["--pretrained", worker.WEIGHTS, *ENCODING[name].split()]
    seen, found = {}, {}
    for processes in (1, 2):
        monkeypatch.setenv("SEEN", str(tmp_path / f"seen{processes}-"))
        done = torchrun(processes, script, name, *flags, "--out-dir", tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        seen[processes] = [path.read_text().splitlines() for path in sorted(tmp_path.glob(f"seen{processes}-*"))]
        with np.load(tmp_path / str(processes) / "predictions.npz") as file:
            found[processes] = {key: file[key] for key in file.files}
    (alone,), (first, second) = seen[1], seen[2]
    assert len(set(alone)) == len(alone) > 20  # nothing twice, by the baseline neither
    assert sorted(first + second) == sorted(alone) and abs(len(first) - len(second)) <= 9  # one a set and view
    for key, value in found[1].items():
        assert np.abs(value - found[2][key]).max() <= 1e-4, key


def test_two_runs_at_once_share_a_cache(photos, tmp_path):
    """Whoever writes last writes the same; both end well, and a third run encodes nothing."""
    flags = [
        "--dataset",
        f"folder:{photos}",
        "--model",
        "toyclip",
        "--workers",
        "0",
        "--epochs",
        "2",
        "--augment",
        "none",
    ]
    flags += ["--pretrained", worker.WEIGHTS, "--shots", "all", "--augment", "none", "--no-compare"]
    flags += ["--cache-dir", tmp_path / "cache"]
    call = [sys.executable, ROOT / "prograd.py", *flags, "--out-dir"]
    both = [subprocess.Popen([*call, tmp_path / k], stdout=subprocess.PIPE, text=True) for k in "ab"]
    assert [process.communicate()[0] and process.returncode for process in both] == [0, 0]
    third = subprocess.run([*call, tmp_path / "c"], capture_output=True, text=True)
    saved = [line for line in third.stdout.splitlines() if "features from the cache" in line]
    assert third.returncode == 0 and len(saved) == 4 and all("s saved" in line for line in saved)  # train, 3 tests
    tests = [json.loads((tmp_path / k / "result.json").read_text())["tests"] for k in "abc"]
    assert tests[0] == tests[1] == tests[2]
    assert len(list((tmp_path / "cache").iterdir())) == 4  # and no temporary file


@pytest.mark.parametrize("failure", ["broken image", "crash"])
def test_one_failing_process_ends_all(photos, tmp_path, failure):
    """... within 30 seconds of its failure, and what it says is seen."""
    flags = worker.flags(photos, "--augment", "randaugment", "--epochs", "1000", "--checkpoint-seconds", "30")
    script = tmp_path / "script.py"
    body = {
        "broken image": "raise data.UserError('one.png: no image')",
        "crash": "os.kill(os.getpid(), 9)",
    }[failure]
    script.write_text(
        f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import common, data, proreg, runs
read, calls = data.read_image, []
def read_image(address):
    calls.append(address)
    if common.rank() == 1 and len(calls) > 60:
        open({str(tmp_path / "failed")!r}, "w").write(str(time.time()))
        {body}
    return read(address)
data.read_image = read_image
runs.run(proreg.main)
"""
    )
    done = torchrun(3, script, *flags, "--out-dir", tmp_path / "run")
    took = time.time() - float((tmp_path / "failed").read_text())
    assert done.returncode != 0 and took < 30
    assert not (tmp_path / "run" / "result.json").exists()
    if failure == "broken image":
        assert "one.png: no image" in done.stderr
