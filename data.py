"""The data side: where datasets lie and how they are split, CoOp's few-shot draw, base and new classes, images.

    python data.py --data-root DIR                              what is found under DIR
    python data.py --dataset dtd --data-root DIR --download     one dataset: counts, classes, templates, split
    python data.py --dataset folder:photos --check-images       decode every image and list the bad ones

A dataset is a toy task (toyclip/world.py: no files), a name in SOURCES below, or your own images:
    folder:PATH   PATH/CLASS/*, or PATH/{train,val,test}/CLASS/*; PATH/ood/NAME/CLASS/* are further test sets
    domains:PATH  PATH/DOMAIN/CLASS/*, with --train-domain or --test-domain
PATH/classnames.txt may name the classes, one line "FOLDER<tab>NAME" for each.
"""

import argparse
import collections
import difflib
import hashlib
import itertools
import json
import os
import random
import re
import sys
import urllib.request
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from PIL import Image, ImageOps

from toyclip import world

Item = tuple[str, int]  # (address, label); an address is a path or toy:TASK/PART/INDEX
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


import math
import contextlib
class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")
def require(condition, message):
    if not condition:
        raise UserError(message)
def in_one_line(error):
    return " ".join(str(error).split())[:300]
def flag(key):
    return "--" + key.replace("_", "-")
def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
POSITIVE = {"epochs", "batch_size", "lr", "memory_gb", "temperature", "n_ctx", "power", "accumulate", "head_lr_factor"}
AT_MOST_1 = {"momentum", "warmup", "ensemble", "wise_ft", "betas"}
def check_ranges(args):
    for key, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float):
                text = f"{flag(key)} {number}: it must be"
                require(0 <= number < math.inf, f"{text} at least 0")
                require(number > 0 or key not in POSITIVE, f"{text} more than 0")
                require(number <= 1 or key not in AT_MOST_1, f"{text} at most 1")
