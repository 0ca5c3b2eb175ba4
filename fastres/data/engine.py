"""What turns encoded images into pixels: the interface, the choice, and the torchvision engine."""

from __future__ import annotations

import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastres.data.geometry import Geometry
from fastres.errors import UserError

Backend = Literal["auto", "dali", "dali-only", "torchvision"]
Preset = Literal["fast", "parity"]
Output = Literal["float32", "float16", "bfloat16", "uint8"]


@dataclass(frozen=True)
class Settings:
    """How bytes become pixels. ``on_device`` asks for decoding on ``device`` where the engine can."""

    batch_size: int
    workers: int
    device: torch.device
    preset: Preset = "fast"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    centered: bool = False  # whether the geometry cuts a centre out of what was resized
    on_device: bool = False
    output: Output = "uint8"  # of what is made on the device: engines on the CPU give uint8
    channels: int = 3


class Job(NamedTuple):
    """One batch to decode: encoded images, uint8 each, and their geometry."""

    number: int  # of the batch in its epoch
    samples: np.ndarray  # the samples' numbers in their source
    contents: list[np.ndarray]
    geometry: Geometry
    image_size: int


class Done(NamedTuple):
    """``images`` [n, S, S, C] of the job's samples that could be decoded, and why not for the others by position."""

    job: Job
    images: Tensor
    failures: dict[int, str]


class Engine(Protocol):
    """Decodes, crops, resizes and mirrors. Answers come in the order of the jobs; a few jobs are taken in advance."""

    name: str

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]: ...


def choose_engine(backend: str, settings: Settings) -> Engine:
    """DALI where it is installed, else torchvision, unless one is asked for by name.

    Raises:
        UserError: the one asked for is not installed, or there is none of that name.
    """
    if backend not in ("auto", "dali", "dali-only", "torchvision"):
        raise UserError(f"backend must be auto, dali, dali-only or torchvision, got {backend!r}")
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UserError(f"images are resized by torchvision, which can't be imported ({error})") from error
    if backend.startswith("dali") or (backend == "auto" and importlib.util.find_spec("nvidia.dali") is not None):
        try:
            from fastres.data.dali import DaliEngine, HybridEngine
        except ImportError as error:
            if backend != "auto":
                raise UserError(
                    f"DALI can't be imported ({error}); pip install 'fastres[dali-cu12]' or 'fastres[dali-cu13]'"
                ) from error
        else:
            on_gpu = settings.device.type == "cuda" and settings.on_device
            return DaliEngine(settings) if on_gpu or backend == "dali-only" else HybridEngine(settings)
    return TorchvisionEngine(settings)


def resize_into(
    target: np.ndarray, pixels: Tensor, geometry: Geometry, position: int, interpolation: str = "bilinear"
) -> None:
    """Resize uint8 ``[3, h, w]`` as position ``position`` of the geometry says and write it to ``[S, S, 3]``.

    Antialiased with torchvision's rounding. numpy copies in the calling thread; torch would start threads of its own.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as TF

    height, width = geometry.resized[position].tolist()
    if pixels.shape[1:] != (height, width):
        pixels = TF.resize(pixels, [height, width], InterpolationMode(interpolation), antialias=True)
    values = pixels.numpy().transpose(1, 2, 0)
    size = target.shape[0]
    top, left = geometry.offsets[position].tolist()
    values = values[top : top + size, left : left + size]
    target[...] = values[:, ::-1] if geometry.mirrors[position] else values


def _references(arrays: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(arrays[index])


UNUSED = _references([np.empty(0, np.uint8)], 0)


class Buffers:
    """Memory for batches on the CPU that is used again when nobody holds the batch any more.

    The C library would take each batch from the part of the heap that belongs to the asking thread. These parts grow and
    hardly shrink, and there are many of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._arrays: list[np.ndarray] = []

    def take(self, count: int, size: int) -> tuple[Tensor, np.ndarray]:
        """uint8 ``[count, size, size, 3]`` as a tensor and as an array; pinned where a GPU will fetch it."""
        shape, length = (count, size, size, 3), count * size * size * 3
        if self._pinned:  # torch keeps pinned memory for the next time by itself
            images = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            return images, images.numpy()
        # A tensor holds its array for as long as any view of it lives.
        unused = [i for i in range(len(self._arrays)) if _references(self._arrays, i) == UNUSED]
        fitting = [i for i in unused if len(self._arrays[i]) >= length]
        if fitting:
            array = self._arrays[fitting[0]]
        else:
            self._arrays = [each for i, each in enumerate(self._arrays) if i not in unused]
            array = np.empty(length, np.uint8)
            self._arrays.append(array)
        images = torch.from_numpy(array)[:length].view(shape)
        return images, images.numpy()


class TorchvisionEngine:
    """Decoding by torchvision's C++ in a pool of threads, on the CPU."""

    name = "torchvision"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(max(1, settings.workers), "fastres-decode")
        self._buffers = Buffers(settings.device)

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        for job in jobs:
            yield decode_job(job, self._pool, self._buffers, self._settings)


def decode_job(job: Job, pool: ThreadPoolExecutor, buffers: Buffers, settings: Settings) -> Done:
    """Decode a batch strictly; what fails is left out and named."""
    images, target = buffers.take(len(job.contents), job.image_size)
    reasons = list(pool.map(partial(_decode_one, job, target, settings.interpolation), range(len(job.contents))))
    failures = {position: reason for position, reason in enumerate(reasons) if reason}
    if failures:
        images = images[[i for i in range(len(reasons)) if i not in failures]]
    return Done(job, images, failures)


def _decode_one(job: Job, target: np.ndarray, interpolation: str, position: int) -> str | None:
    try:
        pixels = decode(job.contents[position])
        top, left, height, width = job.geometry.windows[position].tolist()
        if top + height > pixels.shape[1] or left + width > pixels.shape[2]:
            raise ValueError(f"its header promises more than the {pixels.shape[2]}x{pixels.shape[1]} pixels it has")
        pixels = pixels[:, top : top + height, left : left + width]
        resize_into(target[position], pixels, job.geometry, position, interpolation)
    except (RuntimeError, OSError, ValueError) as error:
        return short_reason(error)
    return None


def decode(content: np.ndarray) -> Tensor:
    """Decode an image to uint8 ``[3, h, w]`` RGB; an EXIF orientation is not applied.

    torchvision has announced the end of its decoders: without them Pillow decodes, to the same pixels but slower.

    Raises:
        ValueError, RuntimeError, OSError: it can't be decoded whole.
    """
    if not len(content):
        raise ValueError("the file is empty")
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        from PIL import Image

        with Image.open(io.BytesIO(content.tobytes())) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    # Through a copy: torch warns of an array that it must not write.
    return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)


def decode_file(path: str) -> Tensor:
    """:func:`decode` of a file."""
    return decode(np.frombuffer(Path(path).read_bytes(), np.uint8))


def short_reason(error: BaseException) -> str:
    """The first line of an error's text, without the C++ source line that torchvision puts before it."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return re.sub(r"^\w+, \S+\.cpp:\d+, ", "", line)[:200]
