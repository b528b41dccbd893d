"""Checkpoints of the papers' own code (CoOp, ProGrad, VPT): read them into a run folder, and write them.

    python tools/released.py read prompt_learner/model.pth.tar-50 RUN --dataset oxford_pets --model RN50 --shots 16
    python prograd.py --eval-only --checkpoint RUN              # or tools/use.py: RUN is like one of our own
    python tools/released.py write RUN prompt_learner/model.pth.tar-50

The kind of prompt is read off the tensors: `ctx` alone is ProGrad's or, with --lam 0, CoOp's; with mean_posterior and
std_posterior (a log-variance) it is VPT's global posterior, with meta_net VPT's image posterior. All else that a run
has to know, CLIP's name first, is not in the file: further flags are those of prograd.py or vpt.py, with its defaults.

A released file is a pickle, and a pickle can run any program when it is loaded. So it is read by PyTorch's restricted
unpickler, which executes nothing but an allow-list, and only after a look at which names it refers to: tensors and
containers, and the optimiser and the scheduler, for which an inert stand-in is put. A file with any other is refused.
"""

import collections
import math
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import open_clip
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# ruff: noqa: E402
import common
import prograd
import runs
import vpt
from data import UserError

MAX_BYTES = 1 << 30  # a prompt for 1000 classes with all it is saved with takes a quarter
SKIPPED = ("torch.optim.", "dassl.optim.")  # names below these are given the stand-in
ALLOWED = {"collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device",
           "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
           "torch._utils._rebuild_parameter"}  # fmt: skip
CONTAINERS = {"collections.defaultdict": lambda *_: {}, "builtins.dict": dict, "builtins.list": list}
BUILTINS = {"__builtin__": "builtins"}  # Python 2's name, which torch.save writes


# -------------------- 1. READING A FOREIGN FILE, without executing anything in it
class Inert:
    """Stands in for an optimiser or scheduler: takes any arguments and any state, and does nothing."""

    def __init__(self, *arguments):
        self.nothing = None

    def __setstate__(self, state):
        self.nothing = None


def names_in_pickle(file) -> set[str]:
    """The global names that one pickle, at the file's position, refers to. ValueError if it is none."""
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            names.add(f"{BUILTINS.get(module, module)}.{name}")
        elif opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4", "OBJ"):
            raise UserError(f"its pickle has the instruction {opcode.name}, which torch.save never writes")
    return names


def names_in(path: Path) -> Iterator[set[str]]:
    """The names in each pickle of a file of torch.save, of the zip format or of the one before PyTorch 1.6."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:  # four pickles: a magic number, a version, the system, the content
            yield from (names_in_pickle(file) for _ in range(4))
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(e.file_size for e in entries) > MAX_BYTES or any(e.compress_type for e in entries):
            raise UserError("it is a compressed or oversized archive, which torch.save never writes")
        yield from (names_in_pickle(archive.open(entry)) for entry in entries if entry.filename.endswith(".pkl"))


def read_foreign(path: str | Path) -> dict:
    """What torch.save wrote, with Inert for optimisers and schedulers. UserError for what is suspicious or broken."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"it has over {MAX_BYTES:,} bytes, far too many for a prompt")
        safe = [(make, name) for name, make in CONTAINERS.items()]
        for name in (name for names in names_in(path) for name in sorted(names)):
            if name.startswith(SKIPPED):
                safe.append((Inert, name))
            elif not (name in ALLOWED or name in CONTAINERS or re.fullmatch(r"torch\.(storage\.)?\w+Storage", name)):
                raise UserError(f"it refers to {name}, which a checkpoint has no need of")
        with torch.serialization.safe_globals(safe), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from error
    except Exception as error:  # a damaged or hostile file makes the readers raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is no checkpoint that torch.save wrote, or is damaged: {reason}") from error
    epoch = state.get("epoch") if isinstance(state, dict) else None
    if not isinstance(epoch, int) or epoch < 1 or not isinstance(state.get("state_dict"), dict):
        raise UserError(f"{path} has no state_dict and epoch: expected is prompt_learner/model.pth.tar-EPOCH")
    return state


