"""The DALI engines. They get bytes and a geometry, so there is no state in DALI that a resumed run would have to restore.

:class:`HybridEngine` decodes only the window that a crop needs by DALI and resizes by torch, on the CPU: torch's
antialiased uint8 resize is several times as fast as DALI's there, and agrees with PIL's to one grey level.
:class:`DaliEngine` does all of it in DALI: on a GPU, or on the CPU to compare.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import nvidia.dali
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from fastres.data.engine import Buffers, Done, Job, Settings, decode_job, resize_into
from fastres.data.normalize import MEAN, STD, normalize

log = logging.getLogger("fastres.data")
BYTES, WHOLE, REAL = DALIDataType.UINT8, DALIDataType.INT32, DALIDataType.FLOAT
Feed = Callable[[], list[Any]]
QUEUE_DEPTH = 2  # batches that DALI works on at a time
# Of a large ImageNet photograph: buffers are allocated once instead of growing, which would make a GPU wait.
WIDTH_HINT, HEIGHT_HINT = 2048, 2048
DEVICE_PADDING, HOST_PADDING = 64 << 20, 32 << 20
HARDWARE_SHARE = 0.65  # of a batch that the JPEG engine of A100, H100 and later takes


def decoder_options(on_gpu: bool) -> dict[str, Any]:
    """Arguments of DALI's decoder, on a GPU (nvJPEG and its hardware decoder) or the CPU.

    Orientation tags are ignored as torchvision ignores them. Chroma is upsampled smoothly as libjpeg does: the faster
    way shifts colours by more than the resize does.
    """
    options: dict[str, Any] = {"output_type": DALIImageType.RGB, "adjust_orientation": False}
    if on_gpu:
        options |= {
            "device": "mixed", "hw_decoder_load": HARDWARE_SHARE, "jpeg_fancy_upsampling": True,
            "preallocate_width_hint": WIDTH_HINT, "preallocate_height_hint": HEIGHT_HINT,
            "device_memory_padding": DEVICE_PADDING, "host_memory_padding": HOST_PADDING,
        }  # fmt: skip
    return options


def _decoded(feed: Feed, more: list[Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """The windows' pixels, and the rest of what is fed."""
    types = [BYTES, WHOLE, WHOLE, *more]
    outputs = len(types)
    fed = fn.external_source(
        source=feed, num_outputs=outputs, batch=True, dtype=types, ndim=[1] * outputs, no_copy=True, device="cpu"
    )
    encoded, start, shape, *rest = fed
    pixels = fn.decoders.image_slice(
        encoded, start, shape, axes=[0, 1], normalized_anchor=False, normalized_shape=False, **options
    )
    return pixels, *rest


@pipeline_def
def _windows(feed: Feed) -> Any:
    return _decoded(feed, [], decoder_options(False))[0]


@pipeline_def
def _everything(feed: Feed, on_gpu: bool, two_passes: bool, cut: bool, half: bool, channels: int, cubic: bool) -> Any:
    # Only what the graph uses is fed: size, mirror, size between two passes, where to cut and how much.
    types = [REAL, WHOLE] + [REAL] * two_passes + [WHOLE, WHOLE] * cut
    fed: tuple[Any, ...] = _decoded(feed, types, decoder_options(on_gpu))
    pixels, resized, mirror, *rest = fed
    kind = DALIInterpType.INTERP_CUBIC if cubic else DALIInterpType.INTERP_LINEAR
    how: dict[str, Any] = {"interp_type": kind, "antialias": True}
    if two_passes:  # rows first, rounded to uint8 in between, as PIL does
        pixels = fn.resize(pixels, size=rest.pop(0), **how)
    whole: Any = fn.resize(pixels, size=resized, **how)
    if cut:
        whole = fn.slice(whole, *rest, axes=[0, 1], normalized_anchor=False, normalized_shape=False)
    if not half:
        return fn.flip(whole, horizontal=mirror)
    return fn.crop_mirror_normalize(
        whole, mirror=mirror, mean=[255 * v for v in MEAN], std=[255 * v for v in STD], dtype=DALIDataType.FLOAT16,
        output_layout="HWC", pad_output=channels == 4,
    )  # fmt: skip


