"""Folders of real image files, through the command line, with full-size architectures of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def draw_photos(folder: Path, classes: list[str], per_class: int) -> None:
    """Small photographs in the formats and modes that people have: EXIF rotation, palette, CMYK, RGBA, greyscale."""
    modes = ["RGB", "P", "CMYK", "RGBA", "L"]
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            noise = torch.randint(0, 255, (60 + i, 80, 3), generator=torch.Generator().manual_seed(100 * c + i))
            image = Image.fromarray(noise.to(torch.uint8).numpy()).convert(modes[i % len(modes)])
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by 90 degrees
            if image.mode in ("RGB", "L", "CMYK"):
                image.save(folder / name / f"photo {i}.jpg", exif=exif)
            else:
                image.save(folder / name / f"photo {i}.png")


def prograd(*flags: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "prograd.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def random_weights(model: str, path: Path) -> None:
    torch.manual_seed(0)
    safetensors.torch.save_file(open_clip.create_model(model).state_dict(), path)


@pytest.mark.parametrize("model", ["ViT-S-32-alt", pytest.param("ViT-B-16", marks=pytest.mark.slow)])
def test_own_photographs_run_twice_and_are_encoded_once(tmp_path, model):
    draw_photos(tmp_path / "my photos", ["tabby cat", "golden_retriever", "Zürich"], 10)
    random_weights(model, tmp_path / "weights.safetensors")
    flags = ["--dataset", "folder:my photos", "--model", model, "--pretrained", "weights.safetensors", "--shots", "2"]
    flags += ["--epochs", "2", "--workers", "2", "--augment", "crop", "--views", "1", "--compare"]
    first, second = (prograd(*flags, cwd=tmp_path) for _ in range(2))
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and "gelu" in done.stdout
    assert "from the cache" not in first.stdout
    assert second.stdout.count("from the cache") == 2  # the training view and the test images

    def table(done):
        return [line for line in done.stdout.splitlines() if "accuracy" in line or "NLL" in line]

    assert table(first) == table(second)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "prograd-folder_my photos-2shot-seed1", "prograd-folder_my photos-2shot-seed1-2"}  # fmt: skip


def test_a_broken_photograph_is_named_before_training(tmp_path):
    draw_photos(tmp_path / "photos", ["cat", "dog"], 8)
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 this is not an image")
    (tmp_path / "photos" / "dog" / "empty.png").write_bytes(b"")
    random_weights("ViT-S-32-alt", tmp_path / "w.safetensors")
    flags = ["--dataset", "folder:photos", "--model", "ViT-S-32-alt", "--pretrained", "w.safetensors", "--shots", "all"]
    done = prograd(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "broken.jpg" in done.stderr and "empty.png" in done.stderr and "Traceback" not in done.stderr
