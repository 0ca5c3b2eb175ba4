"""Opens a run's data: the options that a recipe asks for, the image size of an epoch, and each process's part."""

from __future__ import annotations

from typing import Any

import torch

from fastres.data import DATASETS, Loader, create_loader
from fastres.errors import UserError
from fastres.train.distributed import Shard, World
from fastres.train.settings import Settings

# What a loader of images in files does: setting, argument, value that asks for nothing.
OPTIONAL = (
    ("crop", "crop", "resized"),
    ("color_jitter", "color_jitter", 0.0),
    ("pca_noise", "pca_noise", 0.0),
    ("auto_augment", "auto_augment", "none"),
    ("random_erasing", "random_erasing", 0.0),
)


def _common(settings: Settings, device: torch.device) -> dict[str, Any]:
    return {
        "batch_size": settings.batch_size, "seed": settings.seed, "workers": settings.workers,
        "normalize": settings.normalize, "device": device,
        "on_bad_image": settings.on_bad_image, "data_dir": settings.data_dir, "limit": settings.limit,
    }  # fmt: skip


def _open(settings: Settings, world: World, split: str, options: dict[str, Any]) -> Loader:
    if not world.several:
        return create_loader(settings.data, split, **options)  # type: ignore[arg-type]
    return Shard(create_loader(settings.data, split, **options), world)  # type: ignore[arg-type]


def open_test(settings: Settings, world: World, device: torch.device) -> tuple[Loader, list[str]]:
    """The test images, in the size that the recipe gives them; and notes for the user."""
    size = settings.test_image_size or settings.image_size
    return _open(settings, world, "test", {**_common(settings, device), "image_size": size}), []


def open_train(
    settings: Settings, world: World, device: torch.device, epoch: int, epochs: int = 1, opened: Loader | None = None
) -> tuple[Loader, list[str]]:
    """The training images of an epoch, counted from 0; and what the recipe asks for and the loader can't do.

    ``opened`` is the loader of another epoch, which is kept where the image size is the same.

    Raises:
        UserError: a step would have no image, or can't be divided.
    """
    size = settings.image_size_at(epoch, epochs)
    if opened is not None and (size is None or opened.input_shape[1] == size):
        return opened, []
    assert settings.batch_size is not None
    parts = world.size * settings.accumulate
    if settings.batch_size % parts:
        raise UserError(
            f"batch size {settings.batch_size} can't be divided by {world.size} processes and {settings.accumulate} "
            f"parts each; give a multiple of {parts}"
        )
    if settings.batch_size < 2 * parts:
        raise UserError(f"batch size {settings.batch_size} leaves a part of one image, which has no statistics")
    # A batch of one can't be normalised, and an incomplete one disturbs the statistics: training drops it.
    options = {**_common(settings, device), "image_size": size, "augment": settings.augment, "drop_last": True}
    missing = []
    for name, argument, nothing in OPTIONAL:
        value = getattr(settings, name)
        if value in (None, nothing) or not settings.augment:
            continue
        if settings.data in DATASETS:  # small images in memory are padded, cropped and mirrored, no more
            missing.append(f"{name} {value}")
        else:
            options[argument] = value
    loader = _open(settings, world, "train", options)
    if not len(loader):
        raise UserError(f"batch size {settings.batch_size} is more than the {loader.samples} training images")
    notes = (
        [f"left out, since the loader of {settings.data} has no such option: {', '.join(missing)}"] if missing else []
    )
    return loader, notes
