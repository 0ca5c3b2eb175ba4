"""What a Triton backend runs, as data: launches that a GPU, an interpreter, a compiler or a byte counter can each execute.

Every Triton op is written as functions that allocate its results and return :class:`Launch` objects; ``run`` hands
each to the executor in force. Tests replace the executor, so the same host code that serves a GPU is what is checked.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastres.errors import BackendError

OLDEST = (7, 5)  # Turing: the first device with matrix instructions that Triton still generates


@dataclass(frozen=True)
class Config:
    """One point of a kernel's tuning space: block sizes and the like (constexprs), warps and pipeline stages."""

    constants: tuple[tuple[str, int | bool], ...]
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **constants: int | bool) -> "Config":
        return cls(tuple(sorted(constants.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int | bool:
        return dict(self.constants)[name]

    def __str__(self) -> str:
        return (
            ",".join(f"{k}={int(v)}" for k, v in self.constants) + f",warps={self.num_warps},stages={self.num_stages}"
        )


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](**arguments, **constants)``.

    arguments: run-time values by parameter name (tensors, None, ints, floats). constants: constexprs by name, the
    configuration's block sizes among them.
    """

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        return getattr(self.kernel, "__name__", None) or self.kernel.fn.__name__

    def run(self) -> None:
        """Executes it; a launch of no programs is nothing to do."""
        if all(self.grid):
            (_executors[-1] if _executors else _on_device)(self)


Executor = Callable[[Launch], None]
_executors: list[Executor] = []


def _on_device(launch: Launch) -> None:
    if interpreted():
        from fastres.kernels.common.triton_interpreter import repair

        repair()
    launch.kernel[launch.grid](
        **launch.arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages
    )


@contextmanager
def executing_with(executor: Executor) -> Iterator[None]:
    """Every launch inside the block goes to ``executor``, and tensors of any device are accepted."""
    _executors.append(executor)
    try:
        yield
    finally:
        _executors.pop()


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: its kernels then run on CPU tensors."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def refusal(device: str) -> str | None:
    """Why no Triton kernel can run on tensors of ``device`` ("cpu", "cuda") in this process, or None if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton can't be imported ({error})"
    if _executors:
        return None
    if device == "cpu":
        return None if interpreted() else "triton runs on CPU tensors only under its interpreter (TRITON_INTERPRET=1)"
    return old_device() if device == "cuda" else f"triton runs on cuda tensors, not on {device}"


def old_device() -> str | None:
    """The reason why the current CUDA device is too old, or None if it isn't, or if there is none."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"triton's kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, this device has {major}.{minor}"
    return None


# torch.compile asks once and does not trace them.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
old_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require(device: str) -> None:
    """Raises BackendError where :func:`refusal` has a reason."""
    reason = refusal(device)
    if reason is not None:
        raise BackendError(f"backend 'triton': {reason}")
