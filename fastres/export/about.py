"""What travels with a file: the network's configuration, its classes, and the versions that made it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastres._version import __version__
from fastres.errors import ExportError
from fastres.models.base import METADATA

__all__ = ["METADATA", "describe", "to_text"]


def describe(
    model: nn.Module, kind: str, batch: int | None, size: tuple[int, int, int], outputs: int,
    classes: Sequence[str] | None, notes: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The metadata of a file, plain JSON values.

    Raises:
        ExportError: another number of class names than outputs, or notes that JSON can't hold.
    """
    if classes is not None and len(classes) != outputs:
        raise ExportError(f"{len(classes)} class names were given for a network of {outputs} outputs")
    config = getattr(model, "config", None)
    about = {
        **(notes or {}),
        "format": kind,
        "fastres": __version__,
        "torch": str(torch.__version__),
        "config": dict(config) if isinstance(config, dict) else {"name": type(model).__name__},
        "classes": None if classes is None else [str(name) for name in classes],
        "input": [batch, *size],
        "outputs": outputs,
    }
    to_text(about)
    return about


def to_text(about: dict[str, Any]) -> str:
    """As JSON; ASCII, since not every format's strings are more.

    Raises:
        ExportError: a value that JSON can't hold.
    """
    try:
        return json.dumps(about)
    except (TypeError, ValueError) as error:
        raise ExportError(f"the notes of an export are plain JSON values: {error}") from error
