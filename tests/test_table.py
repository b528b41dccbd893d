"""benchmark/table.py on synthetic results: means, harmonic means, differences, what it refuses, pictures."""

import copy
import csv
import importlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))
import plots  # noqa: E402
import table  # noqa: E402

import data  # noqa: E402


def measures(accuracy):
    return {"accuracy": accuracy, "nll": accuracy / 100, "ece": accuracy / 10}


def write(
    folder,
    method="prograd",
    dataset="toy_a",
    seed=1,
    tests=None,
    shots=16,
    classes="base",
    split=None,
    baseline=True,
    **s,
):
    """A run folder; tests: {name: (zero-shot, baseline, tuned)}, "/NAME" is a domain and "@NAME" another dataset."""
    entries = []
    for name, (zero_shot, plain, tuned) in (tests or {"base": (50, 60, 70), "new": (50, 40, 45)}).items():
        domain = {"ID": "photo"}.get(name, name[1:] if name[0] == "/" else None)
        entry = {"dataset": name[1:] if name[0] == "@" else dataset, "domain": domain, "n": 100, "template": "a {}."}
        entry |= {"classes": name if name in ("base", "new", "all") else classes, "extra": {}}
        entry |= {"zero_shot": measures(zero_shot), "baseline": measures(plain) if baseline else None}
        entries.append(entry | {"tuned": measures(tuned)})
    pairs = {"tuned": 2, "baseline": 1, "zero_shot": 0}
    rows = list((tests or {"base": (50, 60, 70), "new": (50, 40, 45)}).values())
    h = (
        {kind: 2 * rows[0][i] * rows[1][i] / (rows[0][i] + rows[1][i]) for kind, i in pairs.items()}
        if len(rows) > 1
        else None
    )
    settings = {
        "lam": 1.0,
        "rule": "project",
        "lr": 0.02,
        "seed": seed,
        "out_dir": str(folder),
        "compare": baseline,
        **s,
    }
    result = {"schema": 1, "method": method, "dataset": dataset, "shots": shots, "seed": seed, "classes": classes}
    result |= {"model": "toyclip", "pretrained": f"/home/{seed}/weights.safetensors", "split": split or f"{seed:040d}"}
    result |= {"protocol": {"template": "a {}.", "n_train": 96}, "tests": entries, "harmonic_mean": h, "commit": "abc"}
    result |= {"settings": settings, "versions": {"torch": "2.14"}, "seconds": {"train": 1.0}, "warnings": []}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return result


def rows_of(*argv):
    return {(r["method"], r["dataset"], r["test"]): r for r in table.main([str(a) for a in argv])}


def command(*argv):
    call = [sys.executable, str(BENCHMARK / "table.py"), *map(str, argv)]
    return subprocess.run(call, capture_output=True, text=True)


def test_means_are_over_seeds_and_harmonic_means_come_first(tmp_path, capsys):
    for seed, base, new in ((1, 70, 40), (2, 80, 50), (3, 90, 30)):
        write(tmp_path / f"s{seed}", seed=seed, tests={"base": (50, 60, base), "new": (50, 40, new)})
        write(tmp_path / f"s{seed}" / "baseline", seed=seed, lam=0.0, baseline=False)  # holds what the run holds
    rows = rows_of(tmp_path)
    assert {key[0] for key in rows} == {"ProGrad"}
    h = [2 * 70 * 40 / 110, 2 * 80 * 50 / 130, 2 * 90 * 30 / 120]
    assert list(rows["ProGrad", "toy_a", "H"]["values"]["tuned"].values()) == pytest.approx(h)
    mean, std, n = table.mean_std(rows["ProGrad", "toy_a", "base"]["values"]["tuned"].values())
    assert (mean, std, n) == (80, 10, 3)  # the sample standard deviation: n - 1
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "| base |" in line)
    assert "80.00 ± 10.00" in line and "50.00 ± 0.00" in line and "60.00 ± 0.00 (CoOp)" in line
    assert f"+20.00 ± {10 / math.sqrt(3):.2f}" in line


def test_baseline_folders_count_only_when_named(tmp_path):
    write(tmp_path / "run")
    write(tmp_path / "run" / "baseline", lam=0.0, baseline=False)
    assert {key[0] for key in rows_of(tmp_path)} == {"ProGrad"}
    assert {key[0] for key in rows_of(tmp_path / "run" / "baseline")} == {"CoOp"}
    assert {key[0] for key in rows_of(tmp_path, tmp_path / "run" / "baseline" / "result.json")} == {"ProGrad", "CoOp"}
    write(
        tmp_path / "lone" / "baseline", lam=0.0, seed=2
    )  # no run above it: a folder that only happens to be called so
    assert {key[0] for key in rows_of(tmp_path / "lone")} == {"CoOp"}


