"""Small copies of every dataset's layout, to try things on: python tests/make_data.py DIR

Each maker fills a folder that serves as --data-root. Images are 24 x 16 JPEGs (or PNGs).
"""

import itertools
import json
import os
import sys
from pathlib import Path

from PIL import Image

N = 10  # images a class
shades = itertools.count()


def image(path: Path, size=(24, 16), **options) -> None:
    """A new image file, unlike the others in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = next(shades)
    color = (shade * 37 % 256, shade * 101 % 256, shade * 11 % 256)
    Image.new("RGB", size, color).save(path, **options)


def images(folder: Path, n=N, name="{}.jpg") -> list[str]:
    """n images in a folder, as paths below its parent."""
    for i in range(n):
        image(folder / name.format(i))
    return [f"{folder.name}/{name.format(i)}" for i in range(n)]


def text(path: Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def split_file(path: Path, rows: dict[str, list[str]]) -> None:
    """rows {class name: paths below the image folder}, split 5 / 2 / 3, in unsorted order."""
    cuts = {"train": slice(0, 5), "val": slice(5, 7), "test": slice(7, None)}
    labels = {name: label for label, name in enumerate(rows)}
    split = {
        part: [
            [file, labels[name], name]
            for name in reversed(rows)
            for file in reversed(rows[name][cut])
        ]
        for part, cut in cuts.items()
    }
    path.write_text(json.dumps(split), encoding="utf-8")


def class_folders(folder: Path, names, name="{}.jpg") -> dict[str, list[str]]:
    return {n: images(folder / n, name=name) for n in names}


def caltech101(root: Path, split=True, home="caltech-101") -> None:
    folders = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "accordion", "airplanes"]
    rows = class_folders(root / home / "101_ObjectCategories", folders, "image_{:04}.jpg")
    if split:
        kept = {"face": "Faces", "leopard": "Leopards"}
        kept |= {"accordion": "accordion", "airplane": "airplanes"}
        named = {name: rows[folder] for name, folder in kept.items()}
        split_file(root / home / "split_zhou_Caltech101.json", named)


def oxford_pets(root: Path, split=True, home="oxford_pets") -> None:
    breeds = ["Abyssinian", "american_bulldog", "Bengal", "shiba_inu"]
    for breed in breeds:
        for i in range(N):
            image(root / home / "images" / f"{breed}_{i}.jpg")
    if split:
        rows = {breed.lower(): [f"{breed}_{i}.jpg" for i in range(N)] for breed in breeds}
        split_file(root / home / "split_zhou_OxfordPets.json", rows)


def stanford_cars(root: Path, split=True) -> None:
    names = ["2012 AM General Hummer SUV", "2012 Acura RL Sedan", "1993 Geo Metro Convertible"]
    files = images(root / "stanford_cars/cars_train", 7 * 3, "{:05}.jpg")
    rows = {name: files[7 * i : 7 * i + 7] for i, name in enumerate(names)}
    files = images(root / "stanford_cars/cars_test", 3 * 3, "{:05}.jpg")
    rows = {name: rows[name] + files[3 * i : 3 * i + 3] for i, name in enumerate(names)}
    if split:
        split_file(root / "stanford_cars/split_zhou_StanfordCars.json", rows)


def oxford_flowers(root: Path, split=True, home="oxford_flowers") -> None:
    files = [f.split("/")[1] for f in images(root / home / "jpg", 3 * N, "image_{:05}.jpg")]
    names = ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    if split:
        rows = {name: files[N * i : N * i + N] for i, name in enumerate(names)}
        split_file(root / home / "split_zhou_OxfordFlowers.json", rows)


def food101(root: Path, split=True) -> None:
    rows = class_folders(root / "food-101/images", ["apple_pie", "baby_back_ribs", "waffles"])
    if split:
        split_file(root / "food-101/split_zhou_Food101.json", rows)


def fgvc_aircraft(root: Path, home="fgvc_aircraft") -> None:
    variants = ["707-320", "A310", "Cessna 172"]
    for i in range(3 * N):
        image(root / home / "images" / f"{i:07}.jpg")
    text(root / home / "variants.txt", variants)
    for part, cut in {"train": range(5), "val": range(5, 7), "test": range(7, 10)}.items():
        lines = [f"{N * label + i:07} {variants[label]}" for label in (2, 0, 1) for i in cut]
        text(root / home / f"images_variant_{part}.txt", lines)


def sun397(root: Path, split=True, home="sun397") -> None:
    folders = ["a/abbey", "a/apse/indoor", "b/bakery/shop"]
    for folder in folders:
        images(root / home / "SUN397" / folder, name="sun_{}.jpg")
    if split:
        rows = {}
        for name, folder in zip(["abbey", "indoor apse", "shop bakery"], folders):
            rows[name] = [f"{folder}/sun_{i}.jpg" for i in range(N)]
        split_file(root / home / "split_zhou_SUN397.json", rows)


def dtd(root: Path, split=True, home="dtd") -> None:
    rows = class_folders(root / home / "images", ["banded", "blotchy", "zigzagged"])
    if split:
        split_file(root / home / "split_zhou_DescribableTextures.json", rows)


def eurosat(root: Path, split=True) -> None:
    rows = class_folders(root / "eurosat/2750", ["AnnualCrop", "Forest", "Highway", "SeaLake"])
    if split:
        names = ["Annual Crop Land", "Forest", "Highway or Road", "Sea or Lake"]
        split_file(root / "eurosat/split_zhou_EuroSAT.json", dict(zip(names, rows.values())))


def ucf101(root: Path, split=True) -> None:
    actions = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "HammerThrow": "Hammer_Throw", "YoYo": "Yo_Yo"}
    home, rows = root / "ucf101", {}
    for action, folder in actions.items():
        rows[folder] = images(home / "UCF-101-midframes" / folder, name=f"v_{action}_g01_c{{}}.jpg")
    if split:
        split_file(home / "split_zhou_UCF101.json", rows)


WNIDS = {"n01440764": "tench", "n02123045": "tabby cat"}
WNIDS |= {"n03773504": "missile", "n04008634": "missile"}


def imagenet(root: Path) -> None:
    home = root / "imagenet"
    for wnid in WNIDS:
        images(home / "images/train" / wnid, name=f"{wnid}_{{}}.JPEG")
        images(home / "images/val" / wnid, 3, "ILSVRC2012_val_{:08}.JPEG")
    text(home / "classnames.txt", [f"{wnid} {name}" for wnid, name in WNIDS.items()])


def imagenet_variants(root: Path) -> None:
    """-V2 and -Sketch with imagenet's classnames.txt, -A and -R without."""
    v2 = root / "imagenetv2/imagenetv2-matched-frequency-format-val"
    for label in range(len(WNIDS)):
        images(v2 / str(label), 2, "{}.jpeg")
    for wnid in WNIDS:
        images(root / "imagenet-sketch/images" / wnid, 2, "sketch_{}.JPEG")
    for wnid in list(WNIDS)[1:]:
        images(root / "imagenet-adversarial/imagenet-a" / wnid, 2)
        images(root / "imagenet-rendition/imagenet-r" / wnid, 2)
    text(root / "imagenet-adversarial/imagenet-a/README.txt", ["no class"])


