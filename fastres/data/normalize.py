"""From uint8 pixels to what a network takes, on the pixels' device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastres.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


@lru_cache(maxsize=16)
def _constants(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # One value for each number of a row: an inner loop of three would not be vectorised.
    mean = (torch.tensor(MEAN, device=device) * 255).repeat(width)
    return mean, 1 / (torch.tensor(STD, device=device) * 255).repeat(width)


def normalize(images: Tensor, output: str = "float32", channels: int = 3) -> Tensor:
    """Normalise uint8 ``[B, H, W, 3]`` by ImageNet's constants to ``[B, channels, H, W]`` with channels_last strides.

    ``channels`` 4 adds a channel of zeros: a convolution on tensor cores reads 4 channels of 16 bits at a time, and
    with weights padded alike its result is the same. ``output`` ``"uint8"`` only changes the view.

    Raises:
        InputError: the images are not uint8 with 3 channels last, or channels is neither 3 nor 4.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise InputError(f"expected uint8 images [B, H, W, 3], got {images.dtype} {tuple(images.shape)}")
    if channels not in (3, 4):
        raise InputError(f"channels must be 3 or 4, got {channels}")
    if output == "uint8":
        values = images
    else:
        mean, inverse_std = _constants(images.shape[2], images.device)
        values = images.float()
        values.flatten(2).sub_(mean).mul_(inverse_std)
    if channels == 4:
        padded = torch.zeros((*values.shape[:3], 4), dtype=DTYPES[output], device=images.device)
        padded[..., :3] = values
        values = padded
    return values.to(DTYPES[output]).permute(0, 3, 1, 2)
