"""benchmark/toy_study.py: its plan against the real command lines, its records, and its tables on invented results."""

import functools
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark"
sys.path.insert(0, str(BENCHMARK))
import table  # noqa: E402
import toy_study  # noqa: E402
import toy_tables  # noqa: E402

import runs  # noqa: E402
from toyclip import world  # noqa: E402

TASKS = [name for name in world.TASKS if name != world.BIASED]
SETTING = {"lr": 0.02, "epochs": 30}


@functools.cache
def chosen():
    """As choices.json has them, with a setting that is not the default's for ProGrad, so that mixing them up shows."""
    found = {
        "base-to-new": dict.fromkeys(toy_study.PROGRAD, SETTING),
        "few-shot": dict.fromkeys(toy_study.PROGRAD, SETTING),
    }
    found["base-to-new"]["ProGrad"] = {"lr": 0.005, "epochs": 100}
    found |= {f"vpt {posterior}": {"pair": SETTING} for posterior in toy_study.VPT}
    picks = {"fixed KD": ("alpha", 0.3, 0.7), "ProReg, power 1": ("alpha", 1, 8), "ProReg, power 10": ("alpha", 4, 16)}
    picks |= {"ensemble": ("share", 0.3, 0.5), "wise-ft": ("share", 0.1, 0.5)}
    picks = {method: {"by ID": {key: a}, "by H": {key: b}} for method, (key, a, b) in picks.items()}
    return found | {"proreg": {"fine-tuning": {"by ID": {}, "by H": {}}} | picks}


def unique(jobs):
    return {" ".join([job["file"], *toy_study.argv(job["flags"])]): job for job in jobs}


def settle(job):
    module = importlib.import_module(job["file"])
    flags = {key: value for key, value in job["flags"].items() if key not in ("checkpoint", "eval_only")}
    args = runs.settle(module.build_parser(), toy_study.argv(flags), job["file"], module.DEFAULTS)
    if job["file"] == "proreg" and args.loss == "ce":
        args.alpha = 0.0  # as proreg.main fills it in
    return args


def test_every_command_is_one_of_the_public_command_line():
    seen = {}
    for jobs in (toy_study.choice_jobs(TASKS[:1], world.BIASED), toy_study.plan(TASKS[:1], world.BIASED, chosen())):
        for job in unique(jobs).values():
            kind = (job["file"], *sorted(set(job["flags"])))  # one of each kind of command
            if kind not in seen:
                seen[kind] = settle(job)
                assert seen[kind].compare is False
    assert len(seen) > 15


def test_settings_are_chosen_on_validation_images_and_reported_on_test_images():
    assert {job["flags"]["test_part"] for job in toy_study.choice_jobs(TASKS, world.BIASED)} == {"val"}
    assert not any("test_part" in job["flags"] for job in toy_study.plan(TASKS, world.BIASED, chosen()))


def test_every_method_has_the_same_grid():
    grids = {}
    for job in toy_study.choice_jobs(TASKS, world.BIASED):
        if job["file"] == "prograd":
            flags, family = job["flags"], grids.setdefault(job["family"], {})
            points = family.setdefault(job["method"], set())
            points.add((flags["dataset"], flags["seed"], flags["lr"], flags["epochs"]))
    for family in grids.values():
        assert len(family) == 3 and len(set(map(frozenset, family.values()))) == 1


def test_headline_groups_have_all_tasks_and_five_seeds():
    for group in ("prograd_base_to_new", "vpt", "prograd_controls"):
        jobs = [job["flags"] for job in toy_study.plan(TASKS, world.BIASED, chosen()) if job["group"] == group]
        assert {job["dataset"] for job in jobs} == set(TASKS) and {job["seed"] for job in jobs} == {1, 2, 3, 4, 5}


def test_the_default_residual_scale_is_vpts():
    import vpt

    assert toy_study.U == vpt.DEFAULTS["toy"]["residual_scale"]


