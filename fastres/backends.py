"""Which backend serves a problem, and why the others do not.

``select`` is a pure function of the op, the problem and the request; importing this module chooses nothing. An explicit
request (``use_backend`` or ``FASTRES_BACKEND``) holds for every op that has the backend and raises where it can't serve;
``auto`` takes the first backend that serves, in the order of ``PREFERENCE``.
"""

import difflib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import _library, tuning
from fastres.errors import BackendError
from fastres.kernels.batch_norm_act import capacity
from fastres.kernels.common import cuda_images, triton_launch
from fastres.ops.schemas import BACKENDS, OPS

AUTO = "auto"
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "library", "reference"),
    # Where nothing was measured (a graph is captured or compiled): our own kernels wait until they were checked and timed.
    "cuda": ("library", "reference", "triton", "cuda"),
}
_ANY_DEVICE = ("library", "reference")
_CONVS = ("conv_stats", "conv_act")
# Where nothing was measured, the convolution engine comes before the library on instruction sets where it was faster.
_ENGINE_FIRST = ("amx",)
_ENGINE_TRAINS_FROM = 64  # channels
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
_DEVICE_OF = {"native": "cpu", "cuda": "cuda"}


class Geometry(NamedTuple):
    """A convolution's weights [K, C/groups, R, S], and how they move."""

    weight: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


_NO_CONV = Geometry((), (), (), (), 1)


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept or refuse."""

    op: str
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    conv: "Geometry | None" = None

    @classmethod
    def of(cls, op: str, x: Tensor, conv: "Geometry | None" = None) -> "Problem":
        return cls(op, x.device.type, x.dtype, tuple(x.shape), conv)

    def key(self) -> str | None:
        """What :mod:`fastres.tuning` calls this problem; ``None`` where it is never measured."""
        if self.conv is None:
            return (
                tuning.key(self.op, self.dtype, self.shape, *_NO_CONV, self.device) if self.device == "cuda" else None
            )
        return tuning.key(self.op, self.dtype, self.shape, *self.conv, self.device)

    def __str__(self) -> str:
        return f"{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}, shape {list(self.shape)}"


@dataclass(frozen=True)
class Choice:
    """The backend taken, for each one that was preferred to it the reason why it was not, and what the choice costs."""

    backend: str
    refused: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def refusal(backend: str, op: str, device: str, dtype: torch.dtype, shape: Sequence[int] | None = None) -> str | None:
    """``None`` if ``backend`` serves ``op`` on ``device`` in ``dtype``, else the reason in words. Without the map's shape what
    depends on it is left out."""
    if backend not in OPS[op].backends:
        return f"{backend} has no {op}"
    if backend not in _DTYPES:
        return None
    if device != _DEVICE_OF.get(backend, device):
        return f"{backend} runs on {_DEVICE_OF[backend]} tensors, not on {device}"
    if dtype not in _DTYPES[backend]:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[backend])
        return f"{backend} takes {known}, not {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        return triton_launch.refusal(device)
    if backend == "native":
        return _library.native_error()
    reason = _library.cuda_error() or unfit_device(backend, dtype)
    return reason or (None if op != "batch_norm_act" or shape is None else _off_chip(shape, dtype))


def unfit_device(backend: str, dtype: torch.dtype | None = None) -> str | None:
    """Why the current CUDA device can't run ``backend``, which could run on others; None if it can, or without a device."""
    if backend == "triton":
        return triton_launch.old_device()
    return cuda_images.unfit_device(_library.cuda_archs(), dtype) if backend == "cuda" else None


def _chip() -> capacity.Chip | None:
    """The current GPU, as far as it decides what fits on it; None without one."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    # all but 1 KiB of a multiprocessor's shared memory may go to one block
    shared = gpu.shared_memory_per_multiprocessor
    return capacity.Chip(gpu.multi_processor_count, shared, shared - 1024)


def _off_chip(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a map [N, C, H, W] can't stay on the current GPU's multiprocessors."""
    chip, (n, c, h, w) = _chip(), shape
    reason = None if chip is None else capacity.refusal(chip, n * h * w, c, dtype.itemsize)
    return None if reason is None else f"the map doesn't fit on the GPU's multiprocessors: {reason}"


_environment_backend = os.environ.get("FASTRES_BACKEND", AUTO)
_forced: list[str] = []


