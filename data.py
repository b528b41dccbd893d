"""The data side: where datasets lie and how they are split, CoOp's few-shot draw, images.

    python data.py --data-root DIR                            what is found under DIR
    python data.py --dataset dtd --data-root DIR --download   one dataset: counts, classes, split
    python data.py --dataset folder:photos --check-images     what is wrong with it

A dataset is a toy task (toyclip/world.py: no files), a name in SOURCES below, or your own images:
    folder:PATH   PATH/CLASS/*, or PATH/{train,val,test}/CLASS/*; PATH/ood/NAME/CLASS/* is tested on
    domains:PATH  PATH/DOMAIN/CLASS/*, with --train-domain or --test-domain
PATH/classnames.txt may name the classes: a line "FOLDER<tab>NAME" for each.
"""

import argparse
import collections
import errno
import hashlib
import itertools
import json
import os
import random
import re
import sys
import unicodedata
import urllib.request
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from toyclip import world

Item = tuple[str, int]  # (address, label); an address is a path or toy:TASK/PART/INDEX
Entry = tuple[str, str, str, str]  # path below the image folder, class folder, part, domain
ENDINGS = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif".split())
MAX_PIXELS = 89_478_485  # where Pillow warns of a decompression bomb


# --------------------------------------------------------------------------------------------------
# 0. WHAT GOES WRONG: one line and an exit status, and never half a file
# --------------------------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake the user can mend. It is shown as one line, with exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is answered by one line and not by the whole usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; {self.prog} --help lists the flags\n")


