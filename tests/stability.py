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
KERNELS = {  # as other processors have: another order of rounding
    "other kernels": ("avx2", "AVX2", "AVX2"),
    "older kernels": ("default", "COMPATIBLE", "SSE41"),
}
SHAKEN = """import sys, json, torch
sys.path.insert(0, sys.argv[1])
import {script} as script
draw, start = int(sys.argv[2]), script.{start}
def shaken(*args, **more):
    value = start(*args, **more)
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(draw))
    return value * (1 + 1e-6 * noise) if draw else value
script.{start} = shaken
result = script.main(["--cache-dir", "none", "--out-dir", *sys.argv[3:]])
kinds = ("baseline", "tuned")
print(json.dumps([[t["n"], {{k: t[k]["accuracy"] for k in kinds}}] for t in result["tests"]]))
"""
START = {"prograd": "initial_context", "vpt": "initial_context", "proreg": "common.prompt_features"}


def stable(commands: list[str]) -> None:
    """Print by how many images each accuracy of each run (a script and flags) moves."""
    cases = [(f"start × (1 + 1e-6 noise {d})", d, {}) for d in (1, 2, 3)]
    names = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    cases += [(name, 0, dict(zip(names, values))) for name, values in KERNELS.items()]
    for run in commands:
        script, *flags = run.split()
        code, first = SHAKEN.format(script=script, start=START[script]), None
        for name, draw, kernels in [("as it is", 0, {}), *cases]:
            with tempfile.TemporaryDirectory() as folder:
                call = [sys.executable, "-c", code, ROOT, str(draw), f"{folder}/run", *flags]
                out = subprocess.check_output(call, text=True, env=os.environ | kernels)
            found = json.loads(out.splitlines()[-1])
            first = first or found
            moved = [f"{kind} {round((m[kind] - m0[kind]) * n / 100):+d}"
                     for (n, m), (_, m0) in zip(found, first) for kind in m]  # fmt: skip
            print(f"{run:26} {name:26} images: {', '.join(moved)}", flush=True)


if __name__ == "__main__":
    stable(sys.argv[1:] or list(START))
