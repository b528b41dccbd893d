"""tools/: predict, export, words; checkpoints of the papers' code, hostile ones too. CPU, offline, on image files."""

import builtins
import collections
import functools
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import golden_world
import numpy as np
import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import prograd
import proreg
import runs
import vpt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import released  # noqa: E402
import use  # noqa: E402

SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
QUICK = ["--dataset", "folder:shapes", "--model", "toyclip", "--augment", "none", "--shots", "2", "--epochs", "2",
         "--no-compare", "--cache-dir", "none", "--lr", "0.02"]  # fmt: skip
RUNS = {
    "prograd": ["prograd", "--n-ctx", "4"],
    "csc": ["prograd", "--n-ctx", "4", "--csc"],
    "global": ["vpt", "--samples", "3", "--residual-scale", "0.08", "--batch-size", "4"],
    "coop": ["vpt", "--samples", "0", "--batch-size", "4"],
    "image": ["vpt", "--samples", "2", "--posterior", "image", "--residual-scale", "0.08", "--batch-size", "4"],
    "proreg": ["proreg", "--lr", "1e-4"],
    "mlp": ["proreg", "--lr", "1e-4", "--head", "mlp", "--head-lr-factor", "1"],
}
KEYS = {"zero_shot", "tuned", "entropy", "mutual_information"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder dataset of JPEG and PNG files, and a function that trains each of RUNS on it, once."""
    folder = tmp_path_factory.mktemp("workshop")
    name = prograd.DEFAULTS["toy"]["dataset"]
    task = data.world.TASKS[name]
    for part, k in (("train", 2), ("val", 1), ("test", 4)):
        labels = data.world.task_labels(name, part)
        for label, classname in enumerate(task.classnames[:6]):
            where = folder / "shapes" / part / classname
            where.mkdir(parents=True)
            for j, i in enumerate([i for i, other in enumerate(labels) if other == label][:k]):
                picture = data.read_image(f"toy:{name}/{part}/{i}")
                picture.save(where / (f"{j}.png" if j % 2 else f"{j}.jpg"), quality=95)
    return folder


@pytest.fixture(autouse=True)
def in_workshop(workshop, monkeypatch):
    monkeypatch.chdir(workshop)


def run_of(name: str) -> str:
    if not Path(name, "result.json").exists():
        method, *flags = RUNS[name]
        SCRIPTS[method].main([*QUICK, *flags, "--out-dir", name])
    return name


def call(main, *flags) -> None:
    runs.run(lambda: main([str(flag) for flag in flags]))


def refusal(capsys, main, *flags) -> str:
    """The one line with which a command ends, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(main, *flags)
    line = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in line and line.startswith("error: ")
    return line


def predictions(capsys, *flags) -> list[dict]:
    capsys.readouterr()
    call(use.main, "predict", *flags, "--json")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def chances(row: dict, key: str) -> list[float]:
    """All classes' probabilities of one prediction, in the order of labels."""
    return [item["probability"] for item in sorted(row[key], key=lambda item: item["label"])]


# ----------------------------------------------------------------------------------------------------------------------
# predict
# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_those_of_the_run(name, capsys, monkeypatch):
    monkeypatch.setattr(use, "BATCH", 7)  # the run encoded all at once
    rows = predictions(capsys, run_of(name), "shapes/test", "--top", "99")
    stored = np.load(Path(name, "predictions.npz"))
    assert [row["image"] for row in rows] == sorted(str(path) for path in Path("shapes/test").rglob("*.*"))
    for key in KEYS & {key.split("/")[1] for key in stored.files}:
        mine = [row[key] if isinstance(row[key], float) else chances(row, key) for row in rows]
        assert np.array(mine) == pytest.approx(stored[f"0/{key}"], abs=2e-5)
    assert ("entropy" in rows[0]) == (RUNS[name][0] == "vpt")
    best = rows[0]["tuned"][0]
    assert best["class"] == sorted(os.listdir("shapes/test"))[best["label"]]


def test_files_folders_and_text(capsys):
    run_of("global")
    capsys.readouterr()
    files = ["shapes/test/" + "/".join(path.parts[-2:]) for path in sorted(Path("shapes/test").rglob("*.png"))[:1]]
    call(use.main, "predict", "global", *files, "shapes/val", "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == files[0] and lines[1].split() == ["zero-shot", "tuned"]
    assert len(lines) == 5 * 7  # of each image: name, heading, two classes, uncertainty
    assert re.fullmatch(r"  [01]\.\d{3}  \w+ \w+ +[01]\.\d{3}  \w+ \w+", lines[2])
    assert re.fullmatch(r"  entropy \d\.\d{3} nats, mutual information \d\.\d{3}", lines[4])


def test_other_names_from_a_list_or_a_file(capsys):
    Path("names.txt").write_text("hollow circle\n\nstriped star\n", encoding="utf-8")
    image = "shapes/test/" + sorted(os.listdir("shapes/test"))[0] + "/0.jpg"
    for name in ("prograd", "global", "image", "proreg"):
        listed = predictions(capsys, run_of(name), image, "--classes", "hollow circle,striped star")
        assert listed == predictions(capsys, name, image, "--classes", "names.txt")
        assert {item["class"] for item in listed[0]["tuned"]} == {"hollow circle", "striped star"}
    two = sorted(os.listdir("shapes/test"))[:2]
    for name in ("proreg", "mlp"):  # of the learned names a few: the learned classifier, made to choose among them
        few = predictions(capsys, run_of(name), image, "--classes", ",".join(two))[0]
        whole = chances(predictions(capsys, name, image, "--top", "9")[0], "tuned")
        assert chances(few, "tuned") == pytest.approx([p / sum(whole[:2]) for p in whole[:2]], abs=1e-5)
    assert "--csc" in refusal(capsys, use.main, "predict", run_of("csc"), image, "--classes", "hollow circle")
    assert "mlp" in refusal(capsys, use.main, "predict", "mlp", image, "--classes", "striped star")
    assert "unicorn" in refusal(capsys, use.main, "predict", "prograd", image, "--classes", "unicorn")


def test_prediction_does_without_the_dataset_and_without_names_with_it(capsys):
    image = "shapes/test/" + sorted(os.listdir("shapes/test"))[0] + "/0.jpg"
    rows = predictions(capsys, run_of("prograd"), image)
    state = torch.load("prograd/checkpoint.pt", weights_only=True)
    assert state["trained_on"]["classnames"] == sorted(os.listdir("shapes/test"))
    torch.save(state | {"trained_on": None}, "nameless.pt")  # as tools/released.py leaves it
    assert predictions(capsys, "nameless.pt", image) == rows
    shutil.copy(image, "photo.jpg")
    os.rename("shapes", "gone")
    try:
        assert [row["tuned"] for row in predictions(capsys, "prograd", "photo.jpg")] == [rows[0]["tuned"]]
        assert "--classes" in refusal(capsys, use.main, "predict", "nameless.pt", "photo.jpg")
        assert (
            predictions(capsys, "nameless.pt", "photo.jpg", "--classes", "hollow circle")[0]["tuned"][0]["label"] == 0
        )
    finally:
        os.rename("gone", "shapes")


def test_a_bad_image_is_named_and_the_others_are_predicted(capsys):
    folder = Path("mixed")
    folder.mkdir()
    (folder / "a broken one.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Image.new("RGBA", (40, 20), (255, 0, 0, 9)).save(folder / "red.png")
    Image.new("L", (1, 1)).save(folder / "tiny.webp")
    (folder / "notes.txt").write_text("no image")
    run_of("prograd"), capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(use.main, "predict", "prograd", folder, "--json")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and [Path(json.loads(line)["image"]).name for line in out.splitlines()] == [
        "red.png", "tiny.webp"]  # fmt: skip
    assert err.splitlines()[0].startswith("bad: mixed/a broken one.jpg: ") and "1 of 3 images" in err.splitlines()[1]
    assert "no image and no folder at nowhere.png" in refusal(capsys, use.main, "predict", "prograd", "nowhere.png")
    (Path("empty")).mkdir()
    assert "empty holds no image" in refusal(capsys, use.main, "predict", "prograd", "empty")


def test_results_come_while_images_are_still_read(monkeypatch, capsys):
    """Nothing of an earlier batch is kept: at most one batch of images is alive."""
    read, alive = data.read_image, []
    run_of("prograd")
    monkeypatch.setattr(use, "BATCH", 2)
    capsys.readouterr()
    monkeypatch.setattr(data, "read_image", lambda path: alive.append(capsys.readouterr().out.count("{")) or read(path))
    call(use.main, "predict", "prograd", "shapes/test", "--json", "--top", "1")
    assert alive[:6] == [0, 0, 6, 0, 6, 0]  # a line has three braces; two lines were out before image three was read


def test_closed_pipe_ends_quietly():
    command = f"{sys.executable} {ROOT}/tools/use.py predict {run_of('prograd')} shapes/test | head -1"
    done = subprocess.run(["bash", "-c", command + "; exit ${PIPESTATUS[0]}"], capture_output=True, text=True)
    assert done.stdout.startswith("shapes/test") and done.stderr == "" and done.returncode == 0


# ----------------------------------------------------------------------------------------------------------------------
# export and words
# ----------------------------------------------------------------------------------------------------------------------
def snippet() -> list[str]:
    """The lines of code in use.py's docstring: four, and VPT's own last line."""
    lines = [line.strip() for line in use.__doc__.splitlines() if line.startswith("    ")]
    code = [line for line in lines if "=" in line and not line.startswith("python")]
    assert len(code) == 5
    return code


@pytest.mark.parametrize("name", ["prograd", "csc", "global", "coop", "proreg"])
def test_four_lines_of_plain_open_clip_reproduce_the_tuned_accuracy(name, monkeypatch, capsys, tmp_path):
    call(use.main, "export", run_of(name), "pets.safetensors" if name == "prograd" else f"{name}.safetensors")
    file = "pets.safetensors" if name == "prograd" else f"{name}.safetensors"
    load, create, encode, classify, average = (line.replace("pets.safetensors", file) for line in snippet())
    classify = average if name == "global" else classify
    open_clip.add_model_config(ROOT / "toyclip" / "toyclip.json")  # toyclip alone needs it
    space = {"safetensors": safetensors, "open_clip": open_clip, "F": F, "Image": Image, "json": json}
    exec(f"{load}\n{create}", space)
    right, names = [], json.loads(space["file"].metadata()["classnames"])
    stored = np.load(Path(name, "predictions.npz"))["0/tuned"]
    for path, row in zip(sorted(Path("shapes/test").rglob("*.*")), stored):
        exec(f"{encode.replace('photo.jpg', str(path))}\n{classify}", space)
        chance = space["probabilities"].detach()
        assert chance[0].numpy() == pytest.approx(row, abs=2e-5)
        right.append(names[chance.argmax()] == path.parent.name)
    result = json.loads(Path(name, "result.json").read_text())
    assert 100 * sum(right) / len(right) == pytest.approx(result["tests"][0]["tuned"]["accuracy"])
    for key in space["file"].keys():
        weights = space["file"].get_tensor(key)
        assert weights.dtype == torch.float32 and weights.shape[-2:] == (6, 64)
        assert weights.norm(dim=-1).numpy() == pytest.approx(np.ones(weights.shape[:-1]), abs=1e-5)
    assert set(space["file"].keys()) == ({"classifier", "samples"} if name == "global" else {"classifier"})


def test_export_other_names_and_what_it_refuses(capsys):
    call(use.main, "export", run_of("prograd"), "new/two.safetensors", "--classes", "solid star,hollow star")
    with safetensors.safe_open("new/two.safetensors", "pt") as file:
        note = file.metadata()
        assert file.get_tensor("classifier").shape == (2, 64) and json.loads(note["classnames"])[0] == "solid star"
    assert note["method"] == "prograd" and float(note["scale"]) == common.load_clip().scale
    assert "predict" in refusal(capsys, use.main, "export", run_of("image"), "x.safetensors")
    assert "mlp" in refusal(capsys, use.main, "export", run_of("mlp"), "x.safetensors")
    assert ".safetensors" in refusal(capsys, use.main, "export", "prograd", "x.pt")
    assert "exists" in refusal(capsys, use.main, "export", "prograd", "new/two.safetensors")
    assert not Path("x.safetensors").exists()


def test_words_are_the_nearest_rows_of_the_models_own_table(capsys):
    clip = common.load_clip()
    ids = clip.tokenizer.encode("a photo of circle")
    words = [clip.tokenizer.decode([i]).strip() for i in ids]
    state = torch.load(Path(run_of("global"), "checkpoint.pt"), weights_only=True)
    table = clip.model.token_embedding.weight
    shift, scale = state["tensors"]["mean"], state["settings"]["residual_scale"]
    state["tensors"]["context"] = table[ids] - scale * shift  # the words appear with the posterior's mean alone
    torch.save(state, "words.pt")
    capsys.readouterr()
    call(use.main, "words", "words.pt", "--top", "2")
    lines = capsys.readouterr().out.splitlines()
    for line, word, i in zip(lines, words, ids):
        assert re.match(rf"vector \d +{word} 0\.000 ", line)
        others = (table[i] - table[clip.known]).norm(dim=1).sort().values
        assert float(line.split()[-1]) == pytest.approx(others[1].item(), abs=6e-4)  # rows of zeros are left out
    assert lines[4].startswith(f"{int(clip.known.sum())} tokens")
    run_of("csc"), run_of("image"), capsys.readouterr()
    call(use.main, "words", "csc")
    assert len(capsys.readouterr().out.splitlines()) == 6 * 4 + 1
    call(use.main, "words", "image")
    assert capsys.readouterr().out.startswith("note: ")
    assert "no prompt" in refusal(capsys, use.main, "words", run_of("proreg"))


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint goes into what it was made for, or nowhere
# ----------------------------------------------------------------------------------------------------------------------
def test_a_checkpoint_refuses_another_model_method_or_shape(capsys):
    def evaluate(name, run, *flags):
        return refusal(capsys, SCRIPTS[name].main, "--eval-only", "--checkpoint", run, *flags)

    assert "--model ViT-B-16" in evaluate("prograd", run_of("prograd"), "--model", "ViT-B-16")
    assert "--n-ctx 5" in evaluate("prograd", "prograd", "--n-ctx", "5")
    assert "made by 'prograd'" in evaluate("vpt", "prograd")
    assert "made by 'vpt'" in evaluate("proreg", run_of("global"))
    assert "--posterior image" in evaluate("vpt", "global", "--posterior", "image")
    assert "--head mlp" in evaluate("proreg", run_of("proreg"), "--head", "mlp")
    torch.save(torch.load("prograd/checkpoint.pt", weights_only=True) | {"method": "mystery"}, "mystery.pt")
    assert "mystery" in refusal(capsys, use.main, "words", "mystery.pt")
    assert "nowhere" in evaluate("prograd", "nowhere") and not Path("runs").exists()
    for name in ("prograd", "global", "image"):
        state = torch.load(Path(run_of(name), "checkpoint.pt"), weights_only=True)
        state["tensors"]["context"] = torch.zeros(4, 32)
        torch.save(state, "narrow.pt")
        assert "32" in evaluate(RUNS[name][0], "narrow.pt", "--out-dir", "narrow")
        shutil.rmtree("narrow", ignore_errors=True)
    assert "--csc" in evaluate("prograd", run_of("csc"), "--dataset", "toy_shapes_biased", "--out-dir", "other")


@pytest.mark.parametrize("method", SCRIPTS)
def test_eval_every_without_validation_images_is_refused_before_training(method, capsys):
    if not Path("no_val").exists():
        shutil.copytree("shapes", "no_val", ignore=shutil.ignore_patterns("val"))
    flags = [*QUICK, "--dataset", "folder:no_val", "--eval-every", "1", "--out-dir", f"no_val_{method}"]
    assert "validation part" in refusal(capsys, SCRIPTS[method].main, *flags)
    assert not Path(f"no_val_{method}", "metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of the papers' code
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def dassl(monkeypatch):
    """Modules with the names that released checkpoints refer to; they exist while a file is written, not when read."""
    lr_scheduler = types.ModuleType("dassl.optim.lr_scheduler")

    class ConstantWarmupScheduler:
        def __init__(self, **state):
            self.__dict__.update(state)

    ConstantWarmupScheduler.__module__ = "dassl.optim.lr_scheduler"
    ConstantWarmupScheduler.__qualname__ = "ConstantWarmupScheduler"
    lr_scheduler.ConstantWarmupScheduler = ConstantWarmupScheduler
    names = {"dassl": types.ModuleType("dassl"), "dassl.optim": types.ModuleType("dassl.optim")}

    def save(path, state_dict, zipped=True, epoch=50):
        """As Dassl does: the scheduler holds its successor, that the optimiser, that the parameters."""
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        sgd = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
        sum(p.sum() for p in parameters).backward()
        sgd.step()
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, float(epoch))
        steps = torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 2])
        warm = ConstantWarmupScheduler(successor=cosine, last_epoch=epoch, cons_lr=1e-5, other=steps, optimizer=sgd)
        content = {"state_dict": collections.OrderedDict(state_dict), "epoch": epoch, "val_result": 71.25,
                   "optimizer": sgd.state_dict(), "scheduler": {"successor": cosine, "whole": warm}}  # fmt: skip
        with monkeypatch.context() as patch:
            for name, module in (names | {"dassl.optim.lr_scheduler": lr_scheduler}).items():
                patch.setitem(sys.modules, name, module)
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert b"ConstantWarmupScheduler" in Path(path).read_bytes()

    return save


def released_names(name: str) -> dict[str, torch.Tensor]:
    """A run's tensors as the released code names them, with the buffers it saves beside them, in half precision."""
    tensors = torch.load(Path(run_of(name), "checkpoint.pt"), weights_only=True)["tensors"]
    names = {"context": "ctx", "mean": "mean_posterior", "logvar": "std_posterior"}
    networks = {"mean_net": "meta_net.weight_mean.module", "logvar_net": "meta_net.weight_log_variance.module"}
    found = {}
    for key, value in tensors.items():
        head, _, rest = key.partition(".")
        found[names.get(key) or f"{networks[head]}.{rest}"] = value
    return found | {"token_prefix": torch.zeros(6, 1, 64), "token_suffix": torch.randn(6, 72, 64)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["prograd", "csc", "global", "image"])
def test_a_released_checkpoint_becomes_a_run(name, zipped, dassl, tmp_path):
    file, run, method = tmp_path / "model.pth.tar-50", str(tmp_path / "run"), RUNS[name][0]
    dassl(file, released_names(name), zipped)
    flags = ["--dataset", "folder:shapes", "--model", "toyclip", "--cache-dir", "none"]
    if method == "vpt":
        flags += ["--samples", RUNS[name][2], "--residual-scale", "0.08"]  # ours was trained with that scale
    call(released.main, "read", file, *flags, run)
    ours = torch.load(Path(name, "checkpoint.pt"), weights_only=True)["tensors"]
    read = torch.load(Path(run, "checkpoint.pt"), weights_only=True)
    assert read["epoch"] == 50 and set(read["tensors"]) == set(ours)
    assert all(torch.equal(read["tensors"][key], ours[key]) for key in ours)
    if zipped:
        result = SCRIPTS[method].main(
            ["--eval-only", "--checkpoint", run, "--cache-dir", "none", "--out-dir", f"{run}2"]
        )
        trained = json.loads(Path(name, "result.json").read_text())
        assert json.loads(json.dumps(result["tests"][0]["tuned"])) == trained["tests"][0]["tuned"]


def test_coop_is_lambda_0_and_half_precision_is_read(dassl, tmp_path, capsys):
    context = torch.randn(16, 512).half()
    dassl(tmp_path / "model", {"ctx": context})
    call(
        released.main, "read", tmp_path / "model", tmp_path / "run", "--dataset", "dtd", "--model", "RN50", "--lam", "0"
    )
    state = runs.load_checkpoint(tmp_path / "run", "prograd")
    assert torch.equal(state["tensors"]["context"], context.float())
    settings = state["settings"]
    assert (settings["lam"], settings["model"], settings["pretrained"]) == (0.0, "RN50", "openai")
    assert settings["n_ctx"] == 16 and settings["epochs"] == 50 and not settings["csc"]


class LoadedByReleasedCode(torch.nn.Module):
    """load_model of the released trainers: the fixed tokens are dropped, and what is missing or unknown is ignored."""

    def __init__(self, shapes: dict[str, list[int]]):
        super().__init__()
        for key, shape in shapes.items():
            module, *rest = self, *key.split(".")
            for part in rest[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(rest[-1], torch.nn.Parameter(torch.zeros(shape)))

    def load_model(self, path):
        checkpoint = torch.load(path, map_location="cpu")
        state_dict, _ = checkpoint["state_dict"], checkpoint["epoch"]
        for key in ("token_prefix", "token_suffix"):
            if key in state_dict:
                del state_dict[key]
        return self.load_state_dict(state_dict, strict=False)


@pytest.mark.parametrize("name", ["prograd", "csc", "coop", "global", "image"])
def test_what_write_makes_is_loaded_by_the_released_code_and_read_back(name, tmp_path, capsys):
    file = tmp_path / "prompt_learner" / "model.pth.tar-2"
    call(released.main, "write", run_of(name), file)
    shapes = released_names("prograd" if name == "coop" else name)
    theirs = LoadedByReleasedCode({key: value.shape for key, value in shapes.items()})
    missing, unexpected = theirs.load_model(file)
    assert set(missing) == {"token_prefix", "token_suffix"} and unexpected == []
    call(released.main, "read", file, tmp_path / "run", "--dataset", "folder:shapes", "--model", "toyclip")
    ours, back = (use.open_run(path).learner for path in (run_of(name), str(tmp_path / "run")))
    x = F.normalize(torch.randn(3, 64), dim=-1)
    if name in ("global", "image"):  # our residual scale went into the posterior
        (mu, logvar), (mu_back, logvar_back) = ours.posterior(x), back.posterior(x)
        assert torch.allclose(0.08 * mu, mu_back, atol=1e-6)
        assert torch.allclose(0.08 * (logvar / 2).exp(), (logvar_back / 2).exp(), atol=1e-6)
    assert torch.equal(ours.context, back.context)


def test_write_refuses_what_the_released_code_cannot_read(tmp_path, capsys):
    assert "proreg.py" in refusal(capsys, released.main, "write", run_of("proreg"), tmp_path / "x")
    (tmp_path / "there").touch()
    assert "exists" in refusal(capsys, released.main, "write", run_of("prograd"), tmp_path / "there")
    assert "no checkpoint" in refusal(capsys, released.main, "write", tmp_path / "nowhere", tmp_path / "x")
    assert "released.py read" in refusal(capsys, released.main, "convert")


@pytest.mark.parametrize("case", ["pets16", "ctxinit16"])
def test_the_last_token_of_a_template_with_a_comma_is_kept(case):
    """The recorded ProGrad of pets: 16 context vectors and a fixed "a", which the released file has in token_suffix."""
    world = golden_world.GoldenWorld()
    path = world.folder / f"prograd_{case}.npz"
    if not path.exists():
        pytest.skip("no such recording")
    recording, clip = world.recording(path.name), world.clip()
    tokens, M = recording["tokenized_prompts"], len(recording["ctx_init"])
    suffix = clip.model.token_embedding.weight[tokens[:, 1 + M :]].detach()
    tensors = released.convert({"ctx": recording["ctx_init"], "token_suffix": suffix}, "oxford_pets")
    learner = prograd.PromptLearner(clip, tensors["context"])
    with torch.no_grad():
        text = learner(common.name_tokens(clip, world.classnames, len(learner.context)))
    reference = recording["text_features_unnorm"]
    assert len(learner.context) == (M + 1 if case == "pets16" else M)
    assert (text - reference).norm() < 1e-5 * reference.norm()


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Attribute:
    """Pickles as an object of a class outside the list."""


HOSTILE = {
    "os.system": lambda: Call(os.system, "touch executed"),
    "builtins.eval": lambda: Call(builtins.eval, "open('executed', 'w')"),
    "builtins.exec": lambda: Call(builtins.exec, "open('executed', 'w')"),
    "subprocess.Popen": lambda: Call(subprocess.Popen, ["touch", "executed"]),
    "functools.partial": lambda: Call(functools.partial, os.system, "touch executed"),
    "builtins.getattr": lambda: Call(builtins.getattr, "os", "system"),
    "torch.serialization.load": lambda: Call(torch.load, "inner.pt"),
    "torch.hub.load": lambda: Call(torch.hub.load, "someone/something", "model"),
    "torch._utils._rebuild_wrapper_subclass": lambda: Call(torch._utils._rebuild_wrapper_subclass),
    "test_tools.Attribute": Attribute,
}


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle 2", "plain pickle 4"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_not_executed(name, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"ctx": torch.zeros(4, 64)}, "epoch": 1, "scheduler": HOSTILE[name]()}
    if form in ("zip", "legacy"):
        torch.save(content, "hostile", _use_new_zipfile_serialization=form == "zip")
    else:
        Path("hostile").write_bytes(pickle.dumps(content | {"state_dict": {}}, protocol=int(form[-1])))
    line = refusal(capsys, released.main, "read", "hostile", "run", "--dataset", "dtd", "--model", "toyclip")
    assert "hostile is refused: it" in line
    assert ("STACK_GLOBAL" if form == "plain pickle 4" else name.split(".")[-1]) in line  # modules have other names too
    assert not Path("executed").exists() and not Path("run").exists()
    assert len(released.read_foreign.__globals__["ALLOWED"]) < 10  # a list to read at a glance
    assert "tools/released.py" in refusal(capsys, prograd.main, "--eval-only", "--checkpoint", "hostile")
    assert not Path("executed").exists()


def test_a_stub_takes_no_call_of_a_method(tmp_path, monkeypatch, capsys):
    """A name below torch.optim gives an inert object, whatever it is: also a module that torch.optim imports."""
    monkeypatch.chdir(tmp_path)
    word = b"X\x05\x00\x00\x00state"
    os_system = b"ctorch.optim.lr_scheduler\nwarnings.os.system\nX\x0e\x00\x00\x00touch executed\x85R"
    hostile = b"\x80\x02}(" + word + os_system + b"u."
    legacy = b"".join(pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    Path("hostile").write_bytes(legacy + hostile + pickle.dumps([], 2))
    assert "state_dict" in refusal(capsys, released.main, "read", "hostile", "run", "--dataset", "dtd")
    assert not Path("executed").exists()


def hostile_bytes(path: Path) -> dict[str, bytes]:
    """Files that are cut, swollen or of another kind, made of a good one."""
    good = path.read_bytes()
    magic = b"".join(pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return {
        "empty": b"",
        "half": good[: len(good) // 2],
        "no end": good[:-30],
        "text": b"no checkpoint\n" * 9,
        "zeros": bytes(4096),
        "long string": magic + b"\x80\x02X\xff\xff\xff\x7f",
        "long integer": magic + b"\x80\x02\x8b\xff\xff\xff\x7f",
        "far memo": magic + b"\x80\x02K\x01r\xff\xff\xff\xff.",
        "endless nesting": magic + b"\x80\x02" + b"]" * 10000 + b"a" * 9999 + b".",
        "no pickle": magic,
        "a number": magic + pickle.dumps(3, 2) + pickle.dumps([], 2),
        "huge storage": magic
        + b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x08"
        + struct.pack("<q", 1 << 60)
        + b"NtQ."
        + pickle.dumps(["0"], 2),
    }


@pytest.mark.parametrize("kind", list(hostile_bytes(Path(__file__))))
def test_a_damaged_or_huge_file_is_one_line(kind, dassl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dassl("good", {"ctx": torch.zeros(4, 64)})
    Path("bad").write_bytes(hostile_bytes(Path("good"))[kind])
    assert "bad " in refusal(capsys, released.main, "read", "bad", "run", "--dataset", "dtd")
    assert not Path("run").exists()


def test_a_bomb_is_not_unpacked(dassl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dassl("good", {"ctx": torch.zeros(4, 64)})
    with zipfile.ZipFile("good") as old, zipfile.ZipFile("bomb", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        new.writestr("good/data/99", bytes(1 << 24))
    assert "compressed" in refusal(capsys, released.main, "read", "bomb", "run", "--dataset", "dtd")
    with open("huge", "wb") as file:
        file.truncate(released.MAX_BYTES + 1)  # sparse
    assert "bytes" in refusal(capsys, released.main, "read", "huge", "run", "--dataset", "dtd")


def test_tensors_that_do_not_fit_are_refused(dassl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ctx, D, W = torch.zeros(4, 512), 1024, 512

    def read(state_dict, *flags):
        shutil.rmtree("run", ignore_errors=True)
        dassl("file", state_dict)
        return refusal(capsys, released.main, "read", "file", "run", "--dataset", "dtd", *flags)

    assert "[M, 768]" in read({"ctx": ctx}, "--model", "ViT-L-14")
    assert "[M, 512]" in read({"ctx": torch.zeros(2, 2, 4, 512)})
    assert "compound" in read({"ctx": ctx, "compound_prompts_text.0": ctx})  # MaPLe
    assert "meta_net.linear1" in read({"ctx": ctx, "meta_net.linear1.weight": ctx})  # CoCoOp
    assert "finite" in read({"ctx": ctx * float("nan")}) and "finite" in read({"ctx": ctx.long()})
    assert "finite" in read({"ctx": torch.zeros(1, 512).expand(10**12, 512)})  # one row, told to be 2 PB
    assert "finite" in read({"ctx": 3.0})
    posterior = {"ctx": ctx, "mean_posterior": torch.zeros(1, 256), "std_posterior": torch.zeros(1, 256)}
    assert "256" in read(posterior)
    sizes = [(D // 2, D), (D // 2,), (D // 2, D // 2), (D // 2,), (W, D // 2), (W,)]
    networks = {
        f"meta_net.{net}.module.{layer}": torch.zeros(size)
        for net in ("weight_mean", "weight_log_variance")
        for layer, size in zip(released.LAYERS, sizes)
    }
    assert "1024" in read({"ctx": ctx} | networks, "--model", "ViT-B-16")  # it was trained on RN50
    dassl("file", {"ctx": ctx})
    assert "--dataset" in refusal(capsys, released.main, "read", "file", "run")
    assert "no-such" in refusal(capsys, released.main, "read", "file", "run", "--dataset", "dtd", "--model", "no-such")
    call(released.main, "read", "file", "run", "--dataset", "dtd")
    assert "run" in refusal(capsys, released.main, "read", "file", "run", "--dataset", "dtd")  # is there already
    torch.save({"model": ctx}, "other")
    assert "state_dict" in refusal(capsys, released.main, "read", "other", "run2", "--dataset", "dtd")
