"""Replay of everything recorded from the released implementations (tests/golden/README.md).

Every file of the folder is walked, and every key is an input, is compared, or is named in SKIP with
a reason. GOLDEN_DIR=/path pytest tests/test_golden.py replays other recordings of the format.
"""

import random
import shutil
from fnmatch import fnmatch
from unittest import mock

import golden_prograd
import golden_proreg
import golden_vpt
import numpy as np
import pytest
import torch
from golden_world import FOLDER, HERE, GoldenWorld, Recording, close, load, world

import common
import data
import prograd
import proreg
import vpt

OWN = HERE / "golden"
SKIP_FILES = {"README.md": "prose"}
SKIP = {}  # every key of every file is read
METHODS = (golden_prograd, golden_vpt, golden_proreg)


def files(folder=FOLDER) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def walk(name: str, golden: GoldenWorld) -> None:
    """Replay one file and fail on what stayed untouched."""
    if name in SKIP_FILES:
        return
    replays = {module.PATTERN: module.replay for module in METHODS} | SHARED
    fitting = [replay for pattern, replay in replays.items() if fnmatch(name, pattern)]
    assert fitting, f"no test reads {name}"
    recording = golden.recording(name)
    fitting[0](recording, golden)
    left = recording.untouched(SKIP)
    assert not left, f"{name}: neither compared nor skipped with a reason: {', '.join(left)}"


@pytest.mark.parametrize("name", files())
def test_recording(name):
    walk(name, world(FOLDER))


# --------------------------------------------------------------------------------------------------
# What all recordings share: weights, images, class names, the few-shot draw, the schedule
# --------------------------------------------------------------------------------------------------
def check_weights(g: Recording, golden: GoldenWorld) -> None:
    """The loaded model holds every recorded tensor, and nothing that was not recorded."""
    is_resnet = "_rn_" in g.name
    state = (golden.clip_rn if is_resnet else golden.clip).model.state_dict()
    only = "visual." if is_resnet else ""
    assert {key for key in state if key.startswith(only)} == set(g.keys())
    for key in g.keys():
        assert torch.equal(state[key], g[key]), key


def check_images(g: Recording, golden: GoldenWorld) -> None:
    """Each stack of images fits the tower of its size."""
    for clip in (golden.clip, golden.clip_rn):
        assert golden.features(clip).isfinite().all()
    for key in g.keys():
        assert g[key].shape[2:] == (3, int(key[6:]), int(key[6:]))


def check_classnames(g: Recording, golden: GoldenWorld) -> None:
    """Every name fits in the context, and becomes tokens of its own."""
    names = common.name_tokens(golden.clip, g[""], 16)
    assert len(names.slot) == len(set(names.slot.tolist())) == len(set(g[""]))


