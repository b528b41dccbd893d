"""The data side: tasks with their splits, CoOp's few-shot draw, base and new classes; reading and transforming images.

    python data.py --dataset all --data-root DIR                what is found under DIR
    python data.py --dataset dtd --data-root DIR                one dataset: counts, template, split, or what is missing
    python data.py --dataset folder:photos --check-images       decode every image and list the bad ones
    python data.py --dataset toy_shapes_biased --show FILE.png  labelled examples

The toy tasks (toyclip/world.py) need no files. The published datasets are in datasets.toml, and layouts.py reads them.
Your own images are folder:PATH with PATH/{train,val,test}/CLASS/*, or PATH/CLASS/* (the split is then ours), or with
--domains PATH/DOMAIN/CLASS/*; PATH/ood/NAME/CLASS/* are further test sets; PATH/classnames.txt names the classes (lines
"FOLDER<tab>NAME", or one name a line in the order of the sorted folders).

A split that nothing on disk gives is ours: drawn with a fixed seed, whatever --seed is; so all seeds share a test set.
"""

import argparse
import collections
import difflib
import hashlib
import inspect
import itertools
import os
import random
import re
import sys
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from layouts import FORMATS, PARTS, TABLE, Tree, UserError, read_layout
from toyclip import world

MAX_PIXELS = 89_478_485  # of an image: where Pillow warns of a decompression bomb, we refuse
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Item = tuple[str, int]  # (address, label); an address is an absolute path or toy:TASK/PART/INDEX


@dataclass
class Test:
    """One test set. tests[0] of a task is in-distribution; another of the same name and another `domain` (style,
    context or place) is out-of-distribution; another name is another dataset."""

    name: str
    domain: str | None
    classes: str  # "base", "new" or "all"
    classnames: list[str]
    template: str
    items: list[Item]


@dataclass
class Task:
    name: str
    classnames: list[str]  # the training classes': the base half with classes="base"
    template: str
    train: list[Item]
    val: list[Item]
    tests: list[Test]
    split: str  # sha1 of the training list, see split_hash
    teacher_template: str  # ProGrad's: the class comes last
    ensemble: list[str]  # many templates, for --teacher ensemble
    notes: list[str]  # sentences to print, and to store as warnings


# ----------------------------------------------------------------------------------------------------------------------
# 1. DRAWS: few-shot, base and new classes, our splits, label noise. Each is a pure function of its seed.
# ----------------------------------------------------------------------------------------------------------------------


