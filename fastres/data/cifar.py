"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 32x32, from files that you have.

Both published formats are read: ``cifar-10-batches-py`` and ``cifar-100-python`` (pickles), ``cifar-10-batches-bin`` and
``cifar-100-binary``. Nothing is downloaded.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastres.data.memory import Arrays
from fastres.errors import DataError, UserError

PIXELS = 3 * 32 * 32
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
TEN = [f"data_batch_{number}" for number in range(1, 6)]
# By format: files of training and test, and the file of class names.
FILES = {
    "cifar-10-batches-py": (TEN, ["test_batch"], "batches.meta"),
    "cifar-10-batches-bin": ([f"{name}.bin" for name in TEN], ["test_batch.bin"], "batches.meta.txt"),
    "cifar-100-python": (["train"], ["test"], "meta"),
    "cifar-100-binary": (["train.bin"], ["test.bin"], "fine_label_names.txt"),
}
SIZES = {"train": 50000, "test": 10000}


class _Plain(pickle.Unpickler):
    """Builds nothing but arrays: a pickle could otherwise run anything."""

    ALLOWED = frozenset([("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")])

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return super().find_class("numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR's files do not")


def load_cifar(name: str, data_dir: str | Path | None, image_size: int = 32) -> Arrays:
    """Load ``"cifar10"`` or ``"cifar100"`` (fine labels) from ``data_dir`` or its published sub-folder.

    Raises:
        UserError: another ``image_size``.
        DataError: files are missing or damaged.
    """
    if image_size != 32:
        raise UserError(f"{name} has 32x32 images; got image_size {image_size}")
    folder, kind = _find(name, data_dir)
    train, test, names = FILES[kind]
    read = _read_pickles if names in ("batches.meta", "meta") else _read_binary
    train_images, train_labels = read(folder, train, name, SIZES["train"])
    test_images, test_labels = read(folder, test, name, SIZES["test"])
    return Arrays(
        name=name, source=str(folder), classes=_class_names(folder / names, name), train_images=train_images,
        train_labels=train_labels, test_images=test_images, test_labels=test_labels, pad=4, flip=True,
    )  # fmt: skip


def _find(name: str, data_dir: str | Path | None) -> tuple[Path, str]:
    kinds = FOLDERS[name]
    if data_dir is None:
        raise DataError(f"{name} is not downloaded: give the folder that holds {' or '.join(kinds)} with --data-dir")
    root = Path(data_dir)
    nearest: list[str] = []
    for kind in kinds:
        train, test, names = FILES[kind]
        for folder in (root / kind, root):
            missing = [file for file in [*train, *test, names] if not (folder / file).is_file()]
            if not missing:
                return folder, kind
            if len(missing) < len(train) + len(test) + 1:
                nearest = nearest or [f"{folder} lacks {', '.join(missing)}"]
    state = nearest[0] if nearest else (f"{root} has none" if root.is_dir() else f"{root} does not exist")
    raise DataError(f"{name} was not found: {state}; expected the files of {' or '.join(kinds)}")


def _read_pickles(folder: Path, files: list[str], name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = [], []
    for file in files:
        content = _unpickle(folder / file)
        key = b"labels" if name == "cifar10" else b"fine_labels"
        if not isinstance(content, dict) or b"data" not in content or key not in content:
            raise DataError(f"{folder / file} is not a file of {name}: it lacks data and {key.decode()}")
        pixels.append(np.asarray(content[b"data"]))
        labels.append(np.asarray(content[key]))
    return _arrays(folder, np.concatenate(pixels), np.concatenate(labels), name, count)


def _unpickle(path: Path) -> Any:
    try:
        return _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _read_binary(folder: Path, files: list[str], name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    head = 1 if name == "cifar10" else 2  # CIFAR-100 has the coarse label first
    parts = []
    for file in files:
        content = np.fromfile(folder / file, np.uint8)
        if not len(content) or len(content) % (head + PIXELS):
            raise DataError(
                f"{folder / file} is incomplete: {len(content)} bytes are no multiple of {head + PIXELS} an image"
            )
        parts.append(content.reshape(-1, head + PIXELS))
    rows = np.concatenate(parts)
    return _arrays(folder, rows[:, head:], rows[:, head - 1], name, count)


def _arrays(
    folder: Path, pixels: np.ndarray, labels: np.ndarray, name: str, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    classes = 10 if name == "cifar10" else 100
    if pixels.shape != (count, PIXELS) or pixels.dtype != np.uint8 or labels.shape != (count,):
        raise DataError(
            f"{folder} has {len(labels)} images of shape {pixels.shape}, expected {count} of {PIXELS} bytes"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"{folder} has labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    images = torch.from_numpy(np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
    return images, torch.from_numpy(labels.astype(np.int64))


def _class_names(path: Path, name: str) -> list[str]:
    if path.suffix == ".txt":
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    else:
        content = _unpickle(path)
        found = content.get(b"label_names" if name == "cifar10" else b"fine_label_names", [])
        names = [each.decode() for each in found]
    expected = 10 if name == "cifar10" else 100
    if len(names) != expected:
        raise DataError(f"{path} names {len(names)} classes, expected {expected}")
    return names
