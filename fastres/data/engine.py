"""What turns a list of image files into batches of pixels: the interface, the choice, and the torchvision engine."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastres.data.loader import epoch_generator
from fastres.errors import UserError

AREA, RATIO, ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10  # of a training crop, as in torchvision and fb.resnet.torch


class BadImages(Exception):
    """Some files of the next batch can't be decoded: ``(path, reason)`` of each. Batches before it were delivered."""

    def __init__(self, culprits: list[tuple[str, str]]) -> None:
        super().__init__(culprits)
        self.culprits = culprits


@dataclass(frozen=True)
class Settings:
    """How files become pixels."""

    batch_size: int
    image_size: int
    augment: bool
    workers: int
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Segment:
    """Files in the order of delivery, and where in the epoch they begin.

    ``resume`` is what :attr:`Batch.resume` was after the last batch that had been delivered, ``done`` how many of the
    segment's files that makes.
    """

    files: Sequence[str]
    labels: Sequence[int]
    epoch: int
    start: int
    done: int = 0
    resume: bytes | None = None


@dataclass(frozen=True)
class Batch:
    """``images`` are uint8 ``[B, H, W, 3]``, ``labels`` int64 ``[B]``; ``resume`` continues behind this batch."""

    images: Tensor
    labels: Tensor
    resume: bytes | None = None


class Engine(Protocol):
    """Decodes, crops, resizes and mirrors."""

    name: str

    def batches(self, segment: Segment) -> Iterator[Batch]:
        """Deliver the segment's files from ``segment.done`` on, the last batch smaller; raise :class:`BadImages`."""
        ...


def choose_engine(backend: str, settings: Settings) -> Engine:
    """DALI where it is installed, else torchvision, unless one is asked for by name.

    Raises:
        UserError: the one asked for is not installed.
    """
    if backend == "dali" or (backend == "auto" and importlib.util.find_spec("nvidia.dali") is not None):
        try:
            from fastres.data.dali import DaliEngine
        except ImportError as error:
            if backend == "dali":
                raise UserError(f"DALI can't be imported ({error}); pip install 'fastres[data]'") from error
        else:
            return DaliEngine(settings)
    return TorchvisionEngine(settings)


def random_window(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop, distributed as torchvision's RandomResizedCrop draws it."""
    draws = torch.rand(ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    for area_draw, ratio_draw, top_draw, left_draw in draws:
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area_draw)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = min(width, round(height * RATIO[1]))
    crop_height = min(height, round(width / RATIO[0]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_pixels(pixels: Tensor, image_size: int, augment: bool) -> Tensor:
    """Bring uint8 ``[3, h, w]`` to ``[3, S, S]``: a training crop is resized whole, an evaluation image has its short
    side resized to 8/7 of S and its centre cut out. Antialiased, with torchvision's rounding."""
    from torchvision.transforms.v2 import functional as TF

    if augment:
        return TF.resize(pixels, [image_size, image_size], antialias=True)
    pixels = TF.resize(pixels, [round(image_size * 8 / 7)], antialias=True)
    return TF.center_crop(pixels, [image_size, image_size])


def write_pixels(target: np.ndarray, pixels: Tensor, mirror: bool) -> None:
    """Copy ``[3, S, S]`` into ``[S, S, 3]``; numpy copies in the calling thread, torch would start its own threads."""
    values = pixels.numpy().transpose(1, 2, 0)
    target[...] = values[:, ::-1] if mirror else values


class TorchvisionEngine:
    """Decoding by torchvision's C++ in a pool of threads, on the CPU."""

    name = "torchvision"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def _one(self, path: str, seed: int, target: np.ndarray) -> tuple[str, str] | None:
        settings = self._settings
        try:
            pixels = decode_file(path)
        except (RuntimeError, OSError, ValueError) as error:
            return path, short_reason(error)
        mirror = False
        if settings.augment:
            generator = torch.Generator().manual_seed(seed)
            top, left, height, width = random_window(pixels.shape[1], pixels.shape[2], generator)
            pixels = pixels[:, top : top + height, left : left + width]
            mirror = bool(torch.rand((), generator=generator) < 0.5)
        write_pixels(target, resize_pixels(pixels, settings.image_size, settings.augment), mirror)
        return None

    def batches(self, segment: Segment) -> Iterator[Batch]:
        settings = self._settings
        side = settings.image_size
        with ThreadPoolExecutor(max(1, settings.workers)) as pool:
            for begin in range(segment.done, len(segment.files), settings.batch_size):
                files = segment.files[begin : begin + settings.batch_size]
                generator = epoch_generator(settings.seed, segment.epoch, segment.start + begin)
                seeds = torch.randint(2**62, (len(files),), generator=generator).tolist()
                images = np.empty((len(files), side, side, 3), np.uint8)
                culprits = [bad for bad in pool.map(self._one, files, seeds, images) if bad]
                if culprits:
                    raise BadImages(culprits)
                labels = torch.tensor(segment.labels[begin : begin + len(files)])
                yield Batch(torch.from_numpy(images), labels)


def decode_file(path: str) -> Tensor:
    """Read an image as uint8 ``[3, h, w]`` RGB; an EXIF orientation is not applied.

    torchvision has announced the end of its decoders: without them Pillow decodes, to the same pixels but slower.
    """
    content = Path(path).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)


def short_reason(error: BaseException) -> str:
    """The first line of an error's text, without the C++ source line that torchvision puts before it."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return re.sub(r"^\w+, \S+\.cpp:\d+, ", "", line)[:200]
