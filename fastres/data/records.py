"""Indices of TFRecord and RecordIO files, without TensorFlow or MXNet: where each image is, and its label."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastres.errors import DataError

if TYPE_CHECKING:
    from fastres.data.shards import Record

RECORDIO_MAGIC = 0xCED7230A
IMAGE_KEY, LABEL_KEY = b"image/encoded", b"image/class/label"


def index_tfrecord(path: Path) -> Iterator[Record]:
    """Records of tf.train.Example with ``image/encoded`` and ``image/class/label``, as TensorFlow's ImageNet scripts
    write them. Labels are taken as they are: those scripts count from 1 and leave 0 to the background.

    Raises:
        DataError: the file ends within a record, or a record lacks a feature.
    """
    from fastres.data.shards import Record

    size, at, number = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while at < size:
            head = _exactly(file, 12, path, number)  # length, and a checksum of it
            (length,) = struct.unpack("<Q", head[:8])
            if at + 16 + length > size:
                raise DataError(
                    f"the shard {path} is truncated: record {number} ends at byte {at + 16 + length}, the file at {size}"
                )
            record = _exactly(file, length + 4, path, number)
            where, label = _example(record[:length], path, number)
            yield Record(f"record {number}", label, at + 12 + where[0], where[1])
            at, number = at + 16 + length, number + 1


def _exactly(file: BinaryIO, count: int, path: Path, number: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise DataError(f"the shard {path} is truncated in record {number}")
    return content


def _fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, Any]]:
    """Fields of a protocol buffer: number, wire type, and a number or the bounds of bytes."""
    while begin < end:
        key, begin = _varint(data, begin)
        kind = key & 7
        if kind == 0:
            value, begin = _varint(data, begin)
            yield key >> 3, kind, value
        elif kind == 2:
            length, begin = _varint(data, begin)
            if begin + length > end:
                raise ValueError("a field exceeds its message")
            yield key >> 3, kind, (begin, begin + length)
            begin += length
        else:
            begin += {1: 8, 5: 4}[kind]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _example(data: bytes, path: Path, number: int) -> tuple[tuple[int, int], int]:
    """Bounds of the image within a serialised Example, and its label."""
    image: tuple[int, int] | None = None
    label: int | None = None
    try:
        for _, _, features in _fields(data, 0, len(data)):
            for _, _, entry in _fields(data, *features):
                parts = {field: value for field, _, value in _fields(data, *entry)}
                key = data[slice(*parts[1])]
                if key not in (IMAGE_KEY, LABEL_KEY) or 2 not in parts:
                    continue
                for _, _, values in _fields(data, *parts[2]):  # a list of bytes or of integers
                    for _, kind, value in _fields(data, *values):
                        if key == IMAGE_KEY:
                            image = (value[0], value[1] - value[0])
                        else:
                            label = value if kind == 0 else _varint(data, value[0])[0]  # packed or not
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(f"the shard {path} is damaged: record {number} is no tf.train.Example ({error})") from error
    if image is None or label is None:
        lacks = IMAGE_KEY if image is None else LABEL_KEY
        raise DataError(f"the shard {path}: record {number} lacks the feature {lacks.decode()}")
    return image, label


def index_recordio(path: Path) -> Iterator[Record]:
    """Records of MXNet's im2rec: a header with the label, then an encoded image. No ``.idx`` file is needed.

    Raises:
        DataError: the file is damaged, or ends within a record.
    """
    from fastres.data.shards import Record

    size, at, number = path.stat().st_size, 0, 0
    with open(path, "rb") as file:
        while at < size:
            head = file.read(32)
            if len(head) < 32:
                raise DataError(f"the shard {path} is truncated in record {number}")
            magic, word, flag, label, identity, _ = struct.unpack("<IIIfQQ", head)
            if magic != RECORDIO_MAGIC:
                raise DataError(f"the shard {path} is damaged: no record begins at byte {at}")
            length = word & 0x1FFFFFFF
            if word >> 29:
                raise DataError(f"the shard {path}: record {number} is split into parts, which is not supported")
            if at + 8 + length > size:
                raise DataError(
                    f"the shard {path} is truncated: record {number} ends at byte {at + 8 + length}, the file at {size}"
                )
            if flag:  # so many labels follow; the first is the class
                (label,) = struct.unpack("<f", file.read(4))
            if label != int(label):
                raise DataError(f"the shard {path}: record {number} has the label {label}, expected a class number")
            begin = 24 + 4 * flag
            yield Record(f"record {identity}", int(label), at + 8 + begin, length - begin)
            at, number = at + 8 + (length + 3) // 4 * 4, number + 1
            file.seek(at)
