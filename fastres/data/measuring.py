"""How fast the input pipeline is by itself, and by stage."""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastres.data.engine import decode, resize_into
from fastres.data.folder import ImageLoader
from fastres.data.geometry import Geometry
from fastres.data.normalize import normalize
from fastres.errors import DataError

BOUND_SHARE = 0.05  # of a run's time spent waiting for data, above which it is called bound by data


@dataclass(frozen=True)
class Stage:
    """Images a second of one stage alone, with the loader's threads."""

    name: str
    images_per_s: float


def measure_pipeline(loader: Any, batches: int, warm_up: int = 5) -> float:
    """Images a second that a loader delivers when nothing else runs; the median over a few parts of ``batches``."""
    rates, counts = [], _endless(loader)
    for _ in range(warm_up):
        next(counts)
    for _ in range(parts := min(5, batches)):
        begin, images = time.perf_counter(), 0
        for _ in range(max(1, batches // parts)):
            images += next(counts)
        rates.append(images / (time.perf_counter() - begin))
    return statistics.median(rates)


def _endless(loader: Any) -> Any:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for _, labels in loader:
            yield len(labels)


def measure_stages(loader: ImageLoader, images: int = 256) -> list[Stage]:
    """Each stage on its own: reading, strict decoding of whole images, resizing, normalising."""
    source, settings = loader.source, loader.options.settings
    samples = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
    size = loader.input_shape[1]
    contents = [source.read(sample) for sample in samples]
    decoded = [decode(content) for content in contents]
    shape = np.full((len(samples), 2), size, np.int32)
    nothing = np.zeros((len(samples), 2), np.int32)
    geometry = Geometry(np.zeros((len(samples), 4), np.int32), shape, nothing, nothing[:, 0])
    pixels = torch.zeros(len(samples), size, size, 3, dtype=torch.uint8)
    target = pixels.numpy()
    with ThreadPoolExecutor(max(1, settings.workers)) as pool:

        def timed(name: str, work: Callable[[int], Any]) -> Stage:
            begin = time.perf_counter()
            list(pool.map(work, range(len(samples))))
            return Stage(name, len(samples) / (time.perf_counter() - begin))

        stages = [
            timed("read", lambda i: source.read(samples[i])),
            timed("decode whole images", lambda i: decode(contents[i])),
            timed("resize whole images", partial(_resize, target, decoded, geometry)),
        ]
    begin = time.perf_counter()
    for part in pixels.split(settings.batch_size):
        normalize(part, settings.output, settings.channels)
    stages.append(
        Stage(f"to {settings.output}, {settings.channels} channels", len(samples) / (time.perf_counter() - begin))
    )
    return stages


def _resize(target: np.ndarray, decoded: list[torch.Tensor], geometry: Geometry, position: int) -> None:
    resize_into(target[position], decoded[position], geometry, position)


@dataclass(frozen=True)
class Consumption:
    """What a training run consumes: images a second over its epochs, and the share of time it waited for data."""

    images_per_s: float
    wait_share: float


def read_run(folder: Path) -> Consumption:
    """From the ``log.csv`` of a run: medians over its epochs, without the first, which builds and compiles things.

    Raises:
        DataError: there is no such log, or it is empty.
    """
    path = folder / "log.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        values = [(float(row["images_per_s"]), float(row["data_wait_share"])) for row in rows]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path} is no log of fastres train: {error}") from error
    if not values:
        raise DataError(f"{path} has no finished epoch yet")
    later = values[1:] or values
    return Consumption(statistics.median(v[0] for v in later), statistics.median(v[1] for v in later))


def verdict(pipeline: float, needed: float, wait_share: float | None = None) -> str:
    """Whether a run that consumes ``needed`` images a second is bound by a pipeline that gives ``pipeline``."""
    if wait_share is not None and wait_share > BOUND_SHARE:
        return f"bound by data: the run waited {wait_share:.0%} of its time for batches"
    if wait_share is None and pipeline < needed:
        return (
            f"bound by data: {needed:,.0f} images/s are needed, {pipeline:,.0f} delivered; more --workers, or shards of a "
            "smaller --short-side"
        )
    # Decoding and training share the cores when both run on the CPU, so this holds where a GPU computes.
    return f"not bound by data: {pipeline:,.0f} images/s are delivered, {pipeline / needed:.1f} times what is needed"
