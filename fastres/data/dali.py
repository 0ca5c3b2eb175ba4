"""The DALI engine: reads and decodes (only the region that a crop needs) by DALI, resizes by torch on the CPU.

torch's antialiased uint8 resize is several times as fast as DALI's on the CPU and agrees with PIL's to one grey level.
On a GPU, training images are decoded, resized and mirrored there; evaluation images always take the CPU route, so
that a network's accuracy doesn't depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIImageType, DALIInterpType
from torch import Tensor

from fastres.data.engine import (
    AREA,
    ATTEMPTS,
    RATIO,
    BadImages,
    Batch,
    Segment,
    Settings,
    decode_file,
    resize_pixels,
    short_reason,
    write_pixels,
)
from fastres.data.loader import epoch_generator

LOOK_AHEAD = 16  # batches that DALI may have begun to read


@pipeline_def
def _pipeline(files: list[str], labels: list[int], augment: bool, gpu_size: int | None) -> Any:
    # The order of the files is the epoch's order already: DALI neither shuffles nor repeats, so that both engines
    # and a resumed run see the same files in the same batches.
    encoded, label = fn.readers.file(files=files, labels=labels, pad_last_batch=True, name="Reader")
    device = "mixed" if gpu_size else "cpu"
    if not augment:
        return fn.decoders.image(encoded, device=device, output_type=DALIImageType.RGB, adjust_orientation=False), label
    pixels = fn.decoders.image_random_crop(
        encoded, device=device, output_type=DALIImageType.RGB, random_area=list(AREA), random_aspect_ratio=list(RATIO),
        num_attempts=ATTEMPTS, adjust_orientation=False,
    )  # fmt: skip
    mirror = fn.random.coin_flip()
    if not gpu_size:
        return pixels, label, mirror
    resized: Any = fn.resize(
        pixels, size=[gpu_size, gpu_size], interp_type=DALIInterpType.INTERP_LINEAR, antialias=True
    )
    return fn.flip(resized, horizontal=mirror), label


class DaliEngine:
    """Satisfies :class:`fastres.data.engine.Engine`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._on_gpu = settings.device.type == "cuda" and settings.augment
        self.name = "DALI on the GPU" if self._on_gpu else "DALI on the CPU"

    def _build(self, segment: Segment, files: list[str], resume: bytes | None) -> Any:
        """A pipeline over ``files``, in place of the segment's own, that goes on where ``resume`` was taken."""
        settings = self._settings
        seed = epoch_generator(settings.seed, segment.epoch, segment.start).initial_seed() % 2**31
        pipeline = _pipeline(
            files, list(segment.labels), settings.augment, settings.image_size if self._on_gpu else None,
            batch_size=settings.batch_size, num_threads=max(1, settings.workers), seed=seed,
            device_id=(settings.device.index or 0) if self._on_gpu else None,
            enable_checkpointing=True, checkpoint=resume,
        )  # fmt: skip
        pipeline.build()
        return pipeline

    def batches(self, segment: Segment) -> Iterator[Batch]:
        size, files, resume = self._settings.batch_size, list(segment.files), segment.resume
        pipeline, unreadable = None, [False] * len(files)
        with ThreadPoolExecutor(max(1, self._settings.workers)) as pool:
            begin = segment.done
            while begin < len(files):
                end = min(begin + size, len(files))
                if any(unreadable[begin:end]):
                    raise BadImages(_unreadable(segment.files[begin:end]))
                try:
                    pipeline = pipeline or self._build(segment, files, resume)
                    outputs = pipeline.run()
                except RuntimeError as error:
                    # DALI names the file in some cases only, and its pipeline is of no use after an error. It reads
                    # ahead, so a file that can't be read may be batches away: a stand-in lets those before it pass,
                    # with the random numbers that they would have had anyway.
                    near = range(begin, min(begin + LOOK_AHEAD * size, len(files)))
                    new = [index for index in near if _unreadable(files[index : index + 1])]
                    if not new:
                        raise BadImages(_culprits(segment.files[begin:end], error)) from error
                    stand_in = next((path for path in files if not _unreadable([path])), None)
                    for index in new:
                        unreadable[index], files[index] = True, stand_in or files[index]
                    pipeline = None
                    if stand_in is None:
                        raise BadImages(_unreadable(segment.files)) from error
                    continue
                count = end - begin
                images = self._on_device(outputs, count) if self._on_gpu else self._resized(outputs, count, pool)
                labels = torch.from_numpy(np.array(outputs[1].as_tensor())).flatten()[:count].long()
                resume, begin = bytes(pipeline.checkpoint()), end
                yield Batch(images, labels, resume)

    def _resized(self, outputs: Any, count: int, pool: ThreadPoolExecutor) -> Tensor:
        settings = self._settings
        images = np.empty((count, settings.image_size, settings.image_size, 3), np.uint8)
        mirrors = np.array(outputs[2].as_tensor()).ravel().tolist() if settings.augment else [0] * count

        def one(index: int) -> None:
            pixels = torch.from_dlpack(outputs[0][index]).permute(2, 0, 1)
            resized = resize_pixels(pixels, settings.image_size, settings.augment)
            write_pixels(images[index], resized, bool(mirrors[index]))

        list(pool.map(one, range(count)))
        return torch.from_numpy(images)

    def _on_device(self, outputs: Any, count: int) -> Tensor:
        # DALI reuses the buffer for a later batch, hence the copy.
        return torch.from_dlpack(outputs[0].as_tensor())[:count].clone()


def _unreadable(files: Sequence[str]) -> list[tuple[str, str]]:
    """Files that fail before they are decoded."""
    found = []
    for path in files:
        try:
            with open(path, "rb") as file:
                if not file.read(1):
                    found.append((path, "the file is empty"))
        except OSError as error:
            found.append((path, short_reason(error)))
    return found


def _culprits(files: Sequence[str], error: RuntimeError) -> list[tuple[str, str]]:
    """Decode a failed batch file by file, first by torchvision, which says most, then by DALI itself."""
    culprits = []
    for path in files:
        try:
            decode_file(path)
        except (RuntimeError, OSError, ValueError) as reason:
            culprits.append((path, short_reason(reason)))
    if culprits:
        return culprits
    for path in files:
        try:
            pipeline = _pipeline([path], [0], False, None, batch_size=1, num_threads=1, device_id=None)
            pipeline.build()
            pipeline.run()
        except RuntimeError as reason:
            culprits.append((path, short_reason(reason)))
    if not culprits:
        raise error
    return culprits
