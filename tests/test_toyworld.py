"""The toy world: the same picture everywhere, balanced disjoint parts, honest captions, and a pretraining that runs.

pytest tests/test_toyworld.py
"""

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from toyclip import pretrain, world

ROOT = Path(__file__).resolve().parent.parent
BIASED = world.BIASED


def all_images(name, part, bias=0.95):
    return world.task_images(name, part, range(len(world.task_labels(name, part))), bias)


def scenes_and_labels(part, bias=0.95):
    """Scene and label of every image of a part of toy_shapes_biased."""
    labels = torch.tensor(world.task_labels(BIASED, part))
    n_blocks = -(-len(labels) // world.BLOCK)
    scenes = torch.cat([world.task_block(BIASED, part, block, bias)[1]["scene"] for block in range(n_blocks)])
    return scenes[: len(labels)], labels


def test_an_image_does_not_depend_on_who_else_is_asked_for():
    name = next(iter(world.TASKS))
    together = world.task_images(name, "test", range(150))
    world.task_block.cache_clear()
    for index in (149, 3, 60, 59):
        assert np.array_equal(world.task_image(name, "test", index), together[index])
    assert np.array_equal(world.task_images(name, "test", [120, 2]), together[[120, 2]])
    assert together.dtype == np.uint8 and together.shape == (150, 32, 32, 3)


def test_images_are_equal_in_another_process_and_leave_the_global_generators_alone():
    code = (
        "import hashlib; from toyclip import world;"
        "names = [*list(world.TASKS)[:3], world.BIASED];"
        "data = b''.join(world.task_images(n, 'val', range(70)).tobytes() for n in names);"
        "print(hashlib.sha256(data).hexdigest())"
    )
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    names = [*list(world.TASKS)[:3], BIASED]
    here = hashlib.sha256(b"".join(world.task_images(n, "val", range(70)).tobytes() for n in names)).hexdigest()
    drawn = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert drawn == (torch.rand(1), np.random.rand(), random.random())
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here


def test_parts_are_disjoint_and_labels_balanced():
    for name in [next(iter(world.TASKS)), BIASED]:
        task = world.TASKS[name]
        assert task.parts["test"] >= 60
        seen = []
        for part, per_class in task.parts.items():
            labels = world.task_labels(name, part)
            assert [labels.count(c) for c in range(len(task.classnames))] == [per_class] * len(task.classnames)
            seen += [image.tobytes() for image in all_images(name, part)]
        assert len(set(seen)) == len(seen)


def test_every_task_has_distinct_names_and_halves_that_share_no_leading_factor():
    for name, task in world.TASKS.items():
        assert name.startswith("toy_") and "{}" in task.template
        assert len(set(task.classnames)) == len(task.classnames) == len(task.classes)
        half, leading = len(task.classes) // 2, next(iter(task.classes[0]))
        base, new = ({row[leading] for row in rows} for rows in (task.classes[:half], task.classes[half:]))
        assert not base & new, name


def test_a_class_shows_its_own_factors_and_the_domain_its_own():
    for name, task in world.TASKS.items():
        factors = world.task_block(name, "train", 1, 0.95 if name == BIASED else None)[1]
        for position in range(world.BLOCK):
            wanted = task.classes[(world.BLOCK + position) % len(task.classes)]
            assert all(factors[key][position] == value for key, value in wanted.items())
        for key, value in task.domain.items():
            if isinstance(value, tuple):
                assert ((factors[key] >= value[0]) & (factors[key] <= value[1])).all()
            else:
                assert (factors[key] == world.NAMES[key].index(value)).all()


def test_bias_ties_class_and_scene_in_train_val_and_test_only():
    for part in ("train", "val", "test"):
        scene, label = scenes_and_labels(part)
        assert 0.92 < (scene == label % 8).float().mean() < 0.98
        scene, label = scenes_and_labels(part, 0.125)
        assert 0.08 < (scene == label % 8).float().mean() < 0.17
        scene, label = scenes_and_labels(part, 1.0)
        assert (scene == label % 8).all()
    for part in ("background", "style"):
        scene, label = scenes_and_labels(part)
        assert not (scene == label % 8).any()
        assert len(scene[label == 0].unique()) == 7
        assert np.array_equal(all_images(BIASED, part, 0.95), all_images(BIASED, part, 0.5))
    styles = world.task_block(BIASED, "style", 0, 0.95)[1]["style"].unique().tolist()
    assert len(styles) == 4 and world.STYLES.index("grainy") not in styles
    assert not np.array_equal(
        world.task_images(BIASED, "train", range(60)), world.task_images(BIASED, "train", range(60), 0.1)
    )


def test_bias_is_ignored_by_the_other_tasks_and_an_unknown_index_refused():
    name = next(iter(world.TASKS))
    assert np.array_equal(world.task_image(name, "test", 5, 0.1), world.task_image(name, "test", 5))
    with pytest.raises(IndexError):
        world.task_image(name, "test", len(world.task_labels(name, "test")))


def test_captions_hold_synonyms_leave_things_out_and_are_sometimes_wrong():
    n, generator = 4000, torch.Generator().manual_seed(0)
    circles = world.sample_factors(n, generator, shape="circle", color="red", style="photo")
    texts = world.captions(circles, random.Random(0))
    assert texts == world.captions(circles, random.Random(0))
    words = [set(text.replace(".", "").replace(",", "").split()) for text in texts]

    def share(*names):
        return sum(bool(w & set(names)) for w in words) / n

    assert 0.6 < share("circle") < 0.75 and 0.15 < share("disc", "ball") < 0.3  # synonyms
    assert 0.3 < share("red") < 0.45 and 0.05 < share("crimson") < 0.15  # often no colour at all
    assert 0.005 < share("square", "box", "triangle", "star", "heart", "diamond") < 0.06  # wrong
    assert 0.03 < share("thing", "object", "shape") < 0.12
    assert len(set(texts)) > 0.7 * n
    exact = world.captions(circles, random.Random(0), wrong=0.0)
    assert not any(w & {"square", "box", "star", "wedge", "blue"} for w in (set(text.split()) for text in exact))


def test_tokens_are_open_clips_own_and_cover_every_caption_template_and_class_name():
    tokens, tokenizer = pretrain.Tokens(), open_clip.SimpleTokenizer()
    factors = world.sample_factors(3000, torch.Generator().manual_seed(1))
    texts = world.captions(factors, random.Random(1))
    for task in world.TASKS.values():
        texts += [task.template.format(name) for name in task.classnames]
    texts += [template.format("red circle") for template in world.CAPTION_TEMPLATES]
    rows, ends = tokens(texts)
    wanted = tokenizer(texts)
    assert int(ends.max()) < 77
    ids = torch.tensor(tokens.ids)
    for text, row, end, want in zip(texts, rows, ends, wanted):
        assert ids[row[: end + 1]].tolist() == want[: end + 1].tolist(), text
        assert want.argmax() == end


def test_short_text_forward_equals_open_clips():
    torch.manual_seed(0)
    tokens = pretrain.Tokens()
    model = pretrain.build_model(len(tokens.ids)).eval()
    rows, ends = tokens(world.captions(world.sample_factors(50, torch.Generator().manual_seed(2)), random.Random(2)))
    full = torch.nn.functional.pad(rows, (0, 77 - rows.shape[1]))  # the last row of the table is end-of-text: argmax
    with torch.no_grad():
        ours, theirs = pretrain.text_features(model, rows, ends), model.encode_text(full, normalize=True)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_pretraining_repeats_resumes_and_loads_into_open_clip(tmp_path, monkeypatch):
    flags = ["--batch-size", "16", "--workers", "0", "--steps", "4", "--checkpoint-every", "2"]

    def run(name):
        path = tmp_path / f"{name}.safetensors"
        pretrain.main([*flags, "--out", str(path)])
        return load_file(path)

    first = run("first")
    build = pretrain.Pairs.__getitem__

    def interrupted(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return build(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Pairs, "__getitem__", interrupted)
        run("stopped")
    assert not (tmp_path / "stopped.safetensors").exists()
    for name in ("stopped", "again"):  # going on after step 2, and from nothing: the same weights, bit for bit
        again = run(name)
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}  # no checkpoint is left behind
    ids, rows = first.pop("token_ids"), first.pop("token_rows")
    table = torch.zeros(49408, rows.shape[1], dtype=rows.dtype)
    table[ids.long()] = rows
    open_clip.add_model_config(ROOT / "toyclip" / "toyclip.json")
    model = open_clip.create_model("toyclip")
    model.load_state_dict(first | {"token_embedding.weight": table}, strict=True)
