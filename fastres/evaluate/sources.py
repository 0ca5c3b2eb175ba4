"""Where the views of an evaluation come from: loaders, tensors, folders; each knows how to give a rank its share."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastres.data.loader import Loader
from fastres.errors import DataError, InputError, UserError
from fastres.evaluate import protocols

log = logging.getLogger("fastres.evaluate")


class Item(NamedTuple):
    """Images that share their views' shapes: ``views`` are normalised ``[n, C, h, w]`` float32, ``labels`` ``[n]``."""

    views: list[Tensor]
    labels: Tensor


class Source(Protocol):
    """What :func:`fastres.evaluate.assess` reads."""

    classes: list[str]
    num_classes: int
    description: str

    @property
    def samples(self) -> int: ...
    def items(self, protocol: protocols.Protocol, rank: int = 0, world: int = 1) -> Iterator[Item]: ...


class LoaderSource:
    """The batches of a loader that delivers test images; a rank takes every ``world``-th batch, none is padded."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.classes, self.num_classes, self.description = loader.classes, loader.num_classes, loader.description

    @property
    def samples(self) -> int:
        return self._loader.samples

    def items(self, protocol: protocols.Protocol, rank: int = 0, world: int = 1) -> Iterator[Item]:
        for number, (images, labels) in enumerate(self._loader):
            if number % world == rank:
                yield Item(protocol.views(images), labels)


class TensorSource:
    """Images and labels in memory.

    Args:
        images: ``[N, C, H, W]`` float, already normalised as the network expects.
        labels: ``[N]`` int64.
        classes: names; labels index them.
        batch_size: images whose views are made at once.
        device: where views are made and delivered.

    Raises:
        InputError: shapes, dtypes or labels that don't fit.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], batch_size: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(f"expected normalised float images [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise InputError(f"expected int64 labels [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise InputError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}, expected 0 to {len(classes) - 1}"
            )
        self._images, self._labels, self._batch, self._device = images, labels, batch_size, device
        self.classes, self.num_classes = list(classes), len(classes)
        self.description = f"{len(images)} images {'x'.join(map(str, images.shape[1:]))} in memory"

    @property
    def samples(self) -> int:
        return len(self._images)

    def items(self, protocol: protocols.Protocol, rank: int = 0, world: int = 1) -> Iterator[Item]:
        images, labels = self._images[rank::world], self._labels[rank::world]
        for part, labels_of_part in zip(images.split(self._batch), labels.split(self._batch), strict=True):
            if len(part):  # splitting nothing gives one empty part
                yield Item(protocol.views(part.to(self._device)), labels_of_part.to(self._device))


class FolderSource:
    """Whole images of a test split, decoded and cut into views in threads: what a loader delivers is one crop.

    A rank reads every ``world``-th file and no other.

    Args:
        root: as for :func:`fastres.data.create_loader`.
        workers: threads that decode and resize.
        on_bad_image: ``"stop"`` raises with the file's name, ``"skip"`` logs it and counts it in ``bad``.
        device: where views are delivered.

    Raises:
        DataError: a folder is missing or empty.
    """

    def __init__(
        self, root: str, workers: int = 2, on_bad_image: str = "stop", device: torch.device | str = "cpu"
    ) -> None:
        from fastres.data.scan import open_source

        self._files, self._workers, self._device = open_source(root, "test"), workers, torch.device(device)
        self._skip = on_bad_image == "skip"
        self.bad: dict[str, str] = {}
        self.classes, self.num_classes = self._files.classes, len(self._files.classes)
        self.description = f"{self._files.place}: {self.samples} whole images in {self.num_classes} classes"

    @property
    def samples(self) -> int:
        return len(self._files)

    def items(self, protocol: protocols.Protocol, rank: int = 0, world: int = 1) -> Iterator[Item]:
        from fastres.data.engine import decode
        from fastres.data.normalize import MEAN, STD

        mean = torch.tensor(MEAN, device=self._device).view(3, 1, 1) * 255
        scale = 1 / (torch.tensor(STD, device=self._device).view(3, 1, 1) * 255)
        mine = range(rank, self.samples, world)
        waiting: deque[tuple[int, Future[list[Tensor]]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            try:
                # A window of a few images: pool.map would cut the views of the whole set ahead of the network.
                for number in [*mine, *[None] * (2 * self._workers)]:
                    if number is not None:
                        view = pool.submit(lambda n: protocol.views(decode(self._files.read(n))), number)
                        waiting.append((number, view))
                    if waiting and (number is None or len(waiting) > 2 * self._workers):
                        index, future = waiting.popleft()
                        views = self._result(index, future)
                        if views is not None:
                            ready = [(v.to(self._device).float() - mean).mul_(scale)[None] for v in views]
                            yield Item(ready, torch.tensor([int(self._files.labels[index])], device=self._device))
            finally:
                for _, future in waiting:
                    future.cancel()

    def _result(self, index: int, future: Future[list[Tensor]]) -> list[Tensor] | None:
        from fastres.data.engine import short_reason

        try:
            return future.result()
        except UserError:
            raise  # a crop that doesn't fit is the same for most images, and no fault of the file
        except (RuntimeError, OSError, ValueError) as error:
            path, reason = self._files.name(index), short_reason(error)
            if not self._skip:
                raise DataError(
                    f"{path} can't be decoded: {reason}. Remove or replace it, or leave such files out with "
                    "--on-bad-image=skip"
                ) from error
            self.bad[path] = reason
            log.warning("left out %s: %s (%d bad images so far)", path, reason, len(self.bad))
            return None
