"""Classify images by an exported classifier. Needs torch, open_clip and Pillow alone.

    python classify.py FILE.safetensors a.jpg b.jpg [--pretrained W]

W: where the CLIP's weights are, if they were a file (toyclip's: toyclip/weights.safetensors).
ProReg's FILE holds its image encoder, and needs none.
"""

import argparse
import json
import os
import sys
import tempfile

import open_clip
import safetensors
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps


def load_model(note: dict, visual: dict, weights: str) -> torch.nn.Module:
    """CLIP with its own activation; its image encoder is `visual`, where that was tuned."""
    name = note["model"]
    if ":" not in name and not open_clip.get_model_config(name):  # toyclip
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"{name}.json")
            with open(path, "w") as file:
                file.write(note["config"])
            open_clip.add_model_config(path)
    if not (weights or visual or ":" in name):
        sys.exit(f"error: name the CLIP's weights file, {note['file']}, by --pretrained")
    from_file = bool(visual) or os.path.isfile(weights) or ":" in name
    quick = note["activation"] == "QuickGELU"
    net = open_clip.create_model(name, None if from_file else weights, force_quick_gelu=quick)
    if visual:
        net.visual.load_state_dict(visual)
    elif os.path.isfile(weights):
        try:  # an archive of OpenAI's
            net.load_state_dict(torch.jit.load(weights, "cpu").state_dict(), strict=False)
        except RuntimeError:
            open_clip.load_checkpoint(net, weights)
    return net.eval()


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
    parser.add_argument("--pretrained", metavar="W", help="the CLIP's weights file")
    args = parser.parse_args()
    with safetensors.safe_open(args.classifier, "pt") as file:
        note = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    visual = {key[7:]: value for key, value in tensors.items() if key.startswith("visual/")}
    net = load_model(note, visual, args.pretrained or note["pretrained"])
    settings = open_clip.transform.PreprocessCfg(**json.loads(note["preprocess"]))
    preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)

    def encode(image: Image.Image) -> torch.Tensor:
        return F.normalize(net.encode_image(preprocess(image)[None]), dim=-1)  # [1, D]

    if (encode(Image.new("RGB", (64, 64), "red")) - tensors["red"]).norm() > 1e-2:
        sys.exit("error: this is another CLIP than the one of the training")
    text = tensors.get("samples", tensors.get("classifier"))  # [L, C, D] or [C, D]
    names = [name.replace("_", " ") for name in json.loads(note["classnames"])]
    for path in args.images:
        logits = float(note["scale"]) * encode(read_image(path)) @ text.mT
        p = logits.softmax(dim=-1).flatten(0, -2).mean(dim=0)  # over VPT's samples
        top = p.topk(min(3, len(p)))
        print(path, *(f"{names[c]} {value:.6f}" for value, c in zip(*top)), sep="\t")


if __name__ == "__main__":
    main()
