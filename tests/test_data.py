"""data.py and layouts.py on small generated copies of every layout: python -m pytest tests/test_data.py

COOP_SPLITS=folder also compares the few-shot draw with the 27 published lists in that folder.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import make_data
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

import data
import layouts
from data import UserError, load_dataset, read_dataset
from toyclip import world

ROOT = Path(data.__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
COOP_NAMES = [make.__name__ for make in make_data.MAKERS[:10]]


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """A --data-root with every dataset in CoOp's or its authors' layout."""
    root = tmp_path_factory.mktemp("data")
    for make in make_data.MAKERS:
        make(root)
    make_data.folder(root / "own")
    return root


def names(items):
    return [(Path(address).name, label) for address, label in items]


def sizes(found):
    return [len(found["parts"][part]) for part in data.PARTS]


def fails(*words, **flags):
    """load_dataset raises a UserError of one line that holds these words; returns the line."""
    with pytest.raises(UserError) as error:
        load_dataset(**flags)
    line = str(error.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line, line
    return line


def command(*flags, cwd=ROOT):
    """`python data.py ...` as (exit status, stdout, lines of stderr)."""
    run = subprocess.run([sys.executable, ROOT / "data.py", *map(str, flags)], capture_output=True, text=True, cwd=cwd)
    return run.returncode, run.stdout, run.stderr.strip().split("\n") if run.stderr.strip() else []


# ----------------------------------------------------------------------------------------------------------------------
# The draws
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (GOLDEN / "fewshot.json").exists(), reason=f"no fewshot.json in {GOLDEN}")
def test_fewshot_draw_equals_the_golden_lists():
    split = json.loads((GOLDEN / "fewshot_split.json").read_text())
    items = {part: [(path, label) for path, label, _ in rows] for part, rows in split.items()}
    n = len({label for _, label in items["train"]})
    ranges = {"all": range(n), "base": range(-(-n // 2)), "new": range(-(-n // 2), n)}
    recorded = json.loads((GOLDEN / "fewshot.json").read_text())
    for key, want in recorded.items():
        shots, seed, classes = key.removeprefix("shots").replace("seed", "").split("_")
        train, val = data.fewshot(items["train"], items["val"], int(shots), int(seed))
        for part, got in {"train": train, "val": val, "test": items["test"]}.items():
            got = data.keep_labels(got, ranges[classes])
            assert [list(item) for item in got] == [row[:2] for row in want[part]], (key, part)
        assert len(ranges[classes]) == want["num_classes"]
    assert len(recorded) == 45


COOP_SPLITS = os.environ.get("COOP_SPLITS")


@pytest.mark.skipif(not COOP_SPLITS, reason="COOP_SPLITS does not name the folder of the published lists")
@pytest.mark.parametrize(
    "name, file", [("caltech101", "Caltech101"), ("dtd", "DescribableTextures"), ("oxford_pets", "OxfordPets")]
)
def test_fewshot_draw_equals_the_published_lists(name, file, tmp_path):
    """Through load_dataset and a real split file; the images are empty files, for nothing decodes them."""
    split = json.loads((Path(COOP_SPLITS) / f"split_zhou_{file}.json").read_text())
    images = tmp_path / layouts.TABLE[name]["images"][0]
    for path in {path for rows in split.values() for path, *_ in rows}:
        (images / path).parent.mkdir(parents=True, exist_ok=True)
        (images / path).touch()
    shutil.copy(Path(COOP_SPLITS) / f"split_zhou_{file}.json", images.parent)
    compared = 0
    for published in sorted(Path(COOP_SPLITS).glob(f"fewshot_{name}-*.json")):
        shots, seed = (int(word.split("_")[1]) for word in published.stem.split("-")[1:])
        task, want = load_dataset(name, tmp_path, shots, seed), json.loads(published.read_text())
        for part in ("train", "val"):
            got = [[os.path.relpath(path, images), label] for path, label in getattr(task, part)]
            assert got == [row[:2] for row in want[part]], published.name
        compared += 1
    assert compared == 9
    assert [len(task.tests[0].items), len(task.classnames)] == [
        len(split["test"]),
        1 + max(row[1] for row in split["test"]),
    ]


def test_draws_are_pure_functions_of_their_seed(everything):
    state = random.getstate()
    first = load_dataset("dtd", everything, shots=2, seed=3)
    random.seed(0)
    again = load_dataset("dtd", everything, shots=2, seed=3)
    assert first == again and first.split == again.split
    assert first.train != load_dataset("dtd", everything, shots=2, seed=4).train
    random.setstate(state)
    load_dataset("eurosat", everything, shots=1)
    assert random.getstate() == state  # never the global generator
    code = (
        f"import data; print(data.load_dataset('dtd', {str(everything)!r}, 2, 3).split, data.draw_seed(1, 'order', 2))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert other.split() == [first.split, str(data.draw_seed(1, "order", 2))]
    assert 0 <= data.draw_seed(1, "a") < 2**63 and data.draw_seed(1, "a") != data.draw_seed(2, "a") != data.draw_seed(
        1, "b"
    )


def test_shots(everything):
    task = load_dataset("dtd", everything, shots=2)
    assert [label for _, label in task.train] == [2, 2, 1, 1, 0, 0]  # the split file's order of classes
    assert [label for _, label in task.val] == [2, 2, 1, 1, 0, 0]
    assert len(load_dataset("dtd", everything, shots="all").train) == 15
    scarce = load_dataset("dtd", everything, shots=16)  # there are 5
    assert len(scarce.train) == 15 and "fewer than 16" in " ".join(scarce.notes)
    assert not any("fewer" in note for note in task.notes)


def test_base_and_new_classes(everything):
    every, base = load_dataset("eurosat", everything, 2), load_dataset("eurosat", everything, 2, classes="base")
    assert base.classnames == every.classnames[:2] == ["Annual Crop Land", "Forest"]
    assert base.train == [item for item in every.train if item[1] < 2]  # the draw comes before the halving
    assert [(test.name, test.classes, test.domain) for test in base.tests] == [
        ("eurosat", "base", None),
        ("eurosat", "new", None),
    ]
    assert base.tests[1].classnames == every.classnames[2:] and {y for _, y in base.tests[1].items} == {0, 1}
    assert [(a, y + 2) for a, y in base.tests[1].items] == [item for item in every.tests[0].items if item[1] >= 2]
    odd = load_dataset("dtd", everything, 1, classes="base")
    assert [len(test.classnames) for test in odd.tests] == [2, 1]  # the first ceil(C / 2)


def test_label_noise(everything):
    clean = load_dataset("eurosat", everything, 4)
    noisy = load_dataset("eurosat", everything, 4, label_noise=0.3)
    changed = [(a, b) for a, b in zip(clean.train, noisy.train) if a != b]
    assert len(changed) == round(0.3 * 16) and all(a[0] == b[0] and a[1] != b[1] for a, b in changed)
    assert noisy == load_dataset("eurosat", everything, 4, label_noise=0.3)
    assert noisy.train != load_dataset("eurosat", everything, 4, seed=2, label_noise=0.3).train
    assert (noisy.val, noisy.tests) == (clean.val, clean.tests) and noisy.split != clean.split
    base = load_dataset("eurosat", everything, 4, classes="base", label_noise=1.0)
    assert {label for _, label in base.train} == {0, 1}  # noise stays among the training classes
    drawn = data.flip_labels([("x", 0)] * 3000, 1.0, 4, 0)
    assert all(900 < sum(label == k for _, label in drawn) < 1100 for k in (1, 2, 3))
    fails("--label-noise", name="dtd", data_root=everything, label_noise=1.5)


def test_split_hash(everything, tmp_path):
    items = [("/data/a/é.jpg", 0), ("/data/b/1.jpg", 1)]
    assert data.split_hash(items, "/data") == hashlib.sha1("a/é.jpg\t0\nb/1.jpg\t1\n".encode()).hexdigest()
    make_data.dtd(tmp_path / "one")
    shutil.copytree(tmp_path / "one/dtd", tmp_path / "two/dtd/dtd")  # torchvision's layout
    assert load_dataset("dtd", tmp_path / "one").split == load_dataset("dtd", tmp_path / "two").split
    assert load_dataset("dtd", tmp_path / "one", 2).split != load_dataset("dtd", tmp_path / "one", 2, seed=2).split


# ----------------------------------------------------------------------------------------------------------------------
# The published datasets
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COOP_NAMES)
def test_coop_dataset_with_its_split_file(name, everything):
    found = read_dataset(name, everything)
    n = len(found["classnames"])
    assert sizes(found) == [5 * n, 2 * n, 3 * n] and not any("ours" in note for note in found["notes"])
    task = load_dataset(name, everything, 2)
    assert len(task.train) == 2 * n and task.classnames == found["classnames"]
    assert all(data.read_image(address).mode == "RGB" for address, _ in task.train)
    for template in (task.template, task.teacher_template, *task.ensemble):
        assert template.count("{}") == 1
    assert task.teacher_template.endswith("{}.") and len(task.ensemble) == len(open_clip.OPENAI_IMAGENET_TEMPLATES)


# without its split file a dataset has these class names in label order, and so many images a class in each part
RULES = {
    "caltech101": (["face", "leopard", "accordion", "airplane"], [5, 2, 3]),
    "oxford_pets": (["abyssinian", "american_bulldog", "bengal", "shiba_inu"], [6, 1, 3]),
    "food101": (["apple_pie", "baby_back_ribs", "waffles"], [5, 2, 3]),
    "sun397": (["abbey", "indoor apse", "shop bakery"], [6, 1, 3]),
    "dtd": (["banded", "blotchy", "zigzagged"], [5, 2, 3]),
    "eurosat": (["Annual Crop Land", "Forest", "Highway or Road", "Sea or Lake"], [5, 2, 3]),
    "ucf101": (["Apply_Eye_Makeup", "Hammer_Throw", "Yo_Yo"], [6, 1, 3]),
}


@pytest.mark.parametrize("name", RULES)
def test_coops_rule_where_there_is_no_split_file(name, tmp_path):
    getattr(make_data, name)(tmp_path, split=False)
    found = read_dataset(name, tmp_path)
    classnames, counts = RULES[name]
    assert found["classnames"] == classnames and sizes(found) == [n * len(classnames) for n in counts]
    assert any("the split is ours" in note for note in found["notes"])
    per_class = [len(group) for group in data.by_label(found["parts"]["val"]).values()]
    assert per_class == [counts[1]] * len(classnames)
    together = [address for part in data.PARTS for address, _ in found["parts"][part]]
    assert len(set(together)) == len(together)
    assert (
        load_dataset(name, tmp_path, seed=1).tests == load_dataset(name, tmp_path, seed=2).tests
    )  # whatever --seed is
    if counts[2] == 3 and counts[0] == 6:  # the published test list is kept
        assert {int(Path(a).stem.split("_")[-1].strip("c")) for a, _ in found["parts"]["test"]} == {7, 8, 9}


def test_our_split_does_not_depend_on_the_order_of_files(tmp_path):
    make_data.dtd(tmp_path / "a", split=False)
    for path in sorted((tmp_path / "a").rglob("*.jpg"), reverse=True):
        target = tmp_path / "b" / path.relative_to(tmp_path / "a")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    a, b = load_dataset("dtd", tmp_path / "a", 3), load_dataset("dtd", tmp_path / "b", 3)
    assert (a.split, names(a.tests[0].items)) == (b.split, names(b.tests[0].items))


TORCHVISION_HOMES = {
    "caltech101": "caltech101",
    "oxford_pets": "oxford-iiit-pet",
    "oxford_flowers": "flowers-102",
    "dtd": "dtd/dtd",
}
TORCHVISION_HOMES |= {"fgvc_aircraft": "fgvc-aircraft-2013b/data", "sun397": "."}


@pytest.mark.parametrize("name, home", TORCHVISION_HOMES.items())
def test_torchvisions_layout(name, home, tmp_path, everything):
    getattr(make_data, name)(tmp_path, home=home)
    a, b = load_dataset(name, tmp_path, 2), load_dataset(name, everything, 2)
    assert (a.split, a.classnames, names(a.tests[0].items)) == (b.split, b.classnames, names(b.tests[0].items))


def test_a_split_file_in_coops_place_serves_images_in_torchvisions(tmp_path):
    make_data.caltech101(tmp_path, home="caltech101")
    (tmp_path / "caltech-101").mkdir()
    (tmp_path / "caltech101/split_zhou_Caltech101.json").rename(tmp_path / "caltech-101/split_zhou_Caltech101.json")
    assert not any("ours" in note for note in load_dataset("caltech101", tmp_path).notes)


@pytest.mark.parametrize("name", ["oxford_flowers", "stanford_cars"])
def test_datasets_that_need_their_split_file(name, tmp_path):
    getattr(make_data, name)(tmp_path, split=False)
    split = layouts.TABLE[name]["split"]
    fails(
        split, "put it into", tmp_path, "DATASETS.md", "linzhiqiu/cross_modal_adaptation", name=name, data_root=tmp_path
    )


def test_aircraft_from_its_text_files(everything, tmp_path):
    task = load_dataset("fgvc_aircraft", everything, "all")
    assert task.classnames == ["707-320", "A310", "Cessna 172"]  # the order of variants.txt
    assert names(task.train)[0] == ("0000020.jpg", 2) and len(task.val) == 6
    make_data.fgvc_aircraft(tmp_path)
    lists = tmp_path / "fgvc_aircraft/images_variant_test.txt"
    text = lists.read_text()
    lists.write_text(text.replace("A310", "A999"))
    fails("A999", "0000017.jpg", name="fgvc_aircraft", data_root=tmp_path)
    lists.write_text(text + "\n\n0000003\n")
    fails(
        "images_variant_test.txt, line",
        "does not name an image and its class",
        name="fgvc_aircraft",
        data_root=tmp_path,
    )
    lists.write_text(text.replace("0000017", "9999999"))
    fails("images_variant_test.txt, line", "9999999.jpg is missing", name="fgvc_aircraft", data_root=tmp_path)
    lists.write_text("../../etc/passwd A310\n")
    fails("leaves the dataset's folder", name="fgvc_aircraft", data_root=tmp_path)
    lists.unlink()
    fails("images_variant_test.txt is missing", "put it into", name="fgvc_aircraft", data_root=tmp_path)


def test_zero_shot_and_teacher_templates():
    """CoOp's, and ProGrad's with the class last, as the released code has them."""
    table = {
        name: (row["template"], row.get("teacher_template", row["template"])) for name, row in layouts.TABLE.items()
    }
    assert table["oxford_pets"] == ("a photo of a {}, a type of pet.", "a type of pet, a photo of a {}.")
    assert table["dtd"] == ("{} texture.", "a texture of {}.")
    assert table["food101"] == ("a photo of {}, a type of food.", "a type of food, a photo of {}.")
    assert table["eurosat"] == ("a centered satellite photo of {}.",) * 2
    assert table["ucf101"] == ("a photo of a person doing {}.",) * 2
    assert table["bar"][0] == "the man is {}." and table["pacs"][0] == table["nico_animal"][0] == "this is {}."
    plain = {"imagenet", "caltech101", "stanford_cars", "sun397", "domainnet", "imagenet_a", "imagenet_sketch"}
    assert all(table[name] == ("a photo of a {}.",) * 2 for name in plain)


def test_template_flag(everything):
    task = load_dataset("oxford_pets", everything, template="{} pet", test_on=["dtd"])
    assert [task.template, task.teacher_template, task.tests[0].template] == ["{} pet"] * 3
    assert task.tests[1].template == "{} texture."  # the others keep theirs
    for wrong in ("a photo", "{} and {}", "{name}", "{} {"):
        fails("--template", repr(wrong), name="dtd", data_root=everything, template=wrong)


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet and its variants
# ----------------------------------------------------------------------------------------------------------------------


def test_imagenet(everything):
    task = load_dataset("imagenet", everything, 2)
    assert task.classnames == ["tench", "tabby cat", "missile", "missile"]
    assert "2 are called 'missile'" in " ".join(task.notes) and "sorted file names" in " ".join(task.notes)
    assert (
        len(task.train) == 8 and task.val == [] and len(task.tests[0].items) == 12
    )  # no val draw; its val is our test
    fails("no val images", "--test-part", name="imagenet", data_root=everything, test_part="val")


def test_imagenet_variants_are_for_testing(everything):
    variants = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
    for name in variants:
        fails("for testing only", f"--test-on {name}", name=name, data_root=everything)
    task = load_dataset("imagenet", everything, 1, test_on=variants)
    assert [test.name for test in task.tests] == ["imagenet", *variants]
    assert [len(test.items) for test in task.tests] == [12, 8, 8, 6, 6]
    assert task.tests[1].classnames == task.classnames and task.tests[3].classnames == task.classnames[1:]
    v2 = {(Path(a).parent.name, label) for a, label in task.tests[1].items}
    assert v2 == {(str(label), label) for label in range(4)}
    a = {(Path(a).parent.name, label) for a, label in task.tests[3].items}
    assert a == {("n02123045", 0), ("n03773504", 1), ("n04008634", 2)}


def test_imagenet_without_classnames_txt(tmp_path):
    make_data.imagenet(tmp_path)
    (tmp_path / "imagenet/classnames.txt").unlink()
    fails("4 classes, not 1,000, in", "classnames.txt", name="imagenet", data_root=tmp_path)
    make_data.image(tmp_path / "one.jpg")
    for part in ("train", "val"):
        for wnid in layouts.WNIDS:
            (tmp_path / "imagenet/images" / part / wnid).mkdir(exist_ok=True)
            os.link(tmp_path / "one.jpg", tmp_path / "imagenet/images" / part / wnid / "1.JPEG")
    task = load_dataset("imagenet", tmp_path, 1)
    assert task.classnames == list(open_clip.IMAGENET_CLASSNAMES) and "IMAGENET_CLASSNAMES" in " ".join(task.notes)
    assert task.classnames[layouts.WNIDS.index("n02123045")] == "tabby cat"
    assert len(layouts.WNIDS) == 1000 and layouts.WNIDS == sorted(layouts.WNIDS)


def test_imagenet_a_takes_names_by_wnid(tmp_path):
    """Without ImageNet and without classnames.txt."""
    make_data.imagenet_variants(tmp_path)
    test = load_dataset("toy_shapes_biased", tmp_path, 1, test_on=["imagenet_a"]).tests[-1]
    assert test.classnames == ["tabby cat", "missile", "missile"]
    (tmp_path / "imagenet-adversarial/imagenet-a/n99999999").mkdir()
    make_data.image(tmp_path / "imagenet-adversarial/imagenet-a/n99999999/1.jpg")
    fails("'n99999999'", name="toy_shapes_biased", data_root=tmp_path, test_on=["imagenet_a"])
    fails("1,000", name="toy_shapes_biased", data_root=tmp_path, test_on=["imagenet_sketch"])


def test_imagenet_whose_val_is_not_sorted_into_classes(tmp_path):
    make_data.imagenet(tmp_path)
    shutil.rmtree(tmp_path / "imagenet/images/val")
    make_data.image(tmp_path / "imagenet/images/val/ILSVRC2012_val_00000001.JPEG")
    fails("images/val has no class folders", "CLASS", name="imagenet", data_root=tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# ProReg's data: domains
# ----------------------------------------------------------------------------------------------------------------------


def rows(task):
    return [(test.domain, len(test.items)) for test in task.tests]


def test_pacs(everything, tmp_path):
    task = load_dataset("pacs", everything, "all", test_domain="photo sketch".split()[1:])
    assert task.classnames == ["dog", "elephant", "giraffe"] and task.template == "this is {}."
    assert rows(task) == [("art_painting+cartoon+photo", 9), ("sketch", 30)]  # the test list is the whole domain
    assert {Path(a).stem for a, _ in task.val} == {"pic_9"} and len(task.val) == 9  # the crossval lists
    assert len(task.train) == 81 - 9 and "10% test" in " ".join(task.notes)  # ours: a tenth of the train lists
    assert rows(load_dataset("pacs", everything))[1:] == [("art_painting", 30)]
    assert rows(load_dataset("pacs", everything, train_domain=["photo"]))[0] == ("photo", 3)
    make_data.pacs(tmp_path, lists=False)
    task = load_dataset("pacs", tmp_path, "all", test_domain=["sketch"])
    assert (len(task.train), len(task.val)) == (72, 9) and "10% val, 10% test" in " ".join(task.notes)
    shutil.rmtree(tmp_path / "pacs/images/cartoon")
    fails("no domain 'cartoon'", "art_painting, photo", name="pacs", data_root=tmp_path, test_domain=["cartoon"])


def test_domainnet(everything, tmp_path):
    task = load_dataset("domainnet", everything, "all")
    assert rows(task) == [("sketch", 9), ("clipart", 9), ("painting", 9), ("real", 9)]
    assert (len(task.train), len(task.val)) == (21 - 3, 3)  # val is ours: a tenth of the train list
    assert {Path(a).stem for a, _ in task.tests[0].items} == {"sketch_7", "sketch_8", "sketch_9"}  # sketch_test.txt
    make_data.domainnet(tmp_path, lists=False)
    assert rows(load_dataset("domainnet", tmp_path)) == [("sketch", 3), ("clipart", 30), ("painting", 30), ("real", 30)]


def test_a_class_that_a_domain_lacks_is_a_note(tmp_path):
    """As in DomainNet, whose painting_train.txt has no t-shirt."""
    make_data.domainnet(tmp_path)
    path = tmp_path / "domainnet/painting_train.txt"
    path.write_text("\n".join(line for line in path.read_text().split("\n") if "t-shirt" not in line))
    task = load_dataset("domainnet", tmp_path, train_domain=["painting"], test_domain=["real"])
    assert len(task.classnames) == 3 and {label for _, label in task.train} == {0, 2}
    assert "1 classes have no train image, 't-shirt'" in " ".join(task.notes)


def test_bar(everything, tmp_path):
    task = load_dataset("bar", everything, "all")
    assert task.classnames == ["climbing", "diving", "pole vaulting"] and task.template == "the man is {}."
    assert rows(task) == [("train", 3), ("test", 30)] and (len(task.train), len(task.val)) == (24, 3)
    make_data.images(tmp_path / "bar/train/climbing")  # a wrong layout
    make_data.images(tmp_path / "bar/test/climbing")
    fails("no class in its name", "CLASS_NUMBER.jpg", name="bar", data_root=tmp_path)


def test_nico(everything, tmp_path):
    task = load_dataset("nico_animal", everything, "all")
    assert rows(task) == [("seen contexts", 6), ("held-out contexts", 40)] and task.classnames == ["bear", "dog"]
    held_out = {Path(address).parent.name for address, _ in task.tests[1].items}
    assert held_out == {"on grass", "only a bear", "only a dog"}  # of 5 contexts a class, the last 2 by name
    task = load_dataset("nico_vehicle", everything, test_domain=["on grass", "eating"])
    assert rows(task)[1:] == [("on grass", 20), ("eating", 20)]
    fails("no domain 'on ice'", "in forest", name="nico_animal", data_root=everything, test_domain=["on ice"])
    make_data.images(tmp_path / "nico/animal/dog")  # no contexts
    fails("animal/dog has no class folders", name="nico_animal", data_root=tmp_path)


def test_domains_with_base_and_new_classes(everything):
    task = load_dataset("pacs", everything, classes="base", test_domain=["sketch"])
    assert [(t.domain, t.classes) for t in task.tests[:2]] == [
        ("art_painting+cartoon+photo", "base"),
        ("art_painting+cartoon+photo", "new"),
    ]
    assert [(t.domain, t.classes) for t in task.tests[2:]] == [("sketch", "base"), ("sketch", "new")]


def test_domain_flags_that_do_not_fit(everything):
    pacs = dict(name="pacs", data_root=everything)
    fails("no domain 'Photo'", "art_painting, cartoon, photo, sketch", test_domain=["Photo"], **pacs)
    fails("different domains", train_domain=["photo"], test_domain="photo", **pacs)
    fails("different domains", train_domain=["photo", "sketch", "cartoon", "art_painting"], **pacs)
    fails("dtd has no domains", name="dtd", data_root=everything, test_domain=["photo"])
    fails("--domains is for folder:PATH", name="dtd", data_root=everything, domains=True)
    own = f"folder:{everything}/pacs/images"
    fails("--domains", name=own, test_domain=["photo"])
    fails("--train-domain", "--test-domain", "cartoon", name=own, domains=True)


def test_folder_of_domains(everything):
    task = load_dataset(f"folder:{everything}/pacs/images", shots="all", domains=True, train_domain=["photo"])
    assert rows(task) == [("photo", 3), ("art_painting", 30), ("cartoon", 30), ("sketch", 30)]
    assert len(task.train) == 24 and "the split is ours" in " ".join(task.notes)


# ----------------------------------------------------------------------------------------------------------------------
# A user's own folder
# ----------------------------------------------------------------------------------------------------------------------


def test_folder_with_parts(everything, tmp_path):
    task = load_dataset(f"folder:{everything}/own", shots="all")
    assert task.classnames == ["cat", "dog", "größe №1"] and task.template == "a photo of a {}."
    assert [len(task.train), len(task.val), len(task.tests[0].items)] == [30, 30, 30] and task.notes == []
    assert {Path(address).parts[-3] for address, _ in task.val} == {"val"}
    make_data.folder(tmp_path, parts=("train", "test", "valid"))
    assert len(load_dataset(f"folder:{tmp_path}", shots="all").val) == 30
    shutil.rmtree(tmp_path / "test")
    task = load_dataset(f"folder:{tmp_path}", shots="all")  # train and val only, as many folders are: val is tested on
    assert [len(task.val), len(task.tests[0].items)] == [0, 30] and "no test folder" in " ".join(task.notes)
    shutil.rmtree(tmp_path / "train")
    fails("has val:", "train/CLASS", "test/CLASS", name=f"folder:{tmp_path}")


def test_folder_with_our_split(tmp_path):
    make_data.folder(tmp_path, parts=())
    task = load_dataset(f"folder:{tmp_path}", shots="all")
    assert [len(task.train), len(task.val), len(task.tests[0].items)] == [15, 6, 9]
    assert "the split is ours: 50% train, 20% val" in " ".join(task.notes)
    assert load_dataset(f"folder:{tmp_path}", seed=5).tests == task.tests


def test_folder_of_domains_without_the_flag_is_noted(everything):
    assert "add --domains" in " ".join(load_dataset(f"folder:{everything}/pacs/images").notes)


def test_folder_with_a_class_called_train(tmp_path):
    make_data.folder(tmp_path, parts=(), classes=("bus", "test", "train"))
    assert load_dataset(f"folder:{tmp_path}").classnames == ["bus", "test", "train"]


def test_folder_with_ood_sets(tmp_path):
    make_data.folder(tmp_path)
    make_data.folder(tmp_path / "ood", parts=("at night",), classes=("dog", "cat"))
    task = load_dataset(f"folder:{tmp_path}")
    assert rows(task) == [(None, 30), ("at night", 20)] and {y for _, y in task.tests[1].items} == {0, 1}
    assert rows(load_dataset(f"folder:{tmp_path}", test_part="val")) == [(None, 30)]  # settings are not chosen on it
    make_data.images(tmp_path / "ood/at night/zebra")
    fails("'zebra'", "at night", name=f"folder:{tmp_path}")


def test_classnames_txt(tmp_path):
    make_data.folder(tmp_path, parts=(), classes=("c1", "c10", "c 2"))
    file = tmp_path / "classnames.txt"
    file.write_text("c10 tin opener\nc1\tcat flap\nc 2  dog\n")
    assert load_dataset(f"folder:{tmp_path}").classnames == [
        "dog",
        "cat flap",
        "tin opener",
    ]  # sorted: "c 2", "c1", "c10"
    file.write_text("one\n\ntwo words\ndrei ß\n", encoding="utf-8")
    assert load_dataset(f"folder:{tmp_path}").classnames == ["one", "two words", "drei ß"]
    file.write_text("cat\ncat\ndog\n")  # equal names are allowed, with a note
    task = load_dataset(f"folder:{tmp_path}")
    assert task.classnames == ["cat", "cat", "dog"] and "2 are called 'cat'" in " ".join(task.notes)
    file.write_text("one\ntwo\n")
    fails("classnames.txt has 2 lines for 3 classes", name=f"folder:{tmp_path}")
    file.write_bytes(b"\xff\xfe\x00")
    fails("not UTF-8", name=f"folder:{tmp_path}")


def test_folders_that_cannot_be_used(tmp_path):
    fails("no such", name=f"folder:{tmp_path}/no such")
    (tmp_path / "file.txt").touch()
    fails("file.txt", name=f"folder:{tmp_path}/file.txt")
    fails("has no class folders", "CLASS", name=f"folder:{tmp_path}")
    make_data.folder(tmp_path, parts=())
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "an empty class", name=f"folder:{tmp_path}")
    (tmp_path / "empty/notes.txt").touch()
    fails(tmp_path / "empty", "an empty class", name=f"folder:{tmp_path}")
    (tmp_path / "empty/notes.txt").rename(tmp_path / "empty/one.png")
    fails("class 'empty' is empty", name=f"folder:{tmp_path}")  # one image cannot be split
    make_data.folder(tmp_path / "parts")
    make_data.images(tmp_path / "parts/test/zebra")
    fails("'zebra'", "training classes", name=f"folder:{tmp_path}/parts")
    fails("no test images of new classes", name=f"folder:{one_class(tmp_path / 'one')}", classes="base")


def one_class(path):
    make_data.folder(path, classes=("only",))
    return path


def test_listing(tmp_path):
    """Hidden files, other files, deeper folders, symbolic links and loops, odd names."""
    make_data.images(tmp_path / "cat", 2)
    make_data.images(tmp_path / "cat/deeper/still", 2, "{}.PNG")
    for name in (".hidden.jpg", "notes.txt", ".git/x.jpg", "Thumbs.db"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).touch()
    make_data.images(tmp_path / "__MACOSX", 1)
    make_data.images(tmp_path / ".cache", 1)
    os.symlink(tmp_path / "cat", tmp_path / "cat/loop")
    os.symlink(tmp_path / "elsewhere", tmp_path / "dog")
    make_data.images(tmp_path / "elsewhere", 3)
    tree = layouts.class_files(str(tmp_path), ["elsewhere"])
    assert {key: [os.path.relpath(p, tmp_path / key) for p in paths] for key, paths in tree.items()} == {
        "cat": ["0.jpg", "1.jpg", "deeper/still/0.PNG", "deeper/still/1.PNG"],
        "dog": ["0.jpg", "1.jpg", "2.jpg"],
    }
    os.symlink(tmp_path / "self", tmp_path / "self")
    with pytest.raises(UserError, match="self"):
        layouts.read_layout(f"folder:{tmp_path}", "")


def test_a_file_name_that_is_no_text(tmp_path):
    make_data.folder(tmp_path, parts=())
    try:
        os.rename(tmp_path / "cat/ 0.jpg", os.fsencode(tmp_path) + b"/cat/\xff\xfe.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(load_dataset(f"folder:{tmp_path}", shots="all").split) == 40
    status, out, _ = command("--dataset", f"folder:{tmp_path}", "--check-images")
    assert status == 0 and "all 30 images can be read" in out


# ----------------------------------------------------------------------------------------------------------------------
# Split files of strangers
# ----------------------------------------------------------------------------------------------------------------------

GOOD = [["banded/0.jpg", 0, "banded"], ["blotchy/0.jpg", 1, "blotchy"]]
BAD_SPLITS = {
    "an absolute path": ([["/etc/passwd", 0, "banded"]], ["train[0]", "'/etc/passwd'", "leaves"]),
    "a path upwards": ([["banded/../../../x.jpg", 0, "banded"]], ["train[0]", "leaves"]),
    "a path upwards, Windows": ([["banded\\..\\..\\x.jpg", 0, "banded"]], ["train[0]", "leaves"]),
    "a null character": ([["banded/0.jpg\0", 0, "banded"]], ["train[0]", "leaves"]),
    "two names of a label": ([["banded/1.jpg", 1, "banded"]], ["test[1]", "label 1", "'blotchy'", "'banded'"]),
    "a missing image": ([["banded/999.jpg", 0, "banded"]], ["train[0]", "banded/999.jpg is missing"]),
    "a missing folder": ([["nowhere/999.jpg", 0, "banded"]], ["nowhere/999.jpg is missing"]),
    "a gap in the labels": ([["banded/1.jpg", 7, "striped"]], ["label 2 has no image", "an empty class"]),
    "a huge label": ([["banded/1.jpg", 10**30, "striped"]], ["label 2 has no image"]),
    "a class without training images": ([["banded/1.jpg", 0, "banded"]], ["'blotchy'", "no training image"]),
    "no training images": ([], ["no training image"]),
    "a label that is text": ([["banded/0.jpg", "0", "banded"]], ["train[0]", "is not [path, label, class name]"]),
    "a label that is true": ([["banded/0.jpg", True, "banded"]], ["train[0]", "is not [path, label, class name]"]),
    "a negative label": ([["banded/0.jpg", -1, "banded"]], ["train[0]", "is not [path, label, class name]"]),
    "two values": ([["banded/0.jpg", 0]], ["train[0]", "is not [path, label, class name]"]),
    "a dictionary": ([{"path": "banded/0.jpg"}], ["train[0]", "is not [path, label, class name]"]),
    "a list that is none": ("banded", ['no list "train"']),
}


@pytest.mark.parametrize("what", BAD_SPLITS)
def test_bad_split_files(what, tmp_path):
    make_data.dtd(tmp_path)
    train, words = BAD_SPLITS[what]
    split = {"train": train, "val": GOOD, "test": GOOD}
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    if what == "two names of a label":
        split = {"train": GOOD, "val": GOOD, "test": GOOD[:1] + train}
        (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    fails(*words, name="dtd", data_root=tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b"[" * 200_000, b'{"train": []}', b'{"train": [], "val": [], "test": []}']
)
def test_split_files_that_are_none(text, tmp_path):
    make_data.dtd(tmp_path)
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_bytes(text)
    fails("split_zhou_DescribableTextures.json", name="dtd", data_root=tmp_path)


def test_a_split_file_of_a_gigabyte_is_not_read(tmp_path):
    make_data.dtd(tmp_path)
    with open(tmp_path / "dtd/split_zhou_DescribableTextures.json", "wb") as file:
        file.truncate(1 << 30)  # sparse
    fails("1,073,741,824 bytes", name="dtd", data_root=tmp_path)


def test_images_in_both_parts_are_noted(tmp_path):
    make_data.dtd(tmp_path)
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(dict.fromkeys(data.PARTS, GOOD)))
    assert "2 images are in both" in " ".join(load_dataset("dtd", tmp_path).notes)


# ----------------------------------------------------------------------------------------------------------------------
# Missing datasets, downloads, further test sets, toy tasks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", layouts.TABLE)
def test_missing_dataset(name, tmp_path):
    row = layouts.TABLE[name]
    line = fails(name, tmp_path / row["images"][0], row["published"], name=name, data_root=tmp_path)
    assert ("--download" in line) == ("download" in row)
    if "download" not in row:
        fails("--download cannot fetch it", row["published"], name=name, data_root=tmp_path, download=True)


def test_download(tmp_path, monkeypatch):
    def fetch(root, download):
        assert download is True
        make_data.dtd(Path(root), split=False, home="dtd/dtd")

    monkeypatch.setattr(torchvision_datasets, "DTD", fetch)
    assert len(load_dataset("dtd", tmp_path, download=True).classnames) == 3
    monkeypatch.setattr(torchvision_datasets, "DTD", None)
    load_dataset("dtd", tmp_path, download=True)  # it is there already: nothing is fetched

    def offline(root, download):
        raise OSError("<urlopen error\n[Errno -3] no network>")

    monkeypatch.setattr(torchvision_datasets, "EuroSAT", offline)
    fails("the download failed", "no network", "EuroSAT.zip", name="eurosat", data_root=tmp_path, download=True)


def test_every_download_name_is_a_torchvision_dataset():
    assert {row["download"] for row in layouts.TABLE.values() if "download" in row} == {
        "Caltech101", "OxfordIIITPet", "Food101", "FGVCAircraft", "DTD", "EuroSAT"}  # fmt: skip
    for row in layouts.TABLE.values():
        assert hasattr(torchvision_datasets, row.get("download", "DTD"))


def test_unknown_names(everything):
    fails("'eurosta'", "did you mean eurosat?", name="eurosta", data_root=everything)
    fails("'zzzz'", "folder:PATH", name="zzzz", data_root=everything)
    fails("'folder:'", "folder:PATH", name="folder:", data_root=everything)
    fails("did you mean", name="dtd", data_root=everything, test_on=["caltech102"])


def test_test_on(everything):
    task = load_dataset("dtd", everything, test_on=["oxford_pets", "pacs", f"folder:{everything}/own", "dtd"])
    assert [(t.name.split("/")[-1], t.domain) for t in task.tests] == [
        ("dtd", None), ("oxford_pets", None),
        ("pacs", "art_painting"), ("pacs", "cartoon"), ("pacs", "photo"), ("pacs", "sketch"),
        ("own", None)]  # fmt: skip
    pets = task.tests[1]
    assert pets.template == "a photo of a {}, a type of pet." and len(pets.classnames) == 4 and pets.classes == "all"
    base = load_dataset("dtd", everything, classes="base", test_on=["oxford_pets", "dtd"])
    assert [(t.name, t.classes) for t in base.tests] == [
        ("dtd", "base"),
        ("dtd", "new"),
        ("oxford_pets", "all"),
        ("dtd", "all"),
    ]
    fails("no images", name="dtd", data_root=everything / "own", test_on=["dtd"])


def test_test_part_val(everything):
    task = load_dataset("dtd", everything, 1, test_part="val", classes="base", test_on=["oxford_pets"])
    assert [len(test.items) for test in task.tests] == [4, 2, 8]  # the whole val part, not the draw
    assert rows(load_dataset("pacs", everything, test_part="val")) == [("cartoon+photo+sketch", 9)]
    fails("no val", name="dtd", data_root=everything, test_part="val", test_on=["imagenet_a"])


@pytest.mark.parametrize("name", world.TASKS)
def test_toy_tasks(name):
    task = load_dataset(name, shots=2)
    assert task.classnames == world.TASKS[name].classnames and len(task.train) == 2 * len(task.classnames)
    assert task.ensemble == list(world.CAPTION_TEMPLATES) and task.template.count("{}") == 1
    assert {label for _, label in task.tests[0].items} == set(range(len(task.classnames)))
    image = data.read_image(task.train[0][0])
    assert image.mode == "RGB" and image.size == (32, 32)


def test_biased_toy_task():
    name = "toy_shapes_biased"
    task, unbiased = load_dataset(name), load_dataset(name, toy_bias=0.125)
    assert [test.domain for test in task.tests] == [None, "background", "style"]
    assert task.train[0][0].startswith(f"toy:{name}/train/") and unbiased.train[0][0].startswith(
        f"toy:{name}@0.125/train/"
    )
    pixels = [
        np.asarray(data.read_image(address))
        for address in ("toy:toy_shapes_biased/test/7", "toy:toy_shapes_biased@0.95/test/7")
    ]
    assert (pixels[0] == pixels[1]).all() and (pixels[0] == world.task_image(name, "test", 7)).all()
    assert [test.domain for test in load_dataset(name, test_part="val").tests] == [None]
    other = next(task for task in world.TASKS if task != name)
    for wrong in (dict(name=other, toy_bias=0.5), dict(name="dtd", toy_bias=0.5), dict(name=name, toy_bias=1.5)):
        fails("--toy-bias", name, **wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------


def test_read_image_of_every_kind(tmp_path):
    red = Image.new("RGB", (8, 4), (200, 30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    red.save(tmp_path / "turned.jpg", exif=exif)
    red.save(tmp_path / "plain.webp", lossless=True)
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    red.quantize(4).save(tmp_path / "palette.png")
    red.quantize(4).save(tmp_path / "clear.png", transparency=b"\x00\x80\xff\xff")
    red.quantize(4).save(tmp_path / "moving.gif", save_all=True, append_images=[red])
    red.convert("RGBA").save(tmp_path / "rgba.png")
    red.save(tmp_path / "bits.bmp")
    red.save(tmp_path / "ENDING.TIFF")
    for path in sorted(tmp_path.iterdir()):
        image = data.read_image(str(path))
        assert image.mode == "RGB" and image.size == ((4, 8) if path.stem == "turned" else (8, 4))
        assert np.abs(np.asarray(image).astype(int) - (200, 30, 10)).max() <= 12, path
    assert len(layouts.list_images(str(tmp_path))) == 9
    red.convert("L").save(tmp_path / "grey.png")
    red.convert("LA").save(tmp_path / "grey_alpha.png")
    red.convert("1").save(tmp_path / "bit.png")
    for name in ("grey", "grey_alpha", "bit"):
        assert data.read_image(str(tmp_path / f"{name}.png")).mode == "RGB"
    deep = np.array([[0, 256, 40_000, 65_535]], np.uint16)
    Image.frombytes("I;16B", (4, 1), deep.astype(">u2").tobytes()).save(tmp_path / "motorola.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "integers.tif")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for name in ("deep.png", "motorola.tif", "integers.tif"):
        assert np.asarray(data.read_image(str(tmp_path / name)))[0, :, 0].tolist() == [0, 1, 156, 255]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(tmp_path):
    make_data.images(tmp_path / "cat", 3)
    whole = (tmp_path / "cat/0.jpg").read_bytes()
    (tmp_path / "cat/truncated.jpg").write_bytes(whole[: len(whole) - 100])
    (tmp_path / "cat/empty.png").touch()
    (tmp_path / "cat/text.jpg").write_text("not an image")
    (tmp_path / "cat/script.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )  # would start Ghostscript
    os.symlink(tmp_path / "gone.jpg", tmp_path / "cat/broken.jpg")
    Image.new("1", (20_000, 6_000)).save(tmp_path / "cat/bomb.png")
    items = [(path, 0) for path in layouts.list_images(str(tmp_path))]
    bad = {Path(path).name: reason for path, reason in data.bad_images(items + items[:2])}
    assert sorted(bad) == ["bomb.png", "broken.jpg", "empty.png", "script.jpg", "text.jpg", "truncated.jpg"]
    assert "20000 x 6000 pixels" in bad["bomb.png"] and "truncated" in bad["truncated.jpg"].lower()
    with pytest.raises(UserError, match=f"^{tmp_path}/cat/text.jpg: "):
        data.read_image(f"{tmp_path}/cat/text.jpg")


def test_train_transform():
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None, load_weights=False)
    assert data.train_transform(preprocess, "none") is preprocess
    crop = data.train_transform(preprocess, "crop")
    resized, flip, _, normalise = crop.transforms
    assert isinstance(resized, transforms.RandomResizedCrop) and isinstance(flip, transforms.RandomHorizontalFlip)
    assert tuple(resized.size) == (224, 224) and resized.scale == (0.08, 1.0)
    assert resized.interpolation is transforms.InterpolationMode.BICUBIC and resized.antialias
    assert (
        tuple(normalise.mean) == open_clip.OPENAI_DATASET_MEAN and tuple(normalise.std) == open_clip.OPENAI_DATASET_STD
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    for augment in ("crop", "randaugment"):
        transform, views = data.train_transform(preprocess, augment), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            views.append(transform(image))
        assert views[0].shape == (3, 224, 224) and views[0].equal(views[1]) and not views[0].equal(views[2])
        assert repr(transform) == repr(data.train_transform(preprocess, augment))  # it is part of a cache key


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_describe(everything, capsys):
    data.main(["--dataset", "dtd", "--data-root", str(everything), "--shots", "2", "--test-on", "eurosat"])
    out = capsys.readouterr().out
    assert '"{} texture."' in out and load_dataset("dtd", everything, 2).split in out
    assert "6 training and 6 validation images" in out and "test: eurosat, all 4 classes, 12 images" in out
    assert [line.split() for line in out.split("\n")[-5:-1]] == [
        ["0", "banded", "5", "2", "3"], ["1", "blotchy", "5", "2", "3"], ["2", "zigzagged", "5", "2", "3"],
        ["all", "15", "6", "9"]]  # fmt: skip
    data.main(["--dataset", "imagenet_a", "--data-root", str(everything)])  # no training list, no error
    data.main(["--dataset", "bar", "--data-root", str(everything)])
    assert "ood/test" in capsys.readouterr().out


def test_overview(everything, capsys):
    (everything / "none").mkdir(exist_ok=True)
    data.main(["--dataset", "all", "--data-root", str(everything)])
    out = capsys.readouterr().out
    assert len(out.strip().split("\n")) == 1 + len(layouts.TABLE) and "no images" not in out
    data.main(["--dataset", "all", "--data-root", str(everything / "none")])
    assert capsys.readouterr().out.count("no images in") == len(layouts.TABLE)


def test_show(everything, tmp_path, capsys):
    for name in ("toy_shapes_biased", "dtd", f"folder:{everything}/own"):
        data.main(["--dataset", name, "--data-root", str(everything), "--show", str(tmp_path / "sheet.png")])
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        assert sheet.std() > 10
    for wrong in ("no/folder/x.png", "x.unknown"):
        with pytest.raises(UserError, match="--show"):
            data.main(["--dataset", "toy_shapes_biased", "--show", str(tmp_path / wrong)])


def test_check_images(tmp_path, capsys):
    make_data.folder(tmp_path)
    flags = ["--dataset", f"folder:{tmp_path}", "--check-images"]
    data.main(flags)
    assert "all 90 images can be read" in capsys.readouterr().out
    (tmp_path / "val/cat/val 3.jpg").write_text("no image")
    with pytest.raises(UserError, match="1 of 90 images cannot be read"):
        data.main(flags)
    assert f"bad: {tmp_path}/val/cat/val 3.jpg: cannot identify" in capsys.readouterr().out


def test_mistakes_on_the_command_line(tmp_path, capsys):
    status, _, err = command("--dataset", "dtd", "--data-root", tmp_path)
    assert status == 2 and len(err) == 1 and err[0].startswith("error: dtd: no images in ")
    for flags in (["--dataset", "dtd", "--data", "x"], ["--shots", "0"], ["--shots", "few"], ["--classes", "new"], []):
        with pytest.raises(SystemExit) as stop:
            data.main(flags)
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(everything):
    run = f"{sys.executable} {ROOT / 'data.py'} --dataset dtd --data-root {everything} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True)
    assert done.returncode == 0 and "Error" not in done.stderr