def image_loader(images, batches, args):
    workers = min(args.workers, len(images) // 64)
    options = {"persistent_workers": workers > 0, "pin_memory": args.device != "cpu"}
    return torch.utils.data.DataLoader(images, batch_sampler=batches, num_workers=workers, **options)
def trained_on(task, lines):
    return 0
def run(main):
    try:
        main()
    except UserError as e:
        print("error:", e, file=sys.stderr); sys.exit(2)
    except FloatingPointError as e:
        print("error:", e, file=sys.stderr); sys.exit(1)
class UserError(Exception):
    """A mistake the user can mend. It is shown as one line, with exit status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. THE DATASETS: a row says where the images are and what tells their class, part and domain
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Source:
    images: str  # the image folder below --data-root: CoOp's place, then others that are tried
    template: str = "a photo of a {}."  # of zero-shot CLIP: CoOp's, for the last five datasets ProReg's
    teacher: str = ""  # ProGrad's, with the class last, where it differs
    split: str = ""  # CoOp's split file, {"train": [[path, label, class name], ...], "val": ..., "test": ...}
    paths: str = ""  # or a pattern, which reads class, part and domain off an image's path
    part: str = ""  # what all images are where paths do not say so: "test" of data sets for testing only
    lists: dict[str, str] = field(default_factory=dict)  # published lists of the images of each part
    train_domain: tuple[str, ...] = ()  # where no flag says so; empty: all that are not tested on
    test_domain: tuple[str, ...] = ()
    get: str = ""  # torchvision's name of it, or where it is to be had


CLASS = "(?P<cls>[^/]+)/.+"
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"  # all but Food101's, SUN397's
SOURCES = {
    "imagenet": Source("imagenet/images imagenet ILSVRC2012", paths=f"(?P<part>train|val)/{CLASS}",
                       get="ILSVRC-2012 from image-net.org, unpacked to train/WNID/* and val/WNID/*"),
    "caltech101": Source("caltech-101/101_ObjectCategories caltech101/101_ObjectCategories",
                         split="split_zhou_Caltech101.json", get="torchvision.Caltech101"),
    "oxford_pets": Source("oxford_pets/images oxford-iiit-pet/images", "a photo of a {}, a type of pet.",
                          "a type of pet, a photo of a {}.", "split_zhou_OxfordPets.json",
                          get="torchvision.OxfordIIITPet"),
    "stanford_cars": Source("stanford_cars", split="split_zhou_StanfordCars.json",
                            get="cars_train and cars_test, see github.com/pytorch/vision/issues/7545"),
    "oxford_flowers": Source("oxford_flowers/jpg flowers-102/jpg", "a photo of a {}, a type of flower.",
                             "a type of flower, a photo of a {}.", "split_zhou_OxfordFlowers.json",
                             get="torchvision.Flowers102"),
    "food101": Source("food-101/images", "a photo of {}, a type of food.", "a type of food, a photo of {}.",
                      "split_zhou_Food101.json", get="torchvision.Food101"),
    "fgvc_aircraft": Source("fgvc_aircraft/images fgvc-aircraft-2013b/data/images",
                            "a photo of a {}, a type of aircraft.", "a type of aircraft, a photo of a {}.",
                            lists={part: f"images_variant_{part}.txt" for part in ("train", "val", "test")},
                            get="torchvision.FGVCAircraft"),
    "sun397": Source("sun397/SUN397 SUN397", split="split_zhou_SUN397.json", get="vision.princeton.edu/projects/2010/SUN"),
    "dtd": Source("dtd/images dtd/dtd/images", "{} texture.", "a texture of {}.",
                  "split_zhou_DescribableTextures.json", get="torchvision.DTD"),
    "eurosat": Source("eurosat/2750", "a centered satellite photo of {}.", split="split_zhou_EuroSAT.json",
                      get="torchvision.EuroSAT"),
    "ucf101": Source("ucf101/UCF-101-midframes", "a photo of a person doing {}.", split="split_zhou_UCF101.json",
                     get="UCF-101-midframes.zip, linked in CoOp's DATASETS.md"),
    # ImageNet's variants, for testing only
    "imagenetv2": Source("imagenetv2/imagenetv2-matched-frequency-format-val", paths=CLASS, part="test"),
    "imagenet_sketch": Source("imagenet-sketch/images", paths=CLASS, part="test"),
    "imagenet_a": Source("imagenet-adversarial/imagenet-a imagenet-a", paths=CLASS, part="test"),
    "imagenet_r": Source("imagenet-rendition/imagenet-r imagenet-r", paths=CLASS, part="test"),
    # ProReg's own: in- and out-of-distribution
    "bar": Source("bar BAR", "the man is {}.", paths=r"(?P<domain>train|test)/(?P<cls>.+)_\d+\.\w+", test_domain=("test",),
                  get="github.com/alinlab/BAR"),
    "nico_animal": Source("nico/animal NICO/Animal", "this is {}.", paths=f"(?P<cls>[^/]+)/(?P<domain>[^/]+)/.+",
                          get="nico.thumedialab.com"),
    "nico_vehicle": Source("nico/vehicle NICO/Vehicle", "this is {}.", paths=f"(?P<cls>[^/]+)/(?P<domain>[^/]+)/.+",
                           get="nico.thumedialab.com"),
    "pacs": Source("pacs/images pacs/kfold PACS", "this is {}.", paths=f"(?P<domain>[^/]+)/{CLASS}",
                   lists={"train": "{}_train_kfold.txt", "val": "{}_crossval_kfold.txt", "ood": "{}_test_kfold.txt"},
                   test_domain=("art_painting",), get="domaingeneralization.github.io"),
    "domainnet": Source("domainnet DomainNet", paths=f"(?P<domain>[^/]+)/{CLASS}",
                        lists={"train": "{}_train.txt", "test": "{}_test.txt", "ood": "{}_test.txt"},
                        train_domain=("sketch",), test_domain=("clipart", "painting", "real"), get="ai.bu.edu/M3SDA, the cleaned version"),
}


# ----------------------------------------------------------------------------------------------------------------------
# 2. READING A DATASET: class names, and the images of every part and domain
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Found:
    """A whole dataset, before any draw."""

    classnames: list[str]
    parts: dict[str, list[Item]]  # train, val, test: in-distribution
    ood: dict[str, list[Item]]  # further test sets, by domain
    source: Source
    root: str = ""  # the image folder
    notes: list[str] = field(default_factory=list)  # what its user has to know


def read(name: str, args: argparse.Namespace) -> Found:
    """Find and read dataset `name`; of `args` where to look, and which domains to train and test on."""
    if name in world.TASKS:
        return read_toy(name)
    kind, _, path = name.partition(":")
    if kind in ("folder", "domains") and path:
        pattern = f"(?P<domain>[^/]+)/{CLASS}" if kind == "domains" else folder_pattern(Path(path))
        source, root = Source(path, paths=pattern), Path(path)
        if not root.is_dir():
            raise UserError(f"{root} is no folder: expected are images PATH/CLASS/NAME.jpg in it")
    elif name in SOURCES:
        source, root = SOURCES[name], find_images(name, args.data_root, args.download)
    else:
        close = difflib.get_close_matches(name, [*world.TASKS, *SOURCES], 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join([*world.TASKS, *SOURCES])}"
        raise UserError(f"no dataset is called {name!r}: {hint}, folder:PATH and domains:PATH")
    if source.split:
        return read_split(name, source, root, args)
    images = read_paths(root, source) if source.paths else read_lists(source, root, source.lists)
    if "?P<domain>" in source.paths:
        images = domains_of(name, source, root, images, args)
    if not images:
        raise UserError(f"{name}: no images in {root}; expected are {source.paths or 'the lists of the archive'}")
    names = class_names(name, source, root, {cls for _, cls, _, _ in images})
    label = {cls: i for i, cls in enumerate(names)}
    parts, ood = collections.defaultdict(list), collections.defaultdict(list)
    for path, cls, part, domain in images:
        if cls in label:
            (ood[domain] if part == "ood" else parts[part]).append((str(root / path), label[cls]))
    return split_rest(name, Found(list(names.values()), parts, ood, source, str(root)))


def find_images(name: str, data_root: str, download: bool) -> Path:
    """The image folder of a row of SOURCES; with --download torchvision fetches it."""
    source = SOURCES[name]
    places = [Path(data_root, place) for place in source.images.split()]
    for place in places:
        if place.is_dir():
            return place
    if download and source.get.startswith("torchvision."):
        from torchvision import datasets

        getattr(datasets, source.get.removeprefix("torchvision."))(data_root, download=True)
        return find_images(name, data_root, download=False)
    get = "add --download" if source.get.startswith("torchvision.") else f"get {source.get}"
    raise UserError(f"{name}: no images in {' or '.join(map(str, places))}: {get}")


def find_file(name: str, file: str, root: Path, url: str = "", also: Path = Path()) -> Path:
    """A file that belongs to a dataset: beside its image folder, in it, or above; fetched from `url` if there is one."""
    for folder in (root.parent, root, root.parent / "splits", also):
        if (folder / file).is_file():
            return folder / file
    if not url:
        raise UserError(f"{name}: {file} is missing: put it into {root.parent} (for CoOp's splits see DATASETS.md there)")
    urllib.request.urlretrieve(url, root.parent / file)
    return root.parent / file


def read_split(name: str, source: Source, root: Path, args: argparse.Namespace) -> Found:
    """CoOp's split file."""
    split = json.loads(find_file(name, source.split, root, SPLITS + source.split if args.download else "").read_text())
    names = dict(sorted((label, cls) for part in split.values() for _, label, cls in part))
    parts = {part: [(str(root / path), label) for path, label, _ in split[part]] for part in ("train", "val", "test")}
    return Found(list(names.values()), parts, {}, source, str(root))


def read_paths(root: Path, source: Source) -> list[tuple[str, str, str, str]]:
    """(path below root, class, part, domain) of each image whose path fits the pattern, class by class."""
    images = []
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            path = os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
            match = re.fullmatch(source.paths, path)
            if match and file.lower().endswith(ENDINGS) and not file.startswith("."):
                found = match.groupdict()
                images.append((path, found["cls"], found.get("part", source.part), found.get("domain", "")))
    return sorted(images, key=lambda image: (image[1], image[0]))


def read_lists(source: Source, root: Path, lists: dict[str, str], domain: str = "") -> list[tuple[str, str, str, str]]:
    """The same from text files, which name an image a line: "1025794 707-320", or "sketch/dog/1.png 1" of domains."""
    images = []
    for part, file in lists.items():
        for line in find_file("this dataset", file.format(domain), root).read_text().splitlines():
            if domain:
                path = line.rsplit(" ", 1)[0]
                images.append((path, re.fullmatch(source.paths, path)["cls"], part, domain))
            else:
                path, cls = line.split(" ", 1)
                images.append((f"{path}.jpg", cls, part, ""))
    return images


def domains_of(name: str, source: Source, root: Path, images: list, args: argparse.Namespace) -> list:
    """The images of the domains to train on, and as part "ood" those of the domains to test on."""
    if name.startswith("nico") and not (args.train_domain or args.test_domain):  # every class has contexts of its own
        return hold_out_contexts(images)
    known = sorted({domain for *_, domain in images})
    test = args.test_domain or (source.test_domain if not args.train_domain else ())
    train = args.train_domain or (source.train_domain if not args.test_domain else ())
    train = train or [domain for domain in known if domain not in test]
    test = test or [domain for domain in known if domain not in train]
    if unknown := set([*train, *test]) - set(known) or set(train) & set(test) or not test:
        raise UserError(f"{name}: cannot train on {train} and test on {test} ({unknown or 'empty'}); there are {known}")
    if source.lists:
        kept = {part: file for part, file in source.lists.items() if part != "ood"}
        found = [read_lists(source, root, kept, domain) for domain in train]
        found += [read_lists(source, root, {"ood": source.lists["ood"]}, domain) for domain in test]
        return sorted(sum(found, []), key=lambda image: image[1].lower())
    part = dict.fromkeys(train, "train") | dict.fromkeys(test, "ood")
    return [(path, cls, part[domain], domain) for path, cls, _, domain in images if domain in part]


def hold_out_contexts(images: list) -> list:
    """NICO's default: the last 30 % of every class's contexts, by name, are held out."""
    contexts = collections.defaultdict(set)
    for _, cls, _, domain in images:
        contexts[cls].add(domain)
    seen = {cls: sorted(found)[: len(found) - round(0.3 * len(found))] for cls, found in contexts.items()}
    kinds = [("train", "seen contexts"), ("ood", "held-out contexts")]
    return [(path, cls, *kinds[domain not in seen[cls]]) for path, cls, _, domain in images]


def folder_pattern(root: Path) -> str:
    """Your own images: PATH/{train,val,test}/CLASS/* if there is a train and a test folder, else PATH/CLASS/*."""
    parts = (root / "train").is_dir() and (root / "test").is_dir()
    return f"(?P<part>train|val|test)/{CLASS}" if parts else f"(?!ood/){CLASS}"


def class_names(name: str, source: Source, root: Path, classes: set[str]) -> dict[str, str]:
    """{class: its name in prompts} in label order: by classnames.txt ("CLASS NAME" lines), else the class itself."""
    if name == "fgvc_aircraft":
        return {line: line for line in find_file(name, "variants.txt", root).read_text().splitlines()}
    if name.startswith("imagenet"):  # folders are WordNet ids; in V2 they are 0 to 999, in the order of classnames.txt
        lines = find_file(name, "classnames.txt", root, also=root.parents[1] / "imagenet").read_text().splitlines()
        names = dict(line.strip().split(" ", 1) for line in lines)
        names = {str(i): cls for i, cls in enumerate(names.values())} if "0" in classes else names
        return {cls: names[cls] for cls in names if cls in classes}
    ordered = sorted(classes, key=str.lower if "?P<domain>" in source.paths else None)
    file = root / "classnames.txt"
    names = dict(line.split("\t", 1) for line in file.read_text().splitlines()) if file.is_file() else {}
    return {cls: names.get(cls, cls) for cls in ordered}


def read_toy(name: str) -> Found:
    task, parts = world.TASKS[name], {}
    for part in task.parts:
        parts[part] = [(f"toy:{name}/{part}/{i}", label) for i, label in enumerate(world.task_labels(name, part))]
    own = {part: parts.pop(part) for part in ("train", "val", "test")}
    return Found(task.classnames, own, parts, Source("", task.template))


def split_rest(name: str, found: Found) -> Found:
    """Parts that nothing on disk gives are ours: the same for every seed, so that all seeds share a test set."""
    parts = found.parts
    parts["train"] += parts.pop("", [])
    if name == "imagenet":  # its val is our test
        parts["test"] = parts.pop("val", [])
    missing = [part for part in ("val", "test") if not parts[part]] if parts["train"] and name != "imagenet" else []
    if "test" in missing or (missing and found.ood):
        shares = {part: 0.1 for part in missing} if found.ood else {"train": 0.5, "val": 0.2}
        found.parts = parts | split_items(parts["train"], shares, name)
        shares = ", ".join(f"{share:.0%} {part}" for part, share in shares.items())
        found.notes.append(f"{name}: the split is ours, with a fixed seed: {shares} of every class")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 3. DRAWS: each is a pure function of its seed, so that no generator's state ever has to be saved
# ----------------------------------------------------------------------------------------------------------------------
def draw_seed(seed, purpose, *where) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, purpose, *where)).encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw_seed(seed, purpose, *where))


