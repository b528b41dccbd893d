"""How the datasets lie on disk: from a name and a folder to class names and the images of every class, part and domain.

datasets.toml is the table of what is looked for; here is how it is read and checked. data.py makes the tasks of it.
Lists and archives come from strangers: sizes, paths, labels and names are checked; the first fault is one clear error.
"""

import collections
import itertools
import json
import os
import re
import tomllib  # Python >= 3.11
from pathlib import Path

from PIL import Image

TABLE = tomllib.loads(Path(__file__).with_name("datasets.toml").read_text(encoding="utf-8"))
WNIDS = TABLE.pop("wnids")["sorted"].split()
SPLITS_AT = "linked in CoOp's DATASETS.md; most are in splits/ of github.com/linzhiqiu/cross_modal_adaptation"
PARTS = ("train", "val", "test")
MAX_TEXT_BYTES = 64 << 20  # of a list or a run's JSON; the largest real one has under 20 MB
# Formats that Pillow opens, without those that start another program or that nothing here can decode.
FORMATS = sorted(
    {*Image.registered_extensions().values()} & {*Image.OPEN} - {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
)
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
SEEN, HELD_OUT = "seen contexts", "held-out contexts"  # NICO's domains where no flag names contexts
Tree = dict[str, list[str]]  # {class: paths of its images}


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong and what to do. Scripts end with exit status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. FOLDERS of images
# ----------------------------------------------------------------------------------------------------------------------


def subfolders(root: str, ignored=()) -> list[str]:
    """Sorted names; hidden folders, and those like __MACOSX, are left out."""
    with os.scandir(root) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith((".", "__")) and entry.is_dir()}
    return sorted(names.difference(ignored))


def list_images(folder: str) -> list[str]:
    """Sorted paths of the image files at any depth. Hidden files are left out; no folder is entered twice, so a loop of
    symbolic links ends. One scandir a folder and no stat a file: 200,000 files take about a second."""
    found, waiting, seen = [], [folder], set()
    while waiting:
        here = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
                    found.append(entry.path)
    return sorted(found)


def class_files(root: str, ignored=()) -> Tree:
    """The images of every class folder, in sorted order. An empty class is an error."""
    tree = {folder: list_images(os.path.join(root, folder)) for folder in subfolders(root, ignored)}
    if not tree:
        raise UserError(f"{root} has no class folders; expected are images {os.path.join(root, 'CLASS', 'NAME.jpg')}")
    for folder, paths in tree.items():
        if not paths:
            raise UserError(f"{os.path.join(root, folder)} has no image, an empty class: add some or remove the folder")
    return tree


# ----------------------------------------------------------------------------------------------------------------------
# 2. LISTS of images, written by someone else
# ----------------------------------------------------------------------------------------------------------------------


def find_file(folders: list[str], name: str) -> str | None:
    """The first that exists."""
    return next((path for path in (os.path.join(folder, name) for folder in folders) if os.path.isfile(path)), None)


def read_text(path: str) -> str:
    if os.path.getsize(path) > MAX_TEXT_BYTES:
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes; more than {MAX_TEXT_BYTES:,} are refused")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def resolve(root: str, relative: str, listings: dict, where: str) -> str:
    """The path of a file that a list names. `listings` keeps folder contents: a scan a folder, not a stat a file."""
    steps = re.split(r"[/\\]", relative)
    if os.path.isabs(relative) or steps[0] == "" or ".." in steps or "\0" in relative:
        raise UserError(f"{where}: {relative!r} leaves the dataset's folder; such a list is refused")
    path = os.path.join(root, relative)
    folder, name = os.path.split(path)
    if folder not in listings:
        listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if name not in listings[folder]:
        raise UserError(f"{where}: {path} is missing: unpack the images again, or take the list that belongs to them")
    return path


