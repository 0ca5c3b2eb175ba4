"""The formats: names, suffixes, and the packages each one needs. Nothing here imports torch."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fastres.errors import ExportError


@dataclass(frozen=True)
class Format:
    """``packages``: what writing and checking needs beside torch, all of the extra ``fastres[export]``."""

    name: str
    suffix: str
    summary: str
    packages: tuple[str, ...] = ()


FORMATS = {
    each.name: each
    for each in (
        Format("onnx", ".onnx", "a graph of standard ONNX operators", ("onnx", "onnxscript", "onnxruntime")),
        Format("torch-export", ".pt2", "a torch.export program; runs with torch alone"),
        Format("aoti", ".pt2", "an AOTInductor package: compiled code; runs with torch alone, also from C++"),
        Format("safetensors", ".safetensors", "the weights under torchvision's names", ("safetensors",)),
    )
}


def find_format(name: str | None, path: Path) -> Format:
    """The format that was asked for, or the one that the file's suffix says.

    Raises:
        ExportError: unknown, or the suffix does not suit it.
    """
    if name is None:
        fitting = [each for each in FORMATS.values() if each.suffix == path.suffix]
        if len(fitting) == 1:
            return fitting[0]
        reason = f"{path.suffix} is that of {' and '.join(f.name for f in fitting)}" if fitting else "no format has it"
        raise ExportError(f"which format should {path} be? Its suffix does not tell ({reason}); {_all()}")
    if name not in FORMATS:
        close = difflib.get_close_matches(str(name).lower().replace("_", "-"), FORMATS, n=2, cutoff=0.4)
        hint = f"; close to {', '.join(close)}" if close else ""
        raise ExportError(f"unknown format {name!r}{hint}; {_all()}")
    if path.suffix != FORMATS[name].suffix:
        raise ExportError(f"{path}: the name of a file of format {name} ends in {FORMATS[name].suffix}")
    return FORMATS[name]


def need_packages(packages: tuple[str, ...], purpose: str) -> None:
    """Raises ExportError, with what to install, where one is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ExportError(
            f"{purpose} needs {' and '.join(missing)}, which {verb} not installed: pip install 'fastres[export]'"
        )


def _all() -> str:
    return f"expected one of {', '.join(FORMATS)}"