def require(condition: object, message: str) -> None:
    """UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


def run(main) -> None:
    """Run a script's main. What stops it is one line on stderr, no traceback, and an exit status:
    2 = the user's to mend, 1 = numbers that are not finite, no space, no memory, 130 = Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # class names may hold what it cannot show
    try:
        return main()
    except KeyboardInterrupt:
        status, text = 130, "interrupted: --resume RUN goes on"
    except UserError as error:
        status, text = 2, str(error).split("UserError: ")[-1]  # loader workers add a traceback
    except FloatingPointError as error:
        status, text = 1, str(error)
    except (RuntimeError, OSError, MemoryError) as error:
        status, text = explain(error)
        if not text:
            raise
    print("error:", " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()), file=sys.stderr)
    raise SystemExit(status)


def explain(error: Exception) -> tuple[int, str]:
    """Exit status and one line for what the machine ran out of; no line for a fault of ours."""
    if any(word in str(error) for word in ("shared memory", "/torch_", "open files", "bus error")):
        return 2, "too little /dev/shm, too few open files: --workers 0, or docker --shm-size 8g"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return 1, "out of memory: try a smaller --memory-gb or --batch-size"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else ""
    return 1 if full else 2, text


def write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: after a kill there is the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a failed write does not say to which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged, no JSON: {error}") from error


# --------------------------------------------------------------------------------------------------
# 1. THE DATASETS: a row says where the images are and what tells their class, part and domain
# --------------------------------------------------------------------------------------------------
@dataclass
class Source:
    images: str  # image folders below --data-root that are tried: CoOp's, torchvision's, others'
    get: str = ""  # torchvision's name of it, or what to get where
    template: str = "a photo of a {}."  # zero-shot CLIP's: CoOp's, for the last five ProReg's
    teacher: str = ""  # ProGrad's, with the class last, where it differs
    split: str = (
        ""  # CoOp's file {"train": [[path, label, class name], ...], "val": .., "test": ..}
    )
    paths: str = ""  # or a pattern that reads class, part and domain off an image's path
    part: str = ""  # what all images are where paths do not say so: "test" of sets to test on
    lists: dict[str, str] = field(default_factory=dict)  # published lists of the images of a part
    domains: tuple[tuple, tuple] = ((), ())  # to train and test on without flags; (): the others


# fmt: off
CLASS = "(?P<cls>[^/]+)/.+"
CONTEXT = "(?P<cls>[^/]+)/(?P<domain>[^/]+)/.+"
STYLE = f"(?P<domain>art_painting|cartoon|photo|sketch)/{CLASS}"
SIX = f"(?P<domain>clipart|infograph|painting|quickdraw|real|sketch)/{CLASS}"
# All of CoOp's split files but Food101's and SUN397's.
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"
SOURCES = {
    "imagenet": Source("imagenet/images imagenet ImageNet ILSVRC2012",
                       "ILSVRC-2012 of image-net.org, unpacked to train/WNID/* and val/WNID/*",
                       paths=f"(?P<part>train|val)/{CLASS}"),
    "caltech101": Source("caltech-101/101_ObjectCategories caltech101/101_ObjectCategories",
                         "torchvision.Caltech101", split="split_zhou_Caltech101.json"),
    "oxford_pets": Source("oxford_pets/images oxford-iiit-pet/images", "torchvision.OxfordIIITPet",
                          "a photo of a {}, a type of pet.", "a type of pet, a photo of a {}.",
                          "split_zhou_OxfordPets.json"),
    "stanford_cars": Source("stanford_cars", "(its link is dead) cars_train and cars_test with "
                            "5-digit file names, see github.com/pytorch/vision/issues/7545",
                            split="split_zhou_StanfordCars.json"),
    "oxford_flowers": Source("oxford_flowers/jpg flowers-102/jpg",
                             "102flowers.tgz of www.robots.ox.ac.uk/~vgg/data/flowers/102",
                             "a photo of a {}, a type of flower.",
                             "a type of flower, a photo of a {}.", "split_zhou_OxfordFlowers.json"),
    "food101": Source("food-101/images", "torchvision.Food101", "a photo of {}, a type of food.",
                      "a type of food, a photo of {}.", "split_zhou_Food101.json"),
    "fgvc_aircraft": Source("fgvc_aircraft/images fgvc-aircraft-2013b/data/images",
                            "torchvision.FGVCAircraft", "a photo of a {}, a type of aircraft.",
                            "a type of aircraft, a photo of a {}.", paths="(?P<path>.+)",
                            lists={p: f"images_variant_{p}.txt" for p in ("train", "val", "test")}),
    "sun397": Source("sun397/SUN397 SUN397", "(its link is dead) SUN397.tar.gz, so that "
                     "SUN397/a/abbey/*.jpg is there", split="split_zhou_SUN397.json"),
    "dtd": Source("dtd/images dtd/dtd/images", "torchvision.DTD", "{} texture.",
                  "a texture of {}.", "split_zhou_DescribableTextures.json"),
    "eurosat": Source("eurosat/2750", "torchvision.EuroSAT", "a centered satellite photo of {}.",
                      split="split_zhou_EuroSAT.json"),
    "ucf101": Source("ucf101/UCF-101-midframes", "UCF-101-midframes.zip, see CoOp's DATASETS.md",
                     "a photo of a person doing {}.", split="split_zhou_UCF101.json"),
    # ImageNet's variants, for testing only
    "imagenetv2": Source("imagenetv2/imagenetv2-matched-frequency-format-val "
                         "imagenetv2-matched-frequency-format-val ImageNetV2-matched-frequency",
                         "matched-frequency of github.com/modestyachts/ImageNetV2",
                         paths=CLASS, part="test"),
    "imagenet_sketch": Source("imagenet-sketch/images imagenet-sketch/sketch sketch",
                              "github.com/HaohanWang/ImageNet-Sketch", paths=CLASS, part="test"),
    "imagenet_a": Source("imagenet-adversarial/imagenet-a imagenet-a",
                         "github.com/hendrycks/natural-adv-examples", paths=CLASS, part="test"),
    "imagenet_r": Source("imagenet-rendition/imagenet-r imagenet-r",
                         "github.com/hendrycks/imagenet-r", paths=CLASS, part="test"),
    # ProReg's own: in- and out-of-distribution
    "bar": Source("bar BAR BAR-master", "github.com/alinlab/BAR", "the man is {}.",
                  paths=r"(?P<domain>train|test)/(?P<cls>[^/]+)_\d+\.\w+", domains=((), ("test",))),
    "nico_animal": Source("nico/animal NICO/Animal nico_animal Animal", "nico.thumedialab.com",
                          "this is {}.", paths=CONTEXT),
    "nico_vehicle": Source("nico/vehicle NICO/Vehicle nico_vehicle Vehicle", "nico.thumedialab.com",
                           "this is {}.", paths=CONTEXT),
    "pacs": Source("pacs/images pacs/kfold PACS/kfold pacs PACS", "domaingeneralization.github.io",
                   "this is {}.", paths=STYLE, domains=((), ("art_painting",)),
                   lists={"train": "{}_train_kfold.txt", "val": "{}_crossval_kfold.txt",
                          "ood": "{}_test_kfold.txt"}),
    "domainnet": Source("domainnet DomainNet domain_net", "ai.bu.edu/M3SDA, the cleaned version",
                        paths=SIX, domains=(("sketch",), ("clipart", "painting", "real")),
                        lists={"train": "{}_train.txt", "test": "{}_test.txt",
                               "ood": "{}_test.txt"}),
}
WRONG = "sketch/dog/n02103406_4068-1.png"  # an entry of PACS's lists that Dassl leaves out, too
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test",
         "val": "val", "valid": "val", "validation": "val"}
# fmt: on


# --------------------------------------------------------------------------------------------------
# 2. READING: every dataset becomes a list of entries, which is checked in one place
# --------------------------------------------------------------------------------------------------
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
    """Find and read dataset `name`; of `args` where to look, and which domains are what."""
    if name in world.TASKS:
        return read_toy(name)
    source, root = locate(name, args)
    notes, domains = [], "?P<domain>" in source.paths and not name.startswith("folder:")
    if source.split:
        entries, names = read_split(name, source, root, args)
    else:
        listed = source.lists and not domains
        entries = (
            read_lists(name, source, root) if listed else walk(name, source, root, args, notes)
        )
        if domains:
            entries = choose_domains(name, source, root, entries, args, notes)
        require(entries, f"{name}: no images in {root}; expected are paths {source.paths}")
        names = class_names(name, root, entries, notes)
    check_entries(name, root, entries, names, notes)
    label = {cls: i for i, cls in enumerate(names)}
    parts, ood = collections.defaultdict(list), collections.defaultdict(list)
    for path, cls, part, domain in entries:
        item = (os.path.join(root, path), label[cls])
        (ood[domain] if part == "ood" else parts[part]).append(item)
    return split_rest(name, Found(list(names.values()), parts, dict(ood), source, str(root), notes))


def read_toy(name: str) -> Found:
    task, parts = world.TASKS[name], {}
    for part in task.parts:
        labels = enumerate(world.task_labels(name, part))
        parts[part] = [(f"toy:{name}/{part}/{i}", label) for i, label in labels]
    own = {part: parts.pop(part) for part in ("train", "val", "test")}
    return Found(task.classnames, own, parts, Source("", template=task.template))


def locate(name: str, args: argparse.Namespace) -> tuple[Source, Path]:
    """The row of a dataset and its image folder; with --download torchvision fetches it."""
    kind, _, path = name.partition(":")
    if kind in ("folder", "domains") and path:
        root = Path(path).expanduser()
        require(root.is_dir(), f"{root} is no folder: expected are images {root}/CLASS/NAME.jpg")
        pattern = f"(?P<domain>[^/]+)/{CLASS}" if kind == "domains" else folder_pattern(root)
        return Source(path, paths=pattern), root
    known = ", ".join([*world.TASKS, *SOURCES])
    require(
        name in SOURCES, f"no dataset is called {name!r}: use folder:PATH, domains:PATH, {known}"
    )
    source, data_root = SOURCES[name], Path(args.data_root).expanduser()
    places = [data_root / place for place in source.images.split()]
    fetch = source.get.removeprefix("torchvision.")
    if args.download and fetch != source.get and not any(map(Path.is_dir, places)):
        from torchvision import datasets

        getattr(datasets, fetch)(data_root, download=True)
    found = [place for place in places if place.is_dir()]
    advice = f"get {fetch}" if fetch == source.get else "add --download"
    require(found, f"{name}: no images in {' or '.join(map(str, places))}: {advice}")
    return source, found[0]


def find_file(name: str, file: str, root: Path, url: str = "") -> Path:
    """A file that belongs to a dataset, beside its image folder or near; or fetched from `url`."""
    above = root.parent
    for place in (above, root, above / "splits", root / "splits", above.parent / "imagenet"):
        if (place / file).is_file():
            return place / file
    if not url:
        raise FileNotFoundError(
            errno.ENOENT, f"{name} needs it, see CoOp's DATASETS.md", above / file
        )
    write(above / file, urllib.request.urlopen(url).read())
    return above / file


def resolve(root: Path, path: str, where: str) -> str:
    """A path that a list names, which must be a file below root."""
    path = path.replace("\\", "/")
    inside = not path.startswith("/") and ".." not in path.split("/") and "\0" not in path
    require(inside, f"{where}: {path!r} leaves the image folder; such a list is refused")
    require((root / path).is_file(), f"{where}: {root / path} is missing: unpack the images again")
    return path


def read_split(name: str, source: Source, root: Path, args) -> tuple[list, dict[int, str]]:
    """CoOp's split file → entries, {label: class name}."""
    file = find_file(name, source.split, root, SPLITS + source.split if args.download else "")
    split, entries, names = read_json(file), [], {}
    for part in ("train", "val", "test"):
        rows = split.get(part) if isinstance(split, dict) else None
        require(isinstance(rows, list), f'{file} has no list "{part}" of [path, label, class name]')
        for i, row in enumerate(rows):
            where = f"{file}, {part}[{i}]: {row!r}"
            kinds = [type(value) for value in row] if isinstance(row, list) else []
            require(kinds == [str, int, str], f"{where} is not [path, label, class name]")
            known = names.setdefault(row[1], row[2])
            require(known == row[2], f"{where}: this label is {known!r} before")
            entries.append((resolve(root, row[0], where), row[1], part, ""))
    numbered = names.keys() == set(range(len(names)))
    require(numbered, f"{file}: labels must be 0, 1, 2, ..., not {sorted(names)[:9]}")
    return entries, dict(sorted(names.items()))


