"""Where to crop, to which size to resize, what to mirror: computed for a whole batch before anything is decoded.

Every engine gets the same numbers, so that they can only differ by how they round pixels.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fastres.data.sampling import uniforms
from fastres.errors import UserError

Crop = Literal["center", "resized", "scale"]
ATTEMPTS = 10  # of a random crop, as in torchvision and fb.resnet.torch
DRAWS = 4 * ATTEMPTS + 1
SHORT_SIDES = (256 / 224, 480 / 224)  # of the papers' scale augmentation, for an image size of 1


@dataclass(frozen=True)
class Crops:
    """Which part of an image becomes a sample.

    ``kind`` is ``"resized"``: a window of a random share of the area and a random ratio (GoogLeNet's, torchvision's
    RandomResizedCrop, fb.resnet.torch); ``"scale"``: a random square from the image whose short side was resized to a
    random length of 256 to 480 for 224 (ResNet paper, section 3.4, after VGG); ``"center"``: the centre of the image
    whose short side was resized to ``image_size / fraction``. The first two mirror half of the images if ``mirror``.
    Interpolation is antialiased.
    """

    kind: Crop = "resized"
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    fraction: float = 0.875
    mirror: bool = True
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def __post_init__(self) -> None:
        if self.kind not in ("resized", "scale", "center"):
            raise UserError(f"crops are of the kind resized, scale or center, got {self.kind!r}")
        if not (0 < self.area[0] <= self.area[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UserError(f"expected 0 < area <= 1 and ratio > 0, lower bound first, got {self.area}, {self.ratio}")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction is of the short side, in 0 to 1, got {self.fraction}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation must be bilinear or bicubic, got {self.interpolation!r}")


class Geometry(NamedTuple):
    """Of a batch, all int32: decode ``windows`` [n, 4] (top, left, height, width), resize them to ``resized`` [n, 2],
    cut ``image_size`` x ``image_size`` at ``offsets`` [n, 2] out of that, and mirror where ``mirrors`` [n] is 1."""

    windows: np.ndarray
    resized: np.ndarray
    offsets: np.ndarray
    mirrors: np.ndarray


def place(crops: Crops, sizes: np.ndarray, samples: np.ndarray, image_size: int, seed: int, epoch: int) -> Geometry:
    """The geometry of a batch. ``sizes`` are heights and widths [n, 2], ``samples`` the numbers of the samples [n]."""
    count = len(sizes)
    if crops.kind == "center":
        short = sizes.min(1, keepdims=True)
        goal = round(image_size / crops.fraction)
        # torchvision truncates the long side and rounds half to even where the centre begins.
        resized = (sizes.astype(np.int64) * goal // short).astype(np.int32)
        offsets = np.rint((resized - image_size) / 2).astype(np.int32)
        windows = np.concatenate([np.zeros_like(sizes), sizes], 1).astype(np.int32)
        return Geometry(windows, resized, offsets, np.zeros(count, np.int32))
    draws = uniforms(seed, epoch, samples, DRAWS, "crop")
    attempts = draws[:, :-1].reshape(count, ATTEMPTS, 4)
    if crops.kind == "resized":
        windows = random_windows(sizes, attempts, crops.area, crops.ratio)
    else:
        windows = scaled_windows(sizes, attempts[:, 0], image_size)
    mirrors = (draws[:, -1] < 0.5) & crops.mirror
    resized = np.full((count, 2), image_size, np.int32)
    return Geometry(windows, resized, np.zeros((count, 2), np.int32), mirrors.astype(np.int32))


def random_windows(
    sizes: np.ndarray, draws: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Windows distributed as torchvision's RandomResizedCrop draws them, from ``draws`` [n, ATTEMPTS, 4] in [0, 1)."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    areas = height * width * (area[0] + (area[1] - area[0]) * draws[:, :, 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + (high - low) * draws[:, :, 1])
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    rows = np.arange(len(sizes))
    first = fits.argmax(1)
    w, h, chosen = widths[rows, first], heights[rows, first], draws[rows, first]
    top = np.floor(chosen[:, 2] * (height[:, 0] - h + 1))
    left = np.floor(chosen[:, 3] * (width[:, 0] - w + 1))
    windows = np.stack([top, left, h, w], 1)
    none = ~fits.any(1)
    if none.any():  # no attempt fits a very long image: the largest centre whose ratio is allowed
        h0, w0 = sizes[none, 0].astype(np.float64), sizes[none, 1].astype(np.float64)
        w, h = np.minimum(w0, np.rint(h0 * ratio[1])), np.minimum(h0, np.rint(w0 / ratio[0]))
        w, h = np.maximum(w, 1), np.maximum(h, 1)
        windows[none] = np.stack([(h0 - h) // 2, (w0 - w) // 2, h, w], 1)
    return windows.astype(np.int32)


def scaled_windows(sizes: np.ndarray, draws: np.ndarray, image_size: int) -> np.ndarray:
    """The squares that ``image_size`` crops of an image resized to a random short side come from; ``draws`` [n, 4]."""
    low, high = (round(image_size * factor) for factor in SHORT_SIDES)
    short_sides = low + np.floor((high - low + 1) * draws[:, 0])
    side = np.maximum(1, np.rint(sizes.min(1) * image_size / short_sides))
    top = np.floor(draws[:, 2] * (sizes[:, 0] - side + 1))
    left = np.floor(draws[:, 3] * (sizes[:, 1] - side + 1))
    return np.stack([top, left, side, side], 1).astype(np.int32)


# --- sizes of encoded images

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset([0x01, *range(0xD0, 0xD9)])  # markers without a length


def image_shape(content: Any) -> tuple[int, int] | None:
    """Height and width in the header of a JPEG, PNG or WebP (bytes or uint8 array); None if there are none.

    A fraction of the time that an imaging library takes to open a file, which matters at thousands of images a second.
    """
    head = bytes(content[:32])
    if head[:2] == b"\xff\xd8":
        return _jpeg_shape(content)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) >= 24:
        return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and len(head) >= 30:
        return _webp_shape(head)
    try:
        from PIL import Image

        with Image.open(io.BytesIO(bytes(content))) as image:
            return image.height, image.width
    except Exception:  # of many kinds, for content that may be anything: a decoder will say what is wrong
        return None


def _jpeg_shape(content: Any) -> tuple[int, int] | None:
    data, end, at = memoryview(content), len(content), 2
    while at + 9 <= end:
        if data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if kind == 0xFF:
            at += 1
        elif kind in _FRAMES:
            return data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
        elif kind in _ALONE:
            at += 2
        else:
            at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _webp_shape(head: bytes) -> tuple[int, int] | None:
    if head[12:16] == b"VP8 ":
        return int.from_bytes(head[28:30], "little") & 0x3FFF, int.from_bytes(head[26:28], "little") & 0x3FFF
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[27:30], "little") + 1, int.from_bytes(head[24:27], "little") + 1
    return None
