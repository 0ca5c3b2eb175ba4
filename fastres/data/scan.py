"""Find the images of a folder: ``root/train/<class>/…`` and ``root/val/<class>/…`` (or ``root/test/…``)."""

from __future__ import annotations

import os
from pathlib import Path

from fastres.data.source import FileSource, Source
from fastres.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # what both DALI and torchvision decode
SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "test")}
LAYOUT = "expected ROOT/train/<class>/*.jpg and ROOT/val/<class>/*.jpg (or ROOT/test/…)"


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _split_folder(root: Path, split: str) -> Path:
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"the data folder {root} {what}; {LAYOUT}, or the name of a data set: digits, fashion-mnist")
    for name in SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    inside = _subfolders(root)
    shown = f"it has the folders {', '.join(inside[:5])}{', …' if len(inside) > 5 else ''}" if inside else "it has none"
    raise DataError(f"{root} has no folder {' or '.join(SPLIT_FOLDERS[split])} ({shown}); {LAYOUT}")


def _images(folder: Path) -> list[str]:
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, n) for n in names if n.lower().endswith(EXTENSIONS) and not n.startswith(".")]
    return sorted(found)


def scan(root: str | Path, split: str) -> FileSource:
    """List a split's images. Classes are the sub-folders of ``train`` in sorted order, as in torchvision's ImageFolder;
    where there is no ``train`` they are those of the split itself.

    Raises:
        DataError: a folder is missing, has no class folders or no images, or the split has classes that train lacks.
    """
    root = Path(root).absolute()
    folder = _split_folder(root, split)
    own = _subfolders(folder)
    if not own:
        loose = len(_images(folder))
        raise DataError(f"{folder} has no class folders{f' but {loose} loose images' if loose else ''}; {LAYOUT}")
    train = root / "train"
    classes = (_subfolders(train) if train.is_dir() else []) or own
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise DataError(
            f"{folder} has classes that {train} lacks: {', '.join(unknown[:5])}; their labels would be undefined"
        )
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for name in own:
        mine = _images(folder / name)
        if not mine:
            empty.append(name)
        files += mine
        labels += [classes.index(name)] * len(mine)
    if not files:
        raise DataError(f"{folder} has {len(own)} class folders but no images ({', '.join(EXTENSIONS)}); {LAYOUT}")
    if empty:
        raise DataError(f"{folder} has class folders without images: {', '.join(empty[:5])}; fill or remove them")
    if len(classes) < 2:
        raise DataError(f"{folder} has one class only, {classes[0]}; a classifier needs at least two")
    return FileSource(folder, classes, files, labels)


def open_source(root: str | Path, split: str) -> Source:
    """The images of a split, from shards where there are some, else from class folders. Raises as :func:`scan` does."""
    from fastres.data.shards import find_shards, open_shards

    shards = find_shards(Path(root).absolute(), split)
    return open_shards(Path(root).absolute(), split, shards) if shards else scan(root, split)


def read_exclusions(path: str | Path | None, source: Source) -> frozenset[str]:
    """Names of the images in a list as ``fastres data check`` writes it: a name, a tab, a reason; ``#`` comments.

    Raises:
        DataError: the list can't be read, or names nothing of ``source``.
    """
    if path is None:
        return frozenset()
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of images to leave out, {path}, can't be read: {error}") from error
    listed = {line.split("\t")[0] for line in lines if line.strip() and not line.startswith("#")}
    known = {name for name in map(source.name, range(len(source))) if name in listed}
    if listed and not known:
        raise DataError(
            f"{path} lists {len(listed)} images, none of which is in {source.place}; expected lines such as "
            f"{source.name(0)}"
        )
    return frozenset(known)
