"""Writes a file, reads it back, compares, and only then puts it in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ExportError, ModelError
from fastres.models import model_info

from . import writing
from .about import describe
from .checking import Check, Comparison
from .formats import Format, find_format, need_packages
from .loading import open_as
from .portable import TRACED_BATCH, fold_batch_norms, own_form, plain, trace

Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its size, what travels with it, and how it compares with the network."""

    path: Path
    format: str
    bytes: int
    about: dict[str, Any]
    comparison: Comparison
    folded: int  # BatchNorms that became part of a convolution
    seconds: float

    def __str__(self) -> str:
        batch, *size = self.about["input"]
        shape = "x".join(str(n) for n in (batch or "N", *size))
        folded = f", {self.folded} BatchNorms folded" if self.folded else ""
        return f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB, images {shape}{folded}; {self.comparison}"


def save(
    model: nn.Module,
    path: str | Path,
    format: str | None = None,
    *,
    image_size: int | tuple[int, int, int] | None = None,
    batch_size: int | None = None,
    classes: Sequence[str] | None = None,
    notes: dict[str, Any] | None = None,
    opset: int | None = None,
    report: Report | None = None,
) -> Exported:
    """Writes ``model`` to ``path`` and checks what was written against the outputs of ``model`` itself.

    The file appears under its name only after the check; a file of that name stays as it was until then, and for good
    where anything fails. ``model`` is not changed; its mode, dtype and device don't matter: programs are of the network
    in evaluation mode, float32, CPU. Safetensors keep the weights' dtypes.

    Args:
        model: a network of fastres, fused or not, or any other in plain PyTorch that maps [N, C, H, W] to one tensor.
        path: where to; the suffix is the format's. format: see :data:`fastres.export.FORMATS`; may be left out where the
            suffix tells.
        image_size: side of the images, or (C, H, W); the registered network's by default. Programs take this size only.
        batch_size: the only number of images that a program takes; by default any.
        classes: names of the outputs. notes: further JSON values that travel with the file.
        opset: of ONNX; torch's choice by default. report: is told, in words, what is being done.

    Raises:
        ExportError: unknown format, wrong suffix or folder, a missing package, a network that can't be written, or a file
            that computes something else. OSError: the disk is full, for one.
    """
    path, started, tell = Path(path), time.monotonic(), report or (lambda _: None)
    kind = find_format(format, path)
    if opset is not None and kind.name != "onnx":
        raise ExportError(f"an opset is for the format onnx, not {kind.name}")
    need_packages(kind.packages, f"writing {kind.name}")
    size = input_size(model, image_size)
    if batch_size is not None and batch_size < 1:
        raise ExportError(f"batch_size is {batch_size}, expected a positive number, or None for any")
    with scratch(path) as folder:
        tell("computing the network's own outputs")
        own, bare = own_form(model), plain(model)
        check = Check(own, bare, size, (1, 3) if batch_size is None else (batch_size,))
        outputs = int(check.expected[0].shape[-1])
        about = describe(model, kind.name, batch_size, size, outputs, classes, notes)
        draft = folder / path.name
        if kind.name == "safetensors":
            tell("writing the weights")
            writing.write_safetensors(model, draft, about)
            comparison, folded = check.compare(_reopened(model, draft), kind.name), 0
        else:
            example = torch.zeros((batch_size or TRACED_BATCH, *size))
            folded = fold_batch_norms(bare, example[:1])
            tell("tracing")
            program = trace(bare, example, any_batch=batch_size is None)
            tell({"aoti": "compiling (a minute or more)"}.get(kind.name, "writing"))
            _write(kind, program, draft, about, opset)
            tell("comparing the file with the network")
            comparison = check.compare(open_as(kind.name, draft), kind.name)
        put(draft, path)
    return Exported(path, kind.name, path.stat().st_size, about, comparison, folded, time.monotonic() - started)


def _write(kind: Format, program: torch.export.ExportedProgram, draft: Path, about: dict[str, Any], opset: Any) -> None:
    if kind.name == "onnx":
        writing.write_onnx(program, draft, about, opset)
    elif kind.name == "aoti":
        writing.write_aoti(program, draft, about)
    else:
        writing.write_torch_export(program, draft, about)


def _reopened(model: nn.Module, draft: Path) -> Callable[[Tensor], Tensor]:
    """The network with the weights that the file holds.

    Raises:
        ExportError: a tensor is not the same bit for bit.
    """
    from fastres.models.weights import load_state, read_safetensors

    state, _ = read_safetensors(draft)
    for key, value in model.state_dict().items():
        if key not in state or state[key].dtype != value.dtype or not _same_bits(state[key], value.cpu()):
            raise ExportError(f"{key} is not in the safetensors file as it is in the network; the file was deleted")
    fresh = own_form(model)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.zero_()  # so that nothing but the file gives it its values
    load_state(fresh, state, str(draft))
    return fresh


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
    )


def input_size(model: nn.Module, image_size: int | tuple[int, int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) of the images.

    Raises:
        ExportError: not positive, or neither given nor known.
    """
    config = getattr(model, "config", None)
    config = config if isinstance(config, dict) else {}
    if isinstance(image_size, (tuple, list)):
        size = tuple(image_size)
    else:
        try:
            channels, height, width = model_info(config.get("name", "")).input_size
        except ModelError:
            channels, height, width = 3, 0, 0
        channels = config.get("in_channels", channels)
        size = (channels, image_size, image_size) if image_size is not None else (channels, height, width)
        if size[1:] == (0, 0) and image_size is None:
            raise ExportError(f"image_size is missing: no size is known for this {type(model).__name__}")
    if len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ExportError(f"image_size is {image_size}, expected the side in pixels, or (C, H, W)")
    return size


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, on the same disk, that is gone afterwards.

    Raises:
        ExportError: nothing can be written there.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder, expected the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"{path} can't be written: there is no folder {path.parent}")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"{path} can't be written: {error.strerror or error}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(draft: Path, path: Path) -> None:
    """Moves the checked file to its place in one step.

    Raises:
        ExportError: it can't be.
    """
    try:
        plain_file = draft.with_name("permissions")
        plain_file.touch()
        shutil.copymode(plain_file, draft)  # safetensors writes a file that only its owner can read
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise ExportError(f"{path} can't be written: {error}") from error