def test_runs_of_two_defaults_are_not_mixed(tmp_path):
    jobs = [toy_study.job("vpt", "vpt", TASKS[0], seed, samples=8, classes="base", shots=16) for seed in (1, 2)]
    for job, weight_decay in zip(jobs, (5e-4, 1e-3)):
        folder = toy_study.folder(tmp_path, job)
        folder.mkdir()
        settings = {"seed": job["flags"]["seed"], "lr": 0.02, "weight_decay": weight_decay, "out_dir": str(folder)}
        (folder / "result.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(SystemExit, match="weight_decay is"):
        toy_study.check_defaults(jobs, tmp_path)
    toy_study.check_defaults(jobs[:1], tmp_path)


def test_between_points():
    assert toy_tables.between([(0, 0), (10, 20), (5, 5)], 7.5) == 12.5
    assert toy_tables.between([(0, 0), (1, 1)], 2) is None


def test_flags_become_words():
    flags = {"lr": 0.02, "compare": False, "eval_only": True, "wise_ft": [0.1, 0.5], "ctx_init": "a photo of a"}
    words = ["--lr", "0.02", "--no-compare", "--eval-only", "--wise-ft", "0.1", "0.5", "--ctx-init", "a photo of a"]
    assert toy_study.argv(flags) == words


def invent(job, folder):
    """A finished run's files with invented figures."""
    args, draw = settle(job), random.Random(str(job["flags"]))
    settings = runs.settings_of(args)

    def measures():
        return {"accuracy": draw.uniform(30, 90), "nll": draw.uniform(0.5, 2), "ece": draw.uniform(1, 9)}

    if job["file"] == "proreg":
        domains = (None,) if args.test_part == "val" else (None, "background", "style")
        parts = [("all", domain) for domain in domains]
    else:
        parts = [(classes, None) for classes in {"base": ("base", "new"), "all": ("all",)}[args.classes]]
    tests, zero_shot = [], {"accuracy": 50.0, "nll": 1.0, "ece": 5.0}
    for classes, domain in parts:
        extra = (
            {"mean_residual": measures(), "auroc_tuned": 0.7, "auroc_zero_shot": 0.6} if job["file"] == "vpt" else {}
        )
        extra |= {f"{k} {a:g}": measures() for k in ("ensemble", "wise_ft") for a in settings.get(k) or ()}
        extra = {name.replace("_", "-") if "wise" in name else name: m for name, m in extra.items()}
        test = {"dataset": args.dataset, "classes": classes, "domain": domain, "n": 60, "template": "a photo of a {}."}
        tests.append(test | {"zero_shot": zero_shot, "tuned": measures(), "baseline": None, "extra": extra})
    result = {"schema": 1, "method": job["file"], "dataset": args.dataset, "shots": args.shots, "seed": args.seed}
    result |= {
        "classes": args.classes,
        "model": "toyclip",
        "pretrained": "/x/weights.safetensors",
        "protocol": {"n_train": 9, "template": "a photo of a {}."},
    }
    result |= {"split": f"{args.dataset} {args.shots} {args.seed} {args.classes} {args.label_noise} {args.toy_bias}"}
    result |= {"tests": tests, "harmonic_mean": runs.harmonic_means(tests), "settings": settings, "commit": "abc"}
    result |= {"seconds": {"train": 1.0}, "versions": {"torch": "2"}, "warnings": []}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    keys = {
        "prograd": ("cosine", "projected", "val_accuracy"),
        "vpt": ("sigma", "kl"),
        "proreg": ("w_mean", "w_above_half"),
    }
    lines = [{"epoch": e} | {key: draw.uniform(-1, 1) for key in keys[job["file"]]} for e in range(6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if job["group"] == "vpt_long":
        rng = np.random.default_rng(0)
        arrays = {
            f"{i}/{kind}": rng.dirichlet([1] * 3, 40) for i in range(len(tests)) for kind in ("zero_shot", "tuned")
        }
        np.savez(
            folder / "predictions.npz", **arrays, **{f"{i}/labels": rng.integers(0, 3, 40) for i in range(len(tests))}
        )
    return result


def test_tables_from_invented_results_have_no_holes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(toy_study, "CHOICE_SEEDS", [1])
    monkeypatch.setattr(toy_study, "RATES", [0.02, 0.08])
    jobs = unique(toy_study.choice_jobs(TASKS[:1], world.BIASED))
    for job in jobs.values():
        invent(job, toy_study.folder(scratch, job))
    found = toy_study.choose(list(jobs.values()), scratch)
    point = max(found["grid"]["base-to-new"]["CoOp"], key=lambda row: row["H"])
    assert found["chosen"]["base-to-new"]["CoOp"] == {"lr": point["lr"], "epochs": point["epochs"]}
    assert set(found["chosen"]["proreg"]) == set(chosen()["proreg"])
    (out / "choices.json").write_text(json.dumps({"tasks": TASKS[:1], "seeds": [1]} | found))

    monkeypatch.setattr(toy_study, "SEEDS", [1, 2])
    monkeypatch.setattr(toy_study, "FEW_SEEDS", [1, 2])
    jobs = toy_study.plan(TASKS[:2], world.BIASED, found["chosen"])
    jobs = [job for job in jobs if job["flags"]["seed"] < 3]  # the defaults of add() were bound before
    for job in unique(jobs).values():
        invent(job, toy_study.folder(scratch, job))
    for group in dict.fromkeys(job["group"] for job in jobs):
        rows = [toy_study.record(job, toy_study.folder(scratch, job)) for job in jobs if job["group"] == group]
        toy_study.write_records(out / f"{group}.jsonl", rows)
        back = table.read_runs([out / f"{group}.jsonl"])
        assert [run["tests"][0]["tuned"] for run in back] == [row["tests"][0]["tuned"] for row in rows]
        assert [run["settings"] for run in back] == [row["settings"] for row in rows]
    toy_tables.write(out)
    for name in ("tables.md", "claims.md"):
        text = (out / name).read_text()
        text = "\n".join(line for line in text.splitlines() if not line.startswith("| 10 |"))  # may be out of range
        assert "nan" not in text and "None" not in text and "not measured" not in text, name
    claims = [line.split(" | ") for line in (out / "claims.md").read_text().splitlines() if line.startswith("| ")]
    assert [line[0] for line in claims[2:]] == [f"| {i}" for i in range(1, 17)]
    assert all(cell.strip(" |") for line in claims[2:] for cell in line)
    assert len(list(out.glob("*.svg"))) == 4
