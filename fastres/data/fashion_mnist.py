"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): 60,000 + 10,000 grey images of 28x28 pixels."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastres.data.memory import Arrays
from fastres.errors import DataError, UserError

CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
# SHA-256 of the compressed files, as published by the authors and packaged by Debian as dataset-fashion-mnist.
SHA256 = {
    "train-images-idx3-ubyte": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "t10k-labels-idx1-ubyte": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
}
SHAPES = {
    "train-images-idx3-ubyte": (60000, 28, 28),
    "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28),
    "t10k-labels-idx1-ubyte": (10000,),
}
SYSTEM_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/local/share/datasets/fashion-mnist"))
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def cache_folder() -> Path:
    """Where downloads go: ``$XDG_CACHE_HOME/fastres/fashion-mnist``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / "fashion-mnist"


def read_idx(path: Path) -> np.ndarray:
    """Read a file of the IDX format (unsigned bytes), plain or compressed by gzip.

    Raises:
        DataError: the file is damaged; the message names it and says what is wrong.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it starts with {content[:4].hex() or 'nothing'}")
    header = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path} is incomplete: shape {shape} needs {header + math.prod(shape)} bytes, it has {len(content)}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _in_folder(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download(folder: Path) -> None:
    """Fetch the four files, check them, and move each into place only when it is whole and right."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in SHA256.items():
        if _in_folder(folder, name):
            continue
        with urllib.request.urlopen(f"{URL}{name}.gz", timeout=30) as reply:
            content = reply.read()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise DataError(f"{URL}{name}.gz has the wrong checksum: SHA-256 {found}, expected {expected}")
        partial = folder / f"{name}.gz.{os.getpid()}.part"
        partial.write_bytes(content)
        os.replace(partial, folder / f"{name}.gz")


def find_files(data_dir: str | Path | None = None) -> dict[str, Path]:
    """Locate the four files: in ``data_dir`` if given, else in the system's folders, the cache, or by download.

    Raises:
        DataError: some are missing everywhere; the message lists every place that was looked at.
    """
    folders = [Path(data_dir)] if data_dir is not None else [*SYSTEM_FOLDERS, cache_folder()]
    tried = []
    for folder in folders:
        found = {name: _in_folder(folder, name) for name in SHA256}
        missing = [name for name, path in found.items() if path is None]
        if not missing:
            return {name: path for name, path in found.items() if path is not None}
        state = f"lacks {', '.join(missing)}" if folder.is_dir() else "does not exist"
        tried.append(f"{folder} ({state})")
    if data_dir is None:
        try:
            _download(cache_folder())
            return {name: cache_folder() / f"{name}.gz" for name in SHA256}
        except OSError as error:
            tried.append(f"{URL} ({error})")
    raise DataError(
        f"fashion-mnist was not found; looked at: {'; '.join(tried)}. Install the Debian package "
        "dataset-fashion-mnist, or give the folder of its four IDX files with --data-dir"
    )


def load_fashion_mnist(data_dir: str | Path | None = None, image_size: int = 32) -> Arrays:
    """Load the set as 28x28 images, or padded with black to 32x32 (the size of the CIFAR networks).

    Raises:
        UserError: another ``image_size``.
        DataError: files are missing or damaged.
    """
    if image_size not in (28, 32):
        raise UserError(f"fashion-mnist has 28x28 images, which can be padded to 32; got image_size {image_size}")
    files = find_files(data_dir)
    arrays: dict[str, Tensor] = {}
    for name, path in files.items():
        values = read_idx(path)
        if values.shape != SHAPES[name]:
            raise DataError(f"{path} has shape {values.shape}, expected {SHAPES[name]}")
        arrays[name] = torch.from_numpy(values.copy())
        if "labels" in name and int(arrays[name].max()) > 9:
            raise DataError(f"{path} has the label {int(arrays[name].max())}, expected 0 to 9")
    border = (image_size - 28) // 2

    def images(name: str) -> Tensor:
        return F.pad(arrays[name], (border,) * 4).unsqueeze(-1)

    return Arrays(
        name="fashion-mnist", source=str(next(iter(files.values())).parent), classes=CLASSES,
        train_images=images("train-images-idx3-ubyte"), train_labels=arrays["train-labels-idx1-ubyte"].long(),
        test_images=images("t10k-images-idx3-ubyte"), test_labels=arrays["t10k-labels-idx1-ubyte"].long(),
        pad=4 if image_size == 32 else 2, flip=True,
    )  # fmt: skip
