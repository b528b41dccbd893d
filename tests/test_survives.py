"""Interrupted runs, full disks, wrong numbers, odd tasks and files from strangers. CPU, offline.

Runs that are killed live in processes of their own: forked from one that has imported everything, so that a kill costs
a second. Their toy sets are cut to two images a class.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import make_data
import numpy as np
import pytest
import safetensors.torch
import torch
from golden_world import world
from PIL import Image

import common
import data
import prograd
import proreg
import runs
import vision
import vpt

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"prograd": prograd, "vpt": vpt, "proreg": proreg}
QUICK = ["--shots", "2", "--epochs", "3", "--checkpoint-seconds", "0"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data.world, "TASKS", small_tasks())


def small_tasks() -> dict:
    return {n: dataclasses.replace(t, parts=dict.fromkeys(t.parts, 2)) for n, t in data.world.TASKS.items()}


def status(module, argv, capsys) -> tuple[int, str]:
    """Exit status of a script and what it said on stderr: nothing, or one line."""
    try:
        runs.run(lambda: module.main(list(map(str, argv))))
        code = 0
    except SystemExit as stop:
        code = stop.code
    line = capsys.readouterr().err
    assert line.count("\n") == (code != 0) and line.startswith("error: " if code else ""), line
    return code, line.strip()


def tensors(out) -> dict[str, torch.Tensor]:
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)["tensors"]


def same_run(one, other) -> None:
    """Two finished run folders agree to the last bit, but for seconds, memory and names of folders."""
    for folder in ("", "baseline"):
        a, b = Path(one, folder), Path(other, folder)
        if not a.exists() and not b.exists():
            continue
        assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
        assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
        left, right = (json.loads((path / "result.json").read_text()) for path in (a, b))
        for key in ("tests", "harmonic_mean", "split", "protocol", "warnings"):
            assert left[key] == right[key]
        left, right = tensors(a), tensors(b)
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
        left, right = (np.load(path / "predictions.npz") for path in (a, b))
        assert left.files == right.files and all(np.array_equal(left[key], right[key]) for key in left.files)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Killed at any moment
# ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def forks():
    """A context whose processes start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_survives"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=os.getpid).start()  # starts the server, in this environment
        yield context


def child(script: str, argv: list[str], folder: str, trap=None) -> None:
    """A whole process of one script, in a folder; `trap` is called first, to lay traps in this process alone."""
    os.chdir(folder)
    with open("stderr", "w") as stderr, open(os.devnull, "w") as stdout:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stdout.fileno(), 1)
    torch.set_num_threads(1)
    data.world.TASKS.update(small_tasks())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if trap:
        trap()
    runs.run(lambda: SCRIPTS[script].main(argv))


def finish(forks, script: str, argv: list[str], trap=None, kill_after: float | None = None) -> int:
    """Run it to its end, or kill it after so many seconds → the exit status, -9 for killed."""
    process = forks.Process(target=child, args=(script, argv, os.getcwd(), trap))
    process.start()
    process.join(kill_after)
    if kill_after is not None:
        process.kill()
    process.join(120)
    return process.exitcode


STAGES = ["half", "written", "renamed"]


