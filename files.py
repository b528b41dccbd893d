"""Files that are never half there, and files read with distrust: damaged, or from a stranger who means harm.

Nothing that is read here runs code, takes memory far beyond its own size, or holds a setting that no flag could give.
"""

import argparse
import json
import math
import mmap
import os
import warnings
import zipfile
from pathlib import Path

import torch

from layouts import UserError, read_text


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: `path` is always the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a failed write does not say to which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_traps(path: str | Path) -> bool:
    """Is it a TorchScript archive? ValueError if loading it would run its code, or take more memory than its size."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        trap = content.find(b"bytearray\n") >= 0  # torch's weights_only calls bytearray(N), for any N
    code = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            code = [record for record in archive.infolist() if "/code/" in record.filename]
            trap |= any(record.compress_type for record in archive.infolist() if record not in code)  # it may inflate
            trap |= any(b"__setstate__" in archive.open(record).read(1 << 24) for record in code)  # runs when loaded
    if trap:
        raise ValueError("loading it would run code or take memory without bound; torch.save does not write such files")
    return bool(code)


def load_checkpoint(path: str | Path, method: str | None = None) -> dict:
    """The checkpoint of a run folder or file. UserError if it is missing, damaged, not ours or another method's."""
    file = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}: give a run folder or its checkpoint.pt")
    try:
        refuse_traps(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells of pickle protocols; the one line below says enough
            state = torch.load(file, map_location="cpu", weights_only=True)
        kinds = [type(state[key]) for key in ("method", "settings", "epoch", "tensors")]
        noted = state["trained_on"] or {"classnames": [], "template": ""}  # None: tools/released.py does not know
        kinds += [type(state["settings"]["dataset"]), type(noted["template"]), *map(type, noted["classnames"])]
        tensors = state["tensors"].values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # a stride of 0 makes a tensor of any
        ours = kinds == [str, dict, int, dict, *[str] * (len(kinds) - 4)] and state["epoch"] >= 0
        ours = ours and all(type(t) is torch.Tensor and t.device.type == "cpu" for t in tensors)
        if not ours or size > file.stat().st_size:
            raise ValueError("not what save_checkpoint writes")
    except Exception as error:  # any broken or foreign file
        text = "is no checkpoint of these scripts; tools/released.py converts the papers' own"
        raise UserError(f"{file} {text}") from error
    if method and state["method"] != method:
        raise UserError(f"{file} was made by {state['method'][:20]!r}: {method}.py cannot read it")
    return state


def restore(module: torch.nn.Module, tensors: dict, where) -> None:
    """Load learned tensors into `module`: all of them, each of the right shape, or UserError."""
    have, want = ({k: list(v.shape) for k, v in state.items()} for state in (tensors, module.state_dict()))
    if wrong := [key for key in have | want if have.get(key) != want.get(key)]:
        text = ", ".join(f"{key} {have.get(key, 'missing')}, wanted {want.get(key, 'none')}" for key in wrong[:3])
        raise UserError(f"{where} does not fit this model and these flags: {text[:500]}")
    module.load_state_dict(tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict, where) -> None:
    """Load an optimiser's state if it is one of this optimiser: same settings, and tensors that fit the parameters."""
    settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        fits = all(group[k] == v for old, group in zip(settings, optimizer.param_groups) for k, v in old.items())
        for parameter, held in optimizer.state.items():
            fits &= all(v is None or v.shape in (parameter.shape, torch.Size()) for v in held.values())
    except Exception:  # whatever is in there
        fits = False
    if not fits:
        raise UserError(f"{where} holds the state of another optimiser: start again with another --out-dir")


def read_json(path: Path) -> dict:
    """An object that one of our runs wrote."""
    try:
        content = json.loads(read_text(str(path)))
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} or choose another --out-dir") from error
    return content


def read_config(out: Path, method: str) -> dict:
    """Settings of the run in `out`, {} where nothing was written yet; UserError if another method made it."""
    if not (out / "config.json").exists():
        return {}
    config = read_json(out / "config.json")
    if config.get("method") != method or not isinstance(config.get("settings"), dict):
        raise UserError(f"{out} is a run of {str(config.get('method'))[:20]}.py, not of {method}.py")
    if config["settings"].get("eval_only"):
        raise UserError(f"{out} is an interrupted evaluation, not training: start it again with another --out-dir")
    return config["settings"]


def read_result(path: Path) -> dict:
    """result.json with all that a table needs."""
    result = read_json(path)
    try:
        tests, mean = result["tests"], result["harmonic_mean"]
        measures = [test[key] for test in tests for key in ("zero_shot", "tuned")]
        measures += [test["baseline"] for test in tests if test["baseline"]]
        whole = all(math.isfinite(measure[key]) for measure in measures for key in ("accuracy", "nll", "ece"))
        whole &= all({"dataset", "classes", "domain", "n", "extra"} <= test.keys() for test in tests)
        whole &= bool(tests and result["dataset"]) and (mean is None or {"of", "zero_shot", "tuned"} <= mean.keys())
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: remove it, and --resume --out-dir {path.parent} makes it again")
    return result


def check_settings(parser: argparse.ArgumentParser, settings: dict, where) -> dict:
    """Those of `settings` that are flags of the parser. UserError for a value that the flag itself could not give."""
    known = {action.dest: settings[action.dest] for action in parser._actions if action.dest in settings}
    for action in parser._actions:
        value = known.get(action.dest)
        values = value if isinstance(value, list) and action.nargs not in (None, 0) else [value]
        try:
            if action.nargs == 0:  # --resume, --compare
                good = value is None or isinstance(value, bool)
            else:
                good = value is None or [parser._get_value(action, str(v)) for v in values] == values
                good = good and (value is None or not action.choices or value in action.choices)
        except Exception:  # whatever a stranger's value does to a comparison
            good = False
        if not good:
            raise UserError(f"{where} has {action.dest} = {str(value)[:80]!r}, which its flag does not take")
    return known
