"""Decoding every image of a data set before a run does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from fastres.data.engine import decode, short_reason
from fastres.data.source import Source

CHUNK = 512  # images given to the threads at a time


@dataclass
class Report:
    """``bad`` has the reasons by name; ``formats`` counts what files really are, ``misnamed`` those of another one."""

    images: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    misnamed: list[str] = field(default_factory=list)
    pixels: int = 0
    size: int = 0
    smallest: tuple[int, int] | None = None


def check_source(source: Source, workers: int = 2, progress: Callable[[int, int], None] | None = None) -> Report:
    """Decode every image whole, by the decoder that refuses most; nothing is raised for bad ones."""
    report = Report()
    for sample, outcome in _outcomes(source, workers):
        report.images += 1
        if isinstance(outcome, str):
            report.bad[source.name(sample)] = outcome
        else:
            kind, size, height, width = outcome
            report.formats[kind] += 1
            report.pixels += height * width
            report.size += size
            report.smallest = min(report.smallest or (height, width), (height, width), key=min)
            suffix = Path(source.name(sample)).suffix.lower()
            if suffix and suffix not in SUFFIXES.get(kind.split()[0], (suffix,)):
                report.misnamed.append(source.name(sample))
        if progress is not None:
            progress(report.images, len(source))
    return report


Outcome = str | tuple[str, int, int, int]
SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WebP": (".webp",), "GIF": (".gif",)}


def _outcomes(source: Source, workers: int) -> Iterator[tuple[int, Outcome]]:
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for begin in range(0, len(source), CHUNK):
            samples = range(begin, min(begin + CHUNK, len(source)))
            yield from zip(samples, pool.map(partial(_one, source), samples), strict=True)


def _one(source: Source, sample: int) -> Outcome:
    try:
        content = source.read(sample)
        pixels = decode(content)
    except (OSError, ValueError, RuntimeError) as error:
        return short_reason(error)
    return image_format(content), len(content), pixels.shape[1], pixels.shape[2]


def image_format(content: np.ndarray) -> str:
    """What a file is by its first bytes; of a JPEG also whether it is CMYK."""
    head = content[:12].tobytes()
    if head[:2] == b"\xff\xd8":
        return "JPEG CMYK" if _components(content) == 4 else "JPEG"
    for start, name in ((b"\x89PNG", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP")):
        if head.startswith(start):
            return name
    return "WebP" if head[:4] == b"RIFF" and head[8:] == b"WEBP" else "another format"


def _components(content: np.ndarray) -> int:
    """Channels of a JPEG, from its frame header."""
    data, at = content.tobytes(), 2
    while at + 9 < len(data) and data[at] == 0xFF:
        if 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
            return data[at + 9]
        at += 1 if data[at + 1] == 0xFF else 2 + (data[at + 2] << 8 | data[at + 3])
    return 0


def write_bad_list(path: Path, report: Report, place: str) -> None:
    """One line an image: name, tab, reason. ``create_loader(exclude=…)`` reads it."""
    lines = [f"# {len(report.bad)} of {report.images} images of {place} can't be decoded\n"]
    lines += [f"{name}\t{reason}\n" for name, reason in report.bad.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