def test_average_over_datasets_is_each_seeds_mean(tmp_path):
    for dataset, shift in (("toy_a", 0), ("toy_b", 20)):
        for seed in (1, 2):
            write(
                tmp_path / dataset / str(seed), dataset=dataset, seed=seed, tests={"all": (50, 60, 60 + shift + seed)}
            )
    write(tmp_path / "toy_b" / "3", dataset="toy_b", seed=3, tests={"all": (50, 60, 99)})  # toy_a lacks this seed
    row = rows_of(tmp_path)["ProGrad", "mean of 2", "all"]
    assert row["values"]["tuned"] == {1: 71, 2: 72}


def test_out_of_distribution_and_other_datasets(tmp_path):
    write(
        tmp_path / "a",
        "proreg",
        "toy_b",
        tests={"ID": (50, 90, 80), "/x": (50, 30, 40), "/y": (60, 40, 50)},
        classes="all",
    )
    tests = {"all": (60, 70, 70), "@one": (50, 40, 45), "@two": (60, 50, 60)}
    write(tmp_path / "b", "prograd", "imagenet", tests=tests, classes="all")
    rows = rows_of(tmp_path)
    values = rows["ProReg", "toy_b", "mean OOD"]["values"]
    assert (values["zero_shot"][1], values["baseline"][1], values["tuned"][1]) == (55, 35, 45)
    assert rows["ProReg", "toy_b", "ID"]["values"]["tuned"] == {1: 80}
    assert rows["ProGrad", "imagenet", "mean of one, two"]["values"]["tuned"] == {1: 52.5}


