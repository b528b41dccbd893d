"""Runs of the three scripts: settings, folders, resume after a kill, evaluation, refusals."""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import make_data
import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import common
import data
import prograd
import proreg
import vpt
from data import UserError

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
SHORT = {  # flags that make a run of seconds
    "prograd": "--dataset toy_fillshapes_sketch --epochs 6 --batch-size 16",
    "vpt": "--dataset toy_fillshapes_sketch --epochs 3 --batch-size 8 --samples 3",
    "proreg": "--dataset toy_shapes_biased --epochs 3 --shots 8 --batch-size 32 --lr 1e-4",
}
SHORT = {name: flags.split() for name, flags in SHORT.items()}


def run(name: str, *flags: str) -> dict:
    """main() of a script with short settings, silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        return SCRIPTS[name].main([*SHORT[name], *flags])


def figures(result: dict) -> dict:
    """What must be the same in a run that was killed."""
    kept = {key: value for key, value in result.items() if key not in ("seconds", "settings")}
    kept["training"] = kept["training"] | {"run": ""}
    return json.loads(json.dumps(kept))


def call(name: str, *flags: str, **options) -> subprocess.CompletedProcess:
    """The script as a user starts it."""
    command = [sys.executable, str(REPO / f"{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, **options)


# What a run writes and prints ---------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run(name, capsys):
    result = SCRIPTS[name].main([*SHORT[name], "--out-dir", "here"])
    lines = capsys.readouterr().out.splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith(" "))
    assert table <= 5 and all(len(line) <= 100 for line in lines[:table])
    assert lines[-4:-2] == ["written to here; try next:", "    python tools/page.py here"]
    files = {path.name for path in Path("here").iterdir()}
    wanted = {"config.json", "metrics.jsonl", "checkpoint.safetensors", "predictions.npz"}
    assert files == wanted | {"result.json", "baseline"}
    assert figures(result) == figures(json.loads(Path("here/result.json").read_text()))
    assert len(result["tests"]) == len(result["tests"][0]["tuned"]) - 2 + (name == "proreg")
    for i, test in enumerate(result["tests"]):
        for kind in ("zero_shot", "baseline", "tuned"):
            keys = {"accuracy", "mean_class_accuracy", "nll", "ece"}
            assert set(test[kind]) == keys and all(np.isfinite(list(test[kind].values())))
        arrays = np.load("here/predictions.npz")
        probabilities = arrays[f"{i}/tuned"]
        assert probabilities.dtype == np.float16 and len(probabilities) == test["n"]
        right = probabilities.argmax(1) == arrays[f"{i}/labels"]
        assert abs(100 * right.mean() - test["tuned"]["accuracy"]) < 0.5
    assert result["harmonic_mean"].keys() >= {"zero_shot", "baseline", "tuned"}
    epochs = int(SHORT[name][SHORT[name].index("--epochs") + 1])
    metrics = common.read_metrics(Path("here"))
    assert [line["epoch"] for line in metrics] == list(range(epochs))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_fits_on_two_screens(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].main(["--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert len(out.splitlines()) <= 80 and max(map(len, out.splitlines())) <= 110
    own = out.index({"prograd": "ProGrad (", "vpt": "VPT (", "proreg": "ProReg ("}[name])
    assert own < out.index("data:") < out.index("run:")
    assert "[toy " in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_has_a_default_in_argparse(name):
    parser = SCRIPTS[name].build_parser()
    assert vars(parser.parse_args([])) == {}
    settled = common.settle(parser, [], name, SCRIPTS[name].defaults)
    assert all(action.dest in vars(settled) for action in parser._actions if action.dest != "help")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_read(name):
    """No flag that nothing reads."""
    source = "".join((REPO / f"{file}.py").read_text() for file in (name, "common", "data"))
    for action in SCRIPTS[name].build_parser()._actions[1:]:
        used = rf'args\.{action.dest}\b|"{action.dest}"'
        assert len(re.findall(used, source)) >= 2 or f"args.{action.dest}" in source, action.dest


def test_paper_settings():
    first = {"dataset": "dtd", "shots": 16}
    assert prograd.defaults(first)["lam"] == 1.0
    assert prograd.defaults(first | {"paper": True})["lam"] == 0.8
    assert prograd.defaults(first | {"paper": True, "shots": 4})["lam"] == 1.0
    assert [
        prograd.defaults({"dataset": "dtd", "shots": k})["epochs"] for k in (1, 2, 4, 8, 16)
    ] == [
        50,
        100,
        100,
        200,
        200,
    ]
    assert prograd.defaults({"dataset": "imagenet", "paper": True})["epochs"] == 50
    vpts = vpt.defaults({"dataset": "eurosat", "paper": True})
    assert (vpts["samples"], vpts["epochs"], vpts["batch_size"], vpts["lr"]) == (20, 60, 1, 0.002)
    alphas = [("bar", "proreg"), ("pacs", "proreg"), ("nico_animal", "kd"), ("dtd", "ce")]
    found = [proreg.defaults({"dataset": d, "loss": x, "paper": True})["alpha"] for d, x in alphas]
    assert found == [1.0, 2.0, 0.9, 0.0]


# Interrupted runs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_and_resumed(name):
    """SIGKILL at several moments, and the same bytes in the end."""
    whole = run(name, "--out-dir", "whole")
    flags = [*SHORT[name], "--resume", "killed"]
    for epoch in (1, 2):
        process = subprocess.Popen(
            [sys.executable, str(REPO / f"{name}.py"), *flags], stdout=subprocess.DEVNULL
        )
        end = time.time() + 60
        while time.time() < end and process.poll() is None:
            if len(common.read_metrics(Path("killed/baseline"))) >= epoch:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = run(name, "--resume", "killed")
    assert figures(again) == figures(whole)
    for file in ("metrics.jsonl", "checkpoint.safetensors", "baseline/metrics.jsonl"):
        assert Path("whole", file).read_bytes() == Path("killed", file).read_bytes(), file
    arrays = [np.load(f"{folder}/predictions.npz") for folder in ("whole", "killed")]
    assert all(np.array_equal(arrays[0][key], arrays[1][key]) for key in arrays[0].files)
    assert figures(run(name, "--resume", "killed")) == figures(whole)  # a finished run


@pytest.mark.parametrize("name", SCRIPTS)
def test_stopped_between_epochs(name, monkeypatch):
    """Every epoch can be the last before an interruption: a line too many is done again."""
    whole = run(name, "--out-dir", "whole", "--no-compare")
    kept = common.save_checkpoint

    def stop(out, *args, **note):
        if note["epoch"] == 1 or after:
            kept(out, *args, **note)
        if note["epoch"] == 2:
            raise KeyboardInterrupt

    for after in (True, False):  # or before the checkpoint, when the line is there already
        folder = f"stopped{after}"
        monkeypatch.setattr(common, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run(name, "--resume", folder, "--no-compare")
        monkeypatch.setattr(common, "save_checkpoint", kept)
        assert figures(run(name, "--resume", folder)) == figures(whole)
        assert common.read_metrics(Path(folder)) == common.read_metrics(Path("whole"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_that_are_not_finite(name, monkeypatch, capsys):
    """The last good checkpoint stays, exit status 1, one line; and the run goes on from there."""
    script = SCRIPTS[name]
    kept = torch.optim.Optimizer.profile_hook_step  # any optimiser's step passes here
    steps = []
    optimizer = torch.optim.SGD if name != "proreg" else torch.optim.AdamW
    step = optimizer.step

    def poison(self, *args, **kwargs):
        steps.append(1)
        if len(steps) > 7:
            for group in self.param_groups:
                group["params"][0].data.fill_(float("nan"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(optimizer, "step", poison)
    flags = [*SHORT[name], "--out-dir", "bad", "--no-compare"]
    with pytest.raises(SystemExit) as stopped:
        data.run(lambda: script.main(flags))
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and kept is not None
    assert err.count("\n") == 1 and "not finite in epoch" in err and "--lr" in err
    tensors = safetensors.torch.load_file("bad/checkpoint.safetensors")
    assert all(value.isfinite().all() for value in tensors.values())
    assert not Path("bad/result.json").exists()
    monkeypatch.setattr(optimizer, "step", step)
    assert run(name, "--resume", "bad")["tests"]


def test_full_disk(monkeypatch, capsys):
    kept = Path.write_bytes

    def full(path, content):
        if "checkpoint" in path.name:
            kept(path, content[:10])
            raise OSError(28, "No space left on device")
        return kept(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stopped:
        data.run(lambda: run("prograd", "--out-dir", "full"))
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and "checkpoint.safetensors: No space left" in err
    assert not list(Path("full/baseline").glob("*checkpoint*"))


# Settings of an earlier run -----------------------------------------------------------------------
def test_resume_keeps_the_settings():
    run("prograd", "--out-dir", "here", "--lr", "0.005", "--no-compare")
    settled = common.settle(
        prograd.build_parser(), ["--resume", "here"], "prograd", prograd.defaults
    )
    assert settled.lr == 0.005 and settled.epochs == 6
    for flags, text in (
        (["--lr", "0.1"], "here has --lr 0.005: leave --lr out"),
        (["--shots", "2"], "here has --shots 4: leave --shots out"),
        (["--csc"], "here has --csc False: leave --csc out"),
        (["--out-dir", "x"], "leave out --eval and --out-dir"),
    ):
        with pytest.raises(UserError, match=text):
            prograd.main(["--resume", "here", *flags])
    with pytest.raises(UserError, match="here is no training run of vpt.py"):
        vpt.main(["--resume", "here"])
    with pytest.raises(UserError, match="here holds a run: --resume it, or name another --out-dir"):
        prograd.main(["--out-dir", "here"])


def test_eval_inherits_what_was_learned_and_not_how():
    trained = run("prograd", "--out-dir", "here", "--no-compare", "--memory-gb", "0.001")
    config = json.loads(Path("here/config.json").read_text())
    config["settings"] |= {"precision": "fp16", "device": "cuda", "memory_gb": 40.0}
    Path("here/config.json").write_text(json.dumps(config))
    result = run("prograd", "--eval", "here")
    settings = result["settings"]
    assert (settings["precision"], settings["device"], settings["memory_gb"]) == (
        "fp32",
        "cpu",
        4.0,
    )
    assert [t["tuned"] for t in result["tests"]] == [t["tuned"] for t in trained["tests"]]
    other = run("prograd", "--eval", "here", "--dataset", "toy_colorfills_dark", "--classes", "all")
    assert other["tests"][0]["dataset"] == "toy_colorfills_dark"
    on = run("prograd", "--eval", "here", "--test-on", "toy_shapes_biased")
    assert len(on["tests"]) == 5 and on["harmonic_mean"] == result["harmonic_mean"]
    with pytest.raises(UserError, match="here has --n-ctx 16: leave --n-ctx out"):
        prograd.main(["--eval", "here", "--n-ctx", "4"])
    with pytest.raises(UserError, match="is no run folder"):  # --eval "$NOT_SET"
        prograd.main(["--eval", ""])
    with pytest.raises(UserError, match="nothing is no run folder"):
        prograd.main(["--eval", "nothing"])


@pytest.mark.parametrize("name", ["vpt", "proreg"])
def test_eval_of_the_others(name):
    trained = run(name, "--out-dir", "here", "--no-compare")
    result = run(name, "--eval", "here")
    assert [t["tuned"] for t in result["tests"]] == [t["tuned"] for t in trained["tests"]]


def own_images(root: Path) -> list[str]:
    for shade, cls in enumerate(("red circle", "blue heart")):
        for i in range(12):
            make_data.image(root / cls / f"{shade}{i}.png")
    return ["--dataset", f"folder:{root}", "--model", "toyclip", "--epochs", "2", "--no-compare"]


def test_run_that_never_began():
    """It holds nothing, so that its folder is used again, by --resume or --out-dir, with other
    flags; one that is not there needs its --dataset."""
    with pytest.raises(UserError, match="use --n-ctx 4 or more"):
        run("prograd", "--n-ctx", "2", "--out-dir", "here")
    with pytest.raises(UserError, match="use --n-ctx 4 or more"):
        run("prograd", "--n-ctx", "3", "--out-dir", "here")
    run("prograd", "--n-ctx", "4", "--resume", "here")
    with pytest.raises(UserError, match="here has --n-ctx 4: leave --n-ctx out"):
        run("prograd", "--n-ctx", "5", "--resume", "here")
    for more in (["--workers", "0"], ["--lr", "0.1"]):
        with pytest.raises(UserError, match="there is no run heer; to begin it say on which --da"):
            prograd.main(["--resume", "heer", *more])
    assert not Path("heer").exists()


def test_eval_of_a_run_that_is_not_finished():
    run("prograd", "--out-dir", "here", "--no-compare")
    Path("here/result.json").unlink()
    assert "here has not finished training" in run("prograd", "--eval", "here")["notes"]


def test_data_that_changed(tmp_path):
    """A run goes on with the images and names it began with; tested ones that it saw are noted."""
    flags = [*own_images(tmp_path / "photos"), "--augment", "none"]
    trained = prograd.main([*flags, "--out-dir", "here"])
    (tmp_path / "photos/red circle/00.png").rename(tmp_path / "photos/red circle/zz.png")
    with pytest.raises(UserError, match="other classes or training images .see .*: restore"):
        prograd.main(["--resume", "here"])
    (tmp_path / "photos/red circle/zz.png").rename(tmp_path / "photos/red circle/00.png")
    (tmp_path / "photos/red circle").rename(tmp_path / "photos/green star")
    with pytest.raises(
        UserError, match="here was begun with other classes or .* .see 'green star'"
    ):
        prograd.main(["--resume", "here"])
    (tmp_path / "photos/green star").rename(tmp_path / "photos/red circle")
    assert figures(prograd.main(["--resume", "here"])) == figures(trained)
    result = prograd.main(["--eval", "here", "--test-part", "val"])
    assert not any("trained on" in note for note in result["notes"])
    config = json.loads(Path("here/config.json").read_text())
    tested = [data.below(a, str(tmp_path / "photos")) for a, _ in items_of_test(flags)]
    config["train"] += [f"{path}\t0" for path in tested[:2]]
    Path("here/config.json").write_text(json.dumps(config))
    notes = prograd.main(["--eval", "here"])["notes"]
    assert any(note.startswith("2 test images are trained on, as ") for note in notes)


def items_of_test(flags: list[str]) -> list:
    args = common.settle(prograd.build_parser(), flags, "prograd", prograd.defaults)
    return data.load_task(args).tests[0].items


def test_weights_that_changed(tmp_path):
    """Moved weights are named anew; other weights are refused."""
    file = tmp_path / "w.safetensors"
    file.write_bytes((common.TOYCLIP / "weights.safetensors").read_bytes())
    trained = run("prograd", "--out-dir", "here", "--no-compare", "--pretrained", str(file))
    file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match="w.safetensors' is no file"):
        run("prograd", "--eval", "here")
    moved = ["--eval", "here", "--pretrained", str(tmp_path / "moved.safetensors")]
    again = run("prograd", *moved)
    assert [t["tuned"] for t in again["tests"]] == [t["tuned"] for t in trained["tests"]]
    tensors = safetensors.torch.load_file(tmp_path / "moved.safetensors")
    tensors["text_projection"] *= 2
    safetensors.torch.save_file(tensors, tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match="here: its CLIP had other weights; name their file"):
        run("prograd", *moved)


# What is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--lr -1", "--lr -1.0: it must be from 1e-09"),
        ("--lr nan", "--lr nan: it must be"),
        ("--shots 0", "--shots 0: it must be from 1 to"),
        ("--seed -1", "--seed -1: it must be from 0 to"),
        ("--momentum 2", "--momentum 2.0: it must be from 0 to 1"),
        ("--device gpu", "--device gpu: here it can be cpu"),
        ("--device cuda:7", "--device cuda:7: here it can be"),
        ("--precision fp16", "--precision fp16 needs a GPU"),
        ("--csc --classes base", "--csc has no context for classes outside training"),
        ("--n-ctx 2", "'a photo of a {}.' has 4 tokens: use --n-ctx 4 or more"),
        ("--model RN51", "--model RN51 is unknown"),
        ("--cache-dir afile", "--cache-dir afile is a file: name a folder"),
        ("--eval-every 1 --dataset imagenet_a", "no images in data/imagenet-adversarial"),
    ],
)
def test_bad_values(flags, text, capsys):
    Path("afile").write_text("")
    with pytest.raises(SystemExit) as stopped:
        data.run(lambda: prograd.main(flags.split()))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and text in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flag", ["--no-such", "--label-noise", "--eval-only", "--lr x"])
def test_wrong_flags_are_one_line(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        prograd.main(flag.split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "--help" in err


def test_broken_image_is_named(tmp_path):
    """As a user starts it: one line on stderr, exit status 2, nothing written."""
    flags = own_images(tmp_path / "photos")
    for name in ("red circle/03.png", "blue heart/15.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    done = call("prograd", *flags, "--shots", "all", "--cache-dir", "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "broken images, mend or remove them" in done.stderr and "Traceback" not in done.stderr
    assert "03.png" in done.stderr or "15.png" in done.stderr


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("prograd", "--out-dir", "~/x", "--no-compare")
    assert (tmp_path / "x/result.json").exists() and not Path("~").exists()


def test_folders_are_claimed():
    """Two commands that start at once get two folders; one that was killed leaves its own free."""
    code = "import argparse, sys, common; a = argparse.Namespace(resume=None, out_dir=sys.argv[1] "
    code += "or None, method='m', dataset='folder:./a/', shots=4, seed=1); "
    code += "print(common.claim_folder(a), flush=True); sys.stdin.read()"
    more = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    more["env"] = os.environ | {"PYTHONPATH": str(REPO)}

    def begin(out: str) -> tuple[subprocess.Popen, str]:
        process = subprocess.Popen([sys.executable, "-c", code, out], **more)
        return process, process.stdout.readline().strip()

    first, name = begin("")
    second, other = begin("")
    third, mine = begin("mine")
    assert (name, other, mine) == ("runs/m-a-4shot-seed1", "runs/m-a-4shot-seed1-2", "mine")
    args = argparse.Namespace(resume=None, out_dir="mine")
    vars(args).update(method="m", dataset="a", shots=4, seed=1)
    with pytest.raises(UserError, match="mine is in use: wait for it"):
        common.claim_folder(args)
    for process in (first, second, third):
        process.kill()
        process.wait()
    assert common.claim_folder(args) == Path("mine")
    args.out_dir = None
    assert str(common.claim_folder(args)) == name
    Path("foreign").mkdir()
    Path("foreign/config.json").write_text('{"architectures": ["CLIPModel"]}')
    args.out_dir = "foreign"
    with pytest.raises(UserError, match="is of another program or version: it lacks"):
        common.claim_folder(args)
    for k in range(2, 1200):  # a thousand runs of one name
        folder = Path("runs", f"m-a-4shot-seed1-{k}")
        folder.mkdir(exist_ok=True)
        (folder / "result.json").touch()
    Path(name, "result.json").touch()
    args.out_dir = None
    assert str(common.claim_folder(args)).endswith("seed1-1200")


def test_cached_features_follow_the_files(tmp_path, toyclip):
    """Two files exchanged, with size and time kept, give new features."""
    args = argparse.Namespace(cache_dir="cache", seed=1, workers=0, device="cpu")
    paths = []
    for i in (1, 2):
        make_data.image(tmp_path / f"{i}.bmp")
        os.utime(tmp_path / f"{i}.bmp", (0, 0))
        paths.append(tmp_path / f"{i}.bmp")
    items = [(str(path), 0) for path in paths]
    first, _ = common.encode_images(toyclip, items, toyclip.preprocess, args)
    again, _ = common.encode_images(toyclip, items, toyclip.preprocess, args)
    assert torch.equal(first, again) and len(list(Path("cache").iterdir())) == 1
    paths[0].rename("kept")
    paths[1].rename(paths[0])
    Path("kept").rename(paths[1])
    swapped, _ = common.encode_images(toyclip, items, toyclip.preprocess, args)
    assert torch.allclose(swapped, first.flip(0), atol=1e-5) and not torch.equal(swapped, first)


def test_probabilities_compress():
    """50,000 images of 1,000 classes stay under 50 MB each: here a fiftieth of it."""
    logits = 100 * (0.2 + 0.04 * torch.randn(1000, 1000))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=common.probabilities(logits).numpy())
    assert len(buffer.getvalue()) * 50 < 50e6
    off = common.probabilities(logits).float() - logits.softmax(1)
    assert off.abs().max() < 3e-4 and common.probabilities(logits).min() > 6e-5


# Nothing waits for the device within a step -------------------------------------------------------
class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("more", [[], ["--posterior", "image"], ["--loss", "kd"]])
def test_no_step_waits(name, more, monkeypatch):
    """Reading an image, which no GPU has a part in, is not counted."""
    kept = data.ImageSet.__getitem__

    def read(images, index):
        with _disable_current_modes():
            return kept(images, index)

    monkeypatch.setattr(data.ImageSet, "__getitem__", read)
    if more and more[0] not in {a.option_strings[0] for a in SCRIPTS[name].build_parser()._actions}:
        pytest.skip("another script's flag")
    counts = []
    for steps in ("1", "2", "8"):  # the first run encodes the images
        flags = ["--epochs", "1", "--batch-size", "4", "--max-steps", steps, "--no-compare"]
        flags += ["--shots", "4"] + more
        with Waits() as waits:
            run(name, *flags, "--out-dir", f"s{steps}")
        counts.append(waits.count)
    assert counts[1] == counts[2]
