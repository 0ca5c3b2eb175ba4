"""Where encoded images come from: files of a folder, or records of shards. Both give bytes by number."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Encoded images with labels; ``place`` is where they are, in words."""

    place: str
    classes: list[str]
    labels: list[int]

    def __len__(self) -> int: ...
    def read(self, sample: int) -> np.ndarray:
        """The encoded image, uint8; raise OSError or ValueError if it can't be had."""
        ...

    def name(self, sample: int) -> str:
        """What a message calls the sample; its path if it is a file."""
        ...

    def fingerprint(self) -> str:
        """Changes when a sample is added, removed, renamed or put in another class."""
        ...


class FileSource:
    """One file an image; ``files`` are absolute paths."""

    def __init__(self, folder: str | os.PathLike[str], classes: list[str], files: list[str], labels: list[int]) -> None:
        self.place, self.classes, self.labels, self.files = str(folder), classes, labels, files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, sample: int) -> np.ndarray:
        with open(self.files[sample], "rb", buffering=0) as file:
            content = file.readall()
        if not content:
            raise ValueError("the file is empty")
        return np.frombuffer(content, np.uint8)

    def name(self, sample: int) -> str:
        return self.files[sample]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path, label in zip(self.files, self.labels, strict=True):
            digest.update(f"{os.path.relpath(path, self.place)}\0{label}\n".encode())
        return digest.hexdigest()[:16]


class ShardSource:
    """Images inside larger files: image ``i`` is ``lengths[i]`` bytes at ``offsets[i]`` of ``shards[owners[i]]``.

    Single images are read, so that the order is as random as with files. That suits an SSD or the page cache.
    """

    KEPT_OPEN = 128

    def __init__(
        self, place: str, classes: list[str], labels: Sequence[int], names: Sequence[str], shards: Sequence[str],
        owners: Sequence[int], offsets: Sequence[int], lengths: Sequence[int],
    ) -> None:  # fmt: skip
        self.place, self.classes = place, classes
        self.labels: list[int] = list(labels)
        self._names, self._shards = list(names), list(shards)
        self._owners = np.asarray(owners, np.int32)
        self._offsets, self._lengths = np.asarray(offsets, np.int64), np.asarray(lengths, np.int64)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.labels)

    def _open(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= self.KEPT_OPEN:
                    os.close(self._files.pop(next(iter(self._files))))
                self._files[shard] = os.open(self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            return os.dup(self._files[shard])  # so that nobody closes it meanwhile

    def read(self, sample: int) -> np.ndarray:
        length = int(self._lengths[sample])
        file = self._open(int(self._owners[sample]))
        try:
            content = os.pread(file, length, int(self._offsets[sample]))
        finally:
            os.close(file)
        if len(content) != length or not length:
            raise ValueError(f"the shard holds {len(content)} of the image's {length} bytes")
        return np.frombuffer(content, np.uint8)

    def name(self, sample: int) -> str:
        return f"{self._shards[self._owners[sample]]}:{self._names[sample]}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for sample, label in enumerate(self.labels):
            shard = os.path.basename(self._shards[self._owners[sample]])
            digest.update(f"{shard}\0{self._names[sample]}\0{label}\0{self._lengths[sample]}\n".encode())
        return digest.hexdigest()[:16]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            try:
                os.close(file)
            except OSError:  # at the interpreter's end it may be gone
                pass
