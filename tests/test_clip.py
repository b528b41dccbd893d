"""Loading CLIPs: every kind of weights file, the activation, and what is refused."""

import argparse
import copy
import dataclasses
import errno
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import make_data
import open_clip
import pytest
import safetensors.torch
import torch
from conftest import CONFIG, QUICK, VISION, checkpoint, read, tiny_clip, tiny_model

import common
import prograd
import proreg
from data import UserError

RESNET = VISION | {"layers": [1] * 4, "width": 8, "patch_size": None, "head_width": 32}


def has_quick_gelu(net) -> bool:
    return any(type(module).__name__ == "QuickGELU" for module in net.modules())


@pytest.fixture(scope="module")
def model():
    """Random weights under a name that open_clip knows."""
    return tiny_model("tinyload", seed=3)


def save_archive(model, path):
    """As OpenAI publishes: a TorchScript archive with numbers among the weights."""
    notes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    for name, number in notes.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = {"encode_image": torch.zeros(1, 3, 32, 32)}
        torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), path)


WRITERS = {
    "x.safetensors": lambda m, p: safetensors.torch.save_file(m.state_dict(), p),
    "x.pt": lambda m, p: torch.save(m.state_dict(), p),
    "x.bin": lambda m, p: torch.save(
        {"state_dict": {f"module.{k}": v for k, v in m.state_dict().items()}, "epoch": 3}, p
    ),
}


def not_loaded(text: str, *model_and_weights: str) -> str:
    """load_clip refuses it in words that hold `text`, a regular expression → the words."""
    with pytest.raises(UserError, match=text) as caught:
        common.load_clip(*model_and_weights)
    return str(caught.value)


def test_local_files(model, tmp_path):
    """Each kind of file gives the same CLIP, with one fingerprint; other weights have another."""
    found = set()
    for file, writer in WRITERS.items():
        writer(model, tmp_path / file)
        clip = common.load_clip("tinyload", str(tmp_path / file))
        state = clip.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        assert not clip.model.training and not has_quick_gelu(clip.model)
        assert not any(p.requires_grad for p in clip.model.parameters())
        assert clip.scale == model.logit_scale.double().exp().item()
        found.add(clip.weights)
    assert len(found) == 1
    WRITERS["x.pt"](tiny_model("tinyload", seed=5), tmp_path / "other.pt")
    assert common.load_clip("tinyload", str(tmp_path / "other.pt")).weights not in found


def test_openai_archive_is_quick_gelu(tmp_path):
    model = tiny_model("tinyarchive", seed=4)
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    save_archive(model, tmp_path / "a.pt")
    clip = common.load_clip("tinyarchive", str(tmp_path / "a.pt"))
    assert has_quick_gelu(clip.model)
    assert all(torch.equal(clip.model.state_dict()[key], wanted[key]) for key in wanted)


def test_activation_follows_the_name_and_the_tag(model, tmp_path, monkeypatch):
    WRITERS["x.pt"](model, tmp_path / "x.pt")
    tiny_model("tinyload-quickgelu", config=CONFIG | {"quick_gelu": True})
    args = argparse.Namespace(pretrained=str(tmp_path / "x.pt"), device="cpu", precision="fp32")
    args.memory_gb = 4
    for args.model, quick in (("tinyload-quickgelu", True), ("tinyload", False)):
        task = argparse.Namespace(notes=[])
        assert has_quick_gelu(common.load_run_clip(args, task).model) == quick
        assert [note[-18:] for note in task.notes] == [] if quick else ["tinyload-quickgelu"]
    made = []

    def create(name, tag, force_quick_gelu, require_pretrained):
        made.append((name, tag, force_quick_gelu))

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag in ("openai", "laion2b_s34b_b88k"):
        common.build_model("ViT-B-16", tag)
    assert made == [("ViT-B-16", "openai", True), ("ViT-B-16", "laion2b_s34b_b88k", False)]