def batches(n: int, size: int, seed: int, epoch: int, max_steps: int = 0) -> list[torch.Tensor]:
    """Shuffled batches of indices. As released, the partial batch is dropped if a full one exists."""
    parts = torch.randperm(n, generator=generator(seed, "order", epoch)).split(size)
    return list(parts[:-1] if n >= size and n % size else parts)[: max_steps or None]


def by_label(items: list[Item]) -> dict[int, list[Item]]:
    """{label: its items}, labels in order of first appearance."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    return groups


def split_items(items: list[Item], shares: dict[str, float], name: str) -> dict[str, list[Item]]:
    """Shuffle each class with a fixed seed and give every part its share, rounded (CoOp's rule, but for the seed). What
    remains is the test part where train has a share, and else stays in train."""
    parts = {part: [] for part in (*shares, "test" if "train" in shares else "train")}
    for label, group in by_label(items).items():
        random.Random(draw_seed(0, "split", name, label)).shuffle(group)
        stops = [0, *itertools.accumulate(round(share * len(group)) for share in shares.values()), len(group)]
        for part, start, stop in zip(parts, stops, stops[1:]):
            parts[part] += group[start:stop]
    return parts


def fewshot(train: list[Item], val: list[Item], shots, seed: int) -> tuple[list[Item], list[Item]]:
    """CoOp's draw, image for image: one generator; class by class in order of first appearance; train first, then val
    with min(shots, 4). A class with fewer images gives all it has. shots="all" draws nothing."""
    rng = random.Random(seed)

    def draw(items, k):
        groups = by_label(items).values()
        return [item for group in groups for item in (rng.sample(group, k) if len(group) >= k else group)]

    return (train, val) if shots == "all" else (draw(train, shots), draw(val, min(shots, 4)))


def keep_labels(items: list[Item], labels: range) -> list[Item]:
    """The items of these classes, relabelled from 0. Base is range(ceil(C/2)), new range(ceil(C/2), C), as in CoOp."""
    return [(address, label - labels.start) for address, label in items if label in labels]


# ----------------------------------------------------------------------------------------------------------------------
# 4. TASKS
# ----------------------------------------------------------------------------------------------------------------------
@dataclass
class Test:
    """One test set. tests[0] of a task is in-distribution; another domain of the same name is out-of-distribution."""

    name: str
    domain: str  # "" where the dataset has none
    classes: str  # "base", "new" or "all"
    classnames: list[str]
    template: str
    items: list[Item]


@dataclass
class Task:
    name: str
    classnames: list[str]  # the training classes': the base half with --classes base
    template: str
    teacher_template: str  # ProGrad's: the class comes last
    train: list[Item]
    val: list[Item]
    tests: list[Test]
    split: str  # sha1 of the training list
    notes: list[str]
    lines: list[str] = field(default_factory=list)
    def validation(self):
        require(self.val, f"{self.name} has no validation part")
        return [Test(self.name, "", "all", self.classnames, self.template, self.val)]


def load_task(args: argparse.Namespace) -> Task:
    """What the flags of add_flags ask for."""
    if args.template and args.template.count("{}") != 1:
        raise UserError(f"--template {args.template!r} needs one {{}}, where the class name goes")
    found = read(args.dataset, args)
    if not found.parts["train"]:
        raise UserError(f"{args.dataset} is for testing only: train on another dataset, with --test-on {args.dataset}")
    half = (len(found.classnames) + 1) // 2
    classnames = found.classnames if args.classes == "all" else found.classnames[:half]
    drawn = fewshot(found.parts["train"], found.parts["val"], args.shots, args.seed)
    train, val = (keep_labels(items, range(len(classnames))) for items in drawn)
    if absent := set(range(len(classnames))) - {label for _, label in train}:
        found.notes.append(f"{len(absent)} classes have no training image, {classnames[min(absent)]!r} for one")
    template = args.template or found.source.template
    tests = make_tests(args.dataset, found, args.classes, args.test_part, template)
    for other in args.test_on:
        target = read(other, args)
        tests += make_tests(other, target, "all", args.test_part, target.source.template)
        found.notes += target.notes
    names = [f"{address.removeprefix(found.root)}\t{label}\n" for address, label in train]
    split = hashlib.sha1("".join(names).encode()).hexdigest()
    teacher = args.template or found.source.teacher or template
    return Task(args.dataset, classnames, template, teacher, train, val, tests, split, found.notes, [n.strip() for n in names])


def make_tests(name: str, found: Found, classes: str, part: str, template: str) -> list[Test]:
    """In-distribution first, all classes or base and new; then the other domains."""
    n = len(found.classnames)
    halves = {"all": range(n)} if classes == "all" else {"base": range((n + 1) // 2), "new": range((n + 1) // 2, n)}
    sets = {"": found.parts[part]} | (found.ood if part == "test" else {})
    tests = []
    for domain, items in sets.items():
        for which, labels in halves.items():
            if kept := keep_labels(items, labels):
                names = found.classnames[labels.start : labels.stop]
                tests.append(Test(name, domain, which, names, template, kept))
    if not tests or tests[0].domain:
        raise UserError(f"{name} has no images in its {part} part")
    return tests


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME", help="a toy task, a dataset of data.py, folder:PATH or domains:PATH")
    add("--data-root", metavar="DIR", help="folder of the datasets")
    add("--shots", type=lambda text: text if text == "all" else int(text), help="training images a class, or all")
    add("--seed", type=int, help="of every random draw")
    add("--classes", choices=["all", "base"], help="base: train on the first half, test on base and new")
    add("--test-on", nargs="+", metavar="NAME", help="further datasets to test on")
    add("--template", help='prompt with {} for the class, such as "a photo of a {}."')
    add("--download", action="store_true", help="fetch what is missing, where torchvision can")
    add("--train-domain", nargs="+", metavar="DOMAIN", help="domains to train on: all not tested on")
    add("--test-domain", nargs="+", metavar="DOMAIN", help="domains to test on: all not trained on")
    add("--test-part", choices=["test", "val"], help="reported on; val is to choose settings")


# ----------------------------------------------------------------------------------------------------------------------
# 5. IMAGES
# ----------------------------------------------------------------------------------------------------------------------
def read_image(address: str) -> Image.Image:
    """An RGB image, EXIF orientation applied (CoOp's code ignores it). UserError names the file and what is wrong.

    WHY RGB here: open_clip's transform converts after it resizes, and resizing a palette mixes its indices."""
    if address.startswith("toy:"):
        task, part, index = address[4:].split("/")
        return Image.fromarray(world.task_image(task, part, int(index)))
    try:
        with Image.open(address) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte; Pillow would clip all above 255 to white
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise UserError(f"{address}: {error or type(error).__name__}") from error


def bad_images(items: list[Item]) -> list[str]:
    """What is wrong with each image that cannot be decoded."""

    def reason(address):
        try:
            read_image(address)
        except UserError as error:
            return str(error)

    with ThreadPool() as pool:  # threads: Pillow decodes without holding Python's lock
        return [why for why in pool.imap(reason, dict.fromkeys(address for address, _ in items), 64) if why]


def train_transform(preprocess, augment: str):
    """The training transform that goes with `preprocess`, an open_clip test transform. none: `preprocess` itself; crop:
    CoOp's random resized crop and flip; randaugment: ProReg's. They draw from torch's global generator."""
    from torchvision import transforms as T

    if augment == "none":
        return preprocess
    if augment == "randaugment":
        return T.Compose([T.RandAugment(2, 9), preprocess])
    size = [step.size for step in preprocess.transforms if hasattr(step, "size")][-1]
    normalise = next(step for step in preprocess.transforms if isinstance(step, T.Normalize))
    crop = T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])