class DieAtWrite:
    """Send this process a signal at its n-th file: half written, before or after its renaming."""

    def __init__(self, n: int, stage: str, number=signal.SIGKILL):
        self.n, self.stage, self.number = n, stage, number

    def __call__(self):
        fsync, replace = os.fsync, os.replace

        def die(stage):
            if stage == self.stage and self.n <= 0:
                os.kill(os.getpid(), self.number)

        def late_fsync(file):
            self.n -= 1
            if self.n <= 0 and self.stage == "half":
                os.ftruncate(file, os.fstat(file).st_size // 2)
                die("half")
            fsync(file)

        def late_replace(*names):
            die("written")
            replace(*names)
            die("renamed")

        os.fsync, os.replace = late_fsync, late_replace


METHODS = {
    "prograd": ["--augment", "crop", "--views", "0", "--eval-every", "2"],
    "vpt": ["--compare", "--samples", "3"],
    "vpt image": ["--posterior", "image", "--samples", "2", "--augment", "crop", "--views", "2", "--no-compare"],
    "proreg": ["--augment", "crop", "--batch-size", "8"],
    "proreg val": ["--select", "val", "--no-compare", "--accumulate", "2", "--ensemble", "0.5"],
}


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_killed_again_and_again_ends_the_same(forks, method, kills):
    """Every other kill hits the writing of a file, the others any moment; the last start ends the run."""
    rng, script = random.Random(f"{method} {kills}"), method.split()[0]
    flags = [*QUICK, *METHODS[method]]
    start = time.time()
    assert finish(forks, script, [*flags, "--out-dir", "whole", "--cache-dir", "none"]) == 0, Path("stderr").read_text()
    seconds, died = time.time() - start, 0
    command = [*flags, "--out-dir", "run", "--resume"]
    while died < kills:
        if died % 2:
            code = finish(forks, script, command, kill_after=rng.uniform(0.2, 1) * seconds)
        else:
            code = finish(forks, script, command, DieAtWrite(rng.randint(1, 9), rng.choice(STAGES)))
        assert code in (0, -signal.SIGKILL), Path("stderr").read_text()
        died += code == -signal.SIGKILL
        for path in Path().glob("run/**/*.json"):
            json.loads(path.read_text())  # whole, whenever it was killed
        for path in Path().glob("run/**/checkpoint.pt"):
            torch.load(path, weights_only=True)
        if code == 0:  # it was faster: again from the start
            same_run("whole", "run")
            shutil.rmtree("run")
    assert finish(forks, script, command) == 0, Path("stderr").read_text()
    same_run("whole", "run")


@pytest.mark.parametrize("method", ["vpt", "proreg"])
def test_ctrl_c_while_a_file_is_written(forks, method):
    """prograd.py, interrupted in the middle of training, is in test_runs.py."""
    flags = [*QUICK, *METHODS[method]]
    assert finish(forks, method, [*flags, "--out-dir", "whole"]) == 0
    for n, stage in ((3, "half"), (2, "written"), (4, "renamed")):
        command = [*flags, "--out-dir", "run", "--resume"]
        assert finish(forks, method, command, DieAtWrite(n, stage, signal.SIGINT)) == 130
        line = Path("stderr").read_text()
        assert line.startswith("error: interrupted") and "--resume" in line and line.count("\n") == 1
        assert not list(Path("run").rglob(".*"))  # no half file is left
    assert finish(forks, method, command) == 0
    same_run("whole", "run")


class FillDisk:
    """After the first checkpoint of this process no file can grow beyond 4,096 bytes."""

    def __call__(self):
        replace = os.replace

        def fill(temporary, path):
            replace(temporary, path)
            if Path(path) == Path("run/checkpoint.pt"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

        os.replace = fill


@pytest.mark.parametrize("method", METHODS)
def test_full_disk(forks, method):
    flags, script = [*QUICK, *METHODS[method], "--no-compare"], method.split()[0]
    assert finish(forks, script, [*flags, "--out-dir", "whole"]) == 0
    command = [*flags, "--out-dir", "run", "--resume"]
    assert finish(forks, script, command, FillDisk()) == 1
    line = Path("stderr").read_text()
    assert line.startswith("error: File too large: run/") and "checkpoint is kept" in line and line.count("\n") == 1
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert not list(Path("run").rglob(".*"))
    assert finish(forks, script, command) == 0
    same_run("whole", "run")


def test_full_file_system():
    """A real one of 40 kB: room for one checkpoint, not for the next beside it."""
    flags = "--shots 1 --epochs 3 --checkpoint-seconds 0 --no-compare --cache-dir none --out-dir disk/run"
    script = f"""mkdir disk && mount -t tmpfs -o size=40k tmpfs disk || exit 77
        {sys.executable} {ROOT / "prograd.py"} {flags} 2> stderr; echo $? > status; cp -r disk/run run"""
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True)
    if not Path("status").exists():
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()[:100]}")
    assert Path("status").read_text().strip() == "1"
    line = Path("stderr").read_text()
    assert line.startswith("error: No space left on device: disk/run/") and line.count("\n") == 1
    assert {path.name for path in Path("run").iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.pt"}
    assert tensors("run")["context"].isfinite().all()


def test_stdout_that_takes_nothing(forks):
    for where, code in (("> /dev/full", 1), ("| true", 2)):
        run = f"{sys.executable} {ROOT / 'common.py'} {where}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# 2. Wrong numbers
# ----------------------------------------------------------------------------------------------------------------------
class BadGradient(torch.autograd.Function):
    """x, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


POISON = {  # what each method calls once a step, and what its result is replaced by
    "prograd loss_kl": ("distillation_loss", lambda loss: loss / 0),
    "prograd gradient": ("distillation_loss", BadGradient.apply),
    "vpt loss": ("task_loss", lambda loss: loss * float("nan")),
    "vpt gradient": ("task_loss", BadGradient.apply),
    "proreg loss": ("proreg_loss", lambda loss: loss - float("inf")),
    "proreg gradient": ("proreg_loss", BadGradient.apply),
}


@pytest.mark.parametrize("what", POISON)
def test_a_wrong_number_stops_the_step_and_keeps_the_checkpoint(small, monkeypatch, capsys, what):
    """The line says where and what; later the run goes on as if nothing had been. 24 images: two steps an epoch."""
    script, quantity = what.split()
    (function, poison), calls = POISON[what], []
    module, flags = SCRIPTS[script], [*QUICK, "--no-compare", "--batch-size", "12"]
    healthy = getattr(module, function)

    def poisoned(*arguments):
        calls.append(1)
        loss = healthy(*arguments)
        return poison(loss) if len(calls) == 4 else loss

    assert status(module, [*flags, "--out-dir", "whole"], capsys)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, function, poisoned)
        code, line = status(module, [*flags, "--out-dir", "run"], capsys)
    assert code == 1 and f"{quantity} is not finite in epoch 1, step 1" in line and "--lr" in line
    assert not Path("run/result.json").exists()
    assert torch.load("run/checkpoint.pt", weights_only=True)["epoch"] == 1
    assert status(module, [*flags, "--out-dir", "run", "--resume"], capsys)[0] == 0
    same_run("whole", "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_numbers_in_a_checkpoint_give_no_result(small, capsys, script):
    """As after a last step that went wrong: it is said, and no table of nonsense is written."""
    module = SCRIPTS[script]
    status(module, [*QUICK, "--no-compare", "--out-dir", "run"], capsys)
    state = torch.load("run/checkpoint.pt", weights_only=True)
    for tensor in state["tensors"].values():
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    torch.save(state, "bad.pt")
    code, line = status(module, ["--eval-only", "--checkpoint", "bad.pt", "--out-dir", "bad"], capsys)
    assert code == 1 and "not finite" in line and not Path("bad/result.json").exists()


@pytest.mark.parametrize("size", [0, 1e-45, 1e-30, 1e-22, 1e-19, 1e-12, 1e-7])
def test_prograd_where_teacher_and_student_agree(size):
    """g_g is zero or rounding noise, down to where |g_g|^2 underflows: g stays finite and no longer than g_d."""
    draw = torch.Generator().manual_seed(0)
    g_d = torch.randn(16, 128, generator=draw)
    for sign in (1, -1):
        noise = size * (torch.randn(16, 128, generator=draw) + sign * g_d)
        g = prograd.project_gradient(g_d, noise)
        assert g.isfinite().all() and g.norm() <= 1.01 * g_d.norm()
        if size == 0:
            assert torch.equal(g, g_d)


def test_prograd_starts_at_the_teacher(small, monkeypatch, capsys):
    """--n-ctx 4 starts as "a photo of a": at first g_g is rounding noise, and wherever it points, g still descends."""
    project, lengths = prograd.project_gradient, []

    def watched(g_d, g_g, lam):
        g = project(g_d, g_g, lam)
        assert g.isfinite().all() and g.norm() <= 1.001 * g_d.norm() and (g * g_d).sum() > 0
        lengths.append((g_g.norm() / g_d.norm()).item())
        return g

    monkeypatch.setattr(prograd, "project_gradient", watched)
    assert status(prograd, ["--n-ctx", "4", "--shots", "2", "--no-compare", "--out-dir", "run"], capsys)[0] == 0
    assert lengths[0] < 1e-5 < lengths[-1]
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss_ce"] < metrics[0]["loss_ce"]


@pytest.mark.parametrize("low, high", [(50, 50), (-50, -50), (-50, 50), (100, 100), (-100, -100)])
def test_vpt_with_extreme_variances(small, capsys, low, high):
    """It trains, or stops in one line; it never reports a number that is none."""
    code, line = status(vpt, [*QUICK, "--no-compare", "--logvar-init", low, high, "--out-dir", "run"], capsys)
    assert code == 0 or (code == 1 and "is not finite in epoch" in line)
    assert (low, high) != (-50, -50) or code == 0
    if code == 0:
        result = json.loads(Path("run/result.json").read_text())
        assert all(np.isfinite(test["tuned"]["nll"]) for test in result["tests"])


def test_proreg_with_certain_predictions(small, monkeypatch, capsys):
    """A logit scale of 10,000: all probabilities are 0 or 1, of the label too, and ln 0 is far away."""
    load = common.load_clip

    def sure(*key):
        clip = load(*key)
        clip.model.logit_scale.data.fill_(np.log(1e4))
        return dataclasses.replace(clip, scale=1e4)

    monkeypatch.setattr(common, "load_clip", sure)
    for power in ("1", "10"):
        code, line = status(proreg, [*QUICK, "--lr", "1e-5", "--power", power, "--out-dir", power], capsys)
        assert code == 0, line
        metrics = [json.loads(line) for line in Path(power, "metrics.jsonl").read_text().splitlines()]
        assert all(0 <= line["w_10"] <= line["w_90"] <= 0.5 and np.isfinite(line["loss"]) for line in metrics)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Odd tasks, with all three methods
# ----------------------------------------------------------------------------------------------------------------------
def photos(classes: dict[str, int], folder="photos", split=True) -> str:
    """Small images of these classes, train and test alike → the dataset's name."""
    for part in ("train", "test") if split else ("",):
        for name, count in classes.items():
            make_data.images(Path(folder, part, name), count, "{}.png")
    return f"folder:{folder}"


@pytest.fixture
def tiny(monkeypatch):
    """A small ViT of random weights, with CLIP's whole vocabulary, in place of every model."""
    clip = world().clip()
    monkeypatch.setattr(common, "load_clip", lambda *key: dataclasses.replace(clip))


def run_all(dataset: str, capsys, *flags: str, ends: int = 0) -> list[str]:
    """Every method on that dataset, quickly → the line of each; all end with this status."""
    lines = []
    for name, module in SCRIPTS.items():
        quick = ["--dataset", dataset, "--model", "toyclip", "--epochs", "2", "--shots", "4", "--workers", "0"]
        quick += ["--batch-size", "8", "--augment", "none", "--out-dir", f"{name} {len(os.listdir())}"]
        code, line = status(module, [*quick, *flags], capsys)
        assert code == ends, line
        lines.append(line)
    return lines


def results() -> list[dict]:
    return [json.loads(path.read_text()) for path in Path().glob("*/result.json")]


def test_one_class(capsys):
    run_all(photos({"circle": 3}), capsys)
    for result in results():
        assert result["tests"][0]["tuned"] == {"accuracy": 100.0, "nll": 0.0, "ece": 0.0}
    run_all("folder:photos", capsys, "--classes", "base", ends=2)  # there is no new class
    run_all("folder:photos", capsys, "--label-noise", "0.5", ends=2)  # nor another label


def test_one_image_a_class_and_a_batch_larger_than_the_set(capsys):
    run_all(photos({"circle": 1, "star": 1}), capsys, "--batch-size", "1000000000")
    for result in results():
        assert result["protocol"]["n_train"] == 2 and result["tests"][0]["n"] == 2
        assert "2 classes have fewer than 4 training images, down to 1" in " ".join(result["warnings"])
    lines = run_all(photos({"circle": 1, "star": 1}, "unsplit", split=False), capsys, ends=2)  # nothing to split
    assert all("'circle'" in line and "no training image" in line for line in lines)


def test_shots_beyond_all_images(capsys):
    dataset = photos({"circle": 3, "star": 5})
    run_all(dataset, capsys, "--shots", "1000000")
    run_all(dataset, capsys, "--shots", "all")
    assert {(result["split"], result["protocol"]["n_train"]) for result in results()} == {(results()[0]["split"], 8)}


def test_equal_names_stay_apart(capsys):
    dataset = photos({"a": 3, "b": 3, "c": 3})
    make_data.text(Path("photos/classnames.txt"), ["star", "circle", "star"])
    run_all(dataset, capsys)
    for result in results():
        assert "2 are called 'star'" in " ".join(result["warnings"])
        assert result["tests"][0]["zero_shot"]["accuracy"] <= 67  # of two equal names the first wins


def test_names_that_no_prompt_can_hold(tiny, capsys):
    dataset = photos({"a": 3, "b": 3})
    for name, says in {"word " * 100: "tokens", "_": "empty name", "🙂" * 99: "tokens"}.items():
        make_data.text(Path("photos/classnames.txt"), ["cat", name])
        assert all(says in line for line in run_all(dataset, capsys, ends=2)), name


def test_names_of_every_script(tiny, capsys, monkeypatch):
    """Emoji, other scripts, quotes, braces, control characters, text that is no Unicode; on a terminal of ASCII."""
    names = ["🙂👩‍🚀", "naïve 猫", 'it\'s "{}" {0} %s', "\x1b[31mred\x07", "<|startoftext|>", "a\u202eb"]
    dataset = photos({f"{i}": 3 for i in range(len(names))})
    make_data.text(Path("photos/classnames.txt"), names)
    run_all(dataset, capsys)
    assert len(results()) == 3
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(ROOT / "data.py"), "--dataset", dataset]
    done = subprocess.run(call, capture_output=True, env=environment)
    assert done.returncode == 0 and b"\\U0001f642" in done.stdout, done.stderr
    call = [sys.executable, str(ROOT / "vpt.py"), "--help"]
    done = subprocess.run(call, capture_output=True, env=environment)
    assert done.returncode == 0 and done.stderr == b""


