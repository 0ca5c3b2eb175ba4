"""An executor that compiles each launch ahead of time for sm_80 and runs the compiler's PTX on the launch's CPU tensors.

with executing_with(ptx_executor()):
    ...
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.backends.driver import decompose_descriptor

from emulation.compiling import compile_launch, jit_function, specialise
from emulation.errors import EmulationError
from emulation.memory import GuardedMemory
from emulation.ptx.machine import Machine
from emulation.ptx.ordering import Ordering
from emulation.ptx.parser import parse
from fastres.kernels.common.triton_launch import Launch

MACHINES = 64  # that are kept
THREADS = 1024  # that run side by side: as many blocks as fit


class PtxExecutor:
    """Runs launches as PTX. ``compiled``: the compiled kernels, one a launch. ``ambiguous``: stores to shared memory in
    which lanes of one warp disagree about one address (rounding of a reduction that isn't bitwise commutative)."""

    def __init__(self, arch: int, change: Callable[[str], str] | None, race_check: bool, early: bool) -> None:
        self.arch, self.change, self.race_check, self.early = arch, change, race_check, early
        self.compiled: list[Any] = []
        self.ambiguous = 0

    def __call__(self, launch: Launch) -> None:
        compiled = compile_launch(launch, self.arch)
        self.compiled.append(compiled)
        text = compiled.asm["ptx"]
        if self.change is not None:
            text = self.change(text)
        memory = GuardedMemory(launch.arguments)
        try:
            self.ambiguous += run_ptx(
                text, memory, launch.grid, 32 * compiled.metadata.num_warps, compiled.metadata.shared,
                self._values(launch), self.race_check, self.early,
            )  # fmt: skip
        except EmulationError as error:
            raise type(error)(f"{launch.name}: {error}") from error

    def _values(self, launch: Launch) -> list[Any]:
        """The kernel's parameters: what isn't constant, in order, and Triton's two scratch pointers."""
        signature = specialise(launch, self.arch)[0]
        values: list[Any] = []
        for name in jit_function(launch.kernel).arg_names:
            if signature[name] == "constexpr":
                continue
            value = launch.arguments[name]
            values += decompose_descriptor(value) if hasattr(value, "block_shape") else [value]
        return [*values, 0, 0]


_machines: dict[tuple[Any, ...], Machine] = {}


def run_ptx(
    text: str, memory: GuardedMemory, grid: tuple[int, ...], threads: int, shared: int, values: list[Any],
    race_check: bool = True, early: bool = False, entry: str | None = None, cooperative: bool = False,
) -> int:  # fmt: skip
    """Runs a kernel's PTX over a grid; returns the number of ambiguous stores (see PtxExecutor).

    values: tensors, integers, floats and structs as bytes, in the order of the kernel's parameters.
    cooperative: all blocks run side by side, since they may wait for each other.
    """
    whole = (*grid, 1, 1, 1)[:3]
    count, ambiguous = int(np.prod(whole)), 0
    memory.ordering = Ordering(count, threads) if cooperative else None
    width = count if cooperative else max(1, min(count, THREADS // threads))
    for first in range(0, count, width):
        blocks = min(width, count - first)
        key = (text, entry, threads, blocks, shared)
        if key not in _machines:
            while len(_machines) >= MACHINES:
                del _machines[next(iter(_machines))]
            _machines[key] = Machine(parse(text, entry), threads, blocks, shared)
        machine = _machines[key]
        for (name, kind, _), value in zip(machine.kernel.parameters, values, strict=True):
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            machine.registers.set_parameter(name, kind, number)
        with np.errstate(all="ignore"):
            machine.run(memory, first, whole, race_check, early, staggered=cooperative)
        ambiguous += machine.shared.ambiguous
    return ambiguous


def ptx_executor(
    arch: int = 80, change: Callable[[str], str] | None = None, race_check: bool = True, early: bool = False
) -> PtxExecutor:
    """change: what to do to the PTX text before it runs (to plant an error). race_check: of shared memory. early:
    asynchronous copies arrive at once, in place of as late as they may."""
    return PtxExecutor(arch, change, race_check, early)