def bar(root: Path) -> None:
    for part, start in (("train", 0), ("test", 100)):
        for action in ("climbing", "diving", "pole vaulting"):
            for i in range(start, start + N):
                image(root / "bar" / part / f"{action}_{i}.jpg")
    text(root / "bar/metadata.json", ["{}"])
    image(root / "bar/assets/tiled.png")


def nico(root: Path) -> None:
    for kind, names in {"animal": ["bear", "dog"], "vehicle": ["airplane", "bus"]}.items():
        for name in names:
            for context in ["eating", "in forest", "in water", "on grass", f"only a {name}"]:
                images(root / "nico" / kind / name / context, name=f"{context} {{}}.jpg")


def pacs(root: Path, lists=True) -> None:
    for domain in ["art_painting", "cartoon", "photo", "sketch"]:
        home = root / "pacs/images" / domain
        rows = class_folders(home, ["dog", "elephant", "giraffe"], "pic_{}.png")
        lines = [f"{domain}/{file} {y}" for y, row in enumerate(rows.values(), 1) for file in row]
        if lists:
            file = f"pacs/splits/{domain}_{{}}_kfold.txt"
            text(root / file.format("train"), [ln for i, ln in enumerate(lines) if i % N < 9])
            text(root / file.format("crossval"), [ln for i, ln in enumerate(lines) if i % N == 9])
            text(root / file.format("test"), lines)


def domainnet(root: Path, lists=True) -> None:
    for domain in ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]:
        classes = ["aircraft_carrier", "The_Mona_Lisa", "t-shirt"]
        rows = class_folders(root / "domainnet" / domain, classes, f"{domain}_{{}}.jpg")
        lines = [f"{domain}/{file} {y}" for y, row in enumerate(rows.values()) for file in row]
        if lists:
            file = root / "domainnet" / f"{domain}_train.txt"
            text(file, [line for i, line in enumerate(lines) if i % N < 7])
            text(file.with_stem(f"{domain}_test"), [ln for i, ln in enumerate(lines) if i % N >= 7])


def folder(root: Path, parts=("train", "val", "test"), classes=("cat", "dog", "größe №1")) -> None:
    """A user's own images; without parts PATH/CLASS/*."""
    for part in parts or ("",):
        for name in classes:
            images(root / part / name, name=f"{part} {{}}.jpg")


MAKERS = [caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397]
MAKERS += [dtd, eurosat, ucf101, imagenet, imagenet_variants, bar, nico, pacs, domainnet]

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_data.py DIR")
    for make in MAKERS:
        make(Path(sys.argv[1]))
    folder(Path(sys.argv[1]) / "own")
    print(f"{sum(len(files) for *_, files in os.walk(sys.argv[1]))} files in {sys.argv[1]}")