def test_toyclip_says_which_word_it_never_saw(capsys):
    dataset = photos({"circle": 3, "🙂": 3})
    assert all("toyclip never saw" in line and "🙂" in line for line in run_all(dataset, capsys, ends=2))


def test_a_thousand_classes(tiny, capsys):
    words = ["red", "old", "tiny", "wet", "loud", "flat", "wild", "pale", "soft", "odd"]
    names = [f"{a} {b} {c}" for a in words for b in words for c in words]
    run_all(photos(dict.fromkeys(names, 1)), capsys, "--max-steps", "2", "--batch-size", "256")
    for result in results():
        assert result["tests"][0]["n"] == 1000 and result["tests"][0]["tuned"]["nll"] < 12


# ----------------------------------------------------------------------------------------------------------------------
# 4. Files from strangers
# ----------------------------------------------------------------------------------------------------------------------
class Evil:
    """What unpickling this does is visible: a file in the working folder."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


class Bomb:
    def __reduce__(self):
        return bytearray, (4_000_000_000,)


def changed(path: Path, change) -> bytes:
    """The checkpoint's content after change(state)."""
    state = torch.load(path, weights_only=True)
    state = change(state) or state
    torch.save(state, "changed.pt")
    return Path("changed.pt").read_bytes()


def deflated(path: Path) -> bytes:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return Path("deflated.pt").read_bytes()


