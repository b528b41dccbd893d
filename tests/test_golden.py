"""Replay of everything recorded from the released implementations (tests/golden/README.md).

Every file of the folder is walked, and every key is read. That what is recorded is compared, too,
is shown below, by recordings that are changed. GOLDEN_DIR=/path pytest tests/test_golden.py replays
other recordings.
"""

import shutil
from fnmatch import fnmatch
from unittest import mock

import numpy as np
import pytest
import torch.nn.functional as F
from golden_replay import REPLAYS, settings
from golden_world import FOLDER, OWN, TOLERANCE, GoldenWorld, Recording, world

import common
import data
import prograd
import proreg
import vpt


def walk(name: str, golden: GoldenWorld) -> None:
    """Replay one file; fail on what is off, and on what nobody looked at."""
    fitting = [replay for pattern, replay in (REPLAYS | SHARED).items() if fnmatch(name, pattern)]
    assert len(fitting) == 1, f"no test reads {name}"
    g = golden.recording(name)
    fitting[0](g, golden)
    bad = [f"{key} ({off:.1e})" for key, off in g.off.items() if not off <= TOLERANCE]
    assert not bad, f"{name} is off by more than {TOLERANCE}: {', '.join(bad)}"
    left = sorted(g.values.keys() - g.read)
    assert not left, f"{name}: nobody reads {', '.join(left)}"


@pytest.mark.parametrize("name", world().names())
def test_recording(name):
    walk(name, world())


def test_there_are_recordings():
    assert all(map(world().names, REPLAYS)), f"{FOLDER} lacks one of {', '.join(REPLAYS)}"


# What all recordings share: weights, images, class names, the few-shot draw, the schedule ---------
def check_weights(g: Recording, golden: GoldenWorld) -> None:
    """The loaded model holds what was recorded, and no other image tower."""
    state = golden.clips[g.name].model.state_dict()
    assert all(key in g.values for key in state if key.startswith("visual."))
    for key in g.keys():
        g.compare(key, state[key])


def check_input(g: Recording, golden: GoldenWorld) -> None:
    """The replays of the other files read it."""
    assert all(len(g[key]) for key in g.keys())