def read_split(path: str, root: str) -> tuple[dict[int, str], dict[str, Tree]]:
    """CoOp's split file -> {label: class name}, {part: {label: paths}}."""
    try:
        split = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    names, trees, listings = {}, {}, {}
    for part in PARTS:
        entries = split.get(part) if isinstance(split, dict) else None
        if not isinstance(entries, list):
            raise UserError(
                f'{path} has no list "{part}"; expected {{"train": [[path, label, class name], ...], "val": ...}}'
            )
        trees[part] = collections.defaultdict(list)
        for i, entry in enumerate(entries):
            where = f"{path}, {part}[{i}]"
            kinds = [type(value) for value in entry] if isinstance(entry, list) else None
            if kinds != [str, int, str] or entry[1] < 0:
                raise UserError(f"{where}: {repr(entry)[:200]} is not [path, label, class name]")
            relative, label, name = entry
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{where}: label {label} is {name!r} for {relative!r}, but {names[label]!r} in an earlier entry"
                )
            trees[part][label].append(resolve(root, relative, listings, where))
    gap = next(label for label in itertools.count() if label not in names)
    if gap < len(names) or not names:
        raise UserError(f"{path}: label {gap} has no image, an empty class")
    return dict(sorted(names.items())), trees


def read_lists(files: dict[str, str], root: str, parse, skipped=()) -> dict[str, Tree]:
    """{part: text file that names its images, one a line} -> {part: tree}; `parse` is one of LINES."""
    trees, listings = {}, {}
    for part, file in files.items():
        trees[part] = collections.defaultdict(list)
        for i, line in enumerate(read_text(file).rstrip().split("\n"), 1):
            try:
                relative, name = parse(line.strip())
            except (IndexError, ValueError) as error:
                raise UserError(f"{file}, line {i}: {line[:200]!r} does not name an image and its class") from error
            if relative not in skipped:
                trees[part][name].append(resolve(root, relative, listings, f"{file}, line {i}"))
    return trees


def capitals(action: str) -> str:
    """ApplyEyeMakeup -> Apply_Eye_Makeup, as CoOp has it."""
    return "_".join(re.findall("[A-Z][^A-Z]*", action))


LINES = {  # a line of a dataset's own list -> (image below the image folder, class)
    "oxford_pets": lambda s: (s.split()[0] + ".jpg", s.rpartition("_")[0].lower()),  # Abyssinian_201 1 1 1
    "fgvc_aircraft": lambda s: (s.split(" ", 1)[0] + ".jpg", s.split(" ", 1)[1]),  # 1025794 707-320
    "sun397": lambda s: (s[1:], " ".join(s.split("/")[-2:1:-1])),  # /a/apse/indoor/sun_aaa.jpg: an indoor apse
    "ucf101": lambda s: (f"{capitals(s.split('/')[0])}/{s.split('/')[1].split('.')[0]}.jpg", capitals(s.split("/")[0])),
    "domain/class": lambda s: (s.rsplit(" ", 1)[0], s.split("/")[-2]),  # sketch/dog/1.png 1
}
CLASS_LINES = {  # a line of the file that orders the classes -> class; else the line is the class
    "sun397": lambda s: " ".join(s.split("/")[:1:-1]),  # /a/apse/indoor
    "ucf101": lambda s: capitals(s.split()[-1]),  # 1 ApplyEyeMakeup
}


# ----------------------------------------------------------------------------------------------------------------------
# 3. DATASETS. A reader returns `names` {class: its name} in label order, `trees` {part or "ood/DOMAIN": tree}, `origin`
#    (where the split is from); where parts are missing on disk `shares` of the training tree: that split is then ours.
# ----------------------------------------------------------------------------------------------------------------------


