"""The views of an image that the papers test on, as data: which sizes, which crops, mirrored or not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastres.errors import UserError

Crops = Literal["centre", "ten", "squares", "dense"]


@dataclass(frozen=True)
class Protocol:
    """How one image becomes several.

    Attributes:
        name: what ``fastres eval --protocol`` calls it.
        scales: lengths that the shorter side is resized to, one after another; None keeps the image as it is.
        crop: side of the square crops; None for ``"dense"``, where the network sees the whole resized image.
        crops: ``"centre"`` (1 a scale), ``"ten"`` (corners, centre, and their mirror images), ``"squares"`` (GoogLeNet's
            36 a scale), ``"dense"`` (1 a scale).
        flips: adds the mirror image of each view ("ten" and "squares" have theirs anyway).
    """

    name: str
    scales: tuple[int | None, ...]
    crop: int | None
    crops: Crops
    flips: bool = False

    @property
    def count(self) -> int:
        """Views of one image."""
        each = {"centre": 1, "ten": 10, "squares": 36, "dense": 1}[self.crops]
        return len(self.scales) * each * (2 if self.flips else 1)

    def views(self, images: Tensor) -> list[Tensor]:
        """All views of an image or of a batch.

        Args:
            images: ``[..., C, H, W]``, uint8 or float.

        Returns:
            :attr:`count` tensors ``[..., C, h, w]`` of the same dtype.

        Raises:
            UserError: a crop doesn't fit into the resized image.
        """
        from torchvision.transforms.v2 import functional as TF

        result: list[Tensor] = []
        for scale in self.scales:
            resized = images if scale is None else TF.resize(images, [scale], antialias=True)
            views = [resized] if self.crop is None else self._crops(resized, self.crop)
            if self.flips:
                views += [TF.horizontal_flip(view) for view in views]
            result += views
        return result

    def _crops(self, images: Tensor, side: int) -> list[Tensor]:
        from torchvision.transforms.v2 import functional as TF

        if min(images.shape[-2:]) < side:
            raise UserError(
                f"a crop of {side} doesn't fit into images of {images.shape[-2]}x{images.shape[-1]}; "
                "give a smaller --crop or larger --scales"
            )
        if self.crops == "centre":
            return [TF.center_crop(images, [side, side])]
        if self.crops == "ten":
            return list(TF.ten_crop(images, [side, side]))
        result = []
        for square in three_squares(images):
            five = list(TF.five_crop(square, [side, side])) + [TF.resize(square, [side, side], antialias=True)]
            result += [*five, *(TF.horizontal_flip(view) for view in five)]
        return result


def three_squares(images: Tensor) -> list[Tensor]:
    """Left, centre and right square of a wide image, or top, centre and bottom of a tall one (GoogLeNet, section 7)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    if width >= height:
        return [images[..., :, x : x + side] for x in (0, (width - side) // 2, width - side)]
    return [images[..., y : y + side, :] for y in (0, (height - side) // 2, height - side)]


def make_protocol(name: str, crop: int | None = None, scales: tuple[int, ...] | None = None) -> Protocol:
    """A protocol by name.

    ========== ===========================================================================================
    loader     the loader's own view of each test image (folders: shorter side 256, centre 224)
    1-crop     centre 224 of a shorter side of 256; ``crop=320`` is the pre-activation paper's (shorter side 320)
    10-crop    corners and centre of a shorter side of 256, and their mirror images (ResNet paper, table 3)
    multi-scale the whole image at shorter sides 224, 256, 384, 480, 640 and its mirror image (table 4)
    144-crop   four sizes, three squares, six crops, mirrored (GoogLeNet, section 7)
    ========== ===========================================================================================

    Args:
        name: see above.
        crop: side of the crops (224). Sizes follow in proportion, so that CIFAR-sized images have these protocols too.
        scales: shorter sides instead of the protocol's own.

    Raises:
        UserError: an unknown name, or a value that doesn't fit.
    """
    if (crop is not None and crop < 1) or any(scale < 1 for scale in scales or ()):
        raise UserError(f"crop and scales must be at least 1, got crop {crop} and scales {scales}")
    side = 224 if crop is None else crop

    def sizes(*of_224: int) -> tuple[int, ...]:
        return scales or tuple(round(size * side / 224) for size in of_224)

    if name == "loader":
        if crop or scales:
            raise UserError("the protocol 'loader' takes the loader's view: --crop and --scales don't apply")
        return Protocol(name, (None,), None, "dense")
    if name == "1-crop":
        return Protocol(name, scales or ((320,) if crop == 320 else sizes(256)), side, "centre")
    if name == "10-crop":
        return Protocol(name, sizes(256), side, "ten")
    if name == "multi-scale":
        return Protocol(name, sizes(224, 256, 384, 480, 640), None, "dense", flips=True)
    if name == "144-crop":
        return Protocol(name, sizes(256, 288, 320, 352), side, "squares")
    close = re.sub(r"\D", "", name)
    hint = f" Did you mean {close}-crop?" if close in ("1", "10", "144") else ""
    raise UserError(f"unknown protocol {name!r}; expected {', '.join(NAMES)}.{hint}")


NAMES = ("loader", "1-crop", "10-crop", "multi-scale", "144-crop")
