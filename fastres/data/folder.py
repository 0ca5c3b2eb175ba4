"""The loader of a folder of images: order, bad files, resuming and delivery; engines do the decoding."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres.data.engine import BadImages, Batch, Segment, Settings, choose_engine
from fastres.data.loader import check_state, epoch_generator
from fastres.data.scan import scan
from fastres.errors import DataError

log = logging.getLogger("fastres.data")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect
READ_AHEAD = 3  # batches


class Position(NamedTuple):
    """How far an epoch has been delivered: ``done`` files of the segment that begins at ``start`` in the epoch's order
    without the first ``bad`` bad files; ``resume`` is the engine's own state there."""

    start: int = 0
    done: int = 0
    resume: bytes | None = None
    bad: int = 0


class FolderLoader:
    """Batches of a folder; satisfies :class:`fastres.data.Loader`. See :func:`fastres.data.create_loader`."""

    def __init__(
        self, root: str, split: str, *, batch_size: int, seed: int, workers: int, augment: bool, image_size: int,
        on_bad_image: str, device: torch.device, drop_last: bool, backend: str,
    ) -> None:  # fmt: skip
        self._list = scan(root, split)
        settings = Settings(batch_size, image_size, augment, workers, device, seed)
        self._engine = choose_engine(backend, settings)
        self._settings, self._shuffle, self._drop_last = settings, split == "train", drop_last
        self._skip = on_bad_image == "skip"
        # One value for each number of a row: an inner loop of three would not be vectorised.
        self._mean = (torch.tensor(MEAN, device=device) * 255).repeat(image_size)
        self._inverse_std = 1 / (torch.tensor(STD, device=device) * 255).repeat(image_size)
        self.bad: dict[str, str] = {}
        self.classes, self.num_classes = self._list.classes, len(self._list.classes)
        self.input_shape = (3, image_size, image_size)
        self._pending: Position | None = None
        self.set_epoch(0)
        crop = f"random crop resized to {image_size}, mirror" if augment else f"centre crop {image_size}"
        missing = "" if backend != "auto" or "DALI" in self._engine.name else " (DALI can't be imported)"
        self.description = (
            f"{self._list.folder}: {self.samples} images in {self.num_classes} classes, decoded by "
            f"{self._engine.name}{missing}; {crop}"
        )
        self._fingerprint = (
            f"{self._list.fingerprint()}/{self._engine.name}/{image_size}/batch {batch_size}/seed {seed}/"
            f"augment {augment}"
        )

    @property
    def samples(self) -> int:
        """Images that an epoch delivers, without those found bad so far."""
        return len(self._list.files) - len(self.bad)

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self._settings.batch_size)
        return full + (1 if rest and not self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration delivers from its start."""
        self._epoch, self._pending = epoch, None
        self._position = Position(bad=len(self.bad))

    def state_dict(self) -> dict[str, Any]:
        start, done, resume, bad = self._position
        return {
            "fingerprint": self._fingerprint, "epoch": self._epoch, "start": start, "done": done,
            "bad": dict(list(self.bad.items())[:bad]),
            "engine": None if resume is None else torch.frombuffer(bytearray(resume), dtype=torch.uint8),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self._fingerprint, self.description)
        self.bad = dict(state["bad"])
        self.set_epoch(state["epoch"])
        engine = state["engine"]
        resume = None if engine is None else engine.numpy().tobytes()
        self._pending = self._position = Position(state["start"], state["done"], resume, len(self.bad))

    def _order(self) -> list[int]:
        count = len(self._list.files)
        order = (
            torch.randperm(count, generator=epoch_generator(self._settings.seed, self._epoch)).tolist()
            if self._shuffle
            else list(range(count))
        )
        # Permuting all files and then leaving out the bad ones keeps the others' order whenever a file turns bad.
        return [index for index in order if self._list.files[index] not in self.bad]

    def _segments(self, position: Position) -> Generator[tuple[Batch, Position], None, None]:
        """Deliver the epoch; a batch with bad files ends a segment, and the next begins at that batch without them."""
        start, done, resume, _ = position
        while True:
            chosen = self._order()[start:]
            files, labels = [self._list.files[i] for i in chosen], [self._list.labels[i] for i in chosen]
            try:
                for batch in self._engine.batches(Segment(files, labels, self._epoch, start, done, resume)):
                    done += len(batch.labels)
                    yield batch, Position(start, done, batch.resume, len(self.bad))
                return
            except BadImages as found:
                self._report(found.culprits)
                start, done, resume = start + done, 0, None

    def _report(self, culprits: list[tuple[str, str]]) -> None:
        path, reason = culprits[0]
        if not self._skip:
            others = f" (and {len(culprits) - 1} more in the same batch)" if len(culprits) > 1 else ""
            raise DataError(
                f"{path} can't be decoded: {reason}{others}. Remove or replace it, or leave such files out with "
                "--on-bad-image=skip"
            )
        self.bad.update(culprits)
        for path, reason in culprits:
            log.warning("left out %s: %s (%d bad images so far)", path, reason, len(self.bad))
        if not self.samples:
            raise DataError(f"none of the {len(self._list.files)} images in {self._list.folder} can be decoded")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        begin = self._pending or Position(bad=len(self.bad))
        self._position, self._pending = begin, None
        device = self._settings.device
        for batch, position in read_ahead(self._segments(begin), READ_AHEAD):
            if self._drop_last and len(batch.labels) < self._settings.batch_size:
                return
            images = batch.images
            if device.type == "cuda" and images.device.type == "cpu":
                images = images.pin_memory().to(device, non_blocking=True)
            values = images.float()
            values.flatten(2).sub_(self._mean).mul_(self._inverse_std)
            self._position = position
            yield values.permute(0, 3, 1, 2), batch.labels.to(device, non_blocking=True)


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