def find_images(name: str, spec: dict, data_root: str, download: bool) -> str:
    """The dataset's image folder. Where there is none: fetch it, or say what to fetch and where to put it."""
    tried = [os.path.join(data_root, folder) for folder in spec["images"]]
    for folder in tried:
        if os.path.isdir(os.path.join(folder, spec.get("probe", "."))):
            return os.path.abspath(folder)
    place = os.path.join(tried[0], spec.get("probe", "")).rstrip(os.sep)
    get = f"get {spec['published']}, and put the images into {place}"
    if not download:
        or_so = " (or add --download)" if "download" in spec else ""
        raise UserError(f"{name}: no images in {' or '.join(tried)}: {get}{or_so}")
    if "download" not in spec:
        raise UserError(f"{name}: --download cannot fetch it: {get}")
    from torchvision import datasets

    try:
        getattr(datasets, spec["download"])(data_root, download=True)
    except Exception as error:  # whatever the network, the disk or the archive does
        raise UserError(f"{name}: the download failed ({' '.join(str(error).split())}): {get}") from error
    return find_images(name, spec, data_root, download=False)


def read_coop(name: str, spec: dict, root: str, homes: list[str]) -> dict:
    """One of CoOp's datasets but ImageNet: by its split file, else by the rule with which CoOp made that file."""
    if file := find_file(homes, spec.get("split", "")):
        names, trees = read_split(file, root)
        return dict(names=names, trees=trees, origin=file)
    if spec["layout"] == "class folders":
        tree = class_files(root, spec.get("ignored", ()))
        names = {folder: spec.get("renames", {}).get(folder, folder) for folder in tree}
        return dict(names=names, trees={"train": tree}, shares={"train": 0.5, "val": 0.2}, origin=root)
    files = {part: find_file(homes, file) for part, file in spec.get("lists", {}).items()}
    if not files or None in files.values():
        missing = [spec["split"]] if "split" in spec else []
        missing += [spec["lists"][part] for part, file in files.items() if file is None][:1]
        raise UserError(f"{name}: {' or '.join(missing)} is missing: put it into {homes[0]} ({SPLITS_AT})")
    trees = read_lists(files, root, LINES[name])
    classes = find_file(homes, spec.get("classes", ""))
    order = map(CLASS_LINES.get(name, str.strip), read_text(classes).strip().split("\n")) if classes else trees["train"]
    shares = {} if "val" in trees else {"val": 0.2}
    return dict(names={key: key for key in order}, trees=trees, shares=shares, origin=files["train"])


def read_imagenet(name: str, spec: dict, root: str, homes: list[str]) -> dict:
    """ImageNet (its val is our test, and there is no val) or a variant. Folders are WordNet ids; in V2, 0 to 999."""
    folders = {"test": ""} if spec.get("test_only") else {"train": "train", "test": "val"}
    trees = {part: class_files(os.path.join(root, folder).rstrip(os.sep)) for part, folder in folders.items()}
    keys, file = list(trees.values())[0], find_file(homes, "classnames.txt")
    if file:
        names = dict(line.strip().split(" ", 1) for line in read_text(file).split("\n") if " " in line.strip())
    elif len(keys) == 1000 or spec.get("subset"):
        from open_clip import IMAGENET_CLASSNAMES

        names, file = dict(zip(WNIDS, IMAGENET_CLASSNAMES)), "open_clip's IMAGENET_CLASSNAMES, for sorted WordNet ids"
    else:
        raise UserError(
            f"{name}: {len(keys)} classes, not 1,000, in {root}: add classnames.txt there ('FOLDER NAME' lines)"
        )
    if "0" in keys:
        names = {str(label): name for label, name in enumerate(names.values())}
    for key in keys:
        if key not in names:
            raise UserError(f"{name}: the class folder {key!r} in {root} has no name in {file}")
    return dict(names={key: names[key] for key in names if key in keys}, trees=trees, origin=root, names_from=file)