def setting(name: str, value):
    return lambda state: state["settings"].update({name: value})


CHECKPOINTS = {
    "noise": lambda path: bytes(range(256)) * 40,
    "nothing": lambda path: b"",
    "text": lambda path: b"this is no checkpoint",
    "cut": lambda path: path.read_bytes()[:-500],
    "other pickle": lambda path: changed(path, lambda state: [1, 2]),
    "code": lambda path: changed(path, lambda state: state | {"tensors": Evil()}),
    "code in settings": lambda path: changed(path, setting("lr", Evil())),
    "memory": lambda path: changed(path, lambda state: state | {"epoch": Bomb()}),
    "deflated": deflated,
    "stride 0": lambda path: changed(path, lambda state: stretch(state, torch.zeros(1).expand(10**10, 512))),
    "meta": lambda path: changed(path, lambda state: stretch(state, torch.zeros(10**6, 512, device="meta"))),
    "sparse": lambda path: changed(path, lambda state: stretch(state, torch.zeros(9, 9).to_sparse())),
    "another shape": lambda path: changed(path, lambda state: stretch(state, torch.zeros(3, 3))),
    "one dimension": lambda path: changed(path, lambda state: stretch(state, torch.zeros(128))),
    "no tensors": lambda path: changed(path, lambda state: state["tensors"].clear()),
    "text for a tensor": lambda path: changed(path, lambda state: stretch(state, "x")),
    "another key": lambda path: changed(path, lambda state: state["tensors"].update(more=torch.zeros(1))),
    "no method": lambda path: changed(path, lambda state: state.pop("method") and None),
    "method upwards": lambda path: changed(path, lambda state: state | {"method": "../../x"}),
    "negative epoch": lambda path: changed(path, lambda state: state | {"epoch": -1}),
    "settings a list": lambda path: changed(path, lambda state: state | {"settings": []}),
    "seed upwards": lambda path: changed(path, setting("seed", "/../../../../evil")),
    "shots upwards": lambda path: changed(path, setting("shots", "/../../../../evil")),
    "dataset upwards": lambda path: changed(path, setting("dataset", "toy_x/../../../evil")),
    "dataset a number": lambda path: changed(path, setting("dataset", 5)),
    "classes": lambda path: changed(path, setting("classes", "new")),
    "lr": lambda path: changed(path, setting("lr", torch.zeros(3))),
    "names": lambda path: changed(path, lambda state: state | {"trained_on": {"classnames": 5, "template": ""}}),
    "names of numbers": lambda path: changed(path, lambda state: state | {"trained_on": {"classnames": [5]}}),
}


