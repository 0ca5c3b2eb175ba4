"""What ``fastres tune`` measured on this machine: the fastest way to compute a convolution, by shape.

Choices are kept in one JSON file, by processor, instruction set and version; where nothing was measured, the fixed
order of preference decides. ``FASTRES_TUNE_CACHE`` names another file, or ``OFF`` for none. A file that can't be read
counts as empty; ``fastres tune`` says so and writes it anew.
"""

import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastres import _library
from fastres._cpu import cpu_name
from fastres._version import __version__
from fastres.errors import InputError

VARIABLE = "FASTRES_TUNE_CACHE"
_known: dict[str, dict[str, Any]] | None = None


def path() -> Path | None:
    """The file of measured choices, or ``None`` where they are turned off."""
    named = os.environ.get(VARIABLE, "")
    if named == "OFF":
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / "tune.json"


@cache
def fingerprint() -> str:
    """What a measurement holds for: processor, instruction set, versions."""
    return f"{cpu_name()}, {_library.isa()}, torch {torch.__version__}, fastres {__version__}"


def key(
    op: str, dtype: torch.dtype, shape: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> str:
    """The name of one problem: op, dtype, input [N, C, H, W], weights [K, C/groups, R, S], geometry, threads."""
    parts = (shape, weight, stride, padding, dilation)
    texts = ["x".join(map(str, part)) for part in parts]
    return "|".join((op, str(dtype).removeprefix("torch."), *texts, str(groups), f"t{torch.get_num_threads()}"))


def read(file: Path) -> tuple[dict[str, Any], str | None]:
    """(all machines' choices, why the file could not be read or ``None``)."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
            return {}, f"{file} does not hold measured choices"
        return content, None
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, f"{file} could not be read: {error}"


def _choices() -> dict[str, dict[str, Any]]:
    global _known
    if _known is None:
        file = path()
        _known = read(file)[0].get(fingerprint(), {}) if file is not None else {}
    return _known


def choice(problem: str) -> str | None:
    """The measured best for a problem's :func:`key`, or ``None``."""
    found = _choices().get(problem)
    return found.get("choice") if isinstance(found, dict) else None


def forget() -> None:
    """Reads the file again at the next question."""
    global _known
    _known = None


def save(found: dict[str, dict[str, Any]]) -> Path:
    """Adds measured choices, ``{key: {"choice": name, "ms": {name: milliseconds}}}``, to the file, at once or not at all.

    Raises:
        InputError: choices are turned off.
    """
    file = path()
    if file is None:
        raise InputError(f"{VARIABLE}=OFF: there is nowhere to keep what was measured")
    content, _ = read(file)
    content.setdefault(fingerprint(), {}).update(found)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as out:
        json.dump(content, out, indent=1, sort_keys=True)
    os.replace(out.name, file)
    forget()
    return file