def read_lists(name: str, source: Source, root: Path, part="", domain="") -> list[Entry]:
    """Text files that name an image a line: "1025794 707-320", or of a part and domain
    "sketch/dog/1.png 1"."""
    entries = []
    pattern = rf"(?P<path>{source.paths}) \d+" if domain else "(?P<path>[^ ]+) (?P<cls>.+)"
    for kind in [part] if part else source.lists:
        file = find_file(name, source.lists[kind].format(domain), root)
        for i, line in enumerate(read_text(file).splitlines(), 1):
            match = re.fullmatch(pattern, line.strip())
            require(match, f"{file}, line {i}: {line!r} names no image and class")
            path = match["path"] if domain else f"{match['path']}.jpg"
            if path != WRONG:
                path = resolve(root, path, f"{file}, line {i}")
                entries.append((path, match["cls"], kind, domain))
    return entries


def walk(name: str, source: Source, root: Path, args, notes: list[str]) -> list[Entry]:
    """The images below root whose paths fit the pattern, class by class. What is left out of your
    own folders is counted, by reason, in a note."""
    own = {os.path.realpath(vars(args).get(key) or "runs") for key in ("cache_dir", "out_dir")}
    entries, left = [], collections.Counter()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = {sub: os.path.realpath(os.path.join(folder, sub)) for sub in folders}
        kept = [sub for sub in folders if not sub.startswith((".", "__")) and real[sub] not in own]
        left["hidden or own folders"] += len(folders) - len(kept)
        above = f"{os.path.realpath(folder)}/"  # a link to a folder above would have no end
        folders[:] = [sub for sub in kept if not above.startswith(f"{real[sub]}/")]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for file in files:
            path = f"{below}/{file}".removeprefix("./")
            match = re.fullmatch(source.paths, path)
            if match and file.lower().endswith(ENDINGS) and not file.startswith("."):
                found = match.groupdict(default="")
                cls = unicodedata.normalize("NFC", found.get("ood_cls") or found["cls"])
                part = "ood" if found.get("ood_cls") else found.get("part", source.part).lower()
                entries.append((path, cls, PARTS.get(part, part), found.get("domain", "")))
            elif file != "classnames.txt":
                left[os.path.splitext(file)[1] or "no ending" if match else "no class folder"] += 1
    text = ", ".join(f"{n} ({why})" for why, n in left.items() if n)
    notes += [f"files left out: {text}"] if text and ":" in name else []
    return sorted(entries, key=lambda entry: (entry[1], entry[0]))


def folder_pattern(root: Path) -> str:
    """Your own images: parts and then classes, if folders are called so; else classes."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name != "ood")
    parts = [folder for folder in folders if folder.lower() in PARTS]
    ood = "ood/(?P<domain>[^/]+)/(?P<ood_cls>[^/]+)/.+"
    if not any(path.is_dir() for part in parts for path in (root / part).iterdir()):
        return f"{ood}|(?!ood/[^/]+/[^/]+/){CLASS}"
    others = [folder for folder in folders if folder not in parts and folder[0] not in "._"]
    text = f"{root} holds {parts[0]!r}, a part, and {others[:1]}, a class: keep one kind"
    require(not others, f"{text}; a class called {parts[0]!r} needs another folder name")
    kinds = sorted(PARTS[part.lower()] for part in parts)
    good = kinds in (["test", "train"], ["train", "val"], ["test", "train", "val"])
    require(
        good, f"{root} has {', '.join(parts)}: needed are one train and one test, maybe one val"
    )
    return f"{ood}|(?P<part>{'|'.join(parts)})/{CLASS}"


def choose_domains(name: str, source: Source, root: Path, entries: list, args, notes: list) -> list:
    """The entries of the domains to train on, and as part "ood" those of the domains to test on."""
    if name.startswith("nico") and not (args.train_domain or args.test_domain):
        notes.append("the last 30 % of every class's contexts, by name, are held out")
        return hold_out_contexts(entries)
    known = sorted({domain for *_, domain in entries})
    train, test = args.train_domain, args.test_domain
    train, test = (train, test) if train or test else source.domains
    require(train or test, f"{name}: name --train-domain or --test-domain, of {', '.join(known)}")
    train = train or [domain for domain in known if domain not in test]
    test = test or [domain for domain in known if domain not in train]
    bad = set([*train, *test]) - set(known) | set(train) & set(test)
    require(train and test and not bad, f"{name}: trains on {train}, tests on {test}, of {known}")
    part = dict.fromkeys(train, "train") | dict.fromkeys(test, "ood")
    whole = [(path, cls, part[d], d) for path, cls, _, d in entries if d in part]
    which = {"train": train, "val": train, "test": train, "ood": test}
    lists = [(kind, domain) for kind in source.lists for domain in which[kind]]
    try:
        listed = [read_lists(name, source, root, *pair) for pair in lists]
    except FileNotFoundError as error:
        notes.append(f"its published lists are not there ({error.filename})")
        return whole
    return sorted(itertools.chain(*listed), key=lambda entry: entry[1].lower()) or whole


def hold_out_contexts(entries: list[Entry]) -> list[Entry]:
    """NICO, whose classes have contexts of their own: some of each class's are for testing."""
    contexts = collections.defaultdict(set)
    for _, cls, _, domain in entries:
        contexts[cls].add(domain)
    seen = {cls: sorted(own)[: len(own) - round(0.3 * len(own))] for cls, own in contexts.items()}
    kinds = [("ood", "held-out contexts"), ("train", "")]
    return [(path, cls, *kinds[domain in seen[cls]]) for path, cls, _, domain in entries]