class Bomb:
    """Unpickling this runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_forged_files_run_nothing(tmp_path):
    """A pickle that would run code: as a checkpoint, and dressed as a TorchScript archive."""
    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pt")
    with zipfile.ZipFile(tmp_path / "forged.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"forged/{name}", pickle.dumps(Bomb(), 2))
        archive.writestr("forged/code/__torch__.py", "")
        archive.writestr("forged/version", "3\n")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Bomb()))
    tiny_model("tinyforged")
    for file in ("evil.pt", "forged.pt", "evil.pkl"):
        # An older torch says it in its own words.
        text = "not tensors alone: save|Unknown type name"
        words = not_loaded(text, "tinyforged", str(tmp_path / file))
        assert len(words) <= 200 and "weights_only" not in words
        assert not Path("ran").exists()


def test_other_models_are_told_by_their_shapes(model, tmp_path):
    longer = VISION | {"image_size": 64}
    other = tiny_model("tinylong", config=CONFIG | {"vision_cfg": longer})
    WRITERS["x.pt"](other, tmp_path / "long.pt")
    text = "(?s)long.pt: Error.*visual.positional_embedding"
    assert len(not_loaded(text, "tinyload", str(tmp_path / "long.pt"))) < 400
    keys = {f"text_model.layer.{i}.weight": torch.zeros(2) for i in range(500)}
    safetensors.torch.save_file(keys, tmp_path / "model.safetensors")
    words = not_loaded("Missing key", "tinyload", str(tmp_path / "model.safetensors"))
    assert len(words) < 700


def test_unknown_names(tmp_path, caplog, capfd):
    not_loaded("cannot load nonesuch", "nonesuch")
    not_loaded("no file, no tag of RN50's .*openai.*: 'opnai'", "RN50", "opnai")
    not_loaded("no file, no tag of RN50's", "RN50")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    tiny_model("tinybroken")
    caplog.clear()
    not_loaded("cannot load tinybroken", "tinybroken", str(tmp_path / "broken.pt"))
    assert not caplog.records and capfd.readouterr().err == ""


def test_hub_names_go_to_open_clip(model, tmp_path, monkeypatch):
    """hf-hub:ORG/NAME, with its own configuration, preprocessing and tokenizer; local-dir: too."""
    if not hasattr(open_clip.factory, "parse_model_name"):
        pytest.skip("this open_clip has no local-dir:")
    preprocess = {"mean": [0.1] * 3, "std": [0.2] * 3, "size": 32}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    clip = common.load_clip(f"local-dir:{tmp_path}")
    assert torch.equal(clip.model.text_projection, model.text_projection)
    assert clip.preprocess.transforms[-1].mean == [0.1] * 3
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda name, **kw: asked.append(name) or 1 / 0)
    not_loaded("cannot load hf-hub:org/name", "hf-hub:org/name")
    assert asked == ["hf-hub:org/name"]


def test_toyclip_is_plain_open_clip(toyclip):
    """Its token table is stored in full, so that open_clip reads the file as it is."""
    net = open_clip.create_model("toyclip", pretrained=str(common.TOYCLIP / "weights.safetensors"))
    assert torch.equal(net.token_embedding.weight, toyclip.model.token_embedding.weight)
    assert has_quick_gelu(toyclip.model) and abs(toyclip.scale - 20.8) < 0.05


@pytest.fixture(scope="module", params=["ViT", "ResNet", "toyclip"])
def any_clip(request, toyclip):
    if request.param == "toyclip":
        return toyclip
    vision = RESNET if request.param == "ResNet" else VISION
    return tiny_clip(f"tinyhalf{request.param}", config=CONFIG | {"vision_cfg": vision})


def half_numbers(clip) -> list[torch.Tensor]:
    """Image and text features, and a prompt's features and gradient."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), common.autocast(clip):
        x = clip.model.encode_image(images).float()
    learner = prograd.PromptLearner(clip, 0.02 * torch.randn(4, clip.width))
    text = learner(learner.names(["red square", "circle", "star"]))
    text.square().sum().backward()
    template = common.prompt_features(clip, ["square", "circle"], "a photo of a {}.")
    return [x, template, text.detach(), learner.context.grad]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_weights_in_half_precision(any_clip, precision):
    """Held in half precision they give what autocast over fp32 weights gives, to the last bit."""
    held = dataclasses.replace(any_clip, model=copy.deepcopy(any_clip.model))
    held = common.in_precision(held, precision)
    theirs = half_numbers(dataclasses.replace(any_clip, precision=precision))
    for ours, wanted in zip(half_numbers(held), theirs, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, wanted)

    def size(module):
        return sum(value.numel() * value.element_size() for value in module.parameters())

    assert size(held.model.visual) < 0.6 * size(any_clip.model.visual)