def read_folder(root: str) -> dict:
    """folder:PATH with PATH/{train,val,test}/CLASS/* or PATH/CLASS/*, and PATH/ood/NAME/CLASS/*."""
    aliases = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    parts = {aliases[f]: os.path.join(root, f) for f in subfolders(root) if f in aliases}
    parts = {part: folder for part, folder in parts.items() if subfolders(folder)}  # else it is a class with that name
    if parts and ("train" not in parts or len(parts) == 1):
        raise UserError(f"{root} has {' and '.join(parts)}: there must be both train/CLASS and test/CLASS in it")
    trees = {part: class_files(folder) for part, folder in parts.items()} or {"train": class_files(root, ["ood"])}
    ood = os.path.join(root, "ood")
    if os.path.isdir(ood):
        trees |= {f"ood/{domain}": class_files(os.path.join(ood, domain)) for domain in subfolders(ood)}
    found = dict(names=folder_names(root, list(trees["train"])), trees=trees, origin=root)
    if parts and "test" not in parts:
        trees["test"] = trees.pop("val")
        found["note"] = f"{root} has no test folder: its val is the test part, and there is no validation part"
    if not parts:
        found["shares"] = {"train": 0.5, "val": 0.2}
        if all(os.path.basename(os.path.dirname(paths[0])) != key for key, paths in trees["train"].items()):
            found["note"] = f"the class folders of {root} hold folders, not images: if they are domains, add --domains"
    return found


def folder_names(root: str, folders: list[str]) -> dict[str, str]:
    """{class folder: class name} by root/classnames.txt: "FOLDER NAME" lines, or names in the order of the folders."""
    file = find_file([root], "classnames.txt")
    if file is None:
        return {folder: folder for folder in folders}
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if len(lines) != len(folders):
        raise UserError(f"{file} has {len(lines)} lines for {len(folders)} classes: one 'FOLDER<tab>NAME' for each")
    pairs = {f: line[len(f) :].strip() for line in lines for f in folders if line.startswith((f"{f} ", f"{f}\t"))}
    return {f: pairs[f] for f in folders} if len(pairs) == len(folders) else dict(zip(folders, lines))


def regroup(layout: str, root: str, by_default: bool) -> dict[str, Tree]:
    """{domain: tree} where the domain is not the outer folder, or the class not the inner one."""
    trees = collections.defaultdict(lambda: collections.defaultdict(list))
    if layout == "class in the file name":  # BAR: train/climbing_0.jpg, test/pole vaulting_300.jpg
        for domain in subfolders(root):
            for path in list_images(os.path.join(root, domain)):
                name, mark, _ = os.path.basename(path).rpartition("_")
                if not mark or os.path.dirname(path) != os.path.join(root, domain):
                    raise UserError(f"{path}: no class in its name; expected {domain}/CLASS_NUMBER.jpg in {root}")
                trees[domain][name].append(path)
        return trees
    for name in subfolders(
        root
    ):  # NICO: dog/on grass/1.jpg; classes have contexts of their own, so the rule is by class
        contexts = class_files(os.path.join(root, name))
        n_seen = len(contexts) - round(0.3 * len(contexts))
        for i, (context, paths) in enumerate(contexts.items()):
            domain = (SEEN if i < n_seen else HELD_OUT) if by_default else context
            trees[domain][name] += paths
    return trees