# --------------------------------------------------------------------------------------------------
# 3. NAMES, CHECKS AND PARTS
# --------------------------------------------------------------------------------------------------
def class_names(name: str, root: Path, entries: list[Entry], notes: list[str]) -> dict[str, str]:
    """{class folder: its name in prompts}, in label order."""
    folded = str.lower if any(domain for *_, domain in entries) else None
    classes = sorted({cls for _, cls, _, _ in entries}, key=folded)
    if name == "fgvc_aircraft":
        classes = read_text(find_file(name, "variants.txt", root)).splitlines()
    if ":" in name and (root / "classnames.txt").is_file():
        return read_names(root / "classnames.txt", classes)
    if name.startswith("imagenet") or all(re.fullmatch(r"n\d{8}", cls) for cls in classes):
        return wordnet_names(name, root, classes, notes)
    bad = [cls for cls in classes if re.search("[\ud800-\udfff]", cls)]
    require(not bad, f"{root}: the folder {bad[:1]} is not UTF-8: name it in classnames.txt")
    return {cls: cls for cls in classes}


def wordnet_names(name: str, root: Path, classes: list[str], notes: list[str]) -> dict[str, str]:
    """Of WordNet ids: by classnames.txt ("WNID NAME" lines), else open_clip's. V2 has 0 to 999."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    try:
        file = find_file(name, "classnames.txt", root)
        names = dict(line.strip().split(" ", 1) for line in read_text(file).strip().splitlines())
    except FileNotFoundError:
        file = "open_clip, for the sorted WordNet ids"
        names = dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES))
    notes.append(f"class names are from {file}")
    if "0" in classes:
        names = {str(i): text for i, text in enumerate(names.values())}
    unknown = [cls for cls in classes if cls not in names]
    require(not unknown, f"{root}: the folder {unknown[:1]} has no name in {file}")
    return {cls: text for cls, text in names.items() if cls in classes}


def read_names(file: Path, folders: list[str]) -> dict[str, str]:
    """classnames.txt: a line "FOLDER<tab>NAME" for each class folder."""
    names = {}
    for line in filter(str.strip, read_text(file).splitlines()):
        folder, _, text = line.partition("\t")
        folder = unicodedata.normalize("NFC", folder.strip())
        fits = text.strip() and folder in folders and folder not in names
        require(fits, f"{file}: {line!r}: needed is FOLDER<tab>NAME, once for each class folder")
        names[folder] = text.strip()
    missing = [folder for folder in folders if folder not in names]
    require(not missing, f"{file}: no line for the class folder {missing[:1]}")
    return {folder: names[folder] for folder in folders}


def check_entries(name: str, root: Path, entries: list, names: dict, notes: list) -> None:
    """Classes that prompts cannot tell apart, and images that are named twice."""
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    require(len(names) > 1, f"{root}: there is one class, {[*names.values()]}: two are needed")
    twins, uses, real = collections.defaultdict(list), collections.defaultdict(set), {}
    for text in names.values():
        twins[tuple(tokenizer.encode(text.replace("_", " ")))].append(text)
    same = [group for tokens, group in twins.items() if len(group) > 1 or not tokens]
    known = not same or name.startswith("imagenet")  # whose own list has such pairs
    require(known, f"{root}: classes {same[:1]} have one prompt, or no name: rename one")
    notes += [f"classes {same[:1]} have one prompt; they stay apart, by label"] if same else []
    for path, cls, part, _ in entries:
        folder, file = os.path.split(os.path.join(root, path))
        where = real.setdefault(folder, os.path.realpath(folder) if folder not in real else "")
        file = os.path.join(where, file)
        uses[os.path.realpath(file) if os.path.islink(file) else file].add((part, cls))
    leaks = [file for file, use in uses.items() if {"train", "test"} <= {part for part, _ in use}]
    require(not leaks, f"{root}: {leaks[:1]} is to be trained and tested on: remove one")
    doubles = len(entries) - len(uses)
    notes += [f"{doubles} images are named twice, under other labels or parts"] if doubles else []


def split_rest(name: str, found: Found) -> Found:
    """Parts that nothing on disk gives are ours: the same for every seed, so that all seeds share a
    test set."""
    parts = found.parts
    parts["train"] += parts.pop("", [])
    if name == "imagenet" or (name.startswith("folder:") and parts["val"] and not parts["test"]):
        parts["test"] = parts.pop("val", [])
        found.notes.append("its val is the test part")
    missing = [part for part in ("val", "test") if not parts[part] and parts["train"]]
    if "test" in missing or (missing and found.ood):
        shares = dict.fromkeys(missing, 0.1) if found.ood else {"train": 0.5, "val": 0.2}
        parts |= split_items(parts["train"], shares, found)
        text = ", ".join(f"{share:.0%} {part}" for part, share in shares.items())
        found.notes.append(f"split: ours, {text}, the rest {'train' if found.ood else 'test'}")
    trained = {label for _, label in parts["train"]}
    extra = (
        sorted({label for _, label in parts["val"] + parts["test"]} - trained) if trained else []
    )
    text = f"{name}: class {[found.classnames[label] for label in extra[:1]]} has no training image"
    require(not extra or found.ood, f"{text}: add one, or remove its other images")
    return found


def split_items(items: list[Item], shares: dict[str, float], found: Found) -> dict[str, list[Item]]:
    """Give every part its share of each class, rounded (CoOp's rule). The rest is the test part
    where train has a share, and else stays in train.

    WHY in the order of a hash of the path below the root: the split does not hang on where the
    folder lies, and an added or removed image moves next to no other.
    """
    parts = {part: [] for part in (*shares, "test" if "train" in shares else "train")}
    for label, group in by_label(items).items():
        n = len(group)
        text = f"{n} images of class {found.classnames[label]!r} cannot be split 50/20/30"
        require(n > 3 or "train" not in shares, f"{found.root}: {text}: 4 are needed")
        group.sort(key=lambda item: draw_seed("split", below(item[0], found.root)))
        stops = [0, *itertools.accumulate(round(share * n) for share in shares.values()), n]
        for part, start, stop in zip(parts, stops, stops[1:]):
            parts[part] += group[start:stop]
    return parts


def below(address: str, root: str) -> str:
    """An address without its root, the same wherever the dataset lies."""
    path = os.path.relpath(address, root).replace(os.sep, "/") if root else address
    return unicodedata.normalize("NFC", path)


# --------------------------------------------------------------------------------------------------
# 4. DRAWS: each is a pure function of its seed, so that no generator's state has to be saved
# --------------------------------------------------------------------------------------------------
def draw_seed(*what) -> int:
    """A 63-bit number that depends on `what` alone."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw_seed(seed, purpose, *where))


def batches(n: int, size: int, seed: int, epoch: int, max_steps: int = 0) -> list[torch.Tensor]:
    """Shuffled batches of positions, at most max_steps (0: all). As released, the partial batch is
    dropped if a full one exists."""
    parts = torch.randperm(n, generator=generator(seed, "order", epoch)).split(size)
    return list(parts[:-1] if n >= size and n % size else parts)[: max_steps or None]


def by_label(items: list[Item]) -> dict[int, list[Item]]:
    """{label: its items}, labels in order of first appearance."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    return groups


def fewshot(train: list[Item], val: list[Item], shots, seed: int) -> tuple[list[Item], list[Item]]:
    """CoOp's draw, image for image: one generator; class by class in order of first appearance;
    train first, then val with min(shots, 4). A class with fewer images gives all it has.
    shots="all" draws nothing."""
    rng = random.Random(seed)

    def draw(items: list[Item], k: int) -> list[Item]:
        groups = by_label(items).values()
        drawn = [rng.sample(group, k) if len(group) >= k else group for group in groups]
        return list(itertools.chain(*drawn))

    return (train, val) if shots == "all" else (draw(train, shots), draw(val, min(shots, 4)))


def keep_labels(items: list[Item], labels: range) -> list[Item]:
    """The items of these classes, relabelled from 0. Base is range(ceil(C/2)), new the rest."""
    return [(address, label - labels.start) for address, label in items if label in labels]


# --------------------------------------------------------------------------------------------------
# 5. TASKS
# --------------------------------------------------------------------------------------------------
@dataclass
class Test:
    """One test set. tests[0] of a task is in-distribution, another domain of its name is not."""

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
    split: str  # sha1 of `lines`
    notes: list[str]
    lines: list[str] = field(default_factory=list)  # "path below root<tab>label", trained on
    root: str = ""

    def validation(self) -> list[Test]:
        """The validation part of the training classes."""
        require(self.val, f"{self.name} has no validation part: no --eval-every, --select val")
        return [Test(self.name, "", "all", self.classnames, self.template, self.val)]


def load_task(args: argparse.Namespace) -> Task:
    """What the data flags ask for."""
    braces = re.fullmatch(r"[^{}]*\{\}[^{}]*", args.template or "{}")
    require(braces, f"--template {args.template!r} needs one {{}}, where the class name goes")
    found = read(args.dataset, args)
    text = f"{args.dataset} is for testing only: train on another, with --test-on {args.dataset}"
    require(found.parts["train"], text)
    n = len(found.classnames)
    require(
        args.classes == "all" or n > 3, f"{args.dataset}: {n} classes have no base and new half"
    )
    classnames = found.classnames[: n if args.classes == "all" else (n + 1) // 2]
    drawn = fewshot(found.parts["train"], found.parts["val"], args.shots, args.seed)
    train, val = (keep_labels(items, range(len(classnames))) for items in drawn)
    counts = collections.Counter(label for _, label in train)
    least = min(counts[label] for label in range(len(classnames)))
    few = least < (1 if args.shots == "all" else args.shots)
    found.notes += [f"a class has {least} training images, no more"] if few else []
    template = args.template or found.source.template
    tests = make_tests(args.dataset, found, args.classes, args.test_part, template)
    for other in args.test_on:
        target = read(other, args)
        tests += make_tests(other, target, "all", args.test_part, target.source.template)
        found.notes += target.notes
    lines = [f"{below(address, found.root)}\t{label}" for address, label in train]
    split = hashlib.sha1("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
    texts = classnames, template, args.template or found.source.teacher or template
    return Task(args.dataset, *texts, train, val, tests, split, found.notes, lines, found.root)


def trained_on(task: Task, lines: list[str]) -> int:
    """How many test images of the task's own dataset are among these lines of another run."""
    own = [test.items for test in task.tests if test.name == task.name]
    tested = {below(address, task.root) for address, _ in itertools.chain(*own)}
    return len({line.rpartition("\t")[0] for line in lines} & tested)


def make_tests(name: str, found: Found, classes: str, part: str, template: str) -> list[Test]:
    """In-distribution first, all classes or base and new; then the other domains."""
    n = len(found.classnames)
    half = {"base": range((n + 1) // 2), "new": range((n + 1) // 2, n)}
    halves = {"all": range(n)} if classes == "all" else half
    sets = {"": found.parts[part]} | (found.ood if part == "test" else {})
    tests = []
    for domain, items in sets.items():
        for which, labels in halves.items():
            names = found.classnames[labels.start : labels.stop]
            tests.append(Test(name, domain, which, names, template, keep_labels(items, labels)))
    tests = [test for test in tests if test.items]
    require(tests, f"{name} has no images in its {part} part")
    return tests


# fmt: off
FLAGS = {
    "--dataset": {"metavar": "NAME", "help": "a task of data.py, folder:PATH or domains:PATH"},
    "--data-root": {"metavar": "DIR", "help": "folder of the datasets"},
    "--shots": {"type": lambda text: text if text == "all" else int(text), "metavar": "K",
                "help": "training images a class, or all"},
    "--seed": {"type": int, "metavar": "S", "help": "of every random draw"},
    "--classes": {"choices": ["all", "base"], "help": "base: train on half, test on base and new"},
    "--test-on": {"nargs": "+", "metavar": "NAME", "help": "further datasets to test on"},
    "--template": {"metavar": "T", "help": 'as "a photo of a {}." [of its dataset]'},
    "--download": {"action": "store_true", "help": "fetch what is missing, where it can be"},
    "--train-domain": {"nargs": "+", "metavar": "D", "help": "[all that are not tested on]"},
    "--test-domain": {"nargs": "+", "metavar": "D", "help": "[all that are not trained on]"},
    "--test-part": {"choices": ["test", "val"], "help": "reported on; val is to choose settings"},
}
# fmt: on


# --------------------------------------------------------------------------------------------------
# 6. IMAGES
# --------------------------------------------------------------------------------------------------
def read_image(address: str) -> Image.Image:
    """An RGB image, EXIF orientation applied. UserError names the file and what is wrong.

    WHY RGB here: open_clip's transform converts after it resizes, and resizing a palette mixes its
    indices. CoOp's code ignores EXIF.
    """
    if address.startswith("toy:"):
        task, part, index = address[4:].split("/")
        return Image.fromarray(world.task_image(task, part, int(index)))
    try:
        with Image.open(address) as image:
            short, long = sorted(image.size)
            limit = f"the limits are {MAX_PIXELS:,}, and 200 times as long as wide: shrink it"
            fits = short * long <= MAX_PIXELS and long <= 200 * short
            require(fits, f"{short} x {long} pixels; {limit}")
            low, high = image.getextrema() if image.mode == "F" else (0, 0)
            require(0 <= low and high <= 1, f"floats {low:g} to {high:g}: scale them to [0, 1]")
            image = upright(image)
            if image.mode == "F":
                image = image.point(lambda value: value * 255 + 0.5).convert("L")
            if image.mode.startswith("I"):  # 16 bit: Pillow would clip all above 255 to white
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise UserError(f"{address}: {error or type(error).__name__}") from error


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says; as it is where the EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the photo itself is readable
        return image


def bad_images(items: list[Item]) -> list[str]:
    """What is wrong with each image that cannot be decoded."""

    def reason(address: str) -> str | None:
        try:
            read_image(address)
        except UserError as error:
            return str(error)

    with ThreadPool() as pool:  # threads: Pillow decodes without holding Python's lock
        return [why for why in pool.imap(reason, dict(items), 64) if why]


def train_transform(preprocess, augment: str):
    """The training transform that goes with `preprocess`, an open_clip test transform. none:
    `preprocess` itself; crop: CoOp's random resized crop and flip; randaugment: ProReg's. They draw
    from torch's global generator."""
    from torchvision import transforms as T  # takes a second, and listing data does without

    if augment == "none":
        return preprocess
    if augment == "randaugment":
        return T.Compose([T.RandAugment(2, 9), preprocess])
    size = [step.size for step in preprocess.transforms if hasattr(step, "size")][-1]
    normalise = [step for step in preprocess.transforms if isinstance(step, T.Normalize)]
    crop = T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), *normalise])