def stretch(state: dict, value) -> None:
    state["tensors"][min(state["tensors"])] = value


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of every method."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(data.world, "TASKS", small_tasks())
        for name, module in SCRIPTS.items():
            module.main([*QUICK, "--epochs", "1", "--no-compare", "--out-dir", name])
    return folder


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_checkpoints_of_strangers(small, trained, tmp_path, capsys, what):
    """--eval-only refuses them in one line, and so does --resume where one lies in the run's folder."""
    for name, module in SCRIPTS.items():
        Path("bad.pt").write_bytes(CHECKPOINTS[what](trained / name / "checkpoint.pt"))
        before, used = set(os.listdir("..")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, line = status(module, ["--eval-only", "--checkpoint", "bad.pt", "--out-dir", f"out {name}"], capsys)
        assert code == 2 and len(line) < 3000, line
        if "upwards" not in what and "seed" not in what:
            assert "bad.pt" in line
        shutil.copytree(trained / name, "run", ignore=shutil.ignore_patterns("result.json"))
        shutil.copy("bad.pt", "run/checkpoint.pt")
        code, line = status(module, ["--resume", "--out-dir", "run"], capsys)
        if what in ("classes", "lr", "code in settings") or what.startswith(("seed", "shots", "dataset up")):
            assert code in (0, 2)  # the settings are config.json's
        else:
            assert code == 2, line
        shutil.rmtree("run")
        assert not Path("evil").exists() and set(os.listdir("..")) == before
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 1_000_000  # kB


JSON = [b"", b"{", b"[]", b"5", b"null", b"\xff\xfe", b"[" * 100_000, b'{"method": 5}', b"{}", b'{"tests": []}', None]


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_run_s_damaged_json(small, trained, capsys, name):
    """None stands for a gigabyte."""
    for script, module in SCRIPTS.items():
        for content in JSON:
            shutil.copytree(trained / script, "run", dirs_exist_ok=True)
            Path("run", name).write_bytes(content or b"")
            if content is None:
                os.truncate(f"run/{name}", 1 << 30)
            code, line = status(module, ["--resume", "--out-dir", "run"], capsys)
            assert code == 2 and "run" in line, (content, line)


def test_result_json_with_wrong_values(small, trained, capsys):
    whole = json.loads((trained / "prograd" / "result.json").read_text())
    shutil.copytree(trained / "prograd", "run")
    for key, value in {"tests": [1], "harmonic_mean": "x", "dataset": None}.items():
        Path("run/result.json").write_text(json.dumps(whole | {key: value}))
        code, line = status(prograd, ["--resume", "--out-dir", "run"], capsys)
        assert code == 2 and "result.json is damaged" in line
    for key, value in {"tuned": None, "zero_shot": {}, "n": None, "extra": None}.items():
        test = {k: v for k, v in whole["tests"][0].items() if k != key} | ({key: value} if key != "n" else {})
        Path("run/result.json").write_text(json.dumps(whole | {"tests": [test]}))
        code, line = status(vpt if key == "extra" else prograd, ["--resume", "--out-dir", "run"], capsys)
        assert code == 2
    Path("run/result.json").unlink()  # as the line says: it is made again
    assert status(prograd, ["--resume", "--out-dir", "run"], capsys)[0] == 0
    again = json.loads(Path("run/result.json").read_text())
    assert again["tests"] == whole["tests"]


@pytest.mark.parametrize("content", [b"\xff\xff", b"garbage\n" * 5, b"", None])
def test_metrics_jsonl_of_a_stranger(small, trained, capsys, content):
    shutil.copytree(trained / "prograd", "run", ignore=shutil.ignore_patterns("result.json", "checkpoint.pt"))
    Path("run/metrics.jsonl").write_bytes(content or b"")
    if content is None:
        os.truncate("run/metrics.jsonl", 1 << 30)
    code, line = status(prograd, ["--resume", "--out-dir", "run"], capsys)
    assert code == (2 if content is None or b"\xff" in content else 0)
    assert code == 0 or "metrics.jsonl" in line


CACHES = ["rows", "columns", "type", "infinite", "key", "header", "long header", "no note"]


@pytest.mark.parametrize("what", CACHES)
def test_cached_features_of_a_stranger(small, capsys, what):
    """With the right name and checksum but another content: made again, and the figures are the same."""
    flags = [*QUICK, "--no-compare", "--cache-dir", "cache", "--out-dir"]
    assert status(prograd, [*flags, "first"], capsys)[0] == 0
    files = sorted(Path("cache").iterdir())
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            x, note = file.get_tensor("features"), file.metadata()
        x = {"rows": x[:-1], "columns": x[:, :-1], "type": x.double(), "infinite": x / 0}.get(what, x).contiguous()
        note = {} if what == "no note" else note | {"sha1": vision.sha1(x)}
        safetensors.torch.save_file({"other" if what == "key" else "features": x}, path, note)
        content = path.read_bytes()
        if what == "header":  # it says that the tensor has more bytes than the file
            path.write_bytes(content.replace(str(x.numel() * 4).encode(), str(x.numel() * 4 + 64).encode()))
        if what == "long header":
            path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])
    assert status(prograd, [*flags, "second"], capsys)[0] == 0
    same_run("first", "second")


