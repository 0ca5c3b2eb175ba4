"""Opens what :func:`fastres.export.save` wrote."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ExportError, InputError, UserError

from .about import METADATA
from .formats import find_format, need_packages
from .portable import quiet
from .writing import ENTRY


class Program:
    """An exported network as a function of images on the CPU.

    Called with [N, C, H, W] in float32, in any memory format, it gives [N, outputs]. The input is checked first, since a
    compiled package reads past the end of a smaller one, and takes channels_last for contiguous, without a word.
    """

    def __init__(self, path: Path, about: dict[str, Any], function: Callable[[Tensor], Tensor]) -> None:
        self.path, self.about, self._function = path, about, function

    def __call__(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, outputs].

        Raises:
            InputError: another shape, dtype or device.
        """
        batch, *size = self.about["input"]
        wanted = f"{self.path.name} takes {[batch or 'N', *size]} in float32 on the CPU"
        if not isinstance(images, Tensor):
            raise InputError(f"{wanted}, got {type(images).__name__}")
        fits = images.dim() == 4 and list(images.shape[1:]) == size and len(images) in (batch or len(images),)
        if not fits or len(images) == 0:
            raise InputError(f"{wanted}, got {list(images.shape)}")
        if images.dtype != torch.float32 or images.device.type != "cpu":
            raise InputError(f"{wanted}, got {str(images.dtype).removeprefix('torch.')} on {images.device}")
        with torch.no_grad():
            return self._function(images.contiguous())

    def __repr__(self) -> str:
        name = self.about.get("config", {}).get("name")
        return f"Program({str(self.path)!r}: {self.about['format']} of {name}, fastres {self.about['fastres']})"


def load(path: str | Path, fused: bool = True) -> Program | nn.Module:
    """A file of :func:`fastres.export.save`: a :class:`Program`, or for safetensors the network in evaluation mode.

    Args:
        path: the file. fused: of a safetensors file, see :func:`fastres.create_model`.

    Raises:
        ExportError: missing, damaged, or written by another program; or a package is missing that runs it.
        CheckpointError, ModelError: safetensors that can't be read, or don't fit the network they name.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        if path.suffix == ".pt2":
            return open_as("aoti" if _holds_code(path) else "torch-export", path)
        return open_as(find_format(None, path).name, path, fused)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path} can't be read: {error}") from error


def _holds_code(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("/data/aotinductor/" in name for name in archive.namelist())


def open_as(kind: str, path: Path, fused: bool = True) -> Any:
    """As :func:`load`, of a format that is known already."""
    if kind == "safetensors":
        return _open_safetensors(path, fused)
    opener = {"onnx": _open_onnx, "torch-export": _open_torch_export, "aoti": _open_aoti}[kind]
    text, function = opener(path)
    if not text:
        raise ExportError(f"{path} was not written by fastres: it has no metadata {METADATA!r}")
    return Program(path, json.loads(text), function)


def _open_onnx(path: Path) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    need_packages(("onnxruntime",), "running ONNX files")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # types of ONNX Runtime's own
        raise ExportError(f"ONNX Runtime can't open {path}: {error}") from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return session.get_modelmeta().custom_metadata_map.get(METADATA), run


def _open_torch_export(path: Path) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    extra = {ENTRY: ""}
    try:
        with quiet():
            module = torch.export.load(path, extra_files=extra).module()
    except Exception as error:  # archives fail in many ways
        raise ExportError(f"torch.export can't open {path}: {error}") from error
    text: Any = extra[ENTRY]
    return text.decode() if isinstance(text, bytes) else text, module


def _open_aoti(path: Path) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    from torch._inductor import aoti_load_package

    try:
        with quiet():
            package = aoti_load_package(str(path))
    except Exception as error:  # a package for another machine, for one, fails in the dynamic linker
        raise ExportError(f"AOTInductor can't open {path}: {error}") from error
    return package.get_metadata().get(METADATA), package


def _open_safetensors(path: Path, fused: bool) -> nn.Module:
    import fastres
    from fastres.models.weights import load_state, read_safetensors

    state, about = read_safetensors(path)
    if not isinstance(about.get("config"), dict):
        raise ExportError(
            f"{path} does not say which network it is of; name it: fastres.create_model(name, weights={str(path)!r})"
        )
    model = fastres.create_model(**about["config"], fused=fused)
    load_state(model, state, str(path))
    return model.eval()
