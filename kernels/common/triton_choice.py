"""Which configuration a Triton kernel runs with: one that the tuner forces, the one measured here, or the first that serves.

Imports no Triton. ``measured`` is how :mod:`fastres.tuning` is asked; kernels know nothing of files and machines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .architectures import architecture
from .triton_launch import Config
from .triton_rejected import REJECTED

if TYPE_CHECKING:
    from .triton_conv import ConvProblem

EXECUTED = (8, 0)  # what is offered where there is no device: the architecture whose code the tests execute
measured: Callable[[str], str | None] = lambda key: None  # noqa: E731
_forced: dict[str, Config] = {}
_chosen: dict[tuple[str, Any], Config] = {}  # of this process, whose devices are taken to be alike


def capability() -> tuple[int, int]:
    """Of the current device, or EXECUTED without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else EXECUTED


def key(kernel: str, problem: "ConvProblem") -> str:
    """The name of one kernel's problem among measured choices."""
    parts = (problem.x_shape, problem.w_shape, problem.stride, problem.padding, problem.dilation)
    texts = ["x".join(map(str, part)) for part in parts]
    flags = "".join(letter for letter, on in (("p", problem.prologue), ("r", problem.relu)) if on)
    return "|".join((kernel, str(problem.dtype).removeprefix("torch."), problem.precision, *texts, flags or "-"))


def offered(
    kernel: str, options: Sequence[Config], device: tuple[int, int] | None = None, sixteen_bit: bool = True
) -> tuple[Config, ...]:
    """The configurations that the compile ledger did not reject for a device; all, where none would be left."""
    rejected = REJECTED.get((kernel, width(sixteen_bit), architecture(device or capability()).number), ())
    return tuple(c for c in options if str(c) not in rejected) or tuple(options)


def width(sixteen_bit: bool) -> str:
    """What a rejection holds for beside kernel and architecture."""
    return "16 bits" if sixteen_bit else "32 bits"


def choose(kernel: str, problem: "ConvProblem", options: Callable[[], Sequence[Config]]) -> Config:
    """The configuration to run ``kernel`` with; ``options`` gives them in order of preference."""
    if kernel in _forced:
        return _forced[kernel]
    found = _chosen.get((kernel, problem))
    if found is None:
        wanted = measured(key(kernel, problem))
        kept = offered(kernel, options(), sixteen_bit=problem.sixteen_bit)
        found = _chosen[kernel, problem] = next((c for c in kept if str(c) == wanted), kept[0])
    return found


def forget() -> None:
    """Asks ``measured`` again at the next question."""
    _chosen.clear()


@contextmanager
def forcing(kernel: str, config: Config) -> Iterator[None]:
    """Inside, ``kernel`` runs with ``config``: for measuring."""
    before = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before
