"""data.py on small copies of every dataset's layout, and on folders that people have."""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import types
import unicodedata
from pathlib import Path

import make_data
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError

HERE = Path(__file__).resolve().parent
SPLITS = Path(os.environ.get("COOP_SPLITS", HERE.parents[1] / "shared" / "coop_splits"))


def arguments(dataset, root="data", **changed) -> argparse.Namespace:
    flags = {"dataset": str(dataset), "data_root": str(root), "download": False, "shots": 4}
    flags |= {"seed": 1, "classes": "all", "test_on": [], "test_part": "test", "template": None}
    flags |= {"train_domain": None, "test_domain": None, "cache_dir": "cache", "out_dir": None}
    flags["eval"] = None
    return argparse.Namespace(**flags | changed)


def load(dataset, root="data", **changed) -> data.Task:
    return data.load_task(arguments(dataset, root, **changed))


def read(dataset, root="data", **changed) -> data.Found:
    return data.read(str(dataset), arguments(dataset, root, **changed))


def photos(root: Path, classes=("cat", "dog"), n=10, parts=("",)) -> Path:
    """Images of a user's own, each with another content."""
    for part in parts:
        for cls in classes:
            for i in range(n):
                make_data.image(root / part / cls / f"{part}{i}.png")
    return root


def below(items, root) -> set[str]:
    return {os.path.relpath(address, root) for address, _ in items}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for make in make_data.MAKERS:
        make(root)
    return root


# The published datasets ---------------------------------------------------------------------------
SIZES = {  # dataset: classes, train, val, test, other domains
    "imagenet": (4, 40, 0, 12, 0),
    "caltech101": (4, 20, 8, 12, 0),
    "oxford_pets": (4, 20, 8, 12, 0),
    "stanford_cars": (3, 15, 6, 9, 0),
    "oxford_flowers": (3, 15, 6, 9, 0),
    "food101": (3, 15, 6, 9, 0),
    "fgvc_aircraft": (3, 15, 6, 9, 0),
    "sun397": (3, 15, 6, 9, 0),
    "dtd": (3, 15, 6, 9, 0),
    "eurosat": (4, 20, 8, 12, 0),
    "ucf101": (3, 15, 6, 9, 0),
    "imagenetv2": (4, 0, 0, 8, 0),
    "imagenet_sketch": (4, 0, 0, 8, 0),
    "imagenet_a": (3, 0, 0, 6, 0),
    "imagenet_r": (3, 0, 0, 6, 0),
    "bar": (3, 24, 3, 3, 30),
    "nico_animal": (2, 48, 6, 6, 40),
    "nico_vehicle": (2, 48, 6, 6, 40),
    "pacs": (3, 72, 9, 9, 30),
    "domainnet": (3, 18, 3, 9, 27),
}


@pytest.mark.parametrize("name", data.SOURCES)
def test_every_dataset(name, everything):
    found = read(name, everything)
    counts = [len(found.sets[part, ""]) for part in ("train", "val", "test")]
    others = sum(len(items) for (_, domain), items in found.sets.items() if domain)
    assert (len(found.classnames), *counts, others) == SIZES[name]
    for part in found.sets.values():
        assert all(os.path.isfile(address) for address, _ in part)


def test_names_and_templates(everything):
    assert read("caltech101", everything).classnames == ["face", "leopard", "accordion", "airplane"]
    assert read("fgvc_aircraft", everything).classnames == ["707-320", "A310", "Cessna 172"]
    assert read("bar", everything).classnames == ["climbing", "diving", "pole vaulting"]
    names = read("domainnet", everything).classnames
    assert names == ["aircraft_carrier", "t-shirt", "The_Mona_Lisa"]  # sorted without case
    pets = load("oxford_pets", everything)
    assert pets.template == "a photo of a {}, a type of pet."
    assert pets.teacher_template == "a type of pet, a photo of a {}."
    assert load("oxford_pets", everything, template="my {}").teacher_template == "my {}"


def test_domains_of_flags(everything):
    task = load("pacs", everything, test_domain=["sketch"])
    assert [test.domain for test in task.tests] == ["", "sketch"]
    assert all("sketch/" not in address for address, _ in task.train)
    with pytest.raises(UserError, match="trains on .*'moon'"):
        load("pacs", everything, test_domain=["moon"])