class ImageSet(Dataset):
    """[position + view · N] → (image [3, H, W], label, position), where N = len. A view is a pure
    function of (seed, view, position)."""

    def __init__(self, items: list[Item], transform, seed: int = 0):
        self.items = items
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        view, i = divmod(index, len(self.items))
        address, label = self.items[i]
        with torch.random.fork_rng(devices=[]):  # lend torchvision's generator this image's seed
            torch.manual_seed(draw_seed(self.seed, "view", view, i))
            return self.transform(read_image(address)), label, i


def image_loader(images: ImageSet, batches: list[list[int]], args) -> DataLoader:
    """A DataLoader over lists of positions in `images`, with --workers processes.

    Short lists are decoded in this process: starting another one costs more than 64 images do.
    """
    n, pin = min(args.workers, len(images) // 64), args.device != "cpu"
    keep = {"persistent_workers": n > 0, "pin_memory": pin}
    return DataLoader(images, batch_sampler=batches, num_workers=n, **keep)


# --------------------------------------------------------------------------------------------------
# 7. THE COMMAND: what is there
# --------------------------------------------------------------------------------------------------
LIKE = dict.fromkeys(world.TASKS, "like the 11 datasets of ProGrad and VPT") | {
    "toy_shapes_biased": "like BAR and NICO, a shortcut in training",
    "toy_shapes_unbiased": "its control, without the shortcut",
}


def describe(name: str, found: Found, whole: bool) -> None:
    """A line about a dataset; then its notes, and the images of each class and part."""
    sets = found.parts | {f"ood {domain}": items for domain, items in found.ood.items()}
    sizes = ", ".join(f"{len(items)} {part}" for part, items in sets.items() if items)
    where = LIKE.get(name, f"in {found.root}")
    print(f"{name:30} {len(found.classnames)} classes; {sizes}; {where}")
    print("".join(f"note: {note}\n" for note in found.notes if whole), end="")
    for label, cls in enumerate(found.classnames if whole else ()):
        counts = [sum(item[1] == label for item in items) for items in sets.values()]
        print(f"{label:5}  {cls:30}", *(f"{n} {part}" for n, part in zip(counts, sets) if n))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="What a dataset holds, and what is missing.", allow_abbrev=False)
    for name, options in FLAGS.items():
        parser.add_argument(name, **options)
    parser.add_argument("--check-images", action="store_true", help="decode all, list every fault")
    parser.set_defaults(data_root="data", dataset="all")
    args = parser.parse_args(argv)
    for name in [*world.TASKS, *SOURCES] if args.dataset == "all" else [args.dataset]:
        try:
            found = read(name, args)
            describe(name, found, name == args.dataset)
        except (UserError, FileNotFoundError) as error:
            if args.dataset == name:
                raise
            print(f"{name:30} {str(error).removeprefix(f'{name}: ')}")
    if args.check_images:
        faults = bad_images(list(itertools.chain(*found.parts.values(), *found.ood.values())))
        print("\n".join(faults) or "all images can be read")
        require(not faults, f"{len(faults)} images are broken: mend or remove them")


if __name__ == "__main__":
    run(main)
