"""The two READMEs: commands and flags exist, and the lines about released checkpoints work."""

import contextlib
import io
import re
import shlex
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prograd
import proreg
import vpt

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
MORE = (REPO / "benchmark/README.md").read_text(encoding="utf-8")
SCRIPTS = {"prograd.py": prograd, "vpt.py": vpt, "proreg.py": proreg}


def commands(text: str) -> list[str]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    blocks = re.sub(r"<<'END'.*?\nEND\n", "\n", blocks, flags=re.S)  # a program's lines
    return [line.split("#")[0] for line in blocks.splitlines()] + re.findall(
        r"`(python [^`]*)`", text
    )


def test_every_command_is_one():
    """Each `python SCRIPT FLAGS` of README, of benchmark/README.md and of the docstrings parses."""
    docs = [
        f"    {line}"
        for s in SCRIPTS.values()
        for line in s.__doc__.splitlines()
        if "python " in line
    ]
    lines = commands(README) + commands(MORE) + [line.split("#")[0].strip() for line in docs]
    tried = 0
    for line in lines:
        words = shlex.split(line)
        files = [word for word in words if word in SCRIPTS]
        if files and words[:2] not in (["python", "-"], ["python", "-m"]):  # these read it
            flags = words[words.index(files[0]) + 1 :]
            SCRIPTS[files[0]].build_parser().parse_args(flags)
            tried += 1
        for word in words:
            made = word in ("mine/classify.py", "dropout.py")  # by an export, by the recipe
            if word.endswith((".py", ".sh")) and not made:
                assert (REPO / word).exists(), word
    assert tried >= 15


def test_files_it_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / name).exists(), name


def test_released_checkpoint(tmp_path, monkeypatch):
    """Its lines read a checkpoint as Dassl writes it, and write one back."""
    with contextlib.redirect_stdout(io.StringIO()):
        flags = ["--epochs", "1", "--max-steps", "1", "--no-compare"]
        prograd.main([*flags, "--out-dir", "runs/released"])
    state = OrderedDict(ctx=torch.randn(16, 64).half())
    context = torch.nn.Parameter(state["ctx"].float())
    optimizer = torch.optim.SGD([context], 0.1, momentum=0.9)
    context.sum().backward()
    optimizer.step()
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10.0)  # holds the optimiser
    content = {"state_dict": state, "epoch": 100, "optimizer": optimizer.state_dict()}
    content["scheduler"] = {"successor": successor, "last_epoch": 3}
    torch.save(content, "model.pth.tar-100")
    (code,) = re.findall(r"```python\n([^`]*?safe_globals.*?)```", MORE, re.S)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("torch.serialization.safe_globals takes names from 2.6 on")
    exec(code, {})  # noqa: S102
    learned = load_file("runs/released/checkpoint.safetensors")["model/context"]
    assert torch.equal(learned, state["ctx"].float())
    assert prograd.main(["--eval", "runs/released"])["tests"]
    back = torch.load("back.pth.tar", weights_only=True)["state_dict"]["ctx"]
    assert torch.equal(back, state["ctx"].float())