def test_pacs_without_its_lists(tmp_path):
    """A fixed split of 80/10/10 for each class, said in a note."""
    make_data.pacs(tmp_path, lists=False)
    found = read("pacs", tmp_path)
    assert [len(found.sets[part, ""]) for part in ("train", "val", "test")] == [72, 9, 9]
    assert any("not by its published lists" in note for note in found.notes)
    assert any("split: ours, 10% val, 10% test" in note for note in found.notes)


def test_imagenet_names(everything, tmp_path):
    """classnames.txt where it is there, else open_clip's for the WordNet ids; a note says which."""
    found = read("imagenet", everything)
    assert found.classnames == ["tench", "tabby cat", "missile", "missile"]
    assert any("classnames.txt" in note for note in found.notes)
    assert any("one prompt" in note for note in found.notes)  # two missiles: its own list has them
    shutil.copytree(everything / "imagenet", tmp_path / "imagenet")
    (tmp_path / "imagenet/classnames.txt").unlink()
    shutil.rmtree(tmp_path / "imagenet/images/train/n03773504")
    shutil.rmtree(tmp_path / "imagenet/images/val/n03773504")
    found = read("imagenet", tmp_path)
    assert found.classnames == ["tench", "tabby cat", "missile"]
    assert any("open_clip" in note for note in found.notes)
    photos(tmp_path / "own", ["n01440764", "n02123045"])
    assert read(f"folder:{tmp_path}/own").classnames == ["tench", "tabby cat"]
    photos(tmp_path / "own", ["n99999999", "1"])
    make_data.text(tmp_path / "classnames.txt", ["n01440764 a stranger's"])
    found = read(f"folder:{tmp_path}/own")
    assert found.classnames == ["tench", "tabby cat", "1", "n99999999"]
    assert any("but for 2 that it lacks" in note for note in found.notes)


def test_missing_data_says_what_to_do(tmp_path, everything):
    with pytest.raises(UserError, match="dtd: no images in .*dtd/images .*: get .*--download"):
        read("dtd", tmp_path)
    with pytest.raises(UserError, match="link is dead.*cars_train"):
        read("stanford_cars", tmp_path, download=True)
    with pytest.raises(UserError, match="link is dead.*SUN397.tar.gz"):
        read("sun397", tmp_path, download=True)
    with pytest.raises(UserError, match="no dataset is called 'dtdd': use folder:PATH"):
        read("dtdd", tmp_path)
    with pytest.raises(UserError, match=f"did you mean folder:{tmp_path}.$"):
        read(tmp_path, tmp_path)
    assert all(data.COPY in data.SOURCES[name].get for name in ("stanford_cars", "sun397"))
    make_data.dtd(tmp_path, split=False)
    text = "/dtd/split_zhou_Describ.*json .*DATASETS.md, .*zhengli97"
    with pytest.raises(FileNotFoundError, match=text):
        read("dtd", tmp_path)
    with pytest.raises(UserError, match="for testing only"):
        load("imagenet_a", everything)


def test_split_file_is_fetched(tmp_path, monkeypatch):
    make_data.dtd(tmp_path)
    file = tmp_path / "dtd/split_zhou_DescribableTextures.json"
    content = file.read_bytes()
    file.unlink()
    asked = []

    class Answer:
        def read(self):
            return content

    monkeypatch.setattr("urllib.request.urlopen", lambda url: asked.append(url) or Answer())
    assert len(read("dtd", tmp_path, download=True).sets["train", ""]) == 15
    assert asked == [data.SPLITS + file.name] and file.read_bytes() == content


VAL = {  # a row of the list "val": what is said
    ("a.jpg", "1", "x"): "is not .path, label",
    ("../x.jpg", 0, "banded"): "no image .*x.jpg: unpack",
    ("banded/99.jpg", 0, "banded"): "no image .*99.jpg: unpack",
    ("banded/0.jpg", 0, "striped"): "this label is 'banded' before",
    ("banded/0.jpg", 4, "a\ud800"): "is not .path, label",
    ("banded/0.jpg", 4, "plaid"): "labels must be 0, 1, .., not .0, 1, 2, 4",
}
for path in ("./banded/0.jpg", "images/banded/0.jpg", "/abs/banded/0.jpg", "Banded/0.JPG"):
    VAL[path, 0, "banded"] = f"{path}: it has to say banded/0.jpg$"  # what differs


def test_wrong_split_file(tmp_path):
    make_data.dtd(tmp_path)
    file = tmp_path / "dtd/split_zhou_DescribableTextures.json"
    split = json.loads(file.read_text())
    wrong = {json.dumps(split | {"val": [row]}): fault for row, fault in VAL.items()}
    wrong[json.dumps(split | {"val": split["train"][:1], "test": split["train"]})] = "tested on"
    wrong |= {"{": "is damaged", json.dumps({"train": split["train"]}): 'has no list "val"'}
    for content, fault in wrong.items():
        file.write_text(content)
        with pytest.raises(UserError, match=fault):
            read("dtd", tmp_path)


def test_split_file_oddities(tmp_path):
    """Back slashes are read as "/"; one image twice is a note."""
    make_data.dtd(tmp_path)
    file = tmp_path / "dtd/split_zhou_DescribableTextures.json"
    split = json.loads(file.read_text())
    split["val"] += [[split["train"][0][0].replace("/", "\\"), *split["train"][0][1:]]]
    file.write_text(json.dumps(split))
    found = read("dtd", tmp_path)
    assert len(found.sets["val", ""]) == 7
    assert any(note == "1 images are there twice, 0 of them in two classes" for note in found.notes)


def test_nico_holds_out_a_rounded_share(tmp_path):
    """round(0.3 n) of a class's n contexts: 1 of 2, 1 of 4, 2 of 5 and 2 of 6."""
    for n in (2, 4, 5, 6):
        photos(tmp_path / f"nico/animal/class{n}", [f"context{i}" for i in range(n)], 6)
    held = [label for _, label in read("nico_animal", tmp_path).sets["test", data.HELD_OUT]]
    assert [held.count(label) for label in range(4)] == [6, 6, 12, 12]


# CoOp's few-shot draw -----------------------------------------------------------------------------
@pytest.mark.skipif(not SPLITS.is_dir(), reason="set COOP_SPLITS to the folder of published lists")
@pytest.mark.parametrize("name", ["Caltech101", "DescribableTextures", "OxfordPets"])
def test_published_draws(name):
    split = json.loads((SPLITS / f"split_zhou_{name}.json").read_text())
    items = {part: [(path, label) for path, label, _ in rows] for part, rows in split.items()}
    known = {"DescribableTextures": "dtd", "OxfordPets": "oxford_pets", "Caltech101": "caltech101"}
    files = sorted(SPLITS.glob(f"fewshot_{known[name]}-*.json"))
    assert len(files) == 9
    for file in files:
        shots, seed = (int(part.split("_")[1]) for part in file.stem.split("-")[1:])
        train, val = data.fewshot(items["train"], items["val"], shots, seed)
        published = json.loads(file.read_text())
        for ours, part in ((train, "train"), (val, "val")):
            paths = [row if isinstance(row, str) else row[0] for row in published[part]]
            assert [path for path, _ in ours] == paths, (file.name, part)


def test_draw_is_a_function_of_the_seed():
    items = [(f"{i}.jpg", i % 3) for i in range(30)]
    state = random.getstate()
    first = data.fewshot(items, items, 4, seed=2)
    assert first == data.fewshot(items, items, 4, seed=2) != data.fewshot(items, items, 4, seed=3)
    assert random.getstate() == state
    assert [len(part) for part in first] == [12, 12]
    assert data.fewshot(items[:2], [], 4, 1) == (items[:2], [])
    assert data.fewshot(items, items, "all", 1) == (items, items)


def test_batches():
    order = data.batches(10, 4, seed=1, epoch=0)
    assert [len(batch) for batch in order] == [4, 4]  # the partial batch goes
    assert len(data.batches(3, 4, 1, 0)[0]) == 3  # unless there is no full one
    assert len(data.batches(10, 2, 1, 0, max_steps=3)) == 3
    assert not torch.equal(order[0], data.batches(10, 4, 1, 1)[0])


# Your own images ----------------------------------------------------------------------------------
def test_folder_with_classes(tmp_path):
    photos(tmp_path, n=10)
    task = load(f"folder:{tmp_path}")
    assert task.classnames == ["cat", "dog"] and len(task.train) == 8
    assert len(task.tests[0].items) == 6
    assert any(note.startswith("split: ours, 50% train, 20% val") for note in task.notes)
    assert task.training["split"] == hashlib.sha1("\n".join(task.lines).encode()).hexdigest()


def test_classes_are_in_the_order_of_their_names(tmp_path):
    photos(tmp_path, ["apple", "Zebra"])
    assert read(f"folder:{tmp_path}").classnames == ["Zebra", "apple"]


def test_folder_with_parts_in_any_spelling(tmp_path):
    photos(tmp_path, n=3, parts=("Train", "Validation", "TEST"))
    found = read(f"folder:{tmp_path}")
    assert [len(found.sets[part, ""]) for part in ("train", "val", "test")] == [6, 6, 6]
    assert found.classnames == ["cat", "dog"]
    assert "the folders TEST, Train, Validation are read as parts" in found.notes


def test_folder_with_train_and_val_only(tmp_path):
    photos(tmp_path, n=3, parts=("train", "val"))
    found = read(f"folder:{tmp_path}")
    assert len(found.sets["test", ""]) == 6 and "its val is the test part" in found.notes


def test_folder_with_other_test_sets(tmp_path):
    photos(tmp_path, n=10)
    photos(tmp_path / "ood/night", n=2)
    task = load(f"folder:{tmp_path}")
    assert [(test.domain, len(test.items)) for test in task.tests] == [("", 2), ("night", 4)]


def test_domains(tmp_path):
    photos(tmp_path, n=10, parts=("sun", "rain", "snow"))
    task = load(f"domains:{tmp_path}", test_domain=["snow"])
    assert [test.domain for test in task.tests] == ["", "snow"]
    with pytest.raises(UserError, match="name --train-domain or --test-domain, of rain, snow, sun"):
        load(f"domains:{tmp_path}")
    photos(tmp_path / "few", n=5, parts=("sun", "rain"))
    with pytest.raises(UserError, match="too few images to split: 6 a class are enough"):
        load(f"domains:{tmp_path}/few", test_domain=["rain"])


WRONG = [  # class folders below the root, the images in each, and what is said
    ("train/cat train/dog cat dog", 3, "images lie in .'cat', 'dog'., beside the parts .'train'."),
    ("train/cat train/dog", 3, "needed: train, and test or val"),
    ("train/cat train/dog test/cat val/cat valid/cat", 3, "needed: train, and test or val"),
    ("val/cat val/dog test/cat test/dog", 3, "needed: train, and test or val"),
    ("cat dog valid", 9, "the parts .'valid'.: a class needs another folder"),
    ("TRAİN/cat test/cat test/dog", 9, "a class needs another folder name, a part"),  # Turkish
    ("cat dog OOD/night", 9, "the parts .'OOD'.: a class .* has ood/NAME/CLASS"),
    ("cat/train cat/Test dog", 9, "lie in .'cat/Test'.: a part stands above its classes"),
    ("train/cat train/dog test/cat test/owl", 3, "1 classes have no train image, as .'owl'"),
    ("cat dog ood/night/cats", 9, "1 classes have no train image, as .'cats'"),
    ("cat dog", 1, "too few images to split"),
    ("cat dog", 3, "too few images to split"),
    ("cat", 9, "the classes are .'cat'.: two are"),
    ("Cat cat", 9, r"\['Cat', 'cat'\]\] have one prompt, or no name: rename"),
    ("a_b a-b a_b_", 9, r"\['a_b', 'a_b_'\]\] have one prompt"),
    ("_ dog", 9, r"\['_'\]\] have one prompt, or no name: rename"),
]


@pytest.mark.parametrize(("folders", "n", "text"), WRONG)
def test_folders_that_are_refused(folders, n, text, tmp_path):
    photos(tmp_path, folders.split(), n)
    with pytest.raises(UserError, match=text):
        read(f"folder:{tmp_path}")


def test_small_halves(tmp_path):
    photos(tmp_path, ["cat", "dog", "owl"])
    with pytest.raises(UserError, match="3 classes have no base and new half"):
        load(f"folder:{tmp_path}", classes="base")


def test_split_hangs_on_nothing_but_names(tmp_path, monkeypatch):
    """Not on how the path is spelt, nor on where it is; an added image moves next to no other."""
    photos(tmp_path / "photos", n=30)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere/other")
    monkeypatch.chdir(tmp_path)
    spellings = ["photos", "photos/", "./photos", "link", "elsewhere/other", tmp_path / "photos"]
    found = [read(f"folder:{spelling}") for spelling in spellings]
    parts = [below(f.sets["test", ""], f.root) for f in found]
    assert all(part == parts[0] for part in parts) and len(parts[0]) == 18
    make_data.image(tmp_path / "photos/cat/new.png")
    later = below(read("folder:photos").sets["test", ""], "photos")
    assert len(parts[0] - later) <= 1


