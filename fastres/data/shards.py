"""Images packed into larger files: tar shards of the WebDataset layout, TFRecord and RecordIO.

``ROOT/train/*.tar`` or ``ROOT/train-*.tar`` are the shards of a split (``val``, ``validation`` or ``test`` for the other
one); in place of ``.tar`` also ``.tfrecord`` or ``.rec``, and TFRecord files named ``train-00000-of-01024``. A shard is
indexed once by reading its headers; images are then read one by one, in any order. Class names are the lines of
``ROOT/classes.txt``; without it classes are named by their numbers.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastres.data.source import ShardSource
from fastres.errors import DataError

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
IMAGE = (".jpg", ".jpeg", ".png", ".webp")
TF_NAME = re.compile(r"-\d{5}-of-\d{5}$")


class Record(NamedTuple):
    """An image in a shard: where its bytes are, and its class as a number or a name."""

    name: str
    label: int | str
    offset: int
    length: int


def _is_shard(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".tar", ".tfrecord", ".rec") or bool(TF_NAME.search(path.name)))


def find_shards(root: Path, split: str) -> list[Path]:
    """A split's shards in sorted order; empty where there are none."""
    for name in SPLITS[split]:
        inside = root / name
        places = [inside.iterdir()] if inside.is_dir() else []
        if root.is_dir():
            places.append(p for p in root.iterdir() if p.name == f"{name}{p.suffix}" or p.name.startswith(f"{name}-"))
        for place in places:
            found = sorted(path for path in place if _is_shard(path))
            if found:
                return found
    return []


def index_shard(path: Path) -> list[Record]:
    """The images of one shard.

    Raises:
        DataError: it is damaged or ends too early; the message names it and where.
    """
    from fastres.data.records import index_recordio, index_tfrecord

    try:
        if path.suffix == ".tar":
            return list(index_tar(path))
        return list(index_recordio(path) if path.suffix == ".rec" else index_tfrecord(path))
    except OSError as error:
        raise DataError(f"the shard {path} can't be read: {error}") from error


def index_tar(path: Path) -> Iterator[Record]:
    """Images of a tar file, ``KEY.jpg`` with a label in ``KEY.cls``, in ``KEY.json`` ({"label": …}), or the name of the
    folder that KEY is in."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | str] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if end > size:
                    raise DataError(
                        f"the shard {path} is truncated: {member.name} ends at byte {end}, the file at {size}"
                    )
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                key, extension = f"{folder}/{stem}", (dot + extension).lower()
                if extension in IMAGE:
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension in (".cls", ".json"):
                    file = tar.extractfile(member)
                    labels[key] = _label(path, member.name, file.read() if file else b"")
            # tarfile takes a file that just stops for a whole one; tar ends it by two blocks of zeros.
            if tar.offset + 512 > size:
                raise DataError(f"the shard {path} is truncated: it has no end mark after {len(images)} images")
    except tarfile.TarError as error:
        raise DataError(f"the shard {path} is damaged: {error}") from error
    for key, (name, offset, length) in images.items():
        label = labels.get(key)
        if label is None:
            label = key.rpartition("/")[0].rpartition("/")[2]
            if not label:
                raise DataError(f"the shard {path} has no label for {name}: neither .cls nor .json nor a class folder")
        yield Record(name, label, offset, length)


def _label(path: Path, name: str, content: bytes) -> int | str:
    try:
        text = content.decode().strip()
        if name.endswith(".json"):
            found = json.loads(text)["label"]
            return found if isinstance(found, (int, str)) else int(found)
        return int(text) if re.fullmatch(r"\d+", text) else text
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the shard {path} has no label in {name}: {content[:40]!r}") from error


def open_shards(root: Path, split: str, shards: list[Path]) -> ShardSource:
    """Index a split's shards.

    Raises:
        DataError: a shard is damaged or empty, labels don't fit the classes, or there is one class only.
    """
    with ThreadPoolExecutor(8) as pool:
        indexed = list(pool.map(index_shard, shards))
    empty = [str(path) for path, records in zip(shards, indexed, strict=True) if not records]
    if empty:
        raise DataError(f"shards without images: {', '.join(empty[:5])}")
    flat = [(owner, record) for owner, records in enumerate(indexed) for record in records]
    classes = _classes(root, split, [record.label for _, record in flat])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for owner, record in flat:
        label = numbers.get(record.label) if isinstance(record.label, str) else record.label
        if label is None or not 0 <= label < len(classes):
            raise DataError(
                f"{shards[owner]}:{record.name} has the label {record.label!r}, which is none of the {len(classes)} "
                f"classes ({', '.join(classes[:3])}, …)"
            )
        labels.append(label)
    return ShardSource(
        f"{os.path.commonpath([path.parent for path in shards])} ({len(shards)} shards)", classes, labels,
        [record.name for _, record in flat], [str(path) for path in shards], [owner for owner, _ in flat],
        [record.offset for _, record in flat], [record.length for _, record in flat],
    )  # fmt: skip


def _classes(root: Path, split: str, labels: list[int | str]) -> list[str]:
    listed = root / "classes.txt"
    if listed.is_file():
        names = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        if len(set(names)) != len(names):
            raise DataError(f"{listed} names a class twice")
    else:
        training = find_shards(root, "train") if split != "train" else []
        # Labels must mean the same in both splits, hence the training set's classes for both.
        all_labels = [record.label for path in training for record in index_shard(path)] if training else labels
        kinds = {type(label) for label in all_labels}
        if len(kinds) > 1:
            raise DataError(f"the shards of {root} mix numbers and names as labels; give the names in {listed}")
        if kinds == {int}:
            names = [str(number) for number in range(max(int(label) for label in all_labels) + 1)]
        else:
            names = sorted({str(label) for label in all_labels})
    if len(names) < 2:
        raise DataError(f"{root} has {len(names)} classes ({', '.join(names)}); a classifier needs at least two")
    return names