def test_weights_of_a_stranger(capsys):
    """A safetensors header that lies, TorchScript that writes a file while it is loaded, pickles."""

    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.zeros(2)

        def forward(self, x):
            return x

        @torch.jit.export
        def __getstate__(self):
            return self.weight, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, bool]):
            torch.save(state[0], "evil")
            self.weight = state[0]
            self.training = state[1]

    header = json.dumps({"x": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    Path("lies.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    Path("long.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + header)
    torch.jit.script(Writes()).save("script.pt")
    torch.save({"state_dict": Evil()}, "code.pt")
    torch.save({"x": Bomb()}, "bomb.pt")
    torch.save({"x": torch.zeros(10**6)}, "zeros.pt")
    Path("inflates.pt").write_bytes(deflated(Path("zeros.pt")))
    for name in ("lies.safetensors", "long.safetensors", "script.pt", "code.pt", "bomb.pt", "inflates.pt"):
        Path("evil").unlink(missing_ok=True)
        code, line = status(prograd, ["--pretrained", name, "--max-steps", "1"], capsys)
        assert code == 2 and name in line and not Path("evil").exists(), line


def bad_photos(folder: str) -> list[str]:
    """Spoil some training images → their names."""
    whole = Path(folder, "train/star/0.png").read_bytes()
    spoiled = {"cut.png": whole[:-30], "empty.jpg": b"", "text.png": b"no image", "gif.png": b"GIF89a" + bytes(9)}
    for name, content in spoiled.items():
        Path(folder, "train/star", name).write_bytes(content)
    Image.new("1", (40_000, 40_000)).save(Path(folder, "train/star/bomb.png"))
    Path(folder, "train/star/gone.png").symlink_to("nowhere.png")
    return [*spoiled, "bomb.png", "gone.png"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_images_are_named_before_training(capsys, script, workers):
    """All of them by the prompt methods; the first by proreg.py, with the command that lists all."""
    dataset = photos({"circle": 70, "star": 3})
    names, module = bad_photos("photos"), SCRIPTS[script]
    flags = ["--dataset", dataset, "--model", "toyclip", "--shots", "all", "--epochs", "1", "--out-dir", "run"]
    code, line = status(module, [*flags, "--workers", workers, "--augment", "crop", "--no-compare"], capsys)
    assert code == 2 and not Path("run/checkpoint.pt").exists()
    assert sum(name in line for name in names) == (1 if script == "proreg" else len(names)), line
    assert "gone.png" not in line or "No such file" in line
    if script == "proreg":
        assert "data.py --check-images" in line


# ----------------------------------------------------------------------------------------------------------------------
# 5. Same command, same answer
# ----------------------------------------------------------------------------------------------------------------------
class Threads:
    """The small random CLIP with this many threads."""

    def __init__(self, threads: int):
        self.threads = threads

    def __call__(self):
        torch.set_num_threads(self.threads)
        clip = world().clip()
        common.load_clip = lambda *key: dataclasses.replace(clip)


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_across_processes_and_threads(forks, script):
    """Bitwise with as many threads; with others probabilities agree to 1e-5. (Not the tensors of proreg.py: Adam turns
    gradients that are rounding noise, as of the bias of attention's keys, into steps of full size.)"""
    dataset = photos({"cat": 6, "dog": 6, "bird": 6})
    flags = ["--dataset", dataset, "--model", "toyclip", "--shots", "4", "--workers", "0", "--no-compare"]
    flags += ["--augment", "crop", "--views", "1", "--cache-dir", "none", "--batch-size", "8", "--epochs", "3"]
    for out, threads in (("one", 1), ("again", 1), ("two", 2)):
        assert finish(forks, script, [*flags, "--out-dir", out], Threads(threads)) == 0, Path("stderr").read_text()
    same_run("one", "again")
    one, two = (np.load(f"{out}/predictions.npz")["0/tuned"] for out in ("one", "two"))
    assert np.abs(one - two).max() <= 1e-5