def test_one_image_under_two_paths(tmp_path):
    """Links are followed: never trained and tested on; two labels are a note."""
    photos(tmp_path / "a", n=3, parts=("train", "test"))
    (tmp_path / "a/test/cat/link.png").symlink_to(tmp_path / "a/train/cat/train0.png")
    with pytest.raises(UserError, match="1 images are trained and tested on: .*link"):
        read(f"folder:{tmp_path}/a")
    photos(tmp_path / "b", n=3, parts=("train", "test"))
    (tmp_path / "b/train/dog/link.png").symlink_to(tmp_path / "b/train/cat/train0.png")
    (note,) = [note for note in read(f"folder:{tmp_path}/b").notes if "twice" in note]
    assert note == "1 images are there twice, 1 of them in two classes"


def test_one_image_in_two_classes_of_our_split(tmp_path):
    photos(tmp_path, n=30)
    for i in range(15):
        (tmp_path / f"dog/link{i}.png").symlink_to(tmp_path / f"cat/{i}.png")
    with pytest.raises(UserError, match="5 images are trained and tested on: .*link"):
        read(f"folder:{tmp_path}")


def test_parts_of_no_usual_name(tmp_path):
    photos(tmp_path, parts=("training_set", "test_set"))
    notes = read(f"folder:{tmp_path}").notes
    assert "images below class folders are of the class above, as in ['test_set/cat']" in notes


def test_class_without_a_test_image(tmp_path):
    photos(tmp_path, parts=("train", "test"))
    photos(tmp_path, ["owl"], parts=("train",))
    assert "1 classes have no test image, as ['owl']" in read(f"folder:{tmp_path}").notes


def test_link_loops_end(tmp_path):
    photos(tmp_path / "a", n=5)
    (tmp_path / "a/cat/again").symlink_to(tmp_path / "a")
    assert len(read(f"folder:{tmp_path}/a").sets["train", ""]) == 4
    photos(tmp_path / "b", ["a", "b", "c"], n=5)
    for one, other in ("ab", "ac", "ba", "bc", "ca", "cb"):
        (tmp_path / f"b/{one}/see_{other}").symlink_to(tmp_path / "b" / other)
    with pytest.raises(UserError, match="images are trained and tested on"):
        read(f"folder:{tmp_path}/b")


def test_folders_have_no_domains(tmp_path):
    photos(tmp_path, ["cat", "dog", "ood/night/cat"])
    with pytest.raises(UserError, match="has no domains: no --train/test-domain"):
        read(f"folder:{tmp_path}", test_domain=["night"])


def test_what_is_left_out_is_counted(tmp_path, monkeypatch):
    photos(tmp_path, n=5)
    for name in ("cat/phone.HEIC", "cat/noending", "beside.png", "cat/.hidden.png", ".git/x.png"):
        make_data.text(tmp_path / name, [""])
    photos(tmp_path, ["cache", "runs"], n=5)
    monkeypatch.chdir(tmp_path)
    (note,) = [note for note in read("folder:.").notes if "left out" in note]
    assert "1 (.HEIC)" in note and "1 (no ending)" in note and "1 (no class folder)" in note
    for folder in (".git", "cache", "runs"):  # named: one may be a misspelt class
        assert f"folder {folder}" in note
    assert read("folder:.").classnames == ["cat", "dog"]


# What a class is called ---------------------------------------------------------------------------
def test_classnames_file(tmp_path):
    """Only a tab separates: "dog" must not take the line of "dog house"."""
    photos(tmp_path, ["dog", "dog house"])
    make_data.text(tmp_path / "classnames.txt", ["dog house\tkennel", "dog\tpuppy"])
    assert read(f"folder:{tmp_path}").classnames == ["puppy", "kennel"]
    for lines in (
        ["dog house kennel", "dog puppy"],
        ["dog,puppy", "dog house,kennel"],
        ["dog\tpuppy", "dog hut\tkennel"],
        ["dog\tpuppy", "dog\twolf", "dog house\tkennel"],
        ["dog\tpuppy"],
    ):
        make_data.text(tmp_path / "classnames.txt", lines)
        with pytest.raises(UserError, match="classnames.txt: "):
            read(f"folder:{tmp_path}")