def test_what_is_tuned_starts_from_the_weights_as_they_are(toyclip):
    """In a run in bf16, too: rounded, they would be off by 1e-3."""
    flags = ["--precision", "bf16", "--lr", "1e-9", "--test-part", "val", "--out-dir", "run"]
    proreg.main([*QUICK, *flags])
    assert read("run")["clip"] == toyclip.weights
    learned = checkpoint("run")
    for key, value in toyclip.model.visual.state_dict().items():
        assert torch.allclose(learned[f"model/visual.{key}"], value, atol=1e-6), key


def test_loading_leaves_the_threads():
    torch.set_num_threads(2)
    common.load_clip()
    assert torch.get_num_threads() == 2


# The cache of features ----------------------------------------------------------------------------
def encode(clip, cache_dir: str) -> torch.Tensor:
    """Features of the files in images/, in the order of their names."""
    args = argparse.Namespace(cache_dir=cache_dir, seed=1, workers=0, device="cpu")
    items = [(str(path), 0) for path in sorted(Path("images").iterdir())]
    return common.encode_images(clip, items, clip.preprocess, args)[0]


@pytest.fixture
def cached(toyclip, tmp_path):
    """Two images, encoded and cached → the cache file, their features."""
    for name in ("1.bmp", "2.bmp"):
        make_data.image(tmp_path / "images" / name)
        os.utime(tmp_path / "images" / name, (0, 0))
    features = encode(toyclip, "cache")
    (path,) = Path("cache").iterdir()
    return path, features


def test_cached_features_follow_the_files(toyclip, cached):
    """Two files exchanged, with size and time kept, give new features."""
    path, features = cached
    assert torch.equal(encode(toyclip, "cache"), features)
    assert list(Path("cache").iterdir()) == [path]
    Path("images/1.bmp").rename("kept")
    Path("images/2.bmp").rename("images/1.bmp")
    Path("kept").rename("images/2.bmp")
    swapped = encode(toyclip, "cache")
    assert torch.allclose(swapped, features.flip(0), atol=1e-5)
    assert not torch.equal(swapped, features)


@pytest.mark.parametrize("damage", ["cut", "empty", "not features"])
def test_damaged_cache_files(toyclip, cached, damage, capsys):
    path, features = cached
    good = path.read_bytes()
    other = safetensors.torch.save({"other": torch.zeros(1)})
    path.write_bytes({"cut": good[:-8], "empty": b"", "not features": other}[damage])
    assert torch.equal(encode(toyclip, "cache"), features) and path.read_bytes() == good
    assert f"note: {path} is damaged" in capsys.readouterr().out
    assert torch.equal(encode(toyclip, "cache"), features) and capsys.readouterr().out == ""


def test_cache_key_follows_the_code(toyclip, monkeypatch):
    """A comment changes nothing; a change of the code that encodes or reads does."""
    source = common.inspect.getsource
    read_image, encode_images = common.data.read_image, common.encode_images
    keys = []
    for part, old, new in (
        (None, "", ""),
        (read_image, "image.load()", "image.load()  # a comment"),
        (read_image, "image.load()", "image.verify()"),
        (encode_images, ".float()", ".double()"),
    ):

        def changed(thing, part=part, old=old, new=new):
            return source(thing).replace(old, new) if thing is part else source(thing)

        monkeypatch.setattr(common.inspect, "getsource", changed)
        keys.append(common.feature_key(toyclip, [], toyclip.preprocess, 1, 0))
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize(("number", "reason"), [(errno.ENOSPC, "No space"), (errno.EROFS, "Read-")])
def test_cache_that_cannot_be_written(toyclip, cached, monkeypatch, number, reason):
    def fail(path, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=f"{reason}.*--cache-dir.* say where") as caught:
        encode(toyclip, "other")
    assert common.data.explain(caught.value)[0] == (1 if number == errno.ENOSPC else 2)