def draw_seed(seed, purpose, *where) -> int:
    """A 63-bit seed that depends on nothing but the arguments: no generator's state ever has to be saved."""
    return int.from_bytes(hashlib.sha256(repr((seed, purpose, *where)).encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *where: int) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that no generator state has to be saved to resume."""
    return torch.Generator().manual_seed(draw_seed(seed, purpose, *where))


def batches(n: int, size: int, seed: int, epoch: int, max_steps: int = 0) -> list[torch.Tensor]:
    """Shuffled batches of indices of one epoch, up to max_steps in all (0: no limit). As released, the partial batch is
    dropped iff a full one exists."""
    parts = torch.randperm(n, generator=generator(seed, "order", epoch)).split(size)
    parts = parts[:-1] if n >= size and n % size else parts
    return list(parts[: max(0, max_steps - epoch * len(parts))] if max_steps else parts)


def by_label(items: list[Item]) -> dict[int, list[Item]]:
    """{label: its items}, labels in order of first appearance."""
    groups = collections.defaultdict(list)
    for item in items:
        groups[item[1]].append(item)
    return groups


def fewshot(train: list[Item], val: list[Item], shots, seed: int) -> tuple[list[Item], list[Item]]:
    """CoOp's draw, image for image and in its order: one generator; class by class in order of first appearance; train
    first, then val with min(shots, 4). A class with fewer images gives all it has. Domains are one pool.
    shots="all" draws nothing."""
    generator = random.Random(seed)

    def draw(items, k):
        groups = by_label(items).values()
        return [item for group in groups for item in (generator.sample(group, k) if len(group) >= k else group)]

    return (train, val) if shots == "all" else (draw(train, shots), draw(val, min(shots, 4)))


def keep_labels(items: list[Item], labels: range) -> list[Item]:
    """The items of these classes, relabelled from 0. Base is range(ceil(C/2)), new range(ceil(C/2), C), as in CoOp."""
    return [(address, label - labels.start) for address, label in items if label in labels]


def split_items(items: list[Item], shares: dict[str, float], name: str) -> dict[str, list[Item]]:
    """Our split: shuffle each class with a fixed seed and give every part its share, rounded (CoOp's rule, but for the
    seed). What remains is the test part where train has a share, and else stays in train."""
    parts = {part: [] for part in (*shares, "test" if "train" in shares else "train")}
    for label, group in by_label(items).items():
        random.Random(draw_seed(0, "split", name, label)).shuffle(group)
        stops = [0, *itertools.accumulate(round(share * len(group)) for share in shares.values()), len(group)]
        for part, start, stop in zip(parts, stops, stops[1:]):
            parts[part] += group[start:stop]
    return parts


def flip_labels(items: list[Item], fraction: float, n_classes: int, seed: int) -> list[Item]:
    """Label noise: exactly round(fraction * N) items get another label, every other class equally likely."""
    generator, flipped = random.Random(draw_seed(seed, "label noise")), list(items)
    for i in generator.sample(range(len(items)), round(fraction * len(items))):
        address, label = items[i]
        flipped[i] = (address, (label + generator.randrange(1, n_classes)) % n_classes)
    return flipped


def split_hash(items: list[Item], root: str) -> str:
    """sha1 of the lines "path below the image folder TAB label": the same wherever the dataset is kept."""
    names = [(address.removeprefix(root).lstrip(os.sep).replace(os.sep, "/"), label) for address, label in items]
    return hashlib.sha1("".join(f"{n}\t{label}\n" for n, label in names).encode("utf-8", "surrogateescape")).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# 2. IMAGES
# ----------------------------------------------------------------------------------------------------------------------


def read_image(address: str) -> Image.Image:
    """An RGB image, EXIF orientation applied. Raises UserError naming the file and what is wrong with it.

    WHY RGB here: open_clip's transform converts after it resizes, and resizing a palette mixes its indices. CoOp's code
    ignores EXIF. Transparency is dropped, as there."""
    if address.startswith("toy:"):
        task, part, index = address[4:].split("/")
        task, _, bias = task.partition("@")
        return Image.fromarray(world.task_image(task, part, int(index), float(bias or 0.95)))
    try:
        with Image.open(address, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; more than {MAX_PIXELS:,} are refused")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte; Pillow would clip all above 255 to white
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:  # damaged files make Pillow's plugins raise nearly anything
        raise UserError(f"{address}: {error or type(error).__name__}") from error


def bad_images(items: list[Item]) -> list[tuple[str, str]]:
    """(address, reason) of every image that cannot be decoded, in order; a progress bar on stderr."""

    def reason(address):
        try:
            read_image(address)
        except UserError as error:
            return str(error).removeprefix(f"{address}: ")

    addresses = list(dict.fromkeys(address for address, _ in items))
    with ThreadPool() as pool:  # threads: Pillow decodes without holding Python's lock
        reasons = list(tqdm(pool.imap(reason, addresses, 64), "check images", len(addresses), disable=None))
    return [(address, why) for address, why in zip(addresses, reasons) if why]


def train_transform(preprocess, augment: str):
    """The training transform (PIL image -> tensor) that goes with `preprocess`, an open_clip test transform.

    none: `preprocess` itself. crop: CoOp's random resized crop (bicubic, 8 to 100 % of the area) and flip, to its size
    and normalisation. randaugment: ProReg's RandAugment(2, 9), then `preprocess`. Both draw from torch's global
    generator: the caller seeds it for each image."""
    from torchvision import transforms as T  # WHY here: takes a second, and listing data does without

    if augment == "none":
        return preprocess
    if augment == "randaugment":
        return T.Compose([T.RandAugment(2, 9), preprocess])
    size = [step.size for step in preprocess.transforms if hasattr(step, "size")][-1]
    normalise = next(step for step in preprocess.transforms if isinstance(step, T.Normalize))
    crop = T.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(normalise.mean, normalise.std)])


# ----------------------------------------------------------------------------------------------------------------------
# 3. TASKS
# ----------------------------------------------------------------------------------------------------------------------


def numbered(tree: Tree, classes: list[str]) -> list[Item]:
    """The tree's images as items; a label is a class's place in `classes`."""
    labels = {key: label for label, key in enumerate(classes)}
    for key in tree:
        if key not in labels:
            raise UserError(f"{tree[key][0]}: its class {key!r} is not among the {len(labels)} training classes")
    return [(path, labels[key]) for key, paths in tree.items() for path in paths]


def read_toy(name: str, bias: float | None) -> dict:
    """What read_dataset returns, for a toy task; `bias` is the share of images with their class's own scene."""
    task, tag = world.TASKS[name], name if bias is None else f"{name}@{bias:g}"
    parts = {part: list(enumerate(world.task_labels(name, part))) for part in task.parts}
    items = {part: [(f"toy:{tag}/{part}/{i}", label) for i, label in rows] for part, rows in parts.items()}
    found = {"classnames": task.classnames, "template": task.template, "root": "", "origin": "world.py", "domain": None}
    return found | {"parts": {part: items.pop(part) for part in PARTS}, "ood": items, "notes": []}


def read_dataset(name, data_root, download=False, train_domain=None, test_domain=None, domains=False, toy_bias=None):
    """A whole dataset, before any draw, as a dict: classnames, template, parts {train, val, test: items}, ood {domain:
    items}, root (of the hashed paths), origin (where the split is from), domain (trained on), notes."""
    known = [*world.TASKS, *TABLE]
    if name not in known and not re.match("folder:.", name):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)} and folder:PATH"
        raise UserError(f"no dataset is called {name!r}: {hint}")
    if toy_bias is not None and (name != world.BIASED or not 0 <= toy_bias <= 1):
        raise UserError(f"--toy-bias is a share from 0 to 1, read by {world.BIASED} only; leave it out")
    if name in world.TASKS:
        if train_domain or test_domain or domains:
            raise UserError(f"{name} has no domains to choose: leave out --train-domain, --test-domain and --domains")
        return read_toy(name, toy_bias)
    found = read_layout(name, data_root, download, train_domain, test_domain, domains)
    items = {part: numbered(tree, list(found["names"])) for part, tree in found["trees"].items()}
    notes = [found["note"]] if "note" in found else []
    if found["shares"]:
        items |= split_items(items["train"], found["shares"], name)
        shares = ", ".join(f"{share:.0%} {part}" for part, share in found["shares"].items())
        notes.append(f"{name}: the split is ours: {shares} of every class in {found['origin']}, with a fixed seed")
    notes += [f"{name}: class names are from {found['names_from']}"] if "names_from" in found else []
    parts = {part: items.get(part, []) for part in PARTS}
    ood = {part.removeprefix("ood/"): items[part] for part in items if part not in PARTS}
    classnames = list(found["names"].values())
    check_classes(name, classnames, parts, found, notes)
    return {**found, "classnames": classnames, "parts": parts, "ood": ood, "notes": notes}


