"""Checkpoints: written whole or not at all, read without running code from them, checked before use."""

from __future__ import annotations

import io
import os
import platform
import random
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastres.errors import CheckpointError

FORMAT = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step: a crash or a full disk leaves the old one as it was.

    Raises:
        CheckpointError: the file can't be written; the message names it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} can't be written: {error}") from error


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Write ``state`` (tensors and plain Python values) to each path."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "versions": versions(), **state}, buffer)
    first, *others = paths
    write_atomically(first, buffer.getvalue())
    for path in others:
        # Checkpoints are replaced, never changed, so that one file may have several names.
        link = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            link.unlink(missing_ok=True)
            os.link(first, link)
            os.replace(link, path)
        except OSError:
            link.unlink(missing_ok=True)  # a file system without hard links
            write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint` into CPU memory; changes no file.

    Raises:
        CheckpointError: it is missing, damaged or of another kind; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load itself doesn't compare the checksums that torch.save wrote
        if damaged is not None:
            raise CheckpointError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        # zipfile, pickle and torch report damage by a dozen unrelated types.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or "config" not in state:
        held = ""
        if isinstance(state, dict) and "format" in state and isinstance(state.get("versions"), dict):
            held = f": it has format {state['format']}, written by fastres {state['versions'].get('fastres')}"
        raise CheckpointError(f"{path} is not a fastres checkpoint of format {FORMAT}{held}")
    return state


def check_config(saved: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of another network: a v1 state dict, for one, loads silently into v1.5.

    Raises:
        CheckpointError: the configurations differ; the message shows both.
    """
    # What is kept for the backward pass doesn't change what a network computes.
    names = sorted(key for key in {*saved, *wanted} - {"memory"} if saved.get(key) != wanted.get(key))
    if names:
        raise CheckpointError(
            f"checkpoint {path} is of another network (they differ in {', '.join(names)}): "
            f"it holds {saved}, asked for was {wanted}"
        )


def check_classes(saved: list[str] | None, now: list[str], path: str | Path) -> None:
    """Refuse a checkpoint whose outputs mean other classes: as many outputs load without a word.

    Raises:
        CheckpointError: the lists differ; the message shows where.
    """
    if saved is None or saved == now:
        return
    at = next((i for i, (a, b) in enumerate(zip(saved, now, strict=False)) if a != b), min(len(saved), len(now)))
    show = [repr(names[at]) if at < len(names) else "nothing" for names in (saved, now)]
    raise CheckpointError(
        f"checkpoint {path} is of other classes: {len(saved)} saved, {len(now)} now; class {at} was {show[0]}, is {show[1]}"
    )


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastres", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {name: str(text) for name, text in found.items()}


def random_state() -> dict[str, Any]:
    """The state of every global random number generator that a training step may use."""
    import numpy

    kind, numbers, gauss = random.getstate()
    state: Any = numpy.random.get_state(legacy=False)
    return {
        "python": [kind, list(numbers), gauss],
        "numpy": {
            "keys": torch.from_numpy(state["state"]["key"].astype("int64")), "position": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]), "gauss": float(state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip


def set_random_state(state: dict[str, Any]) -> None:
    """Undo everything that was drawn since :func:`random_state`."""
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        saved = state["numpy"]
        keys = saved["keys"].numpy().astype("uint32")
        numpy.random.set_state(("MT19937", keys, saved["position"], saved["has_gauss"], saved["gauss"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
