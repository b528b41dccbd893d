"""A GPU on a machine that has none: `with pretended() as reads: prograd.main([..])`.

A tensor "on cuda" is here a CPU tensor that says it is elsewhere. What mixes the two places fails
as on a GPU, and each time that the host would have to wait for the device is counted by line in
`reads`; values are the CPU's. Not seen: kernels that a GPU lacks, its rounding, memory, speed,
streams, autocast, pinned memory, worker processes.
"""

import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
COPIES = ("_to_copy", "copy_")
NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero")  # what they return is no tensor
SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount")  # of what they return
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
REPO = str(Path(__file__).resolve().parent.parent)
reads = collections.Counter()


class OnCuda(torch.Tensor):
    """`held` has the values. C++ takes this one for a tensor on "meta", so that it looks for no
    driver; Python for one on cuda:0."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=META)
        self = torch.Tensor._make_subclass(cls, meta, False, dispatch_device=True)
        self.held = held
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def tolist(self):
        count("tolist")
        return self.held.tolist()

    def __format__(self, how):
        return format(self.item(), how)

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def count(what: str) -> None:
    """Count a wait, by the innermost line of the project."""
    frame = sys._getframe()
    while frame.f_back:
        path = frame.f_code.co_filename
        if path.startswith(REPO) and path != __file__ and "site-packages" not in path:
            break
        frame = frame.f_back
    reads[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {what}"] += 1


def dispatch(function, args, kwargs):
    """Every operation: the CPU's on what the tensors hold, where a GPU would do it, too."""
    if function is torch.ops.prim.device.default:
        return META if isinstance(args[0], OnCuda) else args[0].device
    name = function._schema.name.split("::")[1]
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnCuda)]
    here = [t for t in tensors if not isinstance(t, OnCuda)]
    assert all(t.device.type == "cpu" for t in here), f"{function} of a tensor that holds nothing"
    goes_there = bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type != "cpu"
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    if name == "copy_":
        goes_there = isinstance(args[0], OnCuda)
    if name in COPIES:
        waits = not kwargs.get("non_blocking") and not args[2:]
        if there and not goes_there:
            count("copied to the CPU")
        elif here and goes_there and waits:
            count("copied from the CPU, waiting")
    elif there:
        check_places(function, name, args, [t for t in here if t.dim()])
    if name in ("is_pinned", "_pin_memory"):
        return False if name == "is_pinned" else args[0]
    held = tree_map(lambda t: t.held if isinstance(t, OnCuda) else t, (list(args), kwargs))
    result = function(*held[0], **held[1])
    if name in NUMBERS or not goes_there:
        return result
    given = {id(t.held): t for t in there}  # an operation in place returns what it was given

    def dress(t):
        if not isinstance(t, torch.Tensor):
            return t
        return given[id(t)] if id(t) in given else OnCuda(t)

    return tree_map(dress, result)


def check_places(function, name: str, args, here: list) -> None:
    """Count what waits, and RuntimeError for an operation that also reads tensors of the CPU.
    (Numbers may come from there; and an index is copied over.)"""
    if name in NUMBERS + SIZES:
        count(name)
    if here and name in INDEXING and isinstance(args[0], OnCuda):
        count("index from the CPU")
        here = [t for t in here if t.is_floating_point()]
    if here and not name.startswith(("_fused_", "_foreach_")):  # an optimiser's count of steps
        raise RuntimeError(f"Expected all tensors to be on the same device: {function}, of the CPU "
                           f"{[tuple(t.shape) for t in here]}")  # fmt: skip


class Operations(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # C++ then makes no CUDA context

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Names(TorchFunctionMode):
    """Says "meta" to C++ wherever Python says "cuda"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is torch.device or name in ("__get__", "__repr__", "get_device_module"):
            return function(*args, **kwargs)
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": None}).to(rename(kwargs["device"]))
        if function is torch.Tensor.__getitem__:  # of a list C++ makes a tensor that holds nothing
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in where)
        return function(*map(rename, args), **{key: rename(v) for key, v in kwargs.items()})


def rename(value):
    is_device = isinstance(value, torch.device | str)
    return META if is_device and str(value).split(":")[0] == "cuda" else value


@contextlib.contextmanager
def pretended():
    """One GPU, as far as Python can tell → the counter of waits."""
    about = mock.Mock(total_memory=8e9, major=8, minor=0)
    said = {"_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0,
            "set_device": None, "synchronize": None, "get_device_capability": (8, 0),
            "get_device_properties": about, "get_device_name": "pretended"}  # fmt: skip
    reads.clear()
    with contextlib.ExitStack() as stack:
        for name, answer in said.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, a=answer: a))
        stack.enter_context(mock.patch("torch.autocast", lambda *_, **__: contextlib.nullcontext()))
        for check in [name for name in dir(torch.optim.Optimizer) if "graph_capture" in name]:
            stack.enter_context(mock.patch.object(torch.optim.Optimizer, check, lambda *_: None))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.enter_context(Operations())
        stack.enter_context(Names())
        yield reads