def check_classes(name: str, classnames: list[str], parts: dict, found: dict, notes: list[str]) -> None:
    """Adds notes on equal names, missing classes and shared images. A class without training images is an error, except
    among domains, where it happens (DomainNet's painting_train.txt has no t-shirt)."""
    if blank := [label for label, n in enumerate(classnames) if not n.strip(" _")]:
        raise UserError(f"{name}: class {blank[0]} has an empty name in {found['origin']}: give it one")
    equal = [f"{count} are called {n!r}" for n, count in collections.Counter(classnames).items() if count > 1]
    notes += [f"{name}: of its classes {', '.join(equal[:5])}; they stay apart, by label"] if equal else []
    trained_on = [] if found.get("test_only") or found["domain"] == "" else ["train"]
    for part in [*trained_on, "test"]:
        absent = sorted(set(range(len(classnames))) - {label for _, label in parts[part]})
        if absent and part == "train" and found["domain"] is None:
            raise UserError(f"{name}: class {classnames[absent[0]]!r} is empty: no training image in {found['origin']}")
        if absent and parts[part]:
            notes.append(f"{name}: {len(absent)} classes have no {part} image, {classnames[absent[0]]!r} for one")
    shared = len(set(dict(parts["train"])) & set(dict(parts["test"])))
    notes += [f"{name}: {shared} images are in both the training and the test part"] if shared else []


def make_tests(name: str, found: dict, classes: str, part: str, template: str) -> list[Test]:
    """Its own test sets: in-distribution first (all, or base and new), then other domains, which have no val."""
    half, n = (len(found["classnames"]) + 1) // 2, len(found["classnames"])
    ranges = {"all": range(n)} if classes == "all" else {"base": range(half), "new": range(half, n)}
    groups = [] if found["domain"] == "" else [(found["domain"], found["parts"][part])]  # "": nothing was trained on
    groups += found["ood"].items() if part == "test" else []
    if not groups:
        raise UserError(f"{name} has no {part} part: choose --test-part test")
    tests = []
    for domain, items in groups:
        for which, labels in ranges.items():
            kept = keep_labels(items, labels)
            if kept:
                tests.append(Test(name, domain, which, found["classnames"][labels.start : labels.stop], template, kept))
            elif not tests or tests[0].domain == domain:
                raise UserError(f"{name} has no {part} images of {which} classes: add some, or change --test-part")
    return tests


