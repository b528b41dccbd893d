"""Classify images by an exported classifier. Needs torch, open_clip and Pillow alone.

    python classify.py FILE.safetensors a.jpg b.jpg

--pretrained W: the CLIP's weights file, or a tag (for an archive of OpenAI's: openai), where FILE
has neither a tag nor, as ProReg's, the image encoder. --config C.json: of a model that open_clip
does not know. Of toyclip W is toyclip/weights.safetensors, C is toyclip/toyclip.json.
"""

import argparse
import json
import logging
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
    parser.add_argument("--pretrained", metavar="W", help="the CLIP's weights file, or a tag")
    parser.add_argument("--config", metavar="C.json", help="of a model unknown to open_clip")
    args = parser.parse_args()
    with safetensors.safe_open(args.classifier, "pt") as file:
        note = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    visual = {key[7:]: value for key, value in tensors.items() if key.startswith("visual/")}
    if args.config:
        open_clip.add_model_config(args.config)
    weights = None if visual else args.pretrained or note["pretrained"] or None
    quick = note["activation"] == "QuickGELU"
    logging.disable()  # open_clip warns of random weights: they are replaced or refused below
    clip = open_clip.create_model(note["model"], weights, force_quick_gelu=quick).eval()
    if visual:
        clip.visual.load_state_dict(visual)
    settings = open_clip.transform.PreprocessCfg(**json.loads(note["preprocess"]))
    preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)

    def encode(image: Image.Image) -> torch.Tensor:
        return F.normalize(clip.encode_image(preprocess(image)[None]), dim=-1)  # [1, D]

    if (encode(Image.new("RGB", (64, 64), "red")) - tensors["red"]).norm() > 0.01:
        sys.exit(f"error: name the weights of its CLIP, {note['weights']}, by --pretrained")
    text = tensors.get("samples", tensors.get("classifier"))  # [L, C, D] or [C, D]
    names = [name.replace("_", " ") for name in json.loads(note["classnames"])]
    for path in args.images:
        logits = float(note["scale"]) * encode(read_image(path)) @ text.mT
        p = logits.softmax(dim=-1).flatten(0, -2).mean(dim=0)  # over VPT's samples
        top = p.topk(min(3, len(p)))
        print(path, *(f"{names[c]} {value:.6f}" for value, c in zip(*top)), sep="\t")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # no such file, no image, a model that open_clip does not know
        sys.exit(f"error: {str(error)[:200]}; see the head of {sys.argv[0]}")