class _Pipelined(ABC):
    """Feeds jobs to a pipeline, takes its outputs, and survives what a file does to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Threads are kept: each new one would get, and leave behind, a part of the heap of its own.
        self._pool = ThreadPoolExecutor(max(1, settings.workers), "fastres-resize")
        self._buffers = Buffers(settings.device)
        self._pipeline: Any = None
        self._error: Exception | None = None
        self._source: Iterator[Job] = iter(())
        self._flying: deque[Job] = deque()

    @abstractmethod
    def _build(self) -> Any:
        """The built pipeline, which asks :meth:`_feed` for its inputs."""

    @abstractmethod
    def _inputs(self, job: Job) -> list[Any]:
        """What the pipeline's sources get of a job."""

    @abstractmethod
    def _take(self, outputs: Any, job: Job, pool: ThreadPoolExecutor) -> Tensor:
        """A job's images of what came out, [B, C, H, W]."""

    def _feed(self) -> list[Any]:
        try:
            job = next(self._source)
        except StopIteration:
            raise
        except Exception as error:  # raised behind the batches before it, and not through DALI
            self._error = error
            raise StopIteration from error
        self._flying.append(job)  # also keeps the bytes alive, which DALI does not copy
        return self._inputs(job)

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "batch_size": settings.batch_size, "num_threads": max(1, settings.workers), "device_id": None,
            "prefetch_queue_depth": QUEUE_DEPTH,
        }  # fmt: skip

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        first = next(jobs, None)
        if first is None:
            return
        if self._pipeline is None or self._flying:  # the latter: an epoch was left before its end
            self._flying.clear()
            self._pipeline = self._build()
        self._error = None
        self._source = itertools.chain([first], jobs)
        while True:
            try:
                outputs = self._pipeline.run()
                job = self._flying[0]
                images = self._take(outputs, job, self._pool)
            except StopIteration:
                self._pipeline.reset()
                if self._error is not None:
                    raise self._error from None
                return
            except RuntimeError as error:
                # DALI's pipeline is of no use after an error, and names the file in some cases only. torchvision
                # decodes what was under way: it says what is wrong with which image, and delivers the others.
                waiting, self._flying = list(self._flying), deque()
                self._pipeline = None
                if not waiting or "decoders" not in str(error):  # the operator's name: no file is to blame
                    raise
                answers = [decode_job(job, self._pool, self._buffers, self._settings) for job in waiting]
                if not any(done.failures for done in answers):
                    log.warning("torchvision decodes what DALI can't (%s)", _cause(error))
                yield from map(self._moved, answers)
                self._pipeline = self._build()
                continue
            self._flying.popleft()
            yield Done(job, images, {})

    def _moved(self, done: Done) -> Done:
        return done


def _cause(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else str(error)


def _rows(values: np.ndarray) -> list[np.ndarray]:
    return list(np.ascontiguousarray(values))


class HybridEngine(_Pipelined):
    """Satisfies :class:`fastres.data.engine.Engine`. Its pixels are the torchvision engine's, bit for bit."""

    name = f"DALI {nvidia.dali.__version__} on the CPU"

    def _build(self) -> Any:
        pipeline = _windows(self._feed, **self._options())
        pipeline.build()
        return pipeline

    def _inputs(self, job: Job) -> list[Any]:
        windows = job.geometry.windows
        return [job.contents, _rows(windows[:, :2]), _rows(windows[:, 2:])]

    def _take(self, outputs: Any, job: Job, pool: ThreadPoolExecutor) -> Tensor:
        images, target = self._buffers.take(len(job.contents), job.image_size)
        list(
            pool.map(
                partial(_resize_one, outputs[0], target, job, self._settings.interpolation), range(len(job.contents))
            )
        )
        return images


def _resize_one(pixels: Any, target: np.ndarray, job: Job, interpolation: str, position: int) -> None:
    window = torch.from_dlpack(pixels[position]).permute(2, 0, 1)
    resize_into(target[position], window, job.geometry, position, interpolation)


class DaliEngine(_Pipelined):
    """Everything in DALI. Satisfies :class:`fastres.data.engine.Engine`.

    On a GPU: nvJPEG decodes the windows, partly in hardware, into buffers allocated once; normalised float16 of 3 or 4
    channels comes out, ready for the network's first convolution, unless uint8 is asked for.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._on_gpu = settings.device.type == "cuda"
        self.name = f"DALI {nvidia.dali.__version__} {'on the GPU' if self._on_gpu else 'alone on the CPU'}"

    def _build(self) -> Any:
        settings = self._settings
        options = self._options()
        if self._on_gpu:
            options["device_id"] = settings.device.index or 0
        pipeline = _everything(
            self._feed, self._on_gpu, settings.preset == "parity", settings.centered, settings.output != "uint8",
            settings.channels, settings.interpolation == "bicubic", **options,
        )  # fmt: skip
        pipeline.build()
        return pipeline

    def _inputs(self, job: Job) -> list[Any]:
        windows, resized, offsets, mirrors = job.geometry
        real = np.float32
        parts = [windows[:, :2], windows[:, 2:], resized.astype(real), mirrors[:, None]]
        if self._settings.preset == "parity":
            parts.append(np.stack([windows[:, 2], resized[:, 1]], 1).astype(real))
        if self._settings.centered:
            parts += [offsets, np.full_like(offsets, job.image_size)]
        return [job.contents, *map(_rows, parts)]

    def _take(self, outputs: Any, job: Job, pool: ThreadPoolExecutor) -> Tensor:
        # DALI reuses the buffer for a later batch, hence the copy.
        images = torch.from_dlpack(outputs[0].as_tensor()).clone()
        if images.is_cuda:
            torch.cuda.current_stream(images.device).synchronize()
        return images

    def _moved(self, done: Done) -> Done:
        images = done.images.to(self._settings.device)
        if self._settings.output == "uint8":
            return done._replace(images=images)
        normalized = normalize(images, "float16", self._settings.channels)
        return done._replace(images=normalized.permute(0, 2, 3, 1))
