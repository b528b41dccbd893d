"""The data side: where datasets lie and how they are split, CoOp's few-shot draw, images.

    python data.py --data-root DIR                            what is found under DIR
    python data.py --dataset dtd --data-root DIR --download   one dataset: counts, classes, split
    python data.py --dataset folder:photos --check-images     what is wrong with it

A dataset is a toy task (toyclip/world.py: no files), a name in SOURCES below, or your own images:
    folder:PATH   PATH/CLASS/*, or PATH/{train,val,test}/CLASS/*; PATH/ood/NAME/CLASS/* is tested on
    domains:PATH  PATH/DOMAIN/CLASS/*, with --train-domain or --test-domain
PATH/classnames.txt may name the classes: a line "FOLDER<tab>NAME" for each, or names in order.

To learn how draws and tasks are made read sections 4 to 6; the others read what people have.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unicodedata import normalize

import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from toyclip import world

Item = tuple[str, int]  # (address, label); an address is a path or toy:TASK/PART/INDEX
Row = tuple[str, str | int, str, str]  # address, class (folder, or label), part, domain
ENDINGS = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif".split())


# 0. WHAT GOES WRONG: one line and an exit status, and never half a file ---------------------------
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


def tell(told: list[str], condition: object, text: str) -> None:
    """Add a note or a fault to its list, if the condition holds."""
    if condition:
        told.append(text)


def run(main) -> None:
    """Run a script's main. What stops it is one line on stderr, no traceback, and an exit status:
    2 = the user's to mend, 1 = numbers that are not finite, no space, no memory, 130 = Ctrl-C."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # closed, where it is None
    # Class names may hold what stdout cannot show. It may be closed, or a notebook's.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except KeyboardInterrupt:
        status, text = 130, "interrupted; a run goes on with --resume RUN"
    except UserError as error:
        status, text = 2, str(error).split("UserError: ")[-1]  # loader workers add a traceback
    except FloatingPointError as error:
        status, text = 1, str(error)
    except (RuntimeError, OSError, MemoryError) as error:
        status, text = explain(error)
    print("error:", " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split()), file=sys.stderr)
    raise SystemExit(status)


def explain(error: Exception) -> tuple[int, str]:
    """Exit status and one line for what the machine ran out of. A fault of ours is raised again."""
    reason = getattr(error, "strerror", None) or str(error)  # without a file's name
    if any(word in reason for word in ("shared memory", "</torch_", "open files", "bus error")):
        return 2, "too little /dev/shm, too few open files: --workers 0, or docker --shm-size 8g"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in reason:
        return 1, "out of memory: try a smaller --memory-gb or --batch-size"
    if not isinstance(error, OSError):
        raise error
    full = any(word in reason for word in ("No space left", "quota exceeded", "File too large"))
    return 1 if full else 2, f"{error.filename}: {reason}" if error.filename else reason


def write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: after a kill there is the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:  # a failed write does not say to which file
        advice = f"{error.strerror} (--out-dir, --cache-dir and --data-root say where)"
        raise OSError(error.errno, advice, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def progress(things: Iterable, text: str) -> tqdm:
    """A bar on stderr; where that is no terminal (a log file, a notebook), a line a minute."""
    line = "{desc}: {n_fmt} of {total_fmt} after {elapsed}, {remaining} to go\n"
    rare = {"mininterval": 60, "miniters": 1, "delay": 60, "bar_format": line}
    shown = {"leave": False} if getattr(sys.stderr, "isatty", bool)() else rare
    return tqdm(things, text, disable=os.environ.get("RANK", "0") != "0", **shown)


def read_text(path: Path, parse: Callable = str):
    """A text file, or what `parse` makes of it."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_json(path: Path) -> dict:
    return read_text(path, lambda text: dict(json.loads(text)))


def read_run(folder: str | Path) -> dict:
    """config.json of a run folder: its settings, class names, training images."""
    path = Path(folder, "config.json")
    config = read_json(path) if path.exists() else {}
    known = {"method", "settings", "weights", "classnames", "root", "train", "training", "tests"}
    require(known <= config.keys(), f"{path} is missing, or not ours; a new run needs --dataset")
    return config


def begun(folder: str | Path) -> bool:
    """Whether a folder holds more than what a run writes before its first epoch."""
    return Path(folder).exists() and not {*os.listdir(folder)} <= {"config.json", ".lock"}


# 1. THE DATASETS: a row says where the images are and what tells their class, part and domain -----
@dataclass
class Source:
    images: str  # image folders below --data-root that are tried: CoOp's, torchvision's, others'
    get: str = ""  # what to get where; --download fetches what is torchvision's
    template: str = "a photo of a {}."  # zero-shot CLIP's: CoOp's, for the last five ProReg's
    teacher: str = ""  # ProGrad's, with the class last, where it differs
    split: str = ""  # CoOp's split_zhou_*.json: {"train": [[path, label, class name], ..], ..}
    paths: str = ".+"  # or a pattern that reads class, part and domain off an image's path
    part: str = ""  # what all images are where paths do not say so: "test" of sets to test on
    lists: dict[str, str] = field(default_factory=dict)  # published lists of the images of a part
    domains: tuple[tuple, tuple] = ((), ())  # to train and test on without flags; (): the others


# fmt: off
CLASS = "(?P<cls>[^/]+)/.+"
HELD_OUT = "held-out contexts"  # of NICO
CONTEXT = "(?P<cls>[^/]+)/(?P<domain>[^/]+)/.+"
# CoOp's split files, but for Food101's and SUN397's.
SPLITS = "https://raw.githubusercontent.com/linzhiqiu/cross_modal_adaptation/main/splits/"
COPY = "huggingface.co/datasets/zhengli97/prompt_learning_dataset"  # not tried
SOURCES = {
    "imagenet": Source("imagenet/images imagenet ImageNet ILSVRC2012",
                       "ILSVRC-2012 of image-net.org, unpacked to train/WNID/* and val/WNID/*",
                       paths=f"(?P<part>train|val)/{CLASS}"),
    "caltech101": Source("caltech-101/101_ObjectCategories caltech101/101_ObjectCategories",
                         "torchvision.Caltech101 by --download", split="Caltech101"),
    "oxford_pets": Source(
        "oxford_pets/images oxford-iiit-pet/images", "torchvision.OxfordIIITPet by --download",
        "a photo of a {}, a type of pet.", "a type of pet, a photo of a {}.", "OxfordPets"),
    "stanford_cars": Source("stanford_cars", "(its link is dead) cars_train and cars_test, see "
                            f"github.com/pytorch/vision/issues/7545, or the copy at {COPY}",
                            split="StanfordCars"),
    "oxford_flowers": Source("oxford_flowers/jpg flowers-102/jpg",
                             "102flowers.tgz of www.robots.ox.ac.uk/~vgg/data/flowers/102",
                             "a photo of a {}, a type of flower.",
                             "a type of flower, a photo of a {}.", "OxfordFlowers"),
    "food101": Source(
        "food-101/images", "torchvision.Food101 by --download",
        "a photo of {}, a type of food.", "a type of food, a photo of {}.", "Food101"),
    "fgvc_aircraft": Source("fgvc_aircraft/images fgvc-aircraft-2013b/data/images",
                            "torchvision.FGVCAircraft by --download",
                            "a photo of a {}, a type of aircraft.",
                            "a type of aircraft, a photo of a {}.",
                            lists={p: f"images_variant_{p}.txt" for p in ("train", "val", "test")}),
    "sun397": Source("sun397/SUN397 SUN397", "(its link is dead) SUN397.tar.gz, for SUN397/a/*, or "
                     f"the copy at {COPY}", split="SUN397"),
    "dtd": Source("dtd/images dtd/dtd/images", "torchvision.DTD by --download", "{} texture.",
                  "a texture of {}.", "DescribableTextures"),
    "eurosat": Source("eurosat/2750", "torchvision.EuroSAT by --download",
                      "a centered satellite photo of {}.", split="EuroSAT"),
    "ucf101": Source("ucf101/UCF-101-midframes", "UCF-101-midframes.zip, see CoOp's DATASETS.md",
                     "a photo of a person doing {}.", split="UCF101"),
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
                          "this is {}.", paths=CONTEXT, domains=((), (HELD_OUT,))),
    "nico_vehicle": Source("nico/vehicle NICO/Vehicle nico_vehicle Vehicle", "nico.thumedialab.com",
                           "this is {}.", paths=CONTEXT, domains=((), (HELD_OUT,))),
    "pacs": Source("pacs/images pacs/kfold PACS/kfold pacs PACS", "domaingeneralization.github.io",
                   "this is {}.", domains=((), ("art_painting",)),
                   paths=f"(?P<domain>art_painting|cartoon|photo|sketch)/{CLASS}",
                   lists={"train": "{}_train_kfold.txt", "val": "{}_crossval_kfold.txt",
                          "ood": "{}_test_kfold.txt"}),
    "domainnet": Source("domainnet DomainNet domain_net", "ai.bu.edu/M3SDA, the cleaned version",
                        domains=(("sketch",), ("clipart", "painting", "real")), paths=
                        f"(?P<domain>clipart|infograph|painting|quickdraw|real|sketch)/{CLASS}",
                        lists={"train": "{}_train.txt", "test": "{}_test.txt",
                               "ood": "{}_test.txt"}),
}
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test",
         "val": "val", "valid": "val", "validation": "val"}
OWN = {  # folder:PATH and domains:PATH
    "folder": Source("", "CLASS/NAME.jpg", paths="((?i:ood)/(?P<domain>[^/]+)/"
                     f"|(?P<part>(?ai:{'|'.join(PARTS)}))/)?{CLASS}"),
    "domains": Source("", "DOMAIN/CLASS/NAME.jpg", paths=f"(?P<domain>[^/]+)/{CLASS}"),
}
# fmt: on


# 2. READING: every dataset becomes a list of rows, which is checked in one place ------------------
@dataclass
class Found:
    """A whole dataset, before any draw."""

    name: str
    source: Source
    root: str = ""  # the image folder
    classnames: list[str] = field(default_factory=list)
    # By (part, domain). The domain is "" in distribution; others are further test sets.
    sets: dict[tuple[str, str], list[Item]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what its user has to know
    whole: bool = False  # nothing of it is trained on, so that nothing needs to be held out
    real: dict[str, str] = field(default_factory=dict)  # of every image: where links lead


def read(name: str, args: argparse.Namespace, trained: set[str] | None = None) -> Found:
    """Dataset `name`; of `args` where to look, and for --dataset which domains are what. trained:
    names and places of what is trained on, if known; of others nothing has to be held out."""
    found = locate(name, args)
    found.whole = trained is not None and trained.isdisjoint({name, place(name, found.root)})
    flags = (args.train_domain or (), args.test_domain or ()) if name == args.dataset else ()
    require(has_domains(found) or not any(flags), f"{name} has no domains: no --train/test-domain")
    if name in world.TASKS:
        return found
    rows = walk(found, args)
    if found.source.split:  # which names images that the walk has found
        rows, names = read_split(found, args)
    else:
        rows = choose_rows(found, rows, flags)
        names = class_names(found, {cls for _, cls, _, _ in rows})
    check_names(found, names)
    found.classnames = list(names.values())
    found.sets = {(part, ""): [] for part in ("train", "val", "test")}
    label = {cls: i for i, cls in enumerate(names)}
    for address, cls, part, domain in rows:
        key = ("test", domain) if domain else (PARTS.get(part.lower(), "train"), "")
        found.sets.setdefault(key, []).append((address, label[cls]))
    split_rest(found)
    check_overlaps(found)
    return found


def place(name: str, root: str) -> str:
    """What tells a dataset from others, however it is spelt: its real folder, if it has one."""
    return name if name in world.TASKS else real_name(root)


def has_domains(found: Found) -> bool:
    return "?P<domain>" in found.source.paths and found.source is not OWN["folder"]


def locate(name: str, args: argparse.Namespace) -> Found:
    """A dataset's row and image folder, which torchvision may --download; a toy task is whole."""
    if name in world.TASKS:
        source = Source("", template=world.TASKS[name].template)
        return Found(name, source, "", *world.task_items(name))
    kind, _, path = name.partition(":")
    known = ["folder:PATH", "domains:PATH", *world.TASKS, *SOURCES]
    advice = f"did you mean folder:{name}?" if os.path.isdir(name) else f"use {', '.join(known)}"
    source = OWN.get(path and kind) or SOURCES.get(name)
    require(source, f"no dataset is called {name!r}: {advice}")
    data_root = os.path.expanduser(args.data_root)
    places = [os.path.join(data_root, folder) for folder in source.images.split()] or [
        os.path.expanduser(path)
    ]
    fetch = re.search(r"torchvision\.(\w+) by", source.get)
    if args.download and fetch and not any(map(os.path.isdir, places)):
        from torchvision import datasets

        try:
            getattr(datasets, fetch[1])(data_root, download=True)
        except Exception as error:  # no network, half an archive, another hash
            raise UserError(f"{name} could not be fetched: {error}") from error
    root = next(filter(os.path.isdir, places), "")
    require(root, f"{name}: no images in {' or '.join(places)}, no such folder: get {source.get}")
    return Found(name, source, root)


def find_file(found: Found, file: str, url: str = "") -> Path:
    """A file that belongs to a dataset, beside its image folder or near; or fetched from `url`."""
    root, up = Path(found.root), Path(found.root).parent
    # Names of classes lie beside ImageNet, and are for its variants, too.
    near = [up, root, up / "splits", root / "splits", up / "imagenet", up.parent / "imagenet"]
    path = next((p / file for p in near if (p / file).is_file()), up / file)
    if url and not path.is_file():
        with contextlib.suppress(Exception):  # no network, or half a file
            write(path, urllib.request.urlopen(url + file).read())
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {url or '--download'}, DATASETS.md, or {COPY}")
    return path


def address_of(found: Found, path: str, where: str) -> str:
    """The address of an image that a list names by its path below the root."""
    address = os.path.join(found.root, *path.replace("\\", "/").split("/"))
    if address not in found.real:
        # Perhaps only what stands before it differs (./, images/, /abs), or capital letters do.
        known = (below(other, found.root) for other in found.real)
        near = [k for k in known if f"/{path}".lower().endswith(f"/{k}".lower())]
        advice = f"it has to say {near[0]}" if near else "unpack the images again"
        raise UserError(f"{where}: no image {address}: {advice}")
    return address


def read_split(found: Found, args: argparse.Namespace) -> tuple[list[Row], dict[int, str]]:
    """CoOp's split file → rows, {label: class name}."""
    fetch = args.download and found.name not in ("food101", "sun397")
    file = find_file(found, f"split_zhou_{found.source.split}.json", SPLITS if fetch else "")
    split = read_json(file)
    rows, names = [], {}
    for part in ("train", "val", "test"):
        require(isinstance(split.get(part), list), f'{file} has no list "{part}" of its images')
        for i, row in enumerate(split[part]):
            where = f"{file}, {part}[{i}]: {row!r}"
            require(
                type(row) is list and [*map(type, row)] == [str, int, str] and row[2].isprintable(),
                f"{where} is not [path, label, name]",
            )
            path, label, name = row
            names.setdefault(label, name)
            require(names[label] == name, f"{where}: this label is {names[label]!r} before")
            rows.append((address_of(found, path, where), label, part, ""))
    labels = sorted(names)
    require(labels == [*range(len(labels))], f"{file}: labels must be 0, 1, .., not {labels[:9]}")
    return rows, {label: names[label] for label in labels}


def read_lists(found: Found, rows: list[Row], lists: list[tuple[str, str, str]]) -> list[Row]:
    """The rows that published lists name. A list is (file, part, domain) and has an image a line:
    "sketch/dog/1.png 1", or where the path does not say the class "1025794 707-320"."""
    classes = {address: cls for address, cls, _, _ in rows}
    listed = []
    for name, part, domain in lists:
        file = find_file(found, name)
        for i, line in enumerate(read_text(file).splitlines(), 1):
            path, _, label = line.strip().partition(" ")
            path = f"{path}.jpg" if path.isdigit() else path
            # An empty line, and what Dassl leaves out of PACS, too.
            if path not in ("", "sketch/dog/n02103406_4068-1.png"):
                address = address_of(found, path, f"{file}, line {i}")
                listed.append((address, classes[address] or label, part, domain))
    return listed


def walk(found: Found, args: argparse.Namespace) -> list[Row]:
    """The images below the root whose paths fit the pattern, class by class; their real paths go to
    found.real. What is left out of your own folders is said in a note."""
    # A run's own folders, which may lie among the photos.
    own = {os.path.realpath(vars(args).get(key) or "runs") for key in ("cache_dir", "out_dir")}
    fits = re.compile(found.source.paths).fullmatch
    rows = []
    left = collections.Counter()
    folders = [(found.root, "", [os.path.realpath(found.root)])]  # grows on the way
    for folder, above, way in folders:  # way: the real paths of the folders that lead here
        for file in os.scandir(folder):
            path = above + file.name
            real = os.path.realpath(file.path) if file.is_symlink() else f"{way[-1]}/{file.name}"
            match = fits(path)
            image = file.name.lower().endswith(ENDINGS)
            if file.is_dir():
                if file.name.startswith((".", "__")) or real in own:
                    left[f"folder {path}"] += 1
                # A link to a folder on the way would have no end.
                elif not any(f"{up}/".startswith(f"{real}/") for up in way):
                    folders.append((file.path, normalize("NFC", f"{path}/"), [*way, real]))
            elif file.name[0] == ".":
                left["hidden files"] += 1
            elif match and image:
                said = match.groupdict("")
                part = said.get("part", found.source.part)
                rows.append((file.path, said.get("cls", ""), part, said.get("domain", "")))
                found.real[file.path] = real
            elif path != "classnames.txt":
                ending = os.path.splitext(path)[1] or "no ending"
                left["no class folder" if image else ending] += 1
    text = ", ".join(f"{n} ({why})" for why, n in sorted(left.items()))
    tell(found.notes, text and ":" in found.name, f"left out: {text}")
    require(rows, f"{found.name}: no images in {found.root}: needed is {found.source.get}")
    return sorted(rows, key=lambda row: (row[1], row[0]))


def check_parts(found: Found, rows: list[Row]) -> None:
    """UserError for folders of parts beside or below folders of classes, for too many or too few
    parts. Notes say which of your own folders are parts, and that images lie below classes."""
    parts = {part for _, _, part, _ in rows} - {found.source.part}
    classes = sorted({cls for _, cls, part, domain in rows if not (part or domain)})
    # An image that lies right below train/ or ood/ has that for its class.
    parts = sorted(parts.union(cls for cls in classes if cls.lower() in (*PARTS, "ood")))
    require(
        not (parts and classes),
        f"{found.root}: images lie in {classes[:9]}, beside the parts {parts}: a class needs "
        "another folder name, a part has PART/CLASS/*, and ood has ood/NAME/CLASS/*",
    )
    kinds = sorted(PARTS[part.lower()] for part in parts)
    allowed = [[], ["test", "train"], ["train", "val"], ["test", "train", "val"]]
    allowed += [["test"]] * found.whole
    require(kinds in allowed, f"{found.root} has the parts {parts}: needed: train, and test or val")
    if ":" not in found.name:
        return
    tell(found.notes, parts, f"the folders {', '.join(parts)} are read as parts")
    folders = {below(os.path.dirname(address), found.root): cls for address, cls, _, _ in rows}
    deep = sorted(path for path, cls in folders.items() if path.split("/")[-1] != cls)
    tell(found.notes, deep, f"images below class folders are of the class above, as in {deep[:1]}")
    inner = [path for path in deep if PARTS.keys() & path.lower().split("/")[1:]]
    require(not inner, f"{found.root}: images lie in {inner[:1]}: a part stands above its classes")


def choose_rows(found: Found, rows: list[Row], flags: tuple) -> list[Row]:
    """What the paths say, or published lists. Where there are domains: the rows of those to train
    on, now without a domain, and of those to test on, by the flags (train, test) or the source."""
    check_parts(found, rows)
    lists = found.source.lists
    if not has_domains(found):
        return read_lists(found, rows, [(lists[p], p, "") for p in lists]) if lists else rows
    train, test = flags if any(flags) else found.source.domains
    if found.name.startswith("nico") and not any(flags):
        found.notes.append("of a class's n contexts the last round(0.3 n), by name, are held out")
        contexts = group(sorted({(cls, d) for _, cls, _, d in rows}), lambda pair: pair[0]).values()
        held = {pair for own in contexts for pair in own[len(own) - round(0.3 * len(own)) :]}
        rows = [(*row, HELD_OUT if (row[1], d) in held else "seen") for *row, d in rows]
    known = sorted({domain for *_, domain in rows})
    untrained = found.whole and ":" in found.name  # then every domain is tested on
    train = train or [domain for domain in known if not untrained and domain not in test]
    test = test or [domain for domain in known if domain not in train]
    apart = not {*train} & {*test} and {*train, *test} <= {*known}
    require(
        test and (train or untrained) and apart,
        f"{found.name}: trains on {train}, tests on {test}: "
        f"name --train-domain or --test-domain, of {', '.join(known)}",
    )
    rename = dict.fromkeys(train, "") | {domain: domain for domain in test}
    # Of a domain to test on there is the list "ood", of one to train on there are the others.
    files = [
        (lists[part].format(domain), part, name)
        for part in lists
        for domain, name in rename.items()
        if (part == "ood") == (domain in test)
    ]
    try:
        if files:
            return sorted(read_lists(found, rows, files), key=lambda row: row[1].lower())
    except FileNotFoundError as error:
        found.notes.append(f"not by its published lists: {error}")
    return [(address, cls, part, rename[d]) for address, cls, part, d in rows if d in rename]


# 3. NAMES, PARTS AND CHECKS -----------------------------------------------------------------------
def class_names(found: Found, classes: set[str]) -> dict[str, str]:
    """{class folder: its name in prompts}, in label order."""
    # Of domains without regard to case, as DomainNet's labels are.
    ordered = sorted(sorted(classes), key=str.lower if has_domains(found) else None)
    own = Path(found.root, "classnames.txt")
    if ":" in found.name and own.is_file():
        return read_names(found, own, ordered)
    bad = [cls for cls in ordered if re.search("[\ud800-\udfff]", cls)]
    require(not bad, f"{found.root}: the folder {bad[:1]} is not UTF-8: rename it")
    if found.name.startswith("imagenet") or any(re.fullmatch(r"n\d{8}", cls) for cls in classes):
        return wordnet_names(found, ordered)
    return {cls: cls for cls in ordered}


def wordnet_names(found: Found, classes: list[str]) -> dict[str, str]:
    """Of WordNet ids: ImageNet's classnames.txt ("WNID NAME" lines), else open_clip's. ImageNetV2's
    folders are called 0 to 999, in the same order."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    names = dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES))
    file = "open_clip, for the sorted WordNet ids"
    with contextlib.suppress(FileNotFoundError):
        if found.name in SOURCES:  # beside your own folders such a file belongs to others
            file = find_file(found, "classnames.txt")
            names = dict(re.findall(r"^(\S+)[ \t]+(.+)$", read_text(file), re.MULTILINE))
    if found.name == "imagenetv2":
        names = {str(i): names[wnid] for i, wnid in enumerate(sorted(names))}
    unknown = [cls for cls in classes if cls not in names]
    require(not unknown or ":" in found.name, f"{found.root}: {file} has no name for {unknown[:1]}")
    found.notes.append(f"class names are from {file}, but for {len(unknown)} that it lacks")
    return {cls: names[cls] for cls in names if cls in classes} | {cls: cls for cls in unknown}


def read_names(found: Found, file: Path, folders: list[str]) -> dict[str, str]:
    """classnames.txt: a line "FOLDER<tab>NAME" for each class folder. Names alone are for the
    folders in order, where it is clear which order: not for 1, 10, 2."""
    lines = [normalize("NFC", line) for line in read_text(file).splitlines() if line.strip()]
    if not any("\t" in line for line in lines):
        # As file managers show them: 1, 2, 10.
        shown = sorted(folders, key=lambda f: re.sub(r"\d+", lambda n: n[0].zfill(20), f.lower()))
        # A line that begins as another folder is called may mean that one.
        other = any(x != f and re.split(r"\W", x)[0] in folders for f, x in zip(folders, lines))
        require(
            len(lines) == len(folders) and shown == folders and not other,
            f"{file}: {len(lines)} names alone for {len(folders)} folders, in the order "
            f"{shown[:3]} .. or {folders[:3]} ..? Write FOLDER<tab>NAME",
        )
        lines = [f"{folder}\t{line}" for folder, line in zip(folders, lines)]
        found.notes.append(f"names by order, from {lines[0]!r} to {lines[-1]!r}")
    lines_of = group(lines, lambda line: line.partition("\t")[0].strip())
    wrong = [f for f in [*lines_of, *folders] if f not in folders or len(lines_of[f]) != 1]
    require(not wrong, f"{file}: {wrong[:1]}: needed is FOLDER<tab>NAME, once for each folder")
    return {folder: lines_of[folder][0].partition("\t")[2].strip() for folder in folders}


def check_names(found: Found, names: dict) -> None:
    """Classes that prompts cannot tell apart: their tokens are the same, or none."""
    from open_clip import SimpleTokenizer

    encode = SimpleTokenizer().encode
    prompts = group(names.values(), lambda text: tuple(encode(text.replace("_", " "))))
    same = [texts for tokens, texts in prompts.items() if len(texts) > 1 or not tokens]
    require(len(names) > 1, f"{found.root}: the classes are {[*names.values()]}: two are needed")
    if found.name.startswith("imagenet"):  # whose own list has such pairs
        found.notes += [f"classes {texts} have one prompt, and stay apart" for texts in same]
    else:
        require(not same, f"{found.root}: {same[:5]} have one prompt, or no name: rename them")


def split_rest(found: Found) -> None:
    """A val without a test is the test part. Without both all images are tested on, if nothing is
    trained on. Else a missing test part is ours, and so is a missing val where there are further
    test sets: the same for every seed, so that all seeds share a test set. Every part has its share
    of each class, rounded (CoOp's rule).

    WHY in the order of a hash of the path below the root: the split does not hang on where the
    folder lies, and an added or removed image moves next to no other.
    """
    sets = found.sets
    ood = any(domain for _, domain in sets)
    if sets["val", ""] and not (sets["test", ""] or found.source.lists):  # PACS's lists: val stays
        sets["test", ""], sets["val", ""] = sets["val", ""], []
        found.notes.append("its val is the test part")
    if found.whole and not sets["test", ""]:
        sets["test", ""], sets["val", ""] = sets["train", ""] + sets["val", ""], []
        n = sum(len(items) for (part, _), items in sets.items() if part == "test")
        found.notes.append(f"all its {n} images are tested on")
    if found.whole:
        sets["train", ""] = []
    classes = group(sets["train", ""], lambda item: item[1])
    missing = [part for part in ("val", "test") if classes and not sets[part, ""]]
    if "test" in missing or (missing and ood):
        beside_ood = dict.fromkeys(missing, 0.1) | {"train": 1}
        # In this order; the last part takes what is left.
        shares = beside_ood if ood else {"train": 0.5, "val": 0.2, "test": 1}
        text = ", ".join(f"{share:.0%} {part}" for part, share in shares.items())
        found.notes.append(f"split: ours, {text.replace('100%', 'the rest')}")
        sets |= {(part, ""): [] for part in shares}
        for images in classes.values():
            images.sort(key=lambda item: draw_seed("split", below(item[0], found.root)))
            rest = iter(images)
            for part, share in shares.items():
                sets[part, ""] += itertools.islice(rest, round(share * len(images)))
        enough = sets["train", ""] and sets["test", ""]
        require(enough, f"{found.root}: too few images to split: 6 a class are enough")
    for part in ("train", "test"):
        labels = {label for _, label in sets[part, ""]}
        lacking = [cls for y, cls in enumerate(found.classnames) if labels and y not in labels]
        text = f"{len(lacking)} classes have no {part} image, as {lacking[:1]}"
        allowed = part == "test" or has_domains(found)
        require(allowed or not lacking, f"{found.root}: {text}: add some, or remove these classes")
        tell(found.notes, lacking, text)


def check_overlaps(found: Found) -> None:
    """A note on images that are there twice, by links. None is both trained and tested on."""
    uses = [(found.real[a], a, y, p) for (p, _), items in found.sets.items() for a, y in items]
    twice = [[*zip(*uses)][1:] for uses in group(uses, lambda use: use[0]).values() if uses[1:]]
    mixed = sum(len({*labels}) > 1 for _, labels, _ in twice)
    tell(found.notes, twice, f"{len(twice)} images are there twice, {mixed} of them in two classes")
    both = [addresses for addresses, _, parts in twice if {"train", "test"} <= {*parts}]
    require(not both, f"{found.root}: {len(both)} images are trained and tested on: {both[:9]}")


def below(address: str, root: str) -> str:
    """An address without its root, the same wherever the dataset lies."""
    return normalize("NFC", address[len(root) :].replace(os.sep, "/").lstrip("/"))


# 4. DRAWS: each is a pure function of its seed, so that no generator's state has to be saved ------
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


def group(things: Iterable, key: Callable) -> dict:
    """{key: the things that have it}, keys in order of first appearance."""
    groups = collections.defaultdict(list)
    for thing in things:
        groups[key(thing)].append(thing)
    return groups


def fewshot(train: list[Item], val: list[Item], shots, seed: int) -> tuple[list[Item], list[Item]]:
    """CoOp's draw, image for image: one generator; class by class in order of first appearance;
    train first, then val with min(shots, 4). A class with fewer images gives all it has.
    shots="all" draws nothing."""
    rng = random.Random(seed)

    def draw(items: list[Item], k: int) -> list[Item]:
        classes = group(items, lambda item: item[1]).values()
        drawn = [rng.sample(own, k) if len(own) >= k else own for own in classes]
        return [item for own in drawn for item in own]

    return (train, val) if shots == "all" else (draw(train, shots), draw(val, min(shots, 4)))


def keep_labels(items: list[Item], labels: range) -> list[Item]:
    """The items of these classes, relabelled from 0. Base is range(ceil(C/2)), new the rest."""
    return [(address, label - labels.start) for address, label in items if label in labels]


def numbered(names: list[str]) -> list[tuple[str, int]]:
    """Of each name also how often it stood before. WHY: two of ImageNet's classes are called
    "missile"; a class is known by such a pair, not by its name."""
    return [(name, names[:i].count(name)) for i, name in enumerate(names)]


# 5. TASKS -----------------------------------------------------------------------------------------
def item_lines(items: list[Item], root: str) -> list[str]:
    """ "path below the root<tab>label" of each image: the same wherever the dataset lies."""
    return [f"{below(address, root)}\t{label}" for address, label in items]


def fingerprint(lines: list[str]) -> str:
    return hashlib.sha1("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Test:
    """One test set. The first of a task is in-distribution; those with a domain are not."""

    name: str
    domain: str  # "" where the dataset has none
    classes: str  # "base", "new" or "all"
    classnames: list[str]
    template: str
    items: list[Item]
    root: str = ""

    @property
    def images(self) -> str:
        """Hash of the images, their labels and the class names."""
        return fingerprint(item_lines(self.items, self.root) + self.classnames)


@dataclass
class Task:
    name: str
    classnames: list[str]  # the training classes': the base half with --classes base
    template: str
    teacher_template: str  # ProGrad's: the class comes last
    train: list[Item]
    val: list[Item]
    tests: list[Test]
    notes: list[str]
    lines: list[str] = field(default_factory=list)  # item_lines of what is trained on
    training: dict = field(default_factory=dict)  # what a figure is of: hashes, seed, ..
    root: str = ""

    def validation(self) -> list[Test]:
        """The validation part of the training classes."""
        require(self.val, f"{self.name} has no validation part: no --eval-every, --select val")
        return [Test(self.name, "", "all", self.classnames, self.template, self.val)]


def load_task(args: argparse.Namespace) -> Task:
    """What the data flags ask for. With --eval `train` is empty, `lines` what that run learned."""
    require(re.fullmatch(r"[^{}]*\{\}[^{}]*", args.template or "{}"), "--template needs one {}")
    run = read_run(args.eval) if args.eval else {"settings": vars(args)}
    name = run["settings"]["dataset"]
    trained = {name, place(name, run["root"])} if args.eval else {name}
    found = read(args.dataset, args, trained)
    n = len(found.classnames)
    require(args.classes == "all" or n > 3, f"{found.name}: {n} classes have no base and new half")
    labels = range(n if args.classes == "all" else (n + 1) // 2)
    template = args.template or found.source.template
    tests = make_tests(found, args.classes, args.test_part, template)
    others = [read(other, args, trained) for other in args.test_on]
    places = {place(one.name, one.root) for one in [found, *others]}
    require(len(places) > len(others), f"--test-on {args.test_on}: one test set is there twice")
    for other in others:
        tests += make_tests(other, "all", args.test_part, other.source.template)
        tell(other.notes, args.template, f"its template is {other.source.template!r}")
        found.notes += [f"{other.name}: {note}" for note in other.notes]
    train, val = ([], []) if args.eval else draw(found, labels, args)
    lines = item_lines(train, found.root)
    pool = item_lines(found.sets["train", ""], found.root)  # what the shots are drawn from
    training = {"split": fingerprint(lines), "pool": fingerprint(pool)}
    for key in ("dataset", "classes", "template", "train_domain", "shots", "seed", "precision"):
        training[key] = run["settings"].get(key)
    run = {"train": lines, "training": training, "root": found.root} | run
    seen = trained_on(tests, run)
    text = f"{len(seen)} test images are trained on, as {min(seen, default='')}"
    require(args.eval or not seen, f"{text}: remove them")
    return Task(
        name=found.name,
        classnames=found.classnames[: len(labels)],
        template=template,
        teacher_template=args.template or found.source.teacher or template,
        train=train,
        val=val,
        tests=tests,
        notes=[text] * bool(seen) + found.notes,
        lines=run["train"],
        training=run["training"],
        root=found.root,
    )


def draw(found: Found, labels: range, args: argparse.Namespace) -> tuple[list[Item], list[Item]]:
    """The few shots of these classes to train and to validate on."""
    require(found.sets["train", ""], f"{found.name} is for testing only: name it in --test-on")
    drawn = fewshot(found.sets["train", ""], found.sets["val", ""], args.shots, args.seed)
    train, val = (keep_labels(items, labels) for items in drawn)
    least = min(collections.Counter(label for _, label in train).values(), default=0)
    tell(
        found.notes, args.shots != "all" and least < args.shots, f"a class has only {least} images"
    )
    return train, val


def trained_on(tests: list[Test], run: dict) -> list[str]:
    """The test images that the run with this config.json is trained on. Those of its own dataset,
    which may have moved, are compared by their paths below its folder, others by real paths."""
    trained = {line.rpartition("\t")[0] for line in run["train"]}
    own = [test for test in tests if test.name == run["settings"]["dataset"]]
    seen = [a for test in own for a, _ in test.items if below(a, test.root) in trained]
    others = [a for test in tests if test not in own for a, _ in test.items]
    # Real paths of all trained images take a while to ask for.
    real = {real_name(os.path.join(run["root"], path)) for path in (trained if others else ())}
    return seen + [address for address in others if real_name(address) in real]


def real_name(address: str) -> str:
    return normalize("NFC", os.path.realpath(address))


def make_tests(found: Found, classes: str, part: str, template: str) -> list[Test]:
    """In-distribution first, all classes or base and new; then the other domains."""
    n = len(found.classnames)
    half = (n + 1) // 2
    halves = {"all": range(n)} if classes == "all" else {"base": range(half), "new": range(half, n)}
    tests = [
        Test(found.name, domain, which, found.classnames[labels.start : labels.stop], template,
             keep_labels(items, labels), found.root)
        for (of, domain), items in found.sets.items()
        for which, labels in halves.items()
        if of == part and any(label in labels for _, label in items)
    ]  # fmt: skip
    require(tests, f"{found.name} has no images in its {part} part")
    return tests


def number_or_all(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return text if text == "all" else int(text)


# fmt: off
FLAGS = {
    "--dataset": {"metavar": "NAME", "help": "what data.py lists, folder:PATH or domains:PATH"},
    "--data-root": {"metavar": "DIR", "help": "folder of the datasets"},
    "--shots": {"type": number_or_all, "metavar": "K",
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


# 6. IMAGES ----------------------------------------------------------------------------------------
def read_image(address: str) -> Image.Image:
    """An RGB image, EXIF orientation applied. UserError names the file and what is wrong.

    WHY RGB here: open_clip's transform converts after it resizes, and resizing a palette mixes its
    indices. CoOp's code ignores EXIF.
    """
    if address.startswith("toy:"):
        return Image.fromarray(world.item_image(address))
    try:
        with Image.open(address) as image:
            short, long = sorted(image.size)
            require(long <= 200 * short and short * long < 9e7, f"{short}x{long}: too big or long")
            image.load()  # here: Pillow reports damaged pixels once, and then shows what it has
            with contextlib.suppress(Exception):  # damaged EXIF data: the photo itself is readable
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "FI":  # I;16, too. Pillow would clip all above 255 to white
                values = image.convert(image.mode[0])
                low, high = values.getextrema()
                fits = high <= 1 if image.mode == "F" else 255 < high < 65536 or high == 0
                require(low >= 0 and fits, f"{low:g} to {high:g}: scale to [0, 1], 8 or 16 bit")
                scale, offset = (255, 0.5) if image.mode == "F" else (1 / 256, 0)
                image = values.point(lambda value: value * scale + offset).convert("L")
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise UserError(f"{address}: {error or type(error).__name__}") from error


def bad_images(addresses: Iterable[str]) -> list[str]:
    """What is wrong with each image that cannot be decoded."""

    def reason(address: str) -> str | None:
        try:
            read_image(address)
        except UserError as error:
            return str(error)

    with ThreadPool() as pool:  # threads: Pillow decodes without holding Python's lock
        return [why for why in pool.imap(reason, addresses, 64) if why]


def train_transform(preprocess, augment: str):
    """The training transform that goes with `preprocess`, an open_clip test transform. none:
    `preprocess` itself; crop: CoOp's random resized crop and flip; randaugment: ProReg's. They draw
    from torch's global generator."""
    from torchvision import transforms as T

    if augment == "none":
        return preprocess
    size = [step.size for step in preprocess.transforms if hasattr(step, "size")][-1]
    crop = T.RandomResizedCrop(size, (0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    kinds = {"crop": [crop, T.RandomHorizontalFlip()], "randaugment": [T.RandAugment(2, 9)]}
    return T.Compose([*kinds[augment], *preprocess.transforms])  # a crop has its final size


@dataclass
class ImageSet(Dataset):
    """[position + view · N] → (image [3, H, W], label, position), where N = len. A view is a pure
    function of (seed, view, position)."""

    items: list[Item]
    transform: Callable
    seed: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        view, i = divmod(index, len(self.items))
        address, label = self.items[i]
        with torch.random.fork_rng(devices=[]):  # lend torchvision's generator this image's seed
            torch.manual_seed(draw_seed(self.seed, "view", view, i))
            return self.transform(read_image(address)), label, i


def load_images(images: ImageSet, lists: list[list[int]], args, text: str) -> Iterator:
    """A batch for each list of positions in `images`, decoded by --workers processes, with a bar.
    UserError names every broken image at once.

    Short lists are decoded in this process: starting another one costs more than 64 images do.
    """
    loader = DataLoader(
        images,
        batch_sampler=lists,
        num_workers=min(args.workers, len(images) // 64),
        pin_memory=args.device != "cpu",
    )
    try:
        yield from progress(loader, text)
    except UserError as error:
        bad = "; ".join(bad_images(dict(images.items))) or error
        raise UserError(f"broken images, mend or remove them: {bad}") from error


# 7. THE COMMAND: what is there --------------------------------------------------------------------
def describe(found: Found, whole: bool) -> None:
    """A line about a dataset; then its notes, and the images of each class and part."""
    counts = {
        f"ood {domain}" if domain else part: collections.Counter(label for _, label in items)
        for (part, domain), items in found.sets.items()
    }
    sizes = ", ".join(f"{count.total()} {part}" for part, count in counts.items() if count)
    print(f"{found.name:30} {len(found.classnames)} classes; {sizes}; in {found.root or 'toyclip'}")
    if whole:
        print("".join(f"note: {note}\n" for note in found.notes), end="")
        for label, cls in enumerate(found.classnames):
            shown = [f"{count[label]} {part}" for part, count in counts.items() if count[label]]
            print(f"{label:5}  {cls.replace('_', ' '):30}", *shown)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="What a dataset holds, and what is missing.", allow_abbrev=False)
    for name in ("--dataset", "--data-root", "--download", "--train-domain", "--test-domain"):
        parser.add_argument(name, **FLAGS[name])
    parser.add_argument("--check-images", action="store_true", help="decode all, list every fault")
    args = parser.parse_args(argv, argparse.Namespace(data_root="data"))
    require(args.dataset or not (args.download or args.check_images), "name one --dataset for this")
    if args.dataset:
        found = read(args.dataset, args)
        describe(found, True)
        if args.check_images:
            bad = bad_images(address for items in found.sets.values() for address, _ in items)
            print(*bad or ["all images can be read"], sep="\n")
            require(not bad, f"{len(bad)} images cannot be read, named above: mend or remove them")
    else:
        for name in [*world.TASKS, *SOURCES]:
            try:
                describe(read(name, args), False)
            except (UserError, OSError) as error:
                print(f"{name:30} {str(error).removeprefix(f'{name}: ')}")


if __name__ == "__main__":
    run(main)
