"""Replay of everything recorded from the released implementations (tests/golden/README.md explains each array).

Every file of the folder is walked, and every key must be touched by the replay or named in a SKIP table with a reason.
GOLDEN_DIR=/path pytest tests/test_golden.py replays other recordings of the same format.
"""

import functools
import importlib
import json
import random
import shutil
from fnmatch import fnmatch
from unittest import mock

import golden_prograd
import golden_world
import numpy as np
import pytest
import torch
from golden_world import FOLDER, GoldenWorld, Recording, close, deviation, world

import common
import data
import prograd

OWN = golden_world.HERE / "golden"  # for tests of the tests, whatever GOLDEN_DIR says
SKIP_FILES = {"README.md": "prose"}
SKIP = {  # keys of the shared files; each method's helper has its own table
    "oddities_prograd.json:prograd_class_token_middle": "a crash of the released code: prograd.py has no such position",
    "oddities_prograd.json:prograd_csc_with_ctx_init_ctx_shape": "released: CTX_INIT switches --csc off; not ours",
    "oddities_prograd.json:prograd_pets_nctx4": "an assertion of the released code: ours counts tokens",
    "oddities_prograd.json:prograd_amp": "a crash of the released code in mixed precision",
    "oddities_prograd.json:prograd_zero_*_grad": "released code at g = 0: ours is prograd.py's PAPER vs CODE 7",
    "oddities_prograd.json:prograd_modes_after_set_*": "train/eval flags of the released modules; ours is always eval",
    "oddities_prograd.json:state_dict_keys": "names in the released checkpoints: a matter of tools/released.py",
    "oddities_vpt.json:coco*": "crashes and shapes of the released code at batch sizes that ours does not share",
    "oddities_vpt.json:config_*": "a broken configuration file of the released code",
    "oddities_vpt.json:bad_vpt_type": "an error message of the released code",
    "oddities_vpt.json:state_dict_*": "names in the released checkpoints: a matter of tools/released.py",
    "oddities_vpt.json:coop_eval_*": "how far the released evaluation varies from one draw of noise to the next",
}


# ----------------------------------------------------------------------------------------------------------------------
# 1. The walker
# ----------------------------------------------------------------------------------------------------------------------
def helpers() -> list:
    """The methods' replays, and this file's own for what all recordings share."""
    return [importlib.import_module(f"golden_{method}") for method in ("prograd", "vpt", "proreg")] + [Shared]


def walk(name: str, golden: GoldenWorld) -> None:
    """Replay one file and fail on what stayed untouched."""
    path = golden.folder / name
    if name in SKIP_FILES:
        return
    for helper in helpers():
        patterns = (helper.PATTERN,) if isinstance(helper.PATTERN, str) else helper.PATTERN
        if any(fnmatch(name, pattern) for pattern in patterns):
            recording = golden_world.Recording(path)
            helper.replay(name, recording, golden)
            left = recording.untouched(helper.SKIP)
            assert not left, f"{name}: neither compared nor skipped with a reason: {', '.join(left)}"
            return
    raise AssertionError(f"no test reads {name}")


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", files(FOLDER))
def test_recording(name):
    walk(name, world(FOLDER))