def check_fewshot(g: Recording, golden: GoldenWorld) -> None:
    """CoOp's draw, in its order; base and new classes are cut out after the draw."""
    split = golden.recording("fewshot_split.json")
    items, names = {}, {}
    for part in split.keys():
        items[part] = [(path, label) for path, label, _ in split[part]]
        names |= {label: name for _, label, name in split[part]}
    half = -(-len(names) // 2)
    halves = {"all": range(len(names)), "base": range(half), "new": range(half, len(names))}
    for key in g.keys():
        shots, seed, classes = key.split("_")
        before = random.getstate(), torch.get_rng_state()
        drawn = data.fewshot(items["train"], items["val"], int(shots[5:]), int(seed[4:]))
        assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
        kept = [names[label] for label in halves[classes]]
        for part, rows in zip(("train", "val", "test"), (*drawn, items["test"])):
            ours = data.keep_labels(rows, halves[classes])
            assert [[path, label, kept[label]] for path, label in ours] == g[key][part], key
        assert g[key]["classnames"] == kept and g[key]["num_classes"] == len(kept)
        assert g[key]["lab2cname"] == {str(i): name for i, name in enumerate(kept)}


def check_split(g: Recording, golden: GoldenWorld) -> None:
    """The input of fewshot.json."""
    assert all(isinstance(label, int) for part in g.keys() for _, label, _ in g[part])


def check_rates(g: Recording, golden: GoldenWorld) -> None:
    for key in g.keys():
        rates, epochs = g[key], int(key.removeprefix("lr_per_epoch_E"))
        assert len(rates) == epochs
        close([common.warmup_cosine(e, epochs, rates[1]) for e in range(epochs)], rates, key)


SHARED = {
    "weights_*.npz": check_weights,
    "images.npz": check_images,
    "classnames.json": check_classnames,
    "fewshot.json": check_fewshot,
    "fewshot_split.json": check_split,
    "learning_rates.json": check_rates,
}


# --------------------------------------------------------------------------------------------------
# The tolerance is tight enough: wrong implementations fail
# --------------------------------------------------------------------------------------------------
def whole_row_norms(g_d, g_g, lam=1.0):
    norm2 = g_g.norm(dim=-1).mean() ** 2
    return g_d - lam * torch.clamp((g_d * g_g).sum(), max=0) / norm2 * g_g


def per_token(g_d, g_g, lam=1.0):
    dot = (g_d * g_g).sum(dim=-1, keepdim=True).clamp(max=0)
    return g_d - lam * dot / g_g.square().sum(dim=-1, keepdim=True) * g_g


def entropy_added(logits, zs_logits, T=1.0, kept=prograd.distillation_loss):
    return kept(logits, zs_logits, T) - kept(zs_logits, zs_logits, T)


def sgd_without_decay(params, lr, momentum, weight_decay, kept=torch.optim.SGD):
    return kept(params, lr, momentum)


def one_float32(clip, *args, kept=common.encode_prompts):
    return kept(clip, *args).float().double()


PROJECT = prograd.project_gradient
KL = prograd.distillation_loss
RATE = common.warmup_cosine
WEIGHT = proreg.adaptive_weight
LOSSES = proreg.distillation_losses
MUTANTS = {  # name: (method's recordings, where, name there, the wrong function)
    "no projection": ("prograd", prograd, "project_gradient", lambda d, g, lam: d),
    "always projected": (
        "prograd",
        prograd,
        "project_gradient",
        lambda d, g, lam=1.0: d - lam * (d * g).sum() / g.square().sum() * g,
    ),
    "half of λ": (
        "prograd",
        prograd,
        "project_gradient",
        lambda d, g, lam=1: PROJECT(d, g, lam / 2),
    ),
    "norm for its square": (
        "prograd",
        prograd,
        "project_gradient",
        lambda d, g, lam=1.0: d - lam * (d * g).sum().clamp(max=0) / g.norm() * g,
    ),
    "mean of row norms": ("prograd", prograd, "project_gradient", whole_row_norms),
    "one projection a token": ("prograd", prograd, "project_gradient", per_token),
    "no T²": ("prograd", prograd, "distillation_loss", lambda x, z, T: KL(x, z, T) / T**2),
    "entropy": ("prograd", prograd, "distillation_loss", entropy_added),
    "no decay": ("prograd", torch.optim, "SGD", sgd_without_decay),
    "schedule late": ("prograd", common, "warmup_cosine", lambda e, *r: RATE(max(0, e - 1), *r)),
    "schedule early": ("prograd", common, "warmup_cosine", lambda e, *r: RATE(e + 1, *r)),
    "float32 text": ("prograd", common, "encode_prompts", one_float32),
    "VPT no decay": ("vpt", torch.optim, "SGD", sgd_without_decay),
    "VPT float32 text": ("vpt", common, "encode_prompts", one_float32),
    "VPT mean of logits": ("vpt", vpt, "log_mean_prob", lambda x: x.mean(0).log_softmax(-1)),
    "VPT mean of logs": ("vpt", vpt, "log_mean_prob", lambda x: x.log_softmax(-1).mean(0)),
    "VPT KL summed": (
        "vpt",
        vpt,
        "kl_to_standard_normal",
        lambda m, v: 0.5 * (m.square() + v.expm1() - v).sum(-1),
    ),
    "VPT deviation": ("vpt", vpt, "sample_residual", lambda m, v, e: m + v * e),
    "ProReg power 1": ("proreg", proreg, "adaptive_weight", lambda *a: WEIGHT(*a[:3], 1.0)),
    "ProReg no 1e-5": (
        "proreg",
        proreg,
        "adaptive_weight",
        lambda x, z, y, k=10.0: torch.sigmoid(
            proreg.label_losses(x.detach(), y) - k * proreg.label_losses(z, y)
        ),
    ),
    "ProReg w not detached": (
        "proreg",
        proreg,
        "adaptive_weight",
        lambda x, z, y, k=10.0: (
            (-k * proreg.label_losses(z, y)).exp()
            / ((-proreg.label_losses(x, y)).exp() + (-k * proreg.label_losses(z, y)).exp() + 1e-5)
        ),
    ),
    "ProReg no T²": (
        "proreg",
        proreg,
        "distillation_losses",
        lambda x, z, T: LOSSES(x, z, T) / T**2,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails(name):
    """At least one recording of its method tells it from the released code."""
    method, where, what, wrong = MUTANTS[name]
    golden = world(FOLDER)
    module = {m.PATTERN[: len(method)]: m for m in METHODS}[method]
    with (
        mock.patch.object(where, what, wrong),
        pytest.raises(AssertionError, match="off by|cosine"),
    ):
        for file in golden.names(module.PATTERN):
            module.replay(golden.recording(file), golden)


@pytest.mark.parametrize("change", ["gelu", "scale"])
def test_wrong_clip_fails(change):
    """GELU for QuickGELU, and exp(logit_scale) taken in float32."""
    golden = GoldenWorld(FOLDER)
    if change == "gelu":
        golden.clip = load(golden.weights, quick_gelu=False)
    else:
        golden.clip.scale = golden.clip.model.logit_scale.float().exp().item()
    file = golden.names(golden_prograd.PATTERN)[0]
    with pytest.raises(AssertionError, match="off by"):
        golden_prograd.replay(golden.recording(file), golden)


# --------------------------------------------------------------------------------------------------
# The walker itself
# --------------------------------------------------------------------------------------------------
def doctored(tmp_path, *names: str) -> GoldenWorld:
    """A copy of the shared files and of `names`, to be changed."""
    shared = [name for name in files(OWN) if fnmatch(name, "weights*") or name == "images.npz"]
    for name in {"classnames.json", *shared, *names}:
        shutil.copy(OWN / name, tmp_path / name)
    return GoldenWorld(tmp_path)


def test_untouched_key_or_unknown_file_fails(tmp_path):
    golden = doctored(tmp_path, "prograd_dtd16.npz")
    arrays = dict(np.load(tmp_path / "prograd_dtd16.npz"))
    np.savez(tmp_path / "prograd_dtd16.npz", **arrays, another=np.zeros(3))
    with pytest.raises(AssertionError, match="another"):
        walk("prograd_dtd16.npz", golden)
    np.savez(tmp_path / "fourth_method.npz", loss=np.zeros(3))
    with pytest.raises(AssertionError, match="no test reads fourth_method.npz"):
        walk("fourth_method.npz", golden)


def test_changed_number_fails(tmp_path):
    golden = doctored(tmp_path, "vpt_coop_L3_b1.npz")
    arrays = dict(np.load(tmp_path / "vpt_coop_L3_b1.npz"))
    arrays["grad/ctx"][0] *= 1 + 1e-7
    np.savez(tmp_path / "vpt_coop_L3_b1.npz", **arrays)
    with pytest.raises(AssertionError, match="gradient of ctx"):
        walk("vpt_coop_L3_b1.npz", golden)


def test_other_recording(tmp_path):
    """Other names per label, fewer batches, other file and label kinds: nothing is hard-coded."""
    golden = doctored(tmp_path)
    arrays = dict(np.load(OWN / "prograd_csc4.npz"))
    order = np.random.default_rng(1).permutation(len(golden.classnames))
    names = [golden.classnames[c] for c in order]
    images = {key: value[:2].numpy() for key, value in golden.images.values.items()}
    np.savez(tmp_path / "images.npz", **images)
    other = {}
    for key, value in arrays.items():
        last = key.split("/")[-1]
        if last in ("tokenized_prompts", "name_lens", "zs_text_features", "text_features_unnorm"):
            value = value[order]
        if last in ("ctx_init", "g_d", "g_g") or last.startswith("g_proj"):
            value = value[order]
        if last in ("zs_logits", "logits_init"):
            value = value[:2, :, order]
        if last == "image_features_unnorm" or last in (
            "lr",
            "xe_kl_acc",
            "cos",
            "grad_norm_applied",
        ):
            value = value[:2] if value.ndim else value
        if last == "labels":
            value = np.argsort(order)[value[:2]]
        if last == "ctx":
            value = value[:2, order]
        if last == "momentum_buffer":  # of the last step, which is another one now
            continue
        other[key.replace("conflict", "first").replace("agree", "second")] = value
    np.savez(tmp_path / "prograd_another.npz", **other)
    golden = GoldenWorld(tmp_path)
    golden.classnames = names
    walk("prograd_another.npz", golden)
