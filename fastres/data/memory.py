"""Data sets that fit in memory: batches are cut, augmented and normalised by whole-batch tensor operations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.data.loader import check_state
from fastres.data.sampling import Plan, epoch_generator


@dataclass(frozen=True)
class Arrays:
    """A data set in memory; images are uint8 ``[N, H, W, C]``, labels int64 ``[N]``."""

    name: str
    source: str
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    pad: int  # random crops are taken from the image padded by this many pixels on each side
    flip: bool  # whether a mirrored image is still one of its class


class MemoryLoader:
    """Batches of an :class:`Arrays`; satisfies :class:`fastres.data.Loader`.

    Augmentation is the ResNet paper's for CIFAR: pad, take a random crop of the original size, mirror half of them.
    With ``normalize="pixel"`` the padding is zero after the mean is subtracted (as in the paper); with ``"channel"``
    it is black.
    """

    def __init__(self, arrays: Arrays, split: str, *, batch_size: int, seed: int, augment: bool, normalize: str,
                 device: torch.device, drop_last: bool, limit: int | None, rank: int = 0,
                 world_size: int = 1) -> None:  # fmt: skip
        train = split == "train"
        images, labels = (
            (arrays.train_images, arrays.train_labels) if train else (arrays.test_images, arrays.test_labels)
        )
        if limit is not None and limit < len(labels):
            keep = torch.linspace(0, len(labels) - 1, limit).round().long()
            images, labels = images[keep], labels[keep]
        reference = arrays.train_images.float().div_(255)
        mean = reference.mean(0) if normalize == "pixel" else reference.mean((0, 1, 2)).expand(reference.shape[1:])
        std = reference.std((0, 1, 2), unbiased=False)
        # Rows of numbers: an inner loop over few channels would not be vectorised, and the strides of one channel are
        # ambiguous.
        self._mean = mean.flatten().to(device)
        self._inverse_std = std.reciprocal().expand_as(mean).flatten().to(device)
        self._fill = 0.0 if normalize == "pixel" else float((-mean.mean() / std.mean()).item())
        self._images, self._labels = images.flatten(1).to(device), labels.to(device)
        self._arrays, self._augment, self._shuffle, self._device = arrays, augment, train, device
        self._seed, self._plan = seed, Plan(len(labels), batch_size, rank, world_size, drop_last)
        self._epoch = self._start = self._done = 0
        self.samples = len(labels)
        self.classes, self.num_classes = arrays.classes, len(arrays.classes)
        _, height, width, channels = images.shape
        self.input_shape, self._shape = (channels, height, width), (height, width, channels)
        steps = [f"random crop with {arrays.pad} px padding"] + (["mirror"] if arrays.flip else [])
        self.description = (
            f"{arrays.name} {split}: {self.samples} images {channels}x{height}x{width} from {arrays.source}, "
            f"{normalize} mean; augmentation: {', '.join(steps) if augment else 'none'}"
        )
        self._fingerprint = (
            f"{arrays.name}/{split}/{self.samples}x{channels}x{height}x{width}/{normalize}/batch {batch_size * world_size}/"
            f"seed {seed}/augment {augment}"
        )

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration delivers from its start."""
        self._epoch, self._start, self._done = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, self._fingerprint, self.description)
        self._epoch, self._start, self._done = state["epoch"], state["batches"], state["batches"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self._seed, self._epoch)
        # All of the epoch's random numbers are drawn at once, so that starting in the middle changes none of them.
        order = torch.randperm(self.samples, generator=generator) if self._shuffle else torch.arange(self.samples)
        shifts = torch.randint(0, 2 * self._arrays.pad + 1, (self.samples, 2), generator=generator)
        mirror = torch.rand(self.samples, generator=generator) < 0.5
        start, self._start = self._start, 0
        self._done = start
        for batch in range(start, len(self)):
            chosen = self._plan[batch]
            indices = order[chosen].to(self._device)
            images = self._images[indices].float().div_(255).sub_(self._mean).mul_(self._inverse_std)
            images = images.view(-1, *self._shape)
            if self._augment:
                images = self._crop(images, shifts[chosen], mirror[chosen])
            self._done = batch + 1
            yield images.permute(0, 3, 1, 2), self._labels[indices]

    def _crop(self, images: Tensor, shifts: Tensor, mirror: Tensor) -> Tensor:
        count, height, width, _ = images.shape
        pad = self._arrays.pad
        padded = F.pad(images, (0, 0, pad, pad, pad, pad), value=self._fill)
        rows = shifts[:, :1] + torch.arange(height)
        columns = torch.arange(width).expand(count, width)
        if self._arrays.flip:
            columns = torch.where(mirror[:, None], columns.flip(1), columns)
        columns = shifts[:, 1:] + columns
        samples = torch.arange(count, device=images.device)[:, None, None]
        return padded[samples, rows.to(images.device)[:, :, None], columns.to(images.device)[:, None, :]]