# -------------------- 2. NAMES OF TENSORS, theirs and ours
GLOBAL = {"ctx": "context", "mean_posterior": "mean", "std_posterior": "logvar"}
NETWORKS = {"meta_net.weight_mean.module": "mean_net", "meta_net.weight_log_variance.module": "logvar_net"}
LAYERS = [f"{layer}.{part}" for layer in (0, 2, 4) for part in ("weight", "bias")]
IMAGE = {"ctx": "context"} | {f"{a}.{part}": f"{b}.{part}" for a, b in NETWORKS.items() for part in LAYERS}
SCRIPTS = {"prograd": prograd, "vpt": vpt}
KINDS = {("prograd", None): {"ctx": "context"}, ("vpt", "global"): GLOBAL, ("vpt", "image"): IMAGE}
# ProGrad's code counts words, not tokens: of these datasets' templates, which have a comma, the last token stays
# outside the context, as the fixed first token of every class's suffix. It becomes one more context vector here.
COMMA = {"oxford_pets", "oxford_flowers", "fgvc_aircraft", "food101"}


def kind_of(state_dict: dict) -> tuple[str, str | None]:
    """(method, posterior) of the released network with these tensors. UserError for any other."""
    given = set(state_dict) - {"token_prefix", "token_suffix"}
    for kind, names in KINDS.items():
        if set(names) == given:
            return kind
    raise UserError(f"this is no prompt of CoOp, ProGrad or VPT: its tensors are {', '.join(map(str, given))[:200]}")


def convert(state_dict: dict, dataset: str) -> dict[str, torch.Tensor]:
    """Their prompt_learner's tensors under our names, in fp32. UserError for what is no plain, finite tensor."""
    tensors = {}
    for theirs, ours in KINDS[kind_of(state_dict)].items():
        value = state_dict[theirs]
        plain = isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided
        if not plain or not value.is_contiguous() or not value.isfinite().all():
            raise UserError(f"its {theirs} is no plain tensor of finite numbers")
        tensors[ours] = value.detach().float().clone()
    suffix = state_dict.get("token_suffix")  # [C, context length - 1 - M, W]
    if len(tensors) == 1 and dataset in COMMA and isinstance(suffix, torch.Tensor) and tensors["context"].dim() == 2:
        if len(suffix) > 1 and (suffix[:, 0] == suffix[0, 0]).all():
            tensors["context"] = torch.cat([tensors["context"], suffix[0, :1].float()])
    return tensors


def check_shapes(tensors: dict[str, torch.Tensor], posterior: str | None, model: str, path: str) -> None:
    """UserError unless the tensors fit this CLIP, of which the configuration is enough."""
    if model == "toyclip":
        open_clip.add_model_config(common.HERE / "toyclip" / "toyclip.json")
    config = open_clip.get_model_config(model.replace("/", "-"))
    if config is None:
        raise UserError(f"unknown model {model}: use open_clip's name, such as RN50 or ViT-B-16")
    context, W = tensors["context"], config["text_cfg"]["width"]
    if context.dim() not in ((2,) if posterior else (2, 3)) or context.shape[-1] != W or not context.numel():
        raise UserError(f"{path} has a context of shape {list(context.shape)}; of {model} it would be [M, {W}]")
    if posterior:
        clip = common.Clip(None, width=W, dim=config["embed_dim"])
        runs.restore(vpt.PromptDistribution(clip, context, posterior), tensors, path)


def fold(tensors: dict[str, torch.Tensor], u: float) -> None:
    """Put our residual scale u, which the released code lacks, into the posterior: u r ~ N(u mu, u^2 sigma^2)."""
    for name in ("mean", "mean_net.4.weight", "mean_net.4.bias", "logvar", "logvar_net.4.bias"):
        if name in tensors:
            tensors[name] = tensors[name] * u if name.startswith("mean") else tensors[name] + 2 * math.log(u)


