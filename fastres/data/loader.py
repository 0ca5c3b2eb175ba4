"""The interface of every loader, and the function that picks one by the name of the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastres.errors import DataError, UserError

if TYPE_CHECKING:
    from fastres.data.engine import Backend, Output, Preset
    from fastres.data.memory import Arrays

Split = Literal["train", "test"]
OnBadImage = Literal["stop", "skip"]
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100")


@runtime_checkable
class Loader(Protocol):
    """What a training or evaluation loop may ask of its data.

    Iterating yields ``(images, labels)`` of the current epoch: images ``[B, C, H, W]`` float32 unless another dtype
    was asked for, normalised, with channels_last strides; labels ``[B]`` int64, both on the loader's device. The same
    seed and epoch give the same order and the same augmentation, bit for bit, whatever was iterated before and however
    many processes share the epoch. After ``load_state_dict`` the next iteration goes on behind the last batch that was
    handed out when ``state_dict`` was called, once. ``samples`` counts those of all processes, ``len`` this one's
    batches.
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
    backend: Backend = "auto",
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    output: Output = "float32",
    channels: Literal[3, 4] = 3,
    preset: Preset = "fast",
    crop: Literal["resized", "scale"] = "resized",
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_fraction: float = 0.875,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    color_jitter: float = 0.0,
    pca_noise: float = 0.0,
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none",
    random_erasing: float = 0.0,
    exclude: str | Path | None = None,
) -> Loader:
    """Open a data set.

    Args:
        data: ``"digits"`` (scikit-learn's, always at hand), ``"fashion-mnist"``, ``"cifar10"``, ``"cifar100"``, a
            folder with ``train/<class>/*.jpg`` and ``val/<class>/*.jpg`` (or ``test/``), or a folder with tar shards,
            TFRecord or RecordIO files of each split (see :mod:`fastres.data.shards`).
        split: ``"train"`` is shuffled and augmented, ``"test"`` is neither.
        batch_size: images in a batch of one process; the last one is smaller unless ``drop_last``.
        seed: of order and augmentation.
        workers: threads that decode and resize (images only).
        augment: overrides the split's habit.
        image_size: side of the square images; 32 for the named sets, 224 for images.
        normalize: ``"pixel"`` subtracts the mean image of the training set, as the ResNet paper does on CIFAR;
            ``"channel"`` subtracts one mean a channel. Both divide by the channel's standard deviation. Images use
            ImageNet's channel constants and take ``"channel"`` only.
        on_bad_image: what an image that can't be decoded does: ``"stop"`` raises with its name, ``"skip"`` leaves it
            out and logs its name.
        device: where batches are delivered.
        data_dir: folder that holds the files of ``"fashion-mnist"``, ``"cifar10"`` and ``"cifar100"``.
        backend: what decodes; ``"auto"`` is DALI where it is installed, else torchvision. ``"dali"`` takes torch for
            resizing on the CPU, ``"dali-only"`` doesn't.
        limit: use only this many samples, spread over the set (named sets only).
        rank: which of ``world_size`` processes this is. See :class:`fastres.data.sampling.Plan` for who gets what.
        world_size: number of processes that share an epoch.
        output: dtype of the images; ``"uint8"`` ones are not normalised (images only).
        channels: 4 appends a channel of zeros to red, green and blue (images only).
        preset: ``"parity"`` resizes in two passes where DALI does it alone, and evaluates on the CPU; ``"fast"``
            resizes in one.
        crop: training windows of a random area and ratio, or the papers' scale augmentation; see
            :class:`fastres.data.geometry.Crops`. This and all that follows is for images only.
        crop_area: bounds of the share of the area that ``"resized"`` takes.
        crop_fraction: in evaluation, the image size as a share of the short side before the centre is cut out.
        interpolation: of resizing, antialiased.
        color_jitter: of brightness, contrast and saturation; see :class:`fastres.data.augment.Augmentation`.
        pca_noise: standard deviation of AlexNet's colour noise.
        auto_augment: one of torchvision's automatic augmentations.
        random_erasing: probability of an erased rectangle.
        exclude: a list of images to leave out, as ``fastres data check`` writes it.

    Raises:
        DataError: the data are missing, incomplete or damaged.
        UserError: an argument doesn't fit the data.
    """
    from fastres.data.sampling import Plan

    Plan(0, batch_size, rank, world_size)  # checks them
    augment = (split == "train") if augment is None else augment
    device = torch.device(device)
    name = str(data)
    if name in DATASETS:
        other: tuple[Any, ...] = (
            output, channels, crop, interpolation, color_jitter, pca_noise, auto_augment, random_erasing, exclude,
        )  # fmt: skip
        if other != ("float32", 3, "resized", "bilinear", 0, 0, "none", 0, None):
            raise UserError(
                "output, channels, crop, interpolation, color_jitter, pca_noise, auto_augment, random_erasing and "
                f"exclude are for images in files, not for {name}"
            )
        from fastres.data.memory import MemoryLoader

        arrays = _load_named(name, data_dir, image_size or 32)
        return MemoryLoader(
            arrays, split, batch_size=batch_size, seed=seed, augment=augment, normalize=normalize, device=device,
            drop_last=drop_last, limit=limit, rank=rank, world_size=world_size,
        )  # fmt: skip
    if normalize != "channel" or limit is not None:
        raise UserError("normalize='pixel' and limit are for the named data sets, not for a folder of images")
    from fastres.data.augment import Augmentation
    from fastres.data.engine import Settings
    from fastres.data.folder import ImageLoader, ImageOptions
    from fastres.data.geometry import Crops
    from fastres.data.scan import open_source, read_exclusions

    crops = Crops(crop if augment else "center", area=crop_area, fraction=crop_fraction, interpolation=interpolation)
    augmentation = Augmentation(color_jitter, pca_noise, auto_augment, random_erasing)
    settings = Settings(
        batch_size=batch_size, workers=workers, device=device, preset=preset, output=output, channels=channels,
        on_device=augment, interpolation=crops.interpolation, centered=crops.kind == "center",
    )  # fmt: skip
    source = open_source(name, split)
    options = ImageOptions(
        settings, crops, image_size or 224, seed, split == "train", drop_last, on_bad_image == "skip", rank,
        world_size, augmentation if augment and augmentation != Augmentation() else None,
    )  # fmt: skip
    return ImageLoader(source, options, backend, read_exclusions(exclude, source))


def _load_named(name: str, data_dir: str | Path | None, image_size: int) -> Arrays:
    if name == "digits":
        from fastres.data.digits import load_digits

        return load_digits(image_size)
    if name == "fashion-mnist":
        from fastres.data.fashion_mnist import load_fashion_mnist

        return load_fashion_mnist(data_dir, image_size)
    from fastres.data.cifar import load_cifar

    return load_cifar(name, data_dir, image_size)