def test_names_alone(tmp_path):
    """One a line, in the order of folders: where sorted and natural order agree; with a note."""
    photos(tmp_path / "a", ["01", "02", "10"])
    make_data.text(tmp_path / "a/classnames.txt", ["cat", "guinea pig", "owl"])
    found = read(f"folder:{tmp_path}/a")
    assert found.classnames == ["cat", "guinea pig", "owl"]
    assert any("'01\\tcat'" in note and "'10\\towl'" in note for note in found.notes)
    photos(tmp_path / "d", ["a", "b"])  # names that begin as folders, or are the folders
    for lines in (["apple", "banana"], ["a", "b"]):
        make_data.text(tmp_path / "d/classnames.txt", lines)
        assert read(f"folder:{tmp_path}/d").classnames == lines
    photos(tmp_path / "b", ["1", "2", "10"])
    photos(tmp_path / "c", ["Zebra", "apple", "pear"])  # a file manager shows apple first
    wrong = [("b", ["cat", "guinea pig", "owl"]), ("a", ["cat", "owl"]), ("a", ["10", "01", "02"])]
    wrong.append(("c", ["an apple", "a pear", "a zebra"]))
    for root, lines in wrong:
        make_data.text(tmp_path / root / "classnames.txt", lines)
        with pytest.raises(UserError, match="classnames.txt: . names alone for 3 folders, in the"):
            read(f"folder:{tmp_path}/{root}")


def test_names_that_differ_by_blanks_are_one_prompt(tmp_path):
    photos(tmp_path, ["cat", "cat "])
    with pytest.raises(UserError, match="have one prompt, or no name: rename"):
        read(f"folder:{tmp_path}")


def test_unicode_spellings_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    photos(tmp_path, [composed, "bar"], n=3, parts=("train",))
    photos(tmp_path, [decomposed, "bar"], n=3, parts=("test",))
    found = read(f"folder:{tmp_path}")
    assert found.classnames == ["bar", composed]
    assert {label for _, label in found.sets["test", ""]} == {0, 1}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_folder_that_is_not_utf8(tmp_path):
    photos(tmp_path, ["cat"])
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9")
    for i in range(4):
        name = os.fsencode(tmp_path) + b"/caf\xe9/%d.png" % i
        shutil.copy(tmp_path / f"cat/{i}.png", os.fsdecode(name))
    with pytest.raises(UserError, match="not UTF-8: rename it"):
        read(f"folder:{tmp_path}")


# Flags, and runs that come later ------------------------------------------------------------------
def test_template_and_unknown_part(tmp_path):
    photos(tmp_path)
    for template in ("a photo", "{} and {}", "{} {x}"):
        with pytest.raises(UserError, match="needs one {}"):
            load(f"folder:{tmp_path}", template=template)
    with pytest.raises(UserError, match="no such folder"):
        load(f"folder:{tmp_path}/nothing")
    with pytest.raises(argparse.ArgumentTypeError, match="'x' is neither a number nor all"):
        data.number_or_all("x")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    photos(tmp_path / "photos")
    assert len(load("folder:~/photos").classnames) == 2


def test_base_and_new(everything):
    task = load("eurosat", everything, classes="base", test_on=["dtd"])
    assert task.classnames == ["Annual Crop Land", "Forest"]
    found = [(t.name, t.classes, len(t.classnames), len(t.items)) for t in task.tests]
    assert found == [("eurosat", "base", 2, 6), ("eurosat", "new", 2, 6), ("dtd", "all", 3, 9)]
    assert {label for _, label in task.tests[1].items} == {0, 1}


def test_further_test_sets_hold_no_trained_image(tmp_path):
    for name in ("one", "two"):
        photos(tmp_path / name, n=2, parts=("train", "test"))
    two = {"shots": "all", "test_on": [f"folder:{tmp_path}/two"]}
    assert len(load(f"folder:{tmp_path}/one", **two).tests) == 2
    (tmp_path / "two/test/cat/link.png").symlink_to(tmp_path / "one/train/cat/train0.png")
    with pytest.raises(UserError, match="1 test images are trained on, as .*link.png: remove them"):
        load(f"folder:{tmp_path}/one", **two)


def test_tested_images_that_were_trained_on(tmp_path):
    photos(tmp_path, n=10)
    task = load(f"folder:{tmp_path}", shots="all")
    run = {"settings": {"dataset": task.name}, "root": task.root, "train": task.lines}
    assert not data.trained_on(task.tests, run)
    tested = [f"{data.below(path, task.root)}\t0" for path, _ in task.tests[0].items[:3]]
    run["train"] = task.lines + tested
    assert len(data.trained_on(task.tests, run)) == 3
    assert len(data.trained_on(task.tests, run | {"root": "moved"})) == 3
    (tmp_path / "b").symlink_to(tmp_path)  # the same photos, otherwise called
    other = load(f"folder:{tmp_path}/b", shots="all")
    assert len(data.trained_on(other.tests, run)) == 3
    run["root"] = "moved"
    assert not data.trained_on(other.tests, run)


def test_one_test_set_twice_is_refused(tmp_path, monkeypatch):
    for name in ("one", "two"):
        photos(tmp_path / name)
    (tmp_path / "link").symlink_to("two")
    monkeypatch.chdir(tmp_path)
    others = ["folder:two", "toy_shapes_biased"]
    assert len(load("folder:one", test_on=others).tests) == 5
    for again in (*others, "folder:two/", "folder:link", f"folder:{tmp_path}/two"):
        for dataset, more in (("folder:one", [again]), (again, [])):
            with pytest.raises(UserError, match="one test set is there twice"):
                load(dataset, test_on=others + more)


def evaluate(task: data.Task, dataset, root="data", **changed) -> data.Task:
    """load with --eval of a run that was trained on this task."""
    config = dict.fromkeys(["method", "weights", "classnames", "training", "tests"])
    settings = {"dataset": task.name, "method": ""}
    config |= {"settings": settings, "root": task.root, "train": task.lines}
    make_data.text(Path("run/config.json"), [json.dumps(config)])
    return load(dataset, root, eval="run", **changed)


def test_nothing_is_held_out_where_nothing_is_trained_on(tmp_path, everything, monkeypatch):
    """Neither with --eval nor in --test-on; a test part is kept, and may be all there is."""
    monkeypatch.chdir(tmp_path)
    photos(Path("a"))
    parts = ["parts/train", "parts/test", "test only/test", "val/train", "val/val"]
    for folder in (*parts, "b", "weather/sun", "weather/rain"):
        photos(Path(folder), n=2)
    photos(Path("parts"), ["owl"], n=1, parts=("test",))
    Path("link").symlink_to("a")
    task = load("folder:a")
    for name, n in {"b": 4, "parts": 5, "test only": 4, "val": 4}.items():
        evaluated = evaluate(task, f"folder:{name}", test_on=["folder:link"])  # trained on: split
        assert [len(test.items) for test in evaluated.tests] == [n, 6]
        assert len(load("folder:a", test_on=[f"folder:{name}"]).tests[1].items) == n
    assert evaluate(task, "folder:b").notes == ["all its 4 images are tested on"]
    beside = load("folder:a", test_on=["domains:weather"])
    for tests in (evaluate(task, "domains:weather").tests, beside.tests[1:]):
        assert [(test.domain, len(test.items)) for test in tests] == [("rain", 4), ("sun", 4)]
    assert len(evaluate(task, "domains:weather", test_domain=["sun"]).tests) == 1
    assert len(evaluate(task, "imagenet", everything).tests[0].items) == 12  # its val
    Path("b/cat/link.png").symlink_to(Path(task.train[0][0]).absolute())
    assert "1 test images are trained on, as b/cat/link.png" in evaluate(task, "folder:b").notes


def test_toy_tasks():
    task = load("toy_shapes_biased", shots="all")
    assert [len(test.items) for test in task.tests] == [720, 720, 720]
    same = data.read_image("toy:toy_shapes_unbiased/style/3")
    assert np.array_equal(same, data.read_image("toy:toy_shapes_biased/style/3"))
    train = [np.array(data.read_image(f"toy:{n}/train/3")) for n in data.world.SHORTCUT]
    assert train[0].shape == (32, 32, 3)
    data.world.task_block.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(train[0], data.read_image(f"toy:{[*data.world.SHORTCUT][0]}/train/3"))


# Images -------------------------------------------------------------------------------------------
def test_modes_are_read_right(tmp_path):
    grey = np.full((4, 4), 0.5, np.float32)
    Image.fromarray(grey).save(tmp_path / "float.tif")
    assert np.array(data.read_image(str(tmp_path / "float.tif"))).tolist()[0][0] == [128] * 3
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.array(data.read_image(str(tmp_path / "deep.png"))).tolist()[0][0] == [128] * 3
    palette = Image.new("RGB", (4, 4), (200, 30, 30)).convert("P")
    palette.save(tmp_path / "palette.gif")
    red = np.array(data.read_image(str(tmp_path / "palette.gif")))[0, 0]
    assert abs(red.astype(int) - [200, 30, 30]).max() < 30
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(str(tmp_path / "turned.jpg")).size == (2, 4)


def test_damaged_exif_does_not_cost_the_photo(tmp_path):
    Image.new("RGB", (4, 2), "red").save(
        tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
    )
    assert data.read_image(str(tmp_path / "x.jpg")).size == (4, 2)


