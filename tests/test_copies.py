"""The method files are made to be copied from: each METHOD section runs on torch alone, what is said twice is equal."""

import ast
import builtins
import dis
import importlib
import io
import re
import sys
import tokenize
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EQUATION_TESTS = {"prograd": "test_equations", "vpt": "test_vpt", "proreg": "test_proreg"}
METHODS = [name for name in EQUATION_TESTS if (ROOT / f"{name}.py").exists()]


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def method_section(name: str) -> str:
    """From below the banner of section 1 to above the banner of section 2."""
    _, _, rest = source(name).partition("# 1. METHOD")
    section, _, _ = rest.partition("# 2. MODEL")
    lines = section.splitlines()
    assert lines[1].startswith("# ---") and lines[-1].startswith("# ---"), f"{name}.py: no banner around METHOD"
    return "\n".join(lines[2:-1])


def paste(name: str) -> types.ModuleType:
    """An empty file with `import torch`, and the METHOD section pasted below."""
    module = types.ModuleType(f"pasted_{name}")
    module.torch = torch
    exec(compile(method_section(name), f"{name}.py, METHOD", "exec"), module.__dict__)
    return module


def functions(text: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 1. Pasting
# ----------------------------------------------------------------------------------------------------------------------
def equation_tests() -> list[tuple[str, str]]:
    """(method, test) of every test that touches nothing of a method file but functions of its METHOD section."""
    found = []
    for name in METHODS:
        file, ours = ROOT / "tests" / f"{EQUATION_TESTS[name]}.py", set(functions(method_section(name)))
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.exists() else ast.parse("")
        direct = [node.names for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == name]
        direct = {alias.asname or alias.name: alias.name for aliases in direct for alias in aliases}
        for node in tree.body:
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            used = {direct[n.id] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in direct}
            for n in ast.walk(node):
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == name:
                    used.add(n.attr)
            if used and used <= ours:
                found.append((name, node.name))
    return found


def calls(function) -> list[dict]:
    """The keyword arguments of each case of a test function, from its parametrize marks."""
    cases = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args[0], mark.args[1]
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            rows = [value if len(names) > 1 else (value,) for value in values]
            cases = [case | dict(zip(names, row, strict=True)) for case in cases for row in rows]
    return cases


@pytest.mark.parametrize("name", METHODS)
def test_method_section_runs_on_torch_alone(name):
    pasted = paste(name)
    assert len(functions(method_section(name))) >= 2
    for function in functions(method_section(name)):
        assert callable(getattr(pasted, function))
    known = {"torch", *functions(method_section(name)), *dir(builtins)}
    read = globals_read(compile(method_section(name), name, "exec"))
    assert read <= known, f"{name}.py's METHOD section needs {read - known}"


def globals_read(code: types.CodeType) -> set[str]:
    """Names that functions look up outside themselves: also those on lines that no test runs."""
    nested = [globals_read(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}.union(*nested)


@pytest.mark.parametrize("name, test", equation_tests())
def test_pasted_section_passes_the_equation_tests(name, test):
    module, pasted = importlib.import_module(EQUATION_TESTS[name]), paste(name)
    shipped = importlib.import_module(name)
    changes = {key: pasted for key, value in vars(module).items() if value is shipped}
    for function in functions(method_section(name)):
        changes |= {k: getattr(pasted, function) for k, v in vars(module).items() if v is getattr(shipped, function)}
    assert changes
    with mock.patch.multiple(module, **changes):
        for case in calls(getattr(module, test)):
            getattr(module, test)(**case)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_function_has_an_equation_test(name):
    file = ROOT / "tests" / f"{EQUATION_TESTS[name]}.py"
    tested = file.read_text(encoding="utf-8") if file.exists() else ""
    tests = {test for method, test in equation_tests() if method == name}
    assert tests, f"{file.name} tests no equation of {name}.py"
    for function in functions(method_section(name)):
        assert re.search(rf"\b{function}\b", tested), f"{name}.{function} is not tested in {file.name}"


# ----------------------------------------------------------------------------------------------------------------------
# 2. Equations and copies
# ----------------------------------------------------------------------------------------------------------------------
def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"Eq\. (\d+)", text)]


@pytest.mark.parametrize("name", METHODS)
def test_equations_of_docstring_and_code_agree(name):
    """The docstring lists Eq. 1, 2, ... in order; each is computed where a comment says so, and none is made up."""
    doc = ast.get_docstring(ast.parse(source(name)), clean=False)
    listed = [int(n) for n in re.findall(r"^ {4}Eq\. (\d+) {2,}\S", doc, flags=re.MULTILINE)]
    assert listed == list(range(1, len(listed) + 1)) and len(listed) >= 3
    assert set(numbers(source(name))) == set(listed)
    tokens = tokenize.generate_tokens(io.StringIO(source(name)).readline)
    comments = "\n".join(token.string for token in tokens if token.type == tokenize.COMMENT)
    assert set(numbers(comments)) == set(listed), "an equation of the docstring that no line computes"


@pytest.mark.parametrize("name", METHODS)
def test_sections_come_in_order(name):
    """The same banners in all method files, so that a diff of two of them shows the methods."""
    titles = re.findall(r"^# -{118}\n# (\d\. [A-Z]+)[^\n]*\n# -{118}$", source(name), flags=re.MULTILINE)
    assert titles == ["1. METHOD", "2. MODEL", "3. FLAGS", "4. TRAIN", "5. EVALUATE", "6. MAIN"]


def test_imports():
    """Method files never import one another, and what they share never imports a method."""
    allowed = set(sys.stdlib_module_names) | {"torch", "common", "data", "runs", "vision"}
    for name in METHODS:
        assert imports(name) <= allowed, f"{name}.py imports {imports(name) - allowed}"
    for name in ("common", "runs", "data", "layouts", "vision"):
        assert not imports(name) & set(EQUATION_TESTS), f"{name}.py imports a method"


def test_marked_copies_are_equal():
    """ "# same in FILE.py" above a function: that file holds the same function, letter by letter."""
    marked = 0
    for name in METHODS:
        text = source(name)
        for files, function in re.findall(
            r"^# same in ([^\n]*\.py)\n(?:@[^\n]*\n)*def (\w+)", text, flags=re.MULTILINE
        ):
            for other in re.findall(r"(\w+)\.py", files):
                if other == name:
                    continue
                marked += 1
                ours, theirs = (functions(source(file)) for file in (name, other))
                assert function in theirs, f"{name}.py says that {other}.py has {function}"
                copy = ast.get_source_segment(source(other), theirs[function])
                assert ast.get_source_segment(text, ours[function]) == copy, f"{function} of {name}.py and {other}.py"
        unread = set(re.findall(r"^.*same in \w+\.py.*$", text, flags=re.MULTILINE))
        read = set(re.findall(r"^# same in [^\n]*\.py$", text, flags=re.MULTILINE))
        assert unread == read, f"{name}.py: a marker that no test understands: {unread - read}"
    assert marked or "proreg" not in METHODS
