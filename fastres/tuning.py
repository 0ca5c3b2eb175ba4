"""What ``fastres tune`` measured on this machine: the fastest way to compute a convolution, by shape.

Choices are kept in one JSON file, by processor or GPU with its driver, and by versions; where nothing was measured, the
fixed order of preference decides. ``FASTRES_TUNE_CACHE`` names another file, or ``OFF`` for none. A file that can't be read
counts as empty, and so does what another version measured on a GPU: it is said once, and written anew.
"""

import ctypes
import hashlib
import json
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastres import _library, kernels
from fastres._cpu import cpu_name
from fastres._version import __version__
from fastres.errors import InputError
from fastres.kernels.common import triton_choice

VARIABLE = "FASTRES_TUNE_CACHE"
_known: dict[str, dict[str, Any]] | None = None  # what the file holds, by fingerprint
_said: set[str] = set()


def path() -> Path | None:
    """The file of measured choices, or ``None`` where they are turned off."""
    named = os.environ.get(VARIABLE, "")
    if named == "OFF":
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / "tune.json"


def fingerprint(device: str = "cpu") -> str:
    """What a measurement holds for: on the CPU processor, instruction set, versions; on CUDA the current device, its
    capability, the driver, versions, and the sources of the kernels."""
    if device != "cuda":
        return _cpu_fingerprint()
    try:
        return _gpu_fingerprint()
    except (RuntimeError, AssertionError):  # no device that answers: asking for a choice must not fail for that
        return "unknown GPU"


@cache
def _cpu_fingerprint() -> str:
    return f"{cpu_name()}, {_library.isa()}, torch {torch.__version__}, fastres {__version__}"


@cache
def _gpu_fingerprint() -> str:
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    own = f"fastres {__version__}, kernels {kernel_version()}"
    return f"{name}, sm_{major}{minor}, driver {_driver()}, torch {torch.__version__}, {_triton()}, {own}"


def _driver() -> str:
    """The display driver's version, or else the CUDA version that the driver serves."""
    loaded = Path("/sys/module/nvidia/version")
    try:
        return loaded.read_text().strip()
    except OSError:
        pass  # not Linux, or a driver inside a virtual machine
    version = ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "unknown"
    return f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _triton() -> str:
    try:
        from importlib.metadata import version

        return f"triton {version('triton')}"
    except ImportError:
        return "no triton"


@cache
def kernel_version() -> str:
    """A digest of the GPU kernels' sources."""
    digest = hashlib.sha256()
    for file in sorted(Path(kernels.__path__[0]).rglob("*")):
        if file.suffix in (".py", ".cuh", ".cu") or file.match("cuda_*.h"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def key(
    op: str, dtype: torch.dtype, shape: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int,
    device: str = "cpu",
) -> str:  # fmt: skip
    """The name of one problem: op, dtype, input [N, C, H, W], weights [K, C/groups, R, S], geometry; on the CPU threads."""
    parts = (shape, weight, stride, padding, dilation)
    texts = ["x".join(map(str, part)) for part in parts]
    where = device if device != "cpu" else f"t{torch.get_num_threads()}"
    return "|".join((op, str(dtype).removeprefix("torch."), *texts, str(groups), where))


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


def _choices(device: str) -> dict[str, Any]:
    global _known
    if _known is None:
        file = path()
        _known, problem = read(file) if file is not None else ({}, None)
        if problem is not None:
            _say(f"{problem}; it counts as empty and is written anew when something is measured")
    own = fingerprint(device)
    if device == "cuda" and own not in _known and any(_same_device(own, other) for other in _known):
        _say(f"{path()} was measured on this GPU with other versions: it is measured again")
    return _known.get(own, {})


def _same_device(one: str, other: str) -> bool:
    return one.split(", ")[0] == other.split(", ")[0]


def _say(text: str) -> None:
    """Warns once in a process."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f"fastres: {text}", RuntimeWarning, stacklevel=4)


def choice(problem: str, device: str = "cpu") -> str | None:
    """The measured best for a problem's :func:`key`, or ``None``."""
    found = _choices(device).get(problem)
    return found.get("choice") if isinstance(found, dict) else None


def remember(found: dict[str, dict[str, Any]], device: str = "cpu") -> None:
    """Uses measured choices in this process from now on, whether or not they can be kept."""
    _choices(device)
    assert _known is not None
    _known.setdefault(fingerprint(device), {}).update(found)
    triton_choice.forget()


def forget() -> None:
    """Reads the file again at the next question."""
    global _known
    _known = None
    triton_choice.forget()


def save(found: dict[str, dict[str, Any]], device: str = "cpu") -> Path:
    """Adds measured choices, ``{key: {"choice": name, "ms": {name: milliseconds}}}``, to the file, at once or not at all.

    Raises:
        InputError: choices are turned off.
    """
    file = path()
    if file is None:
        raise InputError(f"{VARIABLE}=OFF: there is nowhere to keep what was measured")
    content, _ = read(file)
    own = fingerprint(device)
    if device == "cuda":  # measurements of other versions are of no use any more
        content = {name: kept for name, kept in content.items() if name == own or not _same_device(own, name)}
    content.setdefault(own, {}).update(found)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as out:
        json.dump(content, out, indent=1, sort_keys=True)
    os.replace(out.name, file)
    forget()
    return file


triton_choice.measured = lambda problem: choice(problem, "cuda") if torch.cuda.is_available() else None