# fmt: off
def load_dataset(name, data_root="data", shots=16, seed=1, classes="all", test_on=(), template=None, label_noise=0.0,
                 download=False, train_domain=None, test_domain=None, domains=False, toy_bias=None, test_part="test",
                 found=None) -> Task:
    # fmt: on
    """A task as the flags say (see add_data_flags); `found` is what read_dataset gave, if that was called already.
    Raises UserError where something is missing or does not fit."""
    if template is not None and ("{}" not in template or len(re.findall("[{}]", template)) != 2):
        raise UserError(f"--template {template!r} needs exactly one {{}}, where the class name goes")
    found = found or read_dataset(name, data_root, download, train_domain, test_domain, domains, toy_bias)
    if found.get("test_only"):
        raise UserError(f"{name} is for testing only: train on another dataset, with --test-on {name}")
    classnames, notes = found["classnames"], list(found["notes"])
    classnames = classnames if classes == "all" else classnames[: (len(classnames) + 1) // 2]
    train, val = fewshot(found["parts"]["train"], found["parts"]["val"], shots, seed)
    few = [k for k in map(len, by_label(train).values()) if shots != "all" and k < shots]
    notes += [f"{name}: {len(few)} classes have fewer than {shots} training images, down to {min(few)}"] if few else []
    train, val = (keep_labels(items, range(len(classnames))) for items in (train, val))
    if label_noise:
        if not 0 < label_noise <= 1 or len(classnames) < 2:
            raise UserError(f"--label-noise {label_noise} is to be a share from 0 to 1, of two or more classes")
        train = flip_labels(train, label_noise, len(classnames), seed)
        notes.append(f"{round(label_noise * len(train))} of {len(train)} training labels are wrong on purpose")
    own = template or found["template"]
    tests = make_tests(name, found, classes, test_part, own)
    for other in test_on:
        target = read_dataset(other, data_root, download, train_domain=())
        if other != name or classes != "all":  # else it is there already
            tests += make_tests(other, target, "all", test_part, target["template"])
            notes += [note for note in target["notes"] if note not in notes]
    teacher = template or found.get("teacher_template", own)
    ensemble = world.CAPTION_TEMPLATES
    if name not in world.TASKS:
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # WHY here: takes seconds, and listing data does without

        ensemble = [fill("{}") for fill in OPENAI_IMAGENET_TEMPLATES]
    split = split_hash(train, found["root"])
    return Task(name, classnames, own, train, val, tests, split, teacher, list(ensemble), notes)


# ----------------------------------------------------------------------------------------------------------------------
# 4. FLAGS AND THE COMMAND
# ----------------------------------------------------------------------------------------------------------------------


def shots_flag(text: str):
    """An argparse type."""
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive whole number nor all")
    return text if text == "all" else int(text)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of load_dataset. All default to None, which stands for load_dataset's own default."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", metavar="NAME", help="a toy task, a dataset of datasets.toml, or folder:PATH")
    add("--data-root", metavar="DIR", help="folder of the datasets (default: data)")
    add("--shots", type=shots_flag, help="training images a class, or all; drawn as CoOp does")
    add("--seed", type=int, help="of every random draw (default: 1)")
    add("--classes", choices=["all", "base"], help="base: train on the first half, test on base and new")
    add("--test-on", nargs="+", metavar="NAME", help="further datasets to test on, with their own names and templates")
    add("--template", help='prompt with {} for the class, such as "a photo of a {}."')
    add("--label-noise", type=float, metavar="X", help="share of the training labels that are made wrong (default: 0)")
    add("--download", action="store_true", default=None, help="fetch missing images, where torchvision can")
    add("--train-domain", nargs="+", metavar="DOMAIN", help="domains to train on (default: all not tested on)")
    add("--test-domain", nargs="+", metavar="DOMAIN", help="domains to test on (default: all not trained on)")
    add("--domains", action="store_true", default=None, help="read folder:PATH as PATH/DOMAIN/CLASS/*")
    add("--toy-bias", type=float, metavar="SHARE", help="toy_shapes_biased: images with their class's own scene (0.95)")
    add("--test-part", choices=["test", "val"], help="what is reported on; val is to choose settings (default: test)")


def load_from_args(args, **more) -> Task:
    """load_dataset with the flags that were given."""
    flags = set(vars(args)) & set(inspect.signature(load_dataset).parameters)
    return load_dataset(args.dataset, **{k: vars(args)[k] for k in flags if vars(args)[k] is not None}, **more)


def show(items: list[Item], classnames: list[str], path: str, columns=8, rows=6, side=128) -> None:
    """A picture of up to 48 items, evenly taken from the list, each above its class name."""
    items = items[:: max(1, len(items) // (columns * rows))][: columns * rows]
    sheet = Image.new("RGB", (columns * (side + 8), -(-len(items) // columns) * (side + 24)), "white")
    for i, (address, label) in enumerate(tqdm(items, "draw", disable=None)):
        x, y = i % columns * (side + 8), i // columns * (side + 24)
        sheet.paste(ImageOps.pad(read_image(address), (side, side), Image.Resampling.BICUBIC, "white"), (x + 4, y + 4))
        ImageDraw.Draw(sheet).text((x + 4, y + side + 6), classnames[label][:20], "black", ImageFont.load_default(12))
    sheet.save(path)


def describe(name: str, found: dict, task: Task | None) -> None:
    """Counts per part and class, templates, and what a run with these flags trains and tests on."""
    parts = found["parts"] | {f"ood/{domain}": items for domain, items in found["ood"].items()}
    print(f"{name}: {len(found['classnames'])} classes; from {found['root'] or 'code'}, split by {found['origin']}")
    print(f'template "{found["template"]}"; teacher "{found.get("teacher_template", found["template"])}"')
    if task:
        print(f"drawn: {len(task.train)} training and {len(task.val)} validation images; split {task.split}")
        for test in task.tests:
            domain = f", {test.domain}" if test.domain else ""
            print(f"test: {test.name}{domain}, {test.classes} {len(test.classnames)} classes, {len(test.items)} images")
    for note in task.notes if task else found["notes"]:
        print(f"note: {note}")
    counts = [collections.Counter(label for _, label in items) for items in parts.values()]
    print(f"{'label':>5}  {'class':30}" + "".join(f"  {part:>7}" for part in parts))
    for label, classname in enumerate(found["classnames"]):
        print(f"{label:5}  {classname:30}" + "".join(f"  {c[label]:{max(7, len(p))}}" for p, c in zip(parts, counts)))
    print(f"{'':5}  {'all':30}" + "".join(f"  {c.total():{max(7, len(p))}}" for p, c in zip(parts, counts)))


def overview(data_root: str) -> None:
    """A line for every dataset of the table: what is found, or what is missing."""
    print(f"{'dataset':16} classes    train      val     test     domains  images")
    for name in TABLE:
        try:
            found = read_dataset(name, data_root)
        except UserError as error:
            print(f"{name:16} {str(error).removeprefix(f'{name}: ').split(': get ')[0]}")
            continue
        counts = [len(items) for items in found["parts"].values()] + [sum(map(len, found["ood"].values()))]
        print(f"{name:16} {len(found['classnames']):7}" + "".join(f" {n:8}" for n in counts) + f"     {found['root']}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="What a dataset holds, and what is missing.", allow_abbrev=False)
    add_data_flags(parser)
    parser.add_argument("--check-images", action="store_true", help="decode every image and list the bad ones")
    parser.add_argument("--show", metavar="FILE.png", help="draw labelled examples")
    args = parser.parse_args(argv)
    if args.dataset is None:
        parser.error("name a dataset: --dataset NAME, or --dataset all for what is found")
    if args.dataset == "all":
        return overview(args.data_root or "data")
    where = (args.data_root or "data", args.download, args.train_domain, args.test_domain)
    found = read_dataset(args.dataset, *where, args.domains, args.toy_bias)
    task = None if found.get("test_only") else load_from_args(args, found=found)
    describe(args.dataset, found, task)
    items = [item for part in (found["parts"] | found["ood"]).values() for item in part]
    if args.show:
        try:
            show(task.train if task else items, found["classnames"], args.show)
        except (OSError, ValueError) as error:
            raise UserError(f"--show {args.show}: {error}") from error
    if args.check_images:
        bad = bad_images(items)
        print("".join(f"bad: {address}: {reason}\n" for address, reason in bad), end="")
        if bad:
            raise UserError(f"{len(bad)} of {len(items)} images cannot be read: repair or remove them")
        print(f"all {len(items)} images can be read")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no valid text
    try:
        main()
    except UserError as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
