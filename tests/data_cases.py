"""Small data sets of images that tests make for themselves."""

import torch
from conftest import require

KINDS = ("train", "val")


def picture(seed, height=None, width=None):
    """A smooth random picture uint8 ``[3, H, W]``, of a random size unless one is given."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(70, 160, (2,), generator=generator).tolist()
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (height or sizes[0], width or sizes[1]), mode="bicubic")
    return fine[0].clamp(0, 255).byte()


def write_picture(path, seed, height=None, width=None, quality=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    require("torchvision.io").write_jpeg(picture(seed, height, width), str(path), quality=quality)


def make_folder(root, classes=("ant", "bee"), count=8, **options):
    """``root/train`` and ``root/val`` with ``count`` images of each class."""
    for half, split in enumerate(KINDS):
        for index, name in enumerate(classes):
            for number in range(count):
                write_picture(root / split / name / f"{number}.jpg", 1000 * half + 100 * index + number, **options)
    return root


def collect(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )
