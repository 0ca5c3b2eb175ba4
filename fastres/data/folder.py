"""The loader of encoded images, in folders or shards: order, bad images, resuming and delivery; engines decode."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.data.augment import Augmentation
from fastres.data.engine import Done, Job, Settings, choose_engine, decode, short_reason
from fastres.data.geometry import Crops, image_shape, place
from fastres.data.loader import check_state
from fastres.data.normalize import DTYPES, normalize
from fastres.data.sampling import Plan, epoch_generator
from fastres.data.source import Source
from fastres.errors import DataError, UserError

log = logging.getLogger("fastres.data")
READ_AHEAD = 3  # batches
READERS = 4  # threads that read files: more than there are cores, since a disk or a network makes them wait


@dataclass(frozen=True)
class ImageOptions:
    """How :class:`ImageLoader` delivers; see :func:`fastres.data.create_loader`."""

    settings: Settings
    crops: Crops
    image_size: int = 224
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    skip: bool = False
    rank: int = 0
    world_size: int = 1
    augmentation: Augmentation | None = None


class ImageLoader:
    """Batches of a source; satisfies :class:`fastres.data.Loader`.

    What happens to a sample is a function of seed, epoch and its number, so a position is only a number of batches.
    """

    def __init__(self, source: Source, options: ImageOptions, backend: str, exclude: frozenset[str] = frozenset()):
        self.source, self.options = source, options
        self._engine = choose_engine(backend, options.settings)
        self._readers = ThreadPoolExecutor(READERS, "fastres-read")
        self._sizes = np.zeros((len(source), 2), np.int32)  # known ones are not looked up again
        self.set_image_size(options.image_size)
        self.bad: dict[str, str] = {}  # found so far: why, by name
        self._left_out: frozenset[str] = frozenset()  # bad ones that the epoch's order lacks
        self._excluded = exclude
        self.classes, self.num_classes = source.classes, len(source.classes)
        self._start = 0
        self.set_epoch(0)
        missing = "" if backend != "auto" or "DALI" in self._engine.name else " (DALI can't be imported)"
        shard = f"; process {options.rank} of {options.world_size}" if options.world_size > 1 else ""
        self.description = (
            f"{source.place}: {self.samples} images in {self.num_classes} classes, decoded by "
            f"{self._engine.name}{missing}; {_describe(options)}{shard}"
        )
        joint = options.settings.batch_size * options.world_size
        self._fingerprint = (
            f"{source.fingerprint()}/{options.crops}/{options.augmentation}/{options.settings.preset}/batch {joint}/"
            f"seed {options.seed}/shuffle {options.shuffle}/without {len(exclude)}"
        )

    @property
    def samples(self) -> int:
        """Images that an epoch delivers to all processes, without those found bad so far."""
        return len(self.source) - len(self._excluded) - len(self.bad)

    def _plan(self, count: int) -> Plan:
        options = self.options
        return Plan(count, options.settings.batch_size, options.rank, options.world_size, options.drop_last)

    def __len__(self) -> int:
        return len(self._plan(len(self.source) - len(self._excluded) - len(self._next_left_out())))

    def _next_left_out(self) -> frozenset[str]:
        # Processes must agree on the order, and each knows only the bad images that it saw itself.
        return frozenset(self.bad) if self.options.world_size == 1 else self._left_out

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration delivers from its start."""
        self._epoch, self._start, self._done = epoch, 0, 0
        self._left_out = self._next_left_out()
        self._known = len(self.bad)

    def set_image_size(self, image_size: int) -> None:
        """Deliver images of another size from the next iteration on; nothing is built anew."""
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        self._image_size = image_size
        self.input_shape = (self.options.settings.channels, image_size, image_size)

    def state_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint, "engine": self._engine.name, "epoch": self._epoch, "batches": self._done,
            "image_size": self._image_size, "left_out": sorted(self._left_out),
            "bad": dict(list(self.bad.items())[: self._known]),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self._fingerprint, self.description)
        if state["engine"] != self._engine.name:
            log.warning(
                "the position was saved with %s, now %s decodes: pixels may be rounded otherwise",
                state["engine"], self._engine.name,
            )  # fmt: skip
        self.bad = dict(state["bad"])
        self.set_epoch(state["epoch"])
        self._left_out = frozenset(state["left_out"])
        self.set_image_size(state["image_size"])
        self._start = self._done = state["batches"]

    def _order(self) -> np.ndarray:
        count, options = len(self.source), self.options
        order = (
            torch.randperm(count, generator=epoch_generator(options.seed, self._epoch)).numpy()
            if options.shuffle
            else np.arange(count)
        )
        absent = self._left_out | self._excluded
        if absent:
            # Permuting all and then leaving some out keeps the others' order whichever turns out to be bad.
            keep = np.array([self.source.name(i) not in absent for i in range(count)])
            order = order[keep[order]]
        return order

    def _read(self, sample: int) -> tuple[np.ndarray | None, tuple[int, int], str]:
        """Bytes, height and width; or why not."""
        try:
            content = self.source.read(sample)
            if self._sizes[sample, 0]:
                return content, (0, 0), ""
            # Where the header can't be understood a decoder says what is wrong, or what the size is.
            shape = image_shape(content) or decode(content).shape[1:]
            if min(shape) < 1:
                raise ValueError(f"its header says {shape[1]}x{shape[0]} pixels")
            return content, (shape[0], shape[1]), ""
        except (OSError, ValueError, RuntimeError) as error:
            return None, (0, 0), short_reason(error)

    def _jobs(self, order: np.ndarray, plan: Plan, begin: int, unreadable: dict[int, dict[str, str]]) -> Iterator[Job]:
        """Read the epoch's batches; what can't be read goes to ``unreadable`` by batch and name."""
        options, name = self.options, self.source.name
        for number in range(begin, len(plan)):
            wanted = order[plan[number]].tolist()
            if self.bad:
                wanted = [sample for sample in wanted if name(sample) not in self.bad]
            contents, left, failed = [], [], {}
            for sample, (content, shape, reason) in zip(wanted, self._readers.map(self._read, wanted), strict=True):
                if content is None:
                    failed[name(sample)] = reason
                    continue
                if shape[0]:
                    self._sizes[sample] = shape
                contents.append(content)
                left.append(sample)
            unreadable[number] = failed
            if not left and options.world_size > 1 and options.skip:
                raise DataError(f"no image of batch {number} can be decoded; the other processes would wait for it")
            if left:
                samples = np.array(left, np.int64)
                sizes = self._sizes[samples]
                geometry = place(options.crops, sizes, samples, self._image_size, options.seed, self._epoch)
                yield Job(number, samples, contents, geometry, self._image_size)

    def _batches(self, begin: int) -> Generator[tuple[int, Done | None, dict[str, str]], None, None]:
        """Decoded batches with their numbers, and the bad images that were met up to there, by name."""
        order, plan = self._order(), self._plan(len(self.source) - len(self._excluded) - len(self._left_out))
        unreadable: dict[int, dict[str, str]] = {}
        for done in self._engine.run(self._jobs(order, plan, begin, unreadable)):
            number = done.job.number
            bad: dict[str, str] = {}
            for earlier in sorted(n for n in unreadable if n <= number):
                bad |= unreadable.pop(earlier)
            for position, reason in done.failures.items():
                bad[self.source.name(int(done.job.samples[position]))] = reason
            yield number, done, bad
        yield len(plan) - 1, None, {name: reason for bad in unreadable.values() for name, reason in bad.items()}

    def _report(self, found: dict[str, str]) -> None:
        if not self.options.skip:
            path, reason = next(iter(found.items()))
            others = f" (and {len(found) - 1} more in the same batch)" if len(found) > 1 else ""
            raise DataError(
                f"{path} can't be decoded: {reason}{others}. Remove or replace it, or leave such files out with "
                "--on-bad-image=skip"
            )
        for path, reason in found.items():
            self.bad[path] = reason
            log.warning("left out %s: %s (%d bad images so far)", path, reason, len(self.bad))
        if not self.samples:
            raise DataError(f"none of the {len(self.source)} images in {self.source.place} can be decoded")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        options, settings = self.options, self.options.settings
        begin, self._start = self._start, 0
        self._done, self._known = begin, len(self.bad)
        for number, done, bad in read_ahead(self._batches(begin), READ_AHEAD):
            if bad:
                self._report(bad)
            if done is None or not len(done.images):
                if done is not None and options.world_size > 1:
                    raise DataError(f"no image of batch {number} can be decoded; the other processes would wait for it")
                continue
            samples = np.delete(done.job.samples, list(done.failures))
            labels = torch.tensor([self.source.labels[sample] for sample in samples.tolist()])
            images = done.images.to(settings.device, non_blocking=True)
            if options.augmentation is not None:
                images = options.augmentation.pixels(images, samples, options.seed, self._epoch)
            if images.dtype == torch.uint8:
                images = normalize(images, settings.output, settings.channels)
            else:  # made by the engine
                images = images.permute(0, 3, 1, 2).to(DTYPES[settings.output])
            if options.augmentation is not None:
                images = options.augmentation.values(images, samples, options.seed, self._epoch)
            self._done, self._known = number + 1, len(self.bad)
            yield images, labels.to(settings.device, non_blocking=True)


def _describe(options: ImageOptions) -> str:
    crops, size = options.crops, options.image_size
    if crops.kind == "center":
        return f"centre crop {size}"
    kind = "random crop resized to" if crops.kind == "resized" else "scale augmentation, random crop of"
    more = f", {options.augmentation.describe()}" if options.augmentation is not None else ""
    return f"{kind} {size}{', mirror' if crops.mirror else ''}{more}"


def read_ahead(source: Generator[Any, None, None], depth: int) -> Iterator[Any]:
    """Run ``source`` in a thread that stays up to ``depth`` items ahead; its exception is raised in its place."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                items.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            source.close()

    thread = threading.Thread(target=work, name="fastres-data", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()
