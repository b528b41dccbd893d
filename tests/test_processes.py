"""Fine-tuning with several processes: K of them learn what one alone would, and a failure in one ends them all.

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
