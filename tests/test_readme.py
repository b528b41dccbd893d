"""The two READMEs: commands and flags exist, and the lines about released checkpoints work."""

import re
import shlex
from collections import OrderedDict

import pytest
import torch
from conftest import QUICK, REPO, SCRIPTS, checkpoint, run

import prograd

README = (REPO / "README.md").read_text(encoding="utf-8")
MORE = (REPO / "benchmark/README.md").read_text(encoding="utf-8")
FILES = {f"{name}.py": script for name, script in SCRIPTS.items()}
ELSEWHERE = ("mine/classify.py", "dropout.py")  # made by an export, by the recipe


def commands() -> list[str]:
    """The lines to type in both READMEs and in the scripts' docstrings, without comments."""
    lines = []
    for text in (README, MORE):
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
        lines += re.sub(r"<<'END'.*?\nEND\n", "\n", blocks, flags=re.S).splitlines()
        lines += re.findall(r"`(python [^`]*)`", text)
    for script in SCRIPTS.values():
        lines += [line for line in script.__doc__.splitlines() if "python " in line]
    return [line.split("#")[0] for line in lines]


def test_every_command_is_one():
    """Its files are there, and `python SCRIPT FLAGS` parses."""
    tried = 0
    for words in map(shlex.split, commands()):
        for word in words:
            if word.endswith((".py", ".sh")) and word not in ELSEWHERE:
                assert (REPO / word).exists(), word
        files = [word for word in words if word in FILES]
        if files and words[:2] not in (["python", "-"], ["python", "-m"]):  # these read it
            flags = words[words.index(files[0]) + 1 :]
            FILES[files[0]].build_parser().parse_args(flags)
            tried += 1
    assert tried >= 15


def test_files_it_names_exist():
    for name in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPO / name).exists(), name


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch.serialization.safe_globals takes names from 2.6 on",
)
def test_released_checkpoint():
    """Its lines read a checkpoint as Dassl writes it, and write one back."""
    run(prograd, *QUICK, "--out-dir", "runs/released")
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
    exec(code, {})  # noqa: S102
    assert torch.equal(checkpoint("runs/released")["model/context"], state["ctx"].float())
    assert run(prograd, "--eval", "runs/released")["tests"]
    back = torch.load("back.pth.tar", weights_only=True)["state_dict"]["ctx"]
    assert torch.equal(back, state["ctx"].float())