def test_one_mean_holds_one_setting(tmp_path):
    write(tmp_path / "1", seed=1)
    write(tmp_path / "2", seed=2, lr=0.08)
    done = command(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert "lr is 0.02" in done.stderr and "0.08" in done.stderr and "Traceback" not in done.stderr
    assert len(rows_of(tmp_path, "--by", "lr")) == 6
    write(tmp_path / "2", seed=2, data_root="/elsewhere", cache_dir="x")  # paths may differ
    assert rows_of(tmp_path)["ProGrad", "toy_a", "base"]["values"]["tuned"] == {1: 70, 2: 70}


@pytest.mark.parametrize("part", ["model", "protocol", "versions", "pretrained", "tests"])
def test_what_else_must_agree(tmp_path, part):
    write(tmp_path / "1", seed=1)
    result = write(tmp_path / "2", seed=2)
    if part == "tests":
        result["tests"][1]["n"] = 7
    elif part in ("model", "pretrained"):
        result[part] = "other"
    else:
        result[part][next(iter(result[part]))] = "other"
    (tmp_path / "2" / "result.json").write_text(json.dumps(result))
    with pytest.raises(table.UserError, match=part):
        table.main([str(tmp_path)])


def test_a_seed_counts_once(tmp_path):
    write(tmp_path / "1")
    write(tmp_path / "again")
    with pytest.raises(table.UserError, match="seed 1 is there twice"):
        table.main([str(tmp_path)])


def test_methods_must_share_their_training_images(tmp_path):
    write(tmp_path / "1", "prograd")
    write(tmp_path / "2", "vpt", split="f" * 40)
    done = command(tmp_path)
    assert done.returncode == 2 and "split" in done.stderr and "f" * 12 in done.stderr and not done.stdout
    write(tmp_path / "2", "vpt", split="f" * 40, label_noise=0.3)  # other labels were asked for
    assert len(rows_of(tmp_path)) == 6


def test_paired_differences_are_seed_by_seed(tmp_path, capsys):
    for seed, base in ((1, 70), (2, 75), (3, 95)):
        write(tmp_path / f"p{seed}", seed=seed, tests={"all": (50, 60, base)})
        write(
            tmp_path / f"v{seed}", "vpt", seed=seed, tests={"all": (50, 61, base - seed)}, posterior="global", samples=8
        )
    write(tmp_path / "v4", "vpt", seed=4, tests={"all": (50, 61, 10)}, posterior="global", samples=8)
    (row,) = table.main([str(tmp_path), "--pair", "ProGrad", "VPT global"])
    assert (row["mean"], row["n"]) == (2, 3) and row["se"] == pytest.approx(1 / math.sqrt(3))
    assert "+2.00 ± 0.58" in capsys.readouterr().out
    (row,) = table.main([str(tmp_path), "--pair", "ProGrad", "CoOp"])  # a run's baseline has a name, too
    assert row["mean"] == pytest.approx(20)
    with pytest.raises(table.UserError, match="no such method here; there are CoOp"):
        table.main([str(tmp_path), "--pair", "ProGrad", "prograd"])


def test_csv_and_other_metrics(tmp_path, capsys):
    for seed in (1, 2):
        write(tmp_path / str(seed), seed=seed, tests={"all": (50, 60, 70 + seed)})
    table.main([str(tmp_path), "--csv", "--metric", "nll"])
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["mean ± std"] == "0.715 ± 0.007" and line["n"] == "2" and line["paper"] == ""


def test_method_names():
    def name(method, **settings):
        return table.method_name({"method": method, "settings": settings, "path": ""})

    assert name("prograd", lam=0.0, rule="add") == "CoOp" and name("prograd", lam=1.0, rule="add") == "CE + KL"
    assert name("prograd", lam=1.0, teacher="ensemble") == "ProGrad++"
    assert name("vpt", samples=0, posterior="image") == "CoCoOp-like" and name("vpt", samples=1) == "VPT global"
    assert name("proreg", loss="ce") == "fine-tuning" and name("proreg", loss="kd") == "fixed KD"


def test_papers_figures_only_for_their_protocol():
    def figures(**settings):
        row = {"method": "ProGrad", "baseline": "CoOp", "dataset": "mean of 11", "test": "all", "shots": 16}
        row |= {"classes": "all", "model": "RN50", "values": dict.fromkeys(table.KINDS, {1: 1.0})} | settings
        return table.table_lines([row], "accuracy")[0][-2:]

    assert figures()[0] == 74.28
    for other in (
        {"shots": 8},
        {"model": "ViT-B-32"},
        {"dataset": "mean of 10"},
        {"method": "CoOp"},
        {"classes": "base"},
    ):
        assert figures(**other) == ["", ""]


def test_extra_predictions_get_rows(tmp_path):
    result = write(tmp_path / "a", "proreg", tests={"ID": (50, 90, 80), "/x": (50, 30, 40)}, classes="all")
    for test, value in zip(result["tests"], (60, 30)):
        test["extra"] = {"ensemble 0.5": measures(value), "auroc": 0.7}
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    rows = rows_of(tmp_path, "--extra")
    assert rows["ProReg: ensemble 0.5", "toy_a", "H"]["values"]["tuned"][1] == pytest.approx(40)
    assert rows["ProReg", "toy_a", "ID"]["values"]["tuned"][1] == 80


def test_json_lines_share_their_first_line(tmp_path):
    results = [copy.deepcopy(write(tmp_path / str(seed), seed=seed)) for seed in (1, 2)]
    common = {key: results[0].pop(key) for key in ("settings", "method", "dataset")}
    for result in results[1:]:
        del result["method"], result["dataset"]
        result["settings"] = {"seed": 2}
    results[0]["settings"] = {}
    lines = [{"common": common}, *results]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rows_of(tmp_path / "study.jsonl")["ProGrad", "toy_a", "new"]["values"]["tuned"] == {1: 45, 2: 45}


@pytest.mark.parametrize("text", [None, "{}", "[1]", "not json", '{"tests": []}'])
def test_errors_are_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    done = command(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert command(tmp_path / "nowhere").returncode == 2
    assert command(tmp_path, "--unknown").returncode == 2


def predictions(folder, shift):
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 3, 200), rng.dirichlet([1, 1, 1], 200)
    p[np.arange(200), labels] += shift
    p /= p.sum(axis=1, keepdims=True)
    np.savez(folder / "predictions.npz", **{"0/labels": labels, "0/tuned": p, "0/zero_shot": p[:, ::-1]})


@pytest.mark.parametrize("kind", ["few-shot", "learning", "ood", "reliability"])
def test_pictures(tmp_path, kind):
    pytest.importorskip("matplotlib")
    for seed in (1, 2):
        for shots in (1, 4):
            folder = tmp_path / f"{seed}-{shots}"
            tests = (
                {"ID": (50, 90, 80 + seed), "/x": (50, 30, 40)}
                if kind == "ood"
                else {"all": (50, 60, 60 + shots + seed)}
            )
            write(folder, "proreg" if kind == "ood" else "prograd", seed=seed, shots=shots, tests=tests, classes="all")
            write(folder / "baseline", seed=seed, shots=shots, tests=tests, classes="all", lam=0.0)
            predictions(folder, 0.5), predictions(folder / "baseline", 0.1)
            lines = [json.dumps({"epoch": e, "val_accuracy": 50.0 + e}) for e in range(9)]
            (folder / "metrics.jsonl").write_text("\n".join(lines))
    for name in ("a.svg", "a.png"):
        table.main([str(tmp_path), "--plot", str(tmp_path / name), "--kind", kind])
        assert (tmp_path / name).stat().st_size > 1000
    first = (tmp_path / "a.svg").read_bytes()
    table.main([str(tmp_path), "--plot", str(tmp_path / "a.svg"), "--kind", kind])
    assert (tmp_path / "a.svg").read_bytes() == first  # the same runs give the same file
    with pytest.raises(table.UserError, match="--plot"):
        table.main([str(tmp_path), "--plot", str(tmp_path / "no" / "a.svg"), "--kind", kind])


def test_reliability_bins_count_every_image(tmp_path):
    write(tmp_path, tests={"all": (50, 60, 70)}, classes="all")
    predictions(tmp_path, 0.5)
    (run,) = table.read_runs([tmp_path])
    bins = np.array(plots.reliability(run)["all"]["tuned"])
    with np.load(tmp_path / "predictions.npz") as file:
        p, labels = file["0/tuned"], file["0/labels"]
    assert bins[:, 0].sum() == 200 and bins[:, 2].sum() == (p.argmax(axis=1) == labels).sum()
    assert bins[:, 1].sum() == pytest.approx(p.max(axis=1).sum(), abs=0.1)


def test_a_picture_without_its_data_or_matplotlib_is_one_line(tmp_path, monkeypatch):
    write(tmp_path, tests={"all": (50, 60, 70)}, classes="all")
    for kind, needs in (
        ("ood", "out-of-distribution"),
        ("learning", "--eval-every"),
        ("reliability", "predictions.npz"),
    ):
        with pytest.raises(table.UserError, match=needs):
            table.main([str(tmp_path), "--plot", str(tmp_path / "a.svg"), "--kind", kind])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import then fails
    with pytest.raises(table.UserError, match="pip install matplotlib"):
        table.main([str(tmp_path), "--plot", str(tmp_path / "a.svg")])


def test_free_settings_are_those_of_runs():
    import runs

    assert runs.FREE <= table.FREE
    assert table.FREE - runs.FREE == {"seed", "eval_every", "memory_gb", "compare"}


# ----------------------------------------------------------------------------------------------------------------------
# The papers' grids: every command of the scripts, with the loops' values filled in
# ----------------------------------------------------------------------------------------------------------------------
RUNS_OF = {"prograd_few_shot": 5 * 11, "prograd_base_to_new": 11, "prograd_domain_generalisation": 2,
           "prograd_cross_dataset": 1, "vpt_base_to_new": 2 * 11, "vpt_cross_dataset": 2,
           "vpt_domain_generalisation": 2, "proreg_id_ood": 2 * (4 + 4)}  # fmt: skip


def test_every_script_is_counted():
    assert {path.stem for path in BENCHMARK.glob("*.sh")} == {*RUNS_OF, "seeds"}


@pytest.mark.parametrize("script", RUNS_OF)
def test_scripts_call_the_public_command_line(tmp_path, script):
    fake = tmp_path / "python"  # writes down its arguments and GPU, and leaves a result as a real run would
    lines = ["#!/usr/bin/env bash", f'printf "%s\\t" "$CUDA_VISIBLE_DEVICES" "$@" >> {tmp_path}/calls-$$']
    lines += ['mkdir -p "${@: -1}"; touch "${@: -1}/result.json"', '[[ "$*" != *"dtd --shots 1 "* ]]']  # ... fails
    fake.write_text("\n".join(lines))
    fake.chmod(0o755)
    env = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(fake),
        "RUNS": str(tmp_path / "runs"),
        "SEEDS": "1 2",
        "GPUS": "4 5",
    }
    call = ["bash", str(BENCHMARK / f"{script}.sh")]
    done = subprocess.run(call, env=env | {"POSTERIORS": "global image"}, capture_output=True, text=True)
    failing = script == "prograd_few_shot"  # one dataset cannot be run: the others are, and the script says so
    assert done.returncode == int(failing) and done.stderr.count("failed: ") == 2 * failing, done.stderr
    calls = [path.read_text().rstrip("\t").split("\t") for path in tmp_path.glob("calls-*")]
    assert len(calls) == 2 * RUNS_OF[script] and {call[0] for call in calls} == {"4", "5"}
    seen = set()
    for _, file, *argv in calls:
        parser = importlib.import_module(file.removesuffix(".py")).build_parser()
        args = parser.parse_args(argv)  # SystemExit for a flag that is not there
        assert file == f"{script.split('_')[0]}.py" and args.paper and args.resume
        known = {*data.TABLE, *data.world.TASKS}
        assert args.dataset in known and set(args.test_on or ()) <= known and args.seed in (1, 2)
        seen.add((args.out_dir, *(str(getattr(args, k, None)) for k in ("dataset", "shots", "seed", "model", "loss"))))
    assert len({out for out, *_ in seen}) == len(calls)  # a folder for each run
    subprocess.run(call, env=env, capture_output=True, check=True)
    assert len(list(tmp_path.glob("calls-*"))) == len(calls)  # a second start finds every result