# ----------------------------------------------------------------------------------------------------------------------
# 2. What all recordings share: weights, images, class names, the few-shot draw, the schedule
# ----------------------------------------------------------------------------------------------------------------------
class Shared:
    PATTERN = (
        "weights_*.npz",
        "images.npz",
        "classnames.json",
        "fewshot.json",
        "fewshot_split.json",
        "oddities_*.json",
    )
    SKIP = SKIP

    @staticmethod
    def replay(name: str, g, golden: GoldenWorld) -> None:
        kind = name.split(".")[0].split("_")[0]
        getattr(Shared, kind)(name, g, golden)

    @staticmethod
    def weights(name, g, golden):
        """The loaded model holds every recorded tensor, and nothing that was not recorded."""
        model = (golden.clip_rn() if "_rn_" in name else golden.clip()).model
        state, only = model.state_dict(), "visual." if "_rn_" in name else ""
        assert {key for key in state if key.startswith(only)} == set(g.keys())
        for key in g.keys():
            assert torch.equal(state[key], g[key]), key

    @staticmethod
    def images(name, g, golden):
        """Each stack of images fits the tower of its size."""
        for clip in (golden.clip(), golden.clip_rn()):
            size = clip.model.visual.image_size
            size = size if isinstance(size, int) else size[0]
            images = g[f"images{size}"]
            assert images.shape[2:] == (3, size, size) and images.isfinite().all()

    @staticmethod
    def classnames(name, g, golden):
        """Every name fits in the context, and becomes tokens of its own."""
        names = g[""]
        suffix, eot = common.name_tokens(golden.clip(), names)
        assert len(suffix) == len(eot) == len(names) == len(set(names))

    @staticmethod
    def fewshot(name, g, golden):
        """CoOp's draw, item for item and in its order; base and new classes are cut out after the draw."""
        split = golden.json("fewshot_split.json")
        if name == "fewshot_split.json":  # the input; what is compared is fewshot.json
            assert all(isinstance(label, int) for part in g.keys() for _, label, _ in g[part])
            return
        items = {part: [(path, label) for path, label, _ in entries] for part, entries in split.items()}
        names = {label: text for entries in split.values() for _, label, text in entries}
        C, half = len(names), -(-len(names) // 2)
        labels = {"all": range(C), "base": range(half), "new": range(half, C)}
        for key in g.keys():
            shots, seed, classes = key.split("_")
            state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
            train, val = data.fewshot(items["train"], items["val"], int(shots[5:]), int(seed[4:]))
            assert state[0] == random.getstate() and state[1] == np.random.get_state()[1].tolist()
            assert torch.equal(state[2], torch.get_rng_state())  # no global generator is touched
            kept = [names[label] for label in labels[classes]]
            for part, drawn in (("train", train), ("val", val), ("test", items["test"])):
                ours = [[path, label, kept[label]] for path, label in data.keep_labels(drawn, labels[classes])]
                assert ours == g[key][part], (key, part)
            # A class that the draw leaves out keeps its label: with all of a half's classes these say the same.
            assert g[key]["classnames"] == kept and g[key]["num_classes"] == len(kept)
            assert g[key]["lab2cname"] == {str(i): text for i, text in enumerate(kept)}

    @staticmethod
    def oddities(name, g, golden):
        for key in g.keys():
            if key.startswith("lr_per_epoch_E"):
                rates, epochs = g[key], int(key.removeprefix("lr_per_epoch_E"))
                assert len(rates) == epochs
                close([common.warmup_cosine(e, epochs, rates[1]) for e in range(epochs)], rates, 1e-12, key)
            if key == "optimizer_defaults":
                ours = prograd.METHOD | {"dampening": 0, "nesterov": False}
                recorded = g[key]
                for setting in ("momentum", "weight_decay", "dampening", "nesterov"):
                    assert recorded[setting] == ours[setting]
            if key == "n_optim_params":
                clip = golden.clip()
                learner = prograd.PromptLearner(clip, torch.zeros(4, clip.width))
                assert len(list(learner.parameters())) == g[key]


# ----------------------------------------------------------------------------------------------------------------------
# 3. The tolerances are tight enough: mutants fail
# ----------------------------------------------------------------------------------------------------------------------
def prograd_trajectories():
    return [
        name for name in files(FOLDER) if fnmatch(name, "prograd_*.npz") and golden_prograd.trajectories(read(name))
    ]


@functools.cache
def read(name: str) -> Recording:
    return world(FOLDER).recording(name)


@pytest.mark.parametrize("name", prograd_trajectories())
def test_prograd_mutants_fail(name):
    """Without weight decay every trajectory fails; without the projection every one along which gradients conflict."""
    g, conflicts = read(name), 0
    case = golden_prograd.Case(g, world(FOLDER))
    for key in golden_prograd.trajectories(g):
        with pytest.raises(AssertionError, match="update: off by"):
            golden_prograd.check_update(g, key, case.start, case.trajectory(key, weight_decay=0.0))
        if float(key.partition("_lam")[2]) > 0 and g[f"{key}/cos"].min() < -0.01:
            conflicts += 1
            with mock.patch.object(prograd, "project_gradient", lambda g_d, g_g, lam: g_d):
                with pytest.raises(AssertionError, match="update: off by"):
                    golden_prograd.check_update(g, key, case.start, case.trajectory(key))
    assert conflicts


@pytest.mark.parametrize("name", prograd_trajectories())
def test_prograd_decay_after_projection(name):
    """A large decay shows that it is added after the projection, and is not projected with g_d (Eq. 6)."""
    g, decay = read(name), 100.0
    case = golden_prograd.Case(g, world(FOLDER))
    for kind in {key.split("/")[0] for key in golden_prograd.trajectories(g) if g[f"{key}/cos"][0] < -0.01}:
        (step,) = case.train(g[f"{kind}/labels"][:1], rates=torch.ones(1), weight_decay=decay, lam=1.0)
        after = prograd.project_gradient(step["g_d"], step["g_g"]) + decay * case.start
        before = prograd.project_gradient(step["g_d"] + decay * case.start, step["g_g"])
        close(step["momentum_buffer"], after, 1e-6)
        close(case.start - step["ctx"], after, 1e-6)  # at a rate of 1
        assert deviation(before, after) > 1e-4  # a hundred times what is allowed above


def test_prograd_rule_add():
    """--rule add steps along g_d + λ g_g, the gradient of CE + λ·KL; at λ = 0 the rules are the same, bit for bit."""
    g = world(OWN).recording("prograd_ctxinit16.npz")
    case, labels = golden_prograd.Case(g, world(OWN)), g["conflict/labels"]
    (step,) = case.train(labels[:1], rates=torch.ones(1), weight_decay=0.0)
    (added,) = case.train(labels[:1], rates=torch.ones(1), weight_decay=0.0, rule="add", lam=0.3)
    close(added["momentum_buffer"], step["g_d"] + 0.3 * step["g_g"], 1e-12)
    zero = [case.train(labels, epochs=len(labels), rule=rule, lam=0.0)[-1]["ctx"] for rule in ("add", "project")]
    assert torch.equal(*zero)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tests of the walker itself
# ----------------------------------------------------------------------------------------------------------------------
def doctored(tmp_path, *names: str) -> GoldenWorld:
    """A copy of the shared files and of `names`, to be changed."""
    shared = ("classnames.json", "images.npz", "weights_tiny_openai.npz", "weights_tiny_rn_visual_openai.npz")
    for name in {*shared, *names}:
        shutil.copy(OWN / name, tmp_path / name)
    return GoldenWorld(tmp_path)


def test_golden_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    assert golden_world.golden_folder() == tmp_path
    monkeypatch.delenv("GOLDEN_DIR")
    assert golden_world.golden_folder() == OWN


def test_untouched_key_fails(tmp_path):
    golden = doctored(tmp_path, "oddities_prograd.json", "prograd_front4.npz")
    walk("oddities_prograd.json", golden)
    content = golden.json("oddities_prograd.json") | {"a_new_key": 1}
    (tmp_path / "oddities_prograd.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AssertionError, match="a_new_key"):
        walk("oddities_prograd.json", golden)
    arrays = dict(np.load(tmp_path / "prograd_front4.npz")) | {"another": np.zeros(3)}
    np.savez(tmp_path / "prograd_front4.npz", **arrays)
    with pytest.raises(AssertionError, match="another"):
        walk("prograd_front4.npz", golden)


def test_unknown_file_fails(tmp_path):
    golden = doctored(tmp_path)
    np.savez(tmp_path / "fourth_method.npz", loss=np.zeros(3))
    with pytest.raises(AssertionError, match="no test reads fourth_method.npz"):
        walk("fourth_method.npz", golden)


def test_changed_number_fails(tmp_path):
    golden = doctored(tmp_path, "oddities_prograd.json", "prograd_front4.npz")
    content = golden.json("oddities_prograd.json")
    key = next(key for key in content if key.startswith("lr_per_epoch"))
    content[key][-1] *= 1.001
    (tmp_path / "oddities_prograd.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(AssertionError, match=key):
        walk("oddities_prograd.json", golden)
    arrays = dict(np.load(tmp_path / "prograd_front4.npz"))
    arrays["agree/g_g"][0] *= 1.001
    np.savez(tmp_path / "prograd_front4.npz", **arrays)
    with pytest.raises(AssertionError, match="agree g_g"):
        walk("prograd_front4.npz", golden)


@pytest.mark.parametrize("name", ["prograd_csc4.npz", "prograd_ctxinit16.npz"])
def test_other_recording(tmp_path, name):
    """Other class names per label, fewer steps and images, other file and label-kind names: nothing is hard-coded."""
    golden = doctored(tmp_path)
    names, arrays = golden.classnames, dict(np.load(OWN / name))
    order = np.random.default_rng(1).permutation(len(names))
    (tmp_path / "classnames.json").write_text(json.dumps([names[c] for c in order]), encoding="utf-8")
    images = {key: value[:3].numpy() for key, value in golden.images.values.items()}
    np.savez(tmp_path / "images.npz", **images)
    other = {}
    for key, value in arrays.items():
        if key in ("tokenized_prompts", "name_lens", "zs_text_features", "text_features_unnorm"):
            value = value[order]
        elif key in ("zs_logits", "logits_init"):
            value = value[:3, :, order]
        elif key == "image_features_unnorm":
            value = value[:3]
        elif key.endswith("/labels"):
            value = np.argsort(order)[value[:3]]
        elif "/sgd_" in key and not key.endswith("momentum_buffer"):
            value = value[:3]
        elif "/sgd_" in key:  # of the last step, which is another one now
            continue
        if arrays["ctx_init"].ndim == 3 and (key == "ctx_init" or key.split("/")[-1].startswith("g_")):
            value = value[order]
        elif arrays["ctx_init"].ndim == 3 and key.endswith("/ctx"):
            value = value[:, order]
        other["/".join({"conflict": "first", "agree": "second"}.get(part, part) for part in key.split("/"))] = value
    np.savez(tmp_path / "prograd_another.npz", **other)
    walk("prograd_another.npz", GoldenWorld(tmp_path))