def check_fewshot(g: Recording, golden: GoldenWorld) -> None:
    """CoOp's draw, in its order; base and new classes are cut out after the draw."""
    split = golden.recording("fewshot_split.json").values
    names = {label: name for part in split.values() for _, label, name in part}
    items = {part: [(path, label) for path, label, _ in rows] for part, rows in split.items()}
    half = -(-len(names) // 2)
    halves = {"all": range(len(names)), "base": range(half), "new": range(half, len(names))}
    for key in g.keys():
        shots, seed, classes = key.split("_")
        drawn = data.fewshot(items["train"], items["val"], int(shots[5:]), int(seed[4:]))
        kept = [names[label] for label in halves[classes]]
        ours = {"num_classes": len(kept), "classnames": kept}
        ours["lab2cname"] = {str(label): name for label, name in enumerate(kept)}
        for part, rows in zip(("train", "val", "test"), (*drawn, items["test"])):
            rows = data.keep_labels(rows, halves[classes])
            ours[part] = [[path, label, kept[label]] for path, label in rows]
        assert ours == g[key], key


def check_rates(g: Recording, golden: GoldenWorld) -> None:
    """The schedule at --lr's default."""
    for key in g.keys():
        E = int(key.removeprefix("lr_per_epoch_E"))
        ours = [common.warmup_cosine(epoch, E, settings(prograd).lr) for epoch in range(E)]
        g.compare_rows(key, ours)


SHARED = {
    **dict.fromkeys(("images.npz", "classnames.json", "fewshot_split.json"), check_input),
    "weights_*.npz": check_weights,
    "fewshot.json": check_fewshot,
    "learning_rates.json": check_rates,
}


# Wrong implementations fail, and where README.md of the recordings says so ------------------------
def project(d, g, lam, axes=None, norm2=None):
    """Eq. 5 of ProGrad with a projection of its own for each class, or another norm."""
    dot, square = ((x * g).sum(axes, keepdim=True) for x in (d, g))
    return d - lam * dot.clamp(max=0) / (square if norm2 is None else norm2) * g


def weight(x, z, y, power=10.0, detached=True, grain=1e-5):
    """Eq. 4 of ProReg as the release writes it."""
    p = (-F.cross_entropy(x, y, reduction="none")).exp()
    p_zs = (-power * F.cross_entropy(z, y, reduction="none")).exp()
    w = p_zs / (p + p_zs + grain)
    return w.detach() if detached else w


KL1, KL3, RATE = prograd.distillation_loss, proreg.prompt_losses, common.warmup_cosine
PROJECT, KL, RATES = "prograd.project_gradient", "prograd.distillation_loss", "common.warmup_cosine"
W, KLS, MEAN = "proreg.adaptive_weight", "proreg.prompt_losses", "vpt.log_mean_prob"
GELU = "open_clip.transformer.QuickGELU.forward"
P, V, VR = "prograd_ctxinit16", "vpt_coop_L3_b1", "vpt_coop_L3_b4_meanrand"
MUTANTS = [  # what is wrong, a file that tells, the key that does, what is replaced, by what
    ("no decay", P, "momentum_buffer", "prograd.REAL", prograd.REAL | {"weight_decay": 0}),
    ("no decay", V, "std_posterior.* change", "vpt.REAL", vpt.REAL | {"weight_decay": 0}),
    ("no projection", P, "g_proj_lam1.0", PROJECT, lambda d, g, lam: d),
    ("always", P, "agree/g_proj", PROJECT, lambda d, g, lam: d - (d * g).sum() / (g * g).sum() * g),
    ("half of λ", P, "g_proj_lam1.0", PROJECT, lambda d, g, lam: project(d, g, lam / 2)),
    ("norm", P, "g_proj", PROJECT, lambda d, g, lam: project(d, g, lam, norm2=g.norm())),
    ("a class", "prograd_csc4", "g_proj", PROJECT, lambda d, g, lam: project(d, g, lam, (1, 2))),
    ("no T²", f"{P}_T2", "kl_loss.*g_g", KL, lambda x, z, T: KL1(x / T, z / T)),
    ("entropy", P, "kl_loss.*xe_kl_acc", KL, lambda x, z, T: KL1(x, z, T) - KL1(z, z, T)),
    ("late", P, r"ctx\[1\] change.*lr", RATES, lambda e, *rest: RATE(max(e - 1, 0), *rest)),
    ("early", "learning_rates", "lr_per_epoch", RATES, lambda e, *rest: RATE(e + 1, *rest)),
    ("GELU", "prograd_dtd16", "g_d", GELU, lambda self, x: F.gelu(x)),
    ("blanks", "proreg", "tokenized_prompts.*step/.*loss", "golden_replay.STAND_IN", "_"),
    ("mean of logits", VR, "eval_logprob", MEAN, lambda x: x.mean(dim=0).log_softmax(dim=-1)),
    ("KL summed", VR, "kl", "vpt.kl_to_standard_normal",
     lambda mu, logvar: 0.5 * (mu.square() + logvar.expm1() - logvar).sum(dim=-1)),
    ("a deviation", V, "grad/std", "vpt.sample_residual", lambda mu, logvar, e: mu + logvar * e),
    ("power 1", "proreg", "w_t.*step", W, lambda *given: weight(*given[:3], power=1.0)),
    ("not detached", "proreg", "step/xERM.*grad", W, lambda *given: weight(*given, detached=False)),
    ("no 1e-5", "proreg", "w_t", W, lambda *given: weight(*given, grain=0.0)),
    ("no T²", "proreg", "T2.0.*loss", KLS, lambda x, z, T: KL3(x / T, z / T)),
    ("entropy", "proreg", "xERM/.*loss", KLS, lambda x, z, T: KL3(x, z, T) - KL3(z, z, T)),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[f"{row[0]}, {row[1]}" for row in MUTANTS])
def test_mutant_fails(i):
    _, file, key, what, by = MUTANTS[i]
    golden = world(OWN)
    assert golden.clips  # loaded as it should be
    with mock.patch(what, by), pytest.raises(AssertionError, match=f"is off by more.*{key}"):
        walk(golden.names(f"{file}.*")[0], golden)


def test_float32_scale_fails():
    golden = world(OWN)
    wrong = golden.clip.model.logit_scale.float().exp().item()
    with mock.patch.object(golden.clip, "scale", wrong), pytest.raises(AssertionError, match="g_d"):
        walk("prograd_dtd16.npz", golden)


# The walker itself --------------------------------------------------------------------------------
def change(folder, name: str, how, **more) -> GoldenWorld:
    """Our recordings, with how(key, array) for each array of one file, and more arrays."""
    golden = GoldenWorld(folder)
    golden.clips = world(OWN).clips
    for file in ("classnames.json", "images.npz"):
        shutil.copyfile(OWN / file, folder / file)
    with np.load(OWN / name) as file:
        np.savez(folder / name, **more, **{key: how(key, file[key]) for key in file.files})
    return golden


def test_what_nobody_reads_fails(tmp_path):
    name = "prograd_dtd16.npz"
    golden = change(tmp_path, name, lambda key, value: value, another=np.zeros(3))
    with pytest.raises(AssertionError, match="nobody reads another"):
        walk(name, golden)
    with pytest.raises(AssertionError, match="no test reads fourth_method.npz"):
        walk("fourth_method.npz", golden)


@pytest.mark.parametrize("name", ["prograd_csc4.npz", "vpt_cocoop_L3_b1.npz", "proreg.npz"])
def test_each_number_counts(tmp_path, name):
    """All recorded results changed by 1e-7 are all off."""
    results = []

    def worse(key: str, value: np.ndarray):
        if value.dtype != np.float64 or key == "T" or not value.any():
            return value
        results.append(key)
        return value * (1 + 1e-7) + 1e-7 * key.endswith("cos")

    golden = change(tmp_path, name, worse)
    with pytest.raises(AssertionError) as error:
        walk(name, golden)
    assert len(results) > 10 and all(f" {key}" in str(error.value) for key in results)