def requested() -> str:
    """The backend asked for: by the innermost ``use_backend``, else by FASTRES_BACKEND, else ``"auto"``."""
    name = _forced[-1] if _forced else _environment_backend
    if name != AUTO and name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        source = "use_backend" if _forced else "FASTRES_BACKEND"
        raise BackendError(f"{source}: unknown backend {name!r}, known are {AUTO}, {', '.join(BACKENDS)}{hint}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces ``name`` for every op that has it, in this process, until the block ends. ``"auto"`` lifts a force.

    Raises:
        BackendError: for an unknown name at once; for a problem the backend can't serve when the op is called.
    """
    _forced.append(name)
    try:
        requested()
        yield
    finally:
        _forced.pop()


def _library_trains(problem: Problem) -> bool:
    """Where the library's training was measured faster than the engine's on AMX: in bf16, in groups (of which the engine
    has no gradients of its own), and with few channels, whose gradients don't fill its tiles."""
    if problem.op != "conv_stats" or problem.conv is None:
        return False
    few = min(problem.shape[1], problem.conv.weight[0]) < _ENGINE_TRAINS_FROM
    return problem.dtype == torch.bfloat16 or problem.conv.groups > 1 or few


def preference(problem: Problem) -> tuple[str, ...]:
    """The backends ``auto`` tries, in order: what ``fastres tune`` found fastest here, then a fixed order."""
    op, device = problem.op, problem.device
    order = PREFERENCE.get(device, _ANY_DEVICE)
    if (op in _CONVS or device == "cuda") and not torch.compiler.is_compiling():
        measured = tuning.choice(problem.key() or "", device) if device == "cpu" or torch.cuda.is_available() else None
        if measured in order:
            return (measured, *(b for b in order if b != measured))
    if op in _CONVS and device == "cpu" and (_library.isa() not in _ENGINE_FIRST or _library_trains(problem)):
        order = ("library", "native", "reference")
    return order


def select(op: str, x: Tensor, conv: Geometry | None = None) -> Choice:
    """The backend for ``op`` on tensors like ``x``; convolutions say their geometry.

    Raises:
        BackendError: an explicitly requested backend has the op but can't serve the problem, or nobody can.
    """
    device, dtype = x.device.type, x.dtype
    want = requested()
    unfit = None
    if device == "cuda" and want in OPS[op].backends and not (want == "cuda" and _library.cuda_error()):
        unfit = unfit_device(want, dtype)
    if unfit is not None:
        choice = _without(want, op, x, conv, unfit)
    elif want != AUTO and want in OPS[op].backends:
        reason = refusal(want, op, device, dtype, x.shape)
        if reason is not None:
            usable = [b for b in OPS[op].backends if refusal(b, op, device, dtype, x.shape) is None]
            raise BackendError(
                f"backend {want!r} was requested but can't serve {Problem.of(op, x, conv)}: {reason}. "
                f"Usable here: {', '.join(usable) or 'none'}."
            )
        choice = Choice(want)
    else:
        choice = _first_that_serves(op, x, conv)
    if _recorder is not None:
        _recorder.add(Problem.of(op, x, conv), replace(choice, notes=_notes(choice.backend, op, x)))
    return choice


def _without(want: str, op: str, x: Tensor, conv: Geometry | None, reason: str) -> Choice:
    """What serves instead on a device that can't run the kernels of ``want``. It is the one request that falls back, because
    one program may run on old and new devices; it warns, and ``fastres.explain`` says it at each layer."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"fastres: backend {want!r} was requested, but {reason}; the library serves", stacklevel=4)
    choice = _first_that_serves(op, x, conv)
    return replace(choice, refused=((want, reason), *choice.refused))


def _notes(backend: str, op: str, x: Tensor) -> tuple[str, ...]:
    converts = backend == "triton" or (backend == "cuda" and op in _CONVS)
    if converts and not x.is_contiguous(memory_format=torch.channels_last):
        return (f"{backend} converts this input to channels_last first: a copy at each call",)
    return ()


def _first_that_serves(op: str, x: Tensor, conv: Geometry | None) -> Choice:
    refused: list[tuple[str, str]] = []
    problem = Problem.of(op, x, conv)
    if problem.device == "cuda" and not torch.compiler.is_compiling():
        _see(problem, x)
    for backend in preference(problem):
        reason = refusal(backend, op, x.device.type, x.dtype, x.shape)
        if reason is None:
            return Choice(backend, tuple(refused))
        refused.append((backend, reason))
    raise BackendError(f"no backend serves {Problem.of(op, x, conv)}: " + "; ".join(f"{b}: {r}" for b, r in refused))


def _see(problem: Problem, x: Tensor) -> None:
    """Measures a problem on a GPU the first time it is seen, where that is possible (:mod:`fastres.device_tuner`)."""
    from fastres import device_tuner

    if not device_tuner.may_measure(x):
        return
    name = problem.key()
    if name is not None and x.numel() and tuning.choice(name, problem.device) is None:
        device_tuner.first_sight(problem, name)


def status() -> list[tuple[str, bool, str]]:
    """(backend, usable in this process, reason or remark) for every backend, for ``fastres doctor``."""
    rows = []
    for backend in BACKENDS:
        error = {"native": _library.native_error, "cuda": _library.cuda_error}.get(backend, lambda: None)()
        if backend == "cuda" and error is None and not torch.cuda.is_available():
            error = "the library is loaded, but torch sees no CUDA device"
        elif backend == "cuda" and error is None:
            error = unfit_device(backend)
        if backend == "triton":
            error = triton_launch.refusal("cuda" if torch.cuda.is_available() else "cpu")
        ops = ", ".join(op for op, schema in OPS.items() if backend in schema.backends)
        rows.append((backend, error is None, error or f"serves {ops}"))
    return rows


@dataclass
class Recorder:
    """Collects the choices of one forward pass for :func:`fastres.explain`."""

    names: dict[int, str]  # id(module) -> qualified name
    rows: list[tuple[str, Problem, Choice]] = field(default_factory=list)
    layer: str = ""

    def add(self, problem: Problem, choice: Choice) -> None:
        self.rows.append((self.layer, problem, choice))


_recorder: Recorder | None = None


@contextmanager
def recording(names: dict[int, str]) -> Iterator[Recorder]:
    """Records every choice made inside the block."""
    global _recorder
    previous, _recorder = _recorder, Recorder(names)
    try:
        yield _recorder
    finally:
        _recorder = previous


def entering(module: Any) -> None:
    """Names the layer the next choices belong to; free when nobody records."""
    if _recorder is not None:
        _recorder.layer = _recorder.names.get(id(module), type(module).__name__)
