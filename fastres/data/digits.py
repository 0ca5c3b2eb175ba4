"""scikit-learn's handwritten digits: 1797 images of 8x8 pixels that need no download, enlarged once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fastres.data.memory import Arrays
from fastres.errors import DataError


def load_digits(image_size: int = 32) -> Arrays:
    """Load the digits, enlarged bilinearly to ``image_size``.

    Every fifth image of each class, in the set's own order, is a test image (355 of them); the split depends on no
    seed. Digits are not mirrored by augmentation.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError(f"the digits data set needs scikit-learn (pip install scikit-learn): {error}") from error
    raw = load()
    images = torch.from_numpy(raw.images).float().unsqueeze(1).mul_(255 / 16)
    labels = torch.from_numpy(raw.target).long()
    images = F.interpolate(images, (image_size, image_size), mode="bilinear", align_corners=False)
    images = images.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    rank = torch.zeros_like(labels)
    for digit in range(10):
        mine = labels == digit
        rank[mine] = torch.arange(int(mine.sum()))
    test = rank % 5 == 4
    return Arrays(
        name="digits", source="scikit-learn", classes=[str(digit) for digit in range(10)],
        train_images=images[~test], train_labels=labels[~test], test_images=images[test], test_labels=labels[test],
        pad=max(1, image_size // 8), flip=False,
    )  # fmt: skip