class ImageSet(torch.utils.data.Dataset):
    """items → (image [3, H, W], label, position). View `view` of image i is a pure function of (seed, view, i)."""

    def __init__(self, items: list[Item], transform, seed: int = 0, view: int = 0):
        self.items, self.transform, self.seed, self.view = items, transform, seed, view

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int):
        view, i = divmod(i, len(self.items))
        view += self.view
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator: lend it this image's
            torch.manual_seed(draw_seed(self.seed, "view", view, i))
            return self.transform(read_image(self.items[i][0])), self.items[i][1], i


# ----------------------------------------------------------------------------------------------------------------------
# 6. THE COMMAND: what is there
# ----------------------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a dataset holds, and what is missing.")
    add_flags(parser)
    parser.add_argument("--check-images", action="store_true", help="decode every image and list the bad ones")
    parser.set_defaults(data_root="data")
    args = parser.parse_args(argv)
    for name in [args.dataset] if args.dataset else SOURCES:
        try:
            found = read(name, args)
        except UserError as error:
            if args.dataset:
                raise
            print(f"{name:16} {error}")
            continue
        sets = found.parts | {f"ood/{domain}": items for domain, items in found.ood.items()}
        sizes = ", ".join(f"{len(items)} {part}" for part, items in sets.items())
        print(f"{name:16} {len(found.classnames)} classes; {sizes}; in {found.root or 'code'}")
    if args.dataset:
        for note in found.notes:
            print(f"note: {note}")
        for label, cls in enumerate(found.classnames):
            counts = [sum(item[1] == label for item in items) for items in sets.values()]
            print(f"{label:5}  {cls:30}", *(f"{count:7}" for count in counts))
        if args.check_images:
            bad = bad_images([item for items in sets.values() for item in items])
            print("\n".join(bad) or "all images can be read")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
