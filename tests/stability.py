"""How far each default run moves under a change of 1e-6 in its start, and with other kernels.

python tests/stability.py                          # the three scripts
python tests/stability.py "vpt --residual-scale 10"
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = {"prograd": "initial_context", "vpt": "initial_context", "proreg": "common.prompt_features"}
KERNELS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
CASES = {  # name: (draw of the noise, or 0; as other processors have: another order of rounding)
    "as it is": (0, {}),
    **{f"start × (1 + 1e-6 noise {draw})": (draw, {}) for draw in (1, 2, 3)},
    "other kernels": (0, dict(zip(KERNELS, ("avx2", "AVX2", "AVX2")))),
    "older kernels": (0, dict(zip(KERNELS, ("default", "COMPATIBLE", "SSE41")))),
}
SHAKEN = """import sys, torch, {script}
start = {script}.{start}
def shaken(*args, **more):
    value = start(*args, **more)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed({draw}))
    return value * (1 + 1e-6 * noise)
if {draw}:
    {script}.{start} = shaken
{script}.main(sys.argv[1:])
"""


def accuracies(run: str, draw: int, kernels: dict) -> list[tuple]:
    """Of each test set of a run (a script and flags) and each method: images, method, accuracy."""
    script, *flags = run.split()
    code = SHAKEN.format(script=script, start=START[script], draw=draw)
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--cache-dir", "none", "--out-dir", f"{folder}/run"]
        env = os.environ | kernels | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, *flags]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        tests = json.loads(Path(folder, "run/result.json").read_text())["tests"]
    return [(t["n"], kind, t[kind]["accuracy"]) for t in tests for kind in ("baseline", "tuned")]


if __name__ == "__main__":
    for run in sys.argv[1:] or START:
        found = {name: accuracies(run, *case) for name, case in CASES.items()}
        for name, rows in found.items():
            moved = [
                f"{kind} {round((now - was) * n / 100):+d}"
                for (n, kind, now), (_, _, was) in zip(rows, found["as it is"])
            ]
            print(f"{run:26} {name:26} images: {', '.join(moved)}")
