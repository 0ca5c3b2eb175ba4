"""The interface of every loader, and the function that picks one by the name of the data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastres.errors import DataError, UserError

Split = Literal["train", "test"]
OnBadImage = Literal["stop", "skip"]
DATASETS = ("digits", "fashion-mnist")


@runtime_checkable
class Loader(Protocol):
    """What a training or evaluation loop may ask of its data.

    Iterating yields ``(images, labels)`` of the current epoch: images ``[B, C, H, W]`` float32, normalised, with
    channels_last strides; labels ``[B]`` int64, both on the loader's device. The same seed and epoch give the same
    order and the same augmentation, bit for bit, whatever was iterated before. After ``load_state_dict`` the next
    iteration goes on behind the last batch that was handed out when ``state_dict`` was called, once.
    """

    num_classes: int
    classes: list[str]
    input_shape: tuple[int, int, int]
    description: str

    @property
    def samples(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def epoch_generator(seed: int, epoch: int, position: int = 0) -> torch.Generator:
    """A CPU generator whose stream depends on all three numbers; nearby numbers give unrelated streams."""
    mixed = random.Random(f"{seed}/{epoch}/{position}").getrandbits(63)  # str seeds are hashed by SHA-512: stable
    return torch.Generator().manual_seed(mixed)


def check_state(state: dict[str, Any], fingerprint: str, description: str) -> None:
    """Refuse a loader state that was saved from other data, another batch size or another seed."""
    if state.get("fingerprint") != fingerprint:
        raise DataError(
            f"the saved position belongs to other data or settings: saved {state.get('fingerprint')!r}, "
            f"now {fingerprint!r} ({description})"
        )


def create_loader(
    data: str | Path,
    split: Split = "train",
    *,
    batch_size: int = 128,
    seed: int = 0,
    workers: int = 2,
    augment: bool | None = None,
    image_size: int | None = None,
    normalize: Literal["channel", "pixel"] = "channel",
    on_bad_image: OnBadImage = "stop",
    device: torch.device | str = "cpu",
    drop_last: bool = False,
    data_dir: str | Path | None = None,
    backend: Literal["auto", "dali", "torchvision"] = "auto",
    limit: int | None = None,
) -> Loader:
    """Open a data set.

    Args:
        data: ``"digits"`` (scikit-learn's, always at hand), ``"fashion-mnist"``, or a folder with
            ``train/<class>/*.jpg`` and ``val/<class>/*.jpg`` (or ``test/``).
        split: ``"train"`` is shuffled and augmented, ``"test"`` is neither.
        batch_size: images in a batch; the last one is smaller unless ``drop_last``.
        seed: of order and augmentation.
        workers: threads that decode and resize (folders only).
        augment: overrides the split's habit.
        image_size: side of the square images; 32 for the named sets, 224 for folders.
        normalize: ``"pixel"`` subtracts the mean image of the training set, as the ResNet paper does on CIFAR;
            ``"channel"`` subtracts one mean a channel. Both divide by the channel's standard deviation. Folders use
            ImageNet's channel constants and take ``"channel"`` only.
        on_bad_image: what a file that can't be decoded does (folders only): ``"stop"`` raises with its name,
            ``"skip"`` leaves it out and logs its name.
        device: where batches are delivered.
        data_dir: folder that holds the IDX files of ``"fashion-mnist"``.
        backend: what decodes folders; ``"auto"`` is DALI where it is installed, else torchvision.
        limit: use only this many samples, spread over the set (named sets only).

    Raises:
        DataError: the data are missing, incomplete or damaged.
        UserError: an argument doesn't fit the data.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    augment = (split == "train") if augment is None else augment
    device = torch.device(device)
    name = str(data)
    if name in DATASETS:
        from fastres.data.memory import MemoryLoader

        if name == "digits":
            from fastres.data.digits import load_digits

            arrays = load_digits(image_size or 32)
        else:
            from fastres.data.fashion_mnist import load_fashion_mnist

            arrays = load_fashion_mnist(data_dir, image_size or 32)
        return MemoryLoader(
            arrays, split, batch_size=batch_size, seed=seed, augment=augment, normalize=normalize, device=device,
            drop_last=drop_last, limit=limit,
        )  # fmt: skip
    if normalize != "channel" or limit is not None:
        raise UserError("normalize='pixel' and limit are for the named data sets, not for a folder of images")
    from fastres.data.folder import FolderLoader

    return FolderLoader(
        name, split, batch_size=batch_size, seed=seed, workers=workers, augment=augment,
        image_size=image_size or 224, on_bad_image=on_bad_image, device=device, drop_last=drop_last, backend=backend,
    )  # fmt: skip
