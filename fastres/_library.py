"""Loads the compiled libraries, and says what was built and why something is missing.

The operators' schemas are defined in Python (:mod:`fastres.ops.schemas`) before :func:`load` runs; the libraries only
add implementations: ``fastres/_native*.so`` for the CPU and ``fastres/_cuda.so`` for CUDA, both on LibTorch's stable
ABI.
"""

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastres._version import __version__
from fastres.kernels.common import cuda_images

_PACKAGE = Path(__file__).parent
_NOT_LOADED = "fastres._library.load() has not run"
_errors: dict[str, str | None] = {"native": _NOT_LOADED, "cuda": _NOT_LOADED}
_native: ModuleType | None = None
_isa: str | None = None


@cache
def _notes() -> dict[str, Any]:
    """What setup.py wrote beside the libraries: why it left one out."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _absent(name: str) -> str:
    reason = (
        _notes().get(f"{name}_error") or "it was not part of this build (FASTRES_NATIVE=OFF, or a plain source folder)"
    )
    return f"the {name} library is not installed: {reason}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _load_native() -> str | None:
    global _native, _isa
    if not any(_PACKAGE.glob("_native.*")):
        return _absent("native")
    try:
        _native = importlib.import_module("fastres._native")
    except Exception as error:  # whatever a wrong binary raises: importing fastres must not fail
        return f"the native library did not load: {_first_line(error)}"
    _isa = _native.isa() or None
    return _native.isa_error() or None


def _toolkit() -> str | None:
    """The CUDA toolkit ("13.0.88") that the CUDA library was built with, or None if nobody wrote it down."""
    cuda = _notes().get("cuda", {})
    compiler = cuda.get("compiler", "")  # nvcc has its toolkit's version, other compilers their own
    return cuda.get("toolkit") or (compiler.removeprefix("nvcc ") if compiler.startswith("nvcc ") else None)


def _load_cuda() -> str | None:
    path = _PACKAGE / "_cuda.so"
    if not path.exists():
        return _absent("cuda")
    other = cuda_images.other_major(_toolkit(), torch.version.cuda)
    if other is not None:
        return f"the cuda library is not loaded: {other}"
    try:
        torch.ops.load_library(path)
    except Exception as error:
        return f"the cuda library did not load: {_first_line(error)}"
    return None


def load() -> None:
    """Loads both libraries. Called once, after the schemas are defined; never raises and never prints."""
    _errors["native"] = _load_native()
    _errors["cuda"] = _load_cuda()


def native_error() -> str | None:
    """Why the CPU operators can't be used, or ``None`` when they can (loaded, and ``FASTRES_ISA`` is honoured)."""
    return _errors["native"]


def cuda_error() -> str | None:
    """Why the CUDA operators can't be used, or ``None`` when they are loaded (with or without a CUDA device)."""
    return _errors["cuda"]


def cuda_archs() -> list[str]:
    """The architectures that the CUDA library was built for, in CMake's words ("90-real", "120")."""
    return list(_notes().get("cuda", {}).get("archs", []))


def isa() -> str | None:
    """The instruction set of the CPU kernels, or ``None`` without them. Read once, at load: torch.compile traces this."""
    return _isa


def has_weight_gradient() -> bool:
    """Whether the convolution engine computes weight gradients on this CPU."""
    return _native is not None and _errors["native"] is None and _native.has_weight_gradient()


def build_info() -> dict[str, Any]:
    """What this installation of fastres was built with and can use.

    Returns:
        ``version`` (str); ``native``, ``cuda`` (bool: usable) with ``native_error``, ``cuda_error`` (str or None);
        ``isa`` (``"amx"``, ``"avx512_bf16"``, ``"avx512"``, ``"avx2"``, ``"baseline"`` or None) and ``isa_supported``
        (list, lowest first);
        ``compiler``, ``build_type``, ``torch_built_with`` (str or None), ``torch_running`` (str);
        ``cuda_archs`` (list of str), ``cuda_compiler`` and ``cuda_toolkit``, which CUDA library was built, also where it is not
        loaded, and ``cuda_running``, the CUDA version of this torch (str or None).
    """
    native = _native.build_facts() if _native is not None else {}
    built = (_PACKAGE / "_cuda.so").exists()
    return {
        "version": __version__,
        "native": _errors["native"] is None,
        "native_error": _errors["native"],
        "cuda": _errors["cuda"] is None,
        "cuda_error": _errors["cuda"],
        "isa": _isa,
        "isa_supported": _native.isa_supported() if _native is not None else [],
        "compiler": native.get("compiler"),
        "build_type": native.get("build_type"),
        "torch_built_with": native.get("torch_built_with"),
        "torch_running": torch.__version__,
        "cuda_archs": cuda_archs() if built else [],
        "cuda_compiler": _notes().get("cuda", {}).get("compiler") if built else None,
        "cuda_toolkit": _toolkit() if built else None,
        "cuda_running": torch.version.cuda,
    }