def read_domains(name: str, spec: dict, root: str, homes: list[str], train, test) -> dict:
    """A dataset of domains: trains on some, tests on others. `train` and `test` are names of domains; None is all the
    others; both None is what the table says. train=[] only tests: on every domain."""
    by_default = not train and not test
    regrouped = {} if spec["layout"] == "domain/class" else regroup(spec["layout"], root, by_default)
    known = [domain for domain in regrouped or subfolders(root) if domain in spec.get("domains", [domain])]
    if train is None and test is None:
        nico = spec["layout"] == "class/domain"
        train, test = ([SEEN], [HELD_OUT]) if nico else (spec.get("train_domain"), spec.get("test_domain"))
    if train is None and test is None:
        raise UserError(f"{name}: say --train-domain or --test-domain; the folders of {root} are {', '.join(known)}")
    train = [domain for domain in known if domain not in test] if train is None else list(train)
    test = [domain for domain in known if domain not in train] if test is None else list(test)
    for domain in [*train, *test]:
        if domain not in known:
            raise UserError(f"{name} has no domain {domain!r}; in {root} there are {', '.join(known) or 'no folders'}")
    if not test or set(train) & set(test):
        raise UserError(
            f"{name}: trains on {', '.join(train)}, tests on {', '.join(test)}: these must be different domains"
        )
    trees = domain_lists(spec, root, homes, train, test)
    origin = f"the lists of {', '.join(train)}" if trees else root
    if not trees:
        read = regrouped.get if regrouped else lambda domain: class_files(os.path.join(root, domain))
        trees = {("train", domain): read(domain) for domain in train}
        trees |= {("ood", domain): read(domain) for domain in test}
    merged = collections.defaultdict(lambda: collections.defaultdict(list))
    for (part, domain), tree in trees.items():
        for key, paths in tree.items():
            merged[f"ood/{domain}" if part == "ood" else part][key] += paths
    keys = sorted({key for tree in merged.values() for key in tree}, key=str.lower)
    shares = {part: 0.1 for part in ("val", "test") if train and part not in merged}
    domain = "+".join(train) if len(train) < 6 else f"{len(train)} domains"
    return dict(names=folder_names(root, keys), trees=merged, shares=shares, origin=origin, domain=domain)


def domain_lists(spec: dict, root: str, homes: list[str], train, test) -> dict:
    """{(part, domain): tree} by the lists that the authors publish; {} unless every one that is needed is there."""
    folders = [os.path.join(home, folder) for home in homes for folder in ("", *spec.get("list_folders", []))]
    files = {
        (part, domain): find_file(folders, file.format(domain))
        for part, file in spec.get("lists", {}).items()
        for domain in (test if part == "ood" else train)
    }
    return {} if None in files.values() else read_lists(files, root, LINES["domain/class"], spec.get("skipped", []))


def read_layout(name, data_root, download=False, train_domain=None, test_domain=None, domains=False) -> dict:
    """What a reader says of dataset `name` (see the top of this section), its row of the table, and `root`."""
    train_domain, test_domain = ([d] if isinstance(d, str) else d for d in (train_domain, test_domain))
    spec = TABLE.get(name, {"layout": "domain/class" if domains else "folder", "template": "a photo of a {}."})
    of_domains = spec["layout"] in ("domain/class", "class/domain", "class in the file name")
    if domains and name in TABLE:
        raise UserError(f"--domains is for folder:PATH; {name} is read as it is published")
    if (train_domain or test_domain) and not of_domains:
        raise UserError(f"{name} has no domains to train or test on" + ("" if name in TABLE else ": add --domains"))
    try:
        if name in TABLE:
            data_root = os.path.expanduser(data_root)
            root = find_images(name, spec, data_root, download)
            beside = [os.path.join(data_root, folder.split("/")[0]) for folder in spec["images"]]
            homes = [os.path.dirname(root), root, *beside, data_root, os.path.join(data_root, "imagenet")]
        else:
            root, homes = os.path.abspath(os.path.expanduser(name.removeprefix("folder:"))), []
            if not os.path.isdir(root):
                raise UserError(f"{root} is no folder; it is to hold CLASS/*, or train/CLASS/* and test/CLASS/*")
        if of_domains:
            found = read_domains(name, spec, root, homes, train_domain, test_domain)
        elif spec["layout"] == "folder":
            found = read_folder(root)
        else:
            found = (read_imagenet if spec["layout"] == "imagenet" else read_coop)(name, spec, root, homes)
    except OSError as error:
        raise UserError(f"{name}: {error.filename}: {error.strerror}") from error
    return {"shares": {}, "domain": None, **spec, **found, "root": root}