def test_images_that_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.float32)).save(tmp_path / "range.tif")
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "dark.tif")
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "12bit.png")
    Image.new("1", (30000, 1)).save(tmp_path / "thin.png")
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[:5000] + b"\xff" * 200 + whole[5200:])
    faults = dict.fromkeys(("range.tif", "dark.tif", "12bit.png"), "scale to")
    faults |= {"thin.png": "too big or long", "empty.jpg": "", "half.png": ""}
    for name, text in faults.items():
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: .*{text}"):
            data.read_image(str(tmp_path / name))


def test_views_are_functions_of_seed_view_and_position(tmp_path):
    photos(tmp_path, n=2)
    items = read(f"domains:{photos(tmp_path / 'd', n=6, parts=('a', 'b'))}", test_domain=["b"])
    items = items.sets["train", ""]
    transform = lambda image: torch.rand(2)  # noqa: E731
    images, n = data.ImageSet(items, transform, seed=3), len(items)
    first = images[1][0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(images[1][0], first) and not torch.equal(images[1 + n][0], first)
    assert images[1 + n][2] == 1 and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(data.ImageSet(items, transform, seed=4)[1][0], first)


def test_loader_workers_by_spawn(tmp_path):
    """Windows and macOS start workers anew: everything they need must be importable."""
    photos(tmp_path, n=4)
    items = [(str(tmp_path / "cat/0.png"), 0)] * 8
    images = data.ImageSet(items, data.train_transform(to_tensor, "none"))
    loader = torch.utils.data.DataLoader(
        images, batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    assert [len(labels) for _, labels, _ in loader] == [4, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_broken_images_are_named(workers, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    images = data.ImageSet([(f"{tmp_path}/{i % 2}.png", 0) for i in range(128)], to_tensor)
    args = argparse.Namespace(workers=workers, device="cpu")
    with pytest.raises(UserError, match="mend or remove them: .*/0.png: .*/1.png: "):
        list(data.load_images(images, [[0], [2]], args, "epoch 1"))


def to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


# The command --------------------------------------------------------------------------------------
def test_command_lists_what_is_there(everything, capsys):
    data.main(["--data-root", str(everything)])
    out = capsys.readouterr().out
    assert all(name in out for name in [*data.world.TASKS, *data.SOURCES])
    assert "dtd                            3 classes; 15 train, 6 val, 9 test" in out


def test_command_checks_images(tmp_path, capsys):
    photos(tmp_path, ["cat", "dog", "cup_of_coffee"])
    data.main(["--dataset", f"folder:{tmp_path}", "--check-images"])
    out = capsys.readouterr().out
    assert "all images can be read" in out and "1  cup of coffee  " in out
    for name in ("cat/3.png", "dog/4.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="name one --dataset for this"):
        data.main(["--check-images"])
    with pytest.raises(UserError, match="2 images cannot be read, named above"):
        data.main(["--dataset", f"folder:{tmp_path}", "--check-images"])
    out = capsys.readouterr().out
    assert "cat/3.png: " in out and "dog/4.png: " in out


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("x\ny"), 2, "error: x y"),
        (FloatingPointError("not finite"), 1, "error: not finite"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left", "/a/b"), 1, "error: /a/b: No space left"),
        (FileNotFoundError(2, "No such file", "/torch_a/b"), 2, "error: /torch_a/b: No such file"),
        (OSError("no name or number"), 2, "error: no name or number"),
        (RuntimeError("unable to open shared memory object"), 2, "--workers 0, or docker"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
    ],
)
def test_errors_are_one_line(error, status, text, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        data.run(main)
    assert stopped.value.code == status
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="ours"):  # a fault of ours keeps its traceback
        data.run(lambda: (_ for _ in ()).throw(RuntimeError("ours")))


def test_streams_that_can_only_write(monkeypatch):
    texts = []
    stream = types.SimpleNamespace(write=texts.append, flush=lambda: None)
    for one in (stream, None):
        monkeypatch.setattr(sys, "stdout", one)
        monkeypatch.setattr(sys, "stderr", one)
        data.run(lambda: print(*data.progress("ab", "count")))
        with pytest.raises(SystemExit):
            data.run(lambda: data.require(False, "wrong"))
    assert "".join(texts) == "a b\nerror: wrong\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    """Nothing is printed where nobody reads, and no traceback elsewhere."""
    command = f"{sys.executable} data.py --dataset toy_shapes_biased"
    lines = f"({command} && ! {command} --train-domain x) {closed}"
    done = subprocess.run(["sh", "-c", lines], cwd=HERE.parent, capture_output=True)
    assert done.returncode == 0
    assert bool(done.stdout) == (closed == "2>&-") and b"error" not in done.stdout
    assert done.stderr.count(b"\n") == (closed == ">&-")
