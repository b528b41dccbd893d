"""A GPU on a machine that has none: `with pretended() as reads: prograd.main([..])`.

A tensor "on cuda" is here a CPU tensor that says it is elsewhere. What mixes the two places fails
as on a GPU, and each time that the host would wait for the device is counted by line in `reads`;
values are the CPU's. Not seen: kernels that a GPU lacks, its rounding, memory, speed, streams,
autocast, pinned memory, worker processes.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
NUMBERS = ("_local_scalar_dense", "equal", "is_nonzero")  # what they return is no tensor
READS = (*NUMBERS, "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
REPO = Path(__file__).resolve().parent.parent
reads = collections.Counter()


def operate(_, function, types, args=(), kwargs=None):
    """Any operation: the CPU's on what the tensors hold, if a GPU would do it, too."""
    if function is torch.ops.prim.device.default:
        return META if isinstance(args[0], OnCuda) else args[0].device
    name = function._schema.name.split("::")[1]
    kwargs = dict(kwargs or {})
    tensors = [x for x in tree_leaves([args, kwargs]) if isinstance(x, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, OnCuda)]
    here = [t for t in tensors if not isinstance(t, OnCuda)]
    assert all(t.device.type == "cpu" for t in here), f"{function} of a tensor that holds nothing"
    goes_there = isinstance(args[0], OnCuda) if name == "copy_" else bool(there)
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type != "cpu"
        kwargs["device"] = torch.device("cpu")
    if name in ("is_pinned", "_pin_memory"):
        return False if name == "is_pinned" else args[0]
    if name in ("copy_", "_to_copy"):
        if there and not goes_there:
            count("copied to the CPU")
        elif here and goes_there and not (kwargs.get("non_blocking") or args[2:]):
            count("copied from the CPU, waiting")
    elif there:
        here = [t for t in here if t.dim()]  # a number may be of the CPU
        if name in READS or (name in INDEXING and here):
            count(name)
        if name in INDEXING and isinstance(args[0], OnCuda):  # an index is copied over, no values
            here = [t for t in here if t.is_floating_point()]
        if here and not name.startswith(("_fused_", "_foreach_")):  # an optimiser's count of steps
            raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
    args, kwargs = tree_map_only(OnCuda, lambda t: t.held, [args, kwargs])
    result = function(*args, **kwargs)
    if not goes_there or name in NUMBERS:
        return result
    given = {id(t.held): t for t in there}  # an operation in place returns what it was given
    return tree_map_only(
        torch.Tensor, lambda t: given[id(t)] if id(t) in given else OnCuda(t), result
    )


def count(what: str) -> None:
    """Count a wait, by the innermost line of the project."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if REPO in path.parents and "site-packages" not in path.parts and path.name != "pretend.py":
            reads[f"{path.name}:{line} {what}"] += 1
            return


class OnCuda(torch.Tensor):
    """`held` has the values. To C++ it is on "meta", which needs no driver; to Python on cuda."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(operate)
    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    tolist = lambda self: self.cpu().tolist()  # noqa: E731
    __format__ = lambda self, how: format(self.item(), how)  # noqa: E731

    @staticmethod
    def __new__(cls, held):
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=META)
        self = torch.Tensor._make_subclass(cls, meta, False, dispatch_device=True)
        self.held = held
        return self


class Operations(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # C++ then makes no CUDA context
    __torch_dispatch__ = operate


def rename(value):
    is_device = isinstance(value, torch.device | str)
    return META if is_device and str(value).split(":")[0] == "cuda" else value


class Names(TorchFunctionMode):
    """Says "meta" to C++ wherever Python says "cuda"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is torch.device or name in ("__get__", "__repr__", "get_device_module"):
            return function(*args, **kwargs)
        device = rename(kwargs.get("device"))
        if name in ("tensor", "as_tensor") and device is not None:
            return function(*args, **kwargs | {"device": None}).to(device)
        if function is torch.Tensor.__getitem__:  # of a list C++ makes a tensor that holds nothing
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in where)
        return function(*map(rename, args), **{key: rename(v) for key, v in kwargs.items()})


@contextlib.contextmanager
def pretended():
    """One GPU, as far as Python can tell → the counter of waits."""
    about = mock.Mock(total_memory=8e9, major=8, minor=0)
    said = {"_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0,
            "get_device_capability": (8, 0), "get_device_properties": about}  # fmt: skip
    says = {f"torch.cuda.{name}": lambda *_, a=answer: a for name, answer in said.items()}
    for name in [name for name in dir(torch.optim.Optimizer) if "graph_capture" in name]:
        says[f"torch.optim.Optimizer.{name}"] = lambda *_: None
    says["torch.autocast"] = lambda *_, **__: contextlib.nullcontext()
    says["torch.__future__._overwrite_module_params_on_conversion"] = True
    reads.clear()
    with contextlib.ExitStack() as stack:
        for name, answer in says.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(Operations())
        stack.enter_context(Names())
        yield reads
