"""ImageNet-like JPEG files, made at run time from photographs that Debian and scikit-learn ship. None are committed.

    python -m benchmarks.photographs FOLDER [--count 1024] [--packages]

Crops of 500x375 pixels (or 375x500) at random scales, quality 96, in ten classes without meaning, as FOLDER/train and
FOLDER/val. ``--packages`` fetches a few packages with wallpapers by ``apt-get download`` (170 MB); without it, or where that
fails, scikit-learn's two photographs have to do.
"""

import argparse
import io
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = ["mate-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "plasma-workspace-wallpapers"]
SIZE, CLASSES = (500, 375), 10
# ImageNet's files have about 110 KB on average. Smooth pictures, which are decoded fast, would flatter every pipeline.
QUALITY, LEAST_DETAIL = 96, 45_000
LARGEST = 2400  # pixels of a side kept in memory


def photographs(packages: bool, folder: Path) -> list[Image.Image]:
    """Pictures of at least 500x375 pixels, largest sides reduced, no two alike."""
    from sklearn.datasets import load_sample_images

    found = [Image.fromarray(image) for image in load_sample_images().images]
    if packages and shutil.which("apt-get") and shutil.which("dpkg"):
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=False, capture_output=True)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package.name, "content"], cwd=folder, check=True)
        seen = set()
        for path in sorted((folder / "content").rglob("*")):
            if path.suffix.lower() not in (".jpg", ".jpeg") or path.is_symlink():
                continue
            with Image.open(path) as image:
                image.draft("RGB", (LARGEST, LARGEST))
                picture = image.convert("RGB")
            picture.thumbnail((LARGEST, LARGEST))
            small = picture.resize((8, 8)).tobytes()
            if min(picture.size) >= 500 and small not in seen and _detailed(picture):
                seen.add(small)
                found.append(picture)
    return found


def _detailed(picture: Image.Image) -> bool:
    content = io.BytesIO()
    small = picture.copy()
    small.thumbnail((500, 500))
    small.save(content, "JPEG", quality=QUALITY)
    return content.tell() >= LEAST_DETAIL


def make(folder: Path, count: int = 1024, packages: bool = True, seed: int = 0) -> tuple[int, int]:
    """Write ``count`` training images and a tenth as many for validation; returns photographs and mean bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        pictures = photographs(packages, Path(temporary))
    draw, total = random.Random(seed), 0
    for split, number in (("train", count), ("val", max(CLASSES, count // 10))):
        for index in range(number):
            picture = pictures[index % len(pictures)]
            width, height = SIZE if draw.random() < 0.8 else SIZE[::-1]
            largest = min(picture.width / width, picture.height / height)
            scale = draw.uniform(min(1.0, largest), largest)
            left = draw.uniform(0, picture.width - scale * width)
            top = draw.uniform(0, picture.height - scale * height)
            box = (left, top, left + scale * width, top + scale * height)
            image = picture.resize((width, height), Image.Resampling.LANCZOS, box)
            if draw.random() < 0.5:
                image = Image.fromarray(np.asarray(image)[:, ::-1])
            content = io.BytesIO()
            image.save(content, "JPEG", quality=QUALITY)
            place = folder / split / f"class{index % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:05d}.JPEG").write_bytes(content.getvalue())
            total += content.tell() if split == "train" else 0
    return len(pictures), total // count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--packages", action="store_true", help="fetch Debian packages with photographs")
    options = parser.parse_args()
    pictures, size = make(options.folder, options.count, options.packages)
    print(f"{options.count} images of {size / 1000:.1f} KB from {pictures} photographs in {options.folder}")


if __name__ == "__main__":
    main()
