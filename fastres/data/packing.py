"""Writing tar shards of the WebDataset layout from a folder of images, with smaller images if asked for."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastres.data.engine import short_reason
from fastres.data.sampling import epoch_generator
from fastres.data.scan import open_source
from fastres.data.source import Source
from fastres.errors import DataError, UserError

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Packed:
    """What was written: ``shards`` with ``images`` in ``size`` bytes."""

    shards: list[Path]
    images: int
    size: int


def pack(
    root: str | Path, out: str | Path, split: str, *, shard_bytes: int = 256 << 20, short_side: int | None = None,
    quality: int = 90, seed: int = 0, workers: int = 2, progress: Progress | None = None,
) -> Packed:  # fmt: skip
    """Write a split's images to ``OUT/<split>/NNNNNN.tar`` and the class names to ``OUT/classes.txt``.

    Images are shuffled once, so that each shard holds a fair sample. With ``short_side`` larger images are resized to
    it (antialiased) and encoded as JPEG of ``quality``, which makes them cheaper to decode ever after but is a change
    of the data; else the files' bytes are kept. A shard appears under its name only when it is whole.

    Raises:
        DataError: the images can't be read or decoded, or ``out`` holds shards of the split or other classes already.
        UserError: an option out of range.
    """
    if shard_bytes < 1 or not 1 <= quality <= 100 or (short_side is not None and short_side < 1):
        raise UserError(
            f"shard size and short side must be positive and quality 1 to 100, got {shard_bytes}, {short_side}, {quality}"
        )
    source = open_source(root, split)
    folder = Path(out) / ("train" if split == "train" else "val")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give another folder or remove what is in it")
    write_classes(Path(out) / "classes.txt", source.classes)
    order = torch.randperm(len(source), generator=epoch_generator(seed, 0)).tolist()
    shards: list[Path] = []
    size = 0
    writer = None
    try:
        for done, (sample, name, content) in enumerate(_contents(source, order, short_side, quality, workers), 1):
            if writer is None:
                writer = _Writer(folder / f"{len(shards):06d}.tar")
            writer.add(f"{done - 1:08d}", Path(name).suffix.lower(), content, source.labels[sample])
            size += len(content)
            if writer.size >= shard_bytes or done == len(order):
                shards.append(writer.close())
                writer = None
            if progress is not None:
                progress(done, len(order))
    finally:
        if writer is not None:
            writer.abandon()
    return Packed(shards, len(order), size)


def write_classes(path: Path, classes: list[str]) -> None:
    """Write the class names, or check that the file has the same ones."""
    text = "".join(f"{name}\n" for name in classes)
    if path.exists() and path.read_text() != text:
        raise DataError(f"{path} has other classes than the images; training and validation must have the same")
    path.write_text(text)


def _contents(
    source: Source, order: list[int], short_side: int | None, quality: int, workers: int
) -> Iterator[tuple[int, str, bytes]]:
    """Number, file name and bytes of each image, in order, a few ahead."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for begin in range(0, len(order), 256):
            yield from pool.map(partial(_content, source, short_side, quality), order[begin : begin + 256])


def _content(source: Source, short_side: int | None, quality: int, sample: int) -> tuple[int, str, bytes]:
    try:
        content = source.read(sample).tobytes()
        smaller = content if short_side is None else shrink(content, short_side, quality)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source.name(sample)} can't be packed: {short_reason(error)}; fastres data check lists all such files"
        ) from error
    name = source.name(sample)
    return sample, name if smaller is content and Path(name).suffix else "image.jpg", smaller


def shrink(content: bytes, short_side: int, quality: int) -> bytes:
    """A JPEG whose short side is ``short_side``; the same bytes if it is not longer now."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if min(image.size) <= short_side:
            return content
        factor = short_side / min(image.size)
        size = (max(short_side, int(image.width * factor)), max(short_side, int(image.height * factor)))
        smaller = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    result = io.BytesIO()
    smaller.save(result, "JPEG", quality=quality)
    return result.getvalue()


class _Writer:
    """A tar file that gets its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.part")
        self._tar = tarfile.open(self._partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 it outlives this
        self.size = 0

    def add(self, key: str, extension: str, content: bytes, label: int) -> None:
        for suffix, data in ((extension, content), (".cls", str(label).encode())):
            member = tarfile.TarInfo(key + suffix)
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
            self.size += len(data)

    def close(self) -> Path:
        self._tar.close()
        os.replace(self._partial, self._path)
        return self._path

    def abandon(self) -> None:
        self._tar.close()
        self._partial.unlink(missing_ok=True)