# -------------------- 3. READ and WRITE
def read(file: str, flags: list[str]) -> None:
    """Make a run folder of a released checkpoint; `flags`: RUN and flags of prograd.py or vpt.py, in any order."""
    state = read_foreign(file)
    method, posterior = kind_of(state["state_dict"])
    script = SCRIPTS[method]
    parser = script.build_parser()
    parser.prog = f"released.py read FILE RUN, with flags of {method}.py:"
    parser.add_argument("run", metavar="RUN", help="folder to make")
    given = parser.parse_args(flags)
    if given.dataset is None:
        raise UserError(f"{file} does not say what it was trained on: add --dataset NAME")
    tensors = convert(state["state_dict"], given.dataset)
    M, csc = tensors["context"].shape[-2], tensors["context"].dim() == 3
    flags = [*flags, "--out-dir", given.run, "--epochs", str(state["epoch"])]
    flags.remove(given.run)
    flags += ["--posterior", posterior] if posterior else ["--n-ctx", str(M), *["--csc"] * csc]
    args = runs.settle(script.build_parser(), flags, method, script.DEFAULTS, script.paper_exceptions)
    check_shapes(tensors, posterior, args.model, file)
    if posterior and args.eval_samples is None:
        args.eval_samples = args.samples
    out = runs.open_run(args, method)
    runs.save_checkpoint(out, method, args, tensors, args.epochs)
    common.log(f"{out}: {method}, {args.model}, epoch {args.epochs}, {sizes(tensors)}")
    common.log(f"evaluate it with python {method}.py --eval-only --checkpoint {out}")


def write(run: str, file: str) -> None:
    """Make a file for load_model of the released code."""
    state, path = runs.load_checkpoint(run), Path(file)
    settings, tensors, posterior = state["settings"], dict(state["tensors"]), state["settings"].get("posterior")
    if state["method"] not in SCRIPTS:
        raise UserError(f"{run} is a run of {state['method']}.py: no prompt that the released code could read")
    if path.exists():
        raise UserError(f"{path} exists: choose another name")
    if posterior == "global" and settings["samples"] == 0:  # this is CoOp, whose code reads `ctx` alone
        tensors, posterior = {"context": tensors["context"]}, None
    if posterior:
        if settings["samples"] == 0 or settings["residual_scale"] == 0:
            raise UserError(f"{run} has a prompt without a spread: the released VPT always samples")
        fold(tensors, settings["residual_scale"])
    names = KINDS["vpt" if posterior else "prograd", posterior]
    content = {"state_dict": collections.OrderedDict((theirs, tensors[ours]) for theirs, ours in names.items())}
    content |= {"epoch": state["epoch"], "optimizer": None, "scheduler": None, "val_result": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    key = "VPT" if posterior else "COOP"
    more = f", TRAINER.VPT.VPT_TYPE {'coopvpt' if posterior == 'global' else 'cocoopvpt'}" if posterior else ""
    common.log(f"{path}: {sizes(content['state_dict'])}")
    common.log(
        f"load_model(DIR, epoch={state['epoch']}) reads DIR/prompt_learner/model.pth.tar-{state['epoch']}; "
        f"with TRAINER.{key}.N_CTX {tensors['context'].shape[-2]}{more}"
    )


def sizes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv[:1] or "-h" in argv[:1]:
        print(__doc__)
    elif argv[:1] == ["read"] and len(argv) > 2:
        read(argv[1], argv[2:])
    elif argv[:1] == ["write"] and len(argv) == 3:
        write(*argv[1:])
    else:
        raise UserError("use: released.py read FILE RUN --dataset NAME [flags], or released.py write RUN FILE")


if __name__ == "__main__":
    runs.run(main)
