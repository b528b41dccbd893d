"""Classify images by an exported classifier. Needs torch, open_clip and Pillow alone.

python classify.py FILE.safetensors a.jpg b.jpg
"""

import argparse
import json
import sys

import open_clip
import safetensors
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


def read_image(path: str) -> Image.Image:
    """RGB, turned as its EXIF data say, before the transform resizes it: as in training."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "FI":
        sys.exit(f"error: {path}: convert its 16-bit or float pixels to 8 bits")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("classifier", metavar="FILE.safetensors")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args()
    with safetensors.safe_open(args.classifier, "pt") as file:
        note = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    rows = tensors.pop("classifier")  # [C, D], or [L, C, D] of L samples
    visual = open_clip.CLIP(**json.loads(note["model"]), text_cfg={}).visual.eval()
    visual.load_state_dict(tensors)
    settings = open_clip.transform.PreprocessCfg(**json.loads(note["preprocess"]))
    preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)
    names = json.loads(note["classnames"])
    for path in args.images:
        x = F.normalize(visual(preprocess(read_image(path))[None]), dim=-1)  # [1, D]
        p = (x @ rows.mT).softmax(dim=-1).flatten(0, -2).mean(dim=0)  # over the samples
        top = p.topk(min(3, len(p)))
        print(path, *(f"{names[c]} {value:.6f}" for value, c in zip(*top)), sep="\t")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # no such file, no image, an open_clip that is too old
        sys.exit(f"error: {str(error)[:200]}")
