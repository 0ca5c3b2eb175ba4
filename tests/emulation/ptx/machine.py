"""Runs a parsed kernel: several blocks side by side, all their threads at once in numpy.

Threads that go different ways are groups; the group with the smallest program counter runs until it meets another one,
so that they join again as early as possible. Threads that sleep, because they wait for another block, do so until no
other thread can go on. Every instruction is turned into a function once and then called for every
group of blocks of every launch.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from emulation.errors import EmulationError, Hang, Unsupported
from emulation.memory import GuardedMemory
from emulation.ptx import bits, warps  # noqa: F401  (they register their instructions)
from emulation.ptx.accesses import Memories
from emulation.ptx.arithmetic import BUILDERS
from emulation.ptx.parser import Instruction, Kernel, shared_width
from emulation.ptx.registers import Mask, Registers
from emulation.ptx.shared import SharedMemory

LIMIT = 5_000_000  # instructions of one group of blocks
PATIENCE = 100  # times that sleeping threads look in vain for what other blocks do


class Machine:
    """A kernel for ``blocks`` blocks of ``threads`` threads with ``shared`` bytes of dynamic shared memory each."""

    def __init__(self, kernel: Kernel, threads: int, blocks: int, shared: int) -> None:
        self.kernel, self.threads, self.blocks = kernel, threads, blocks
        self.registers = Registers(kernel, threads, blocks)
        self.shared = SharedMemory(
            max(kernel.dynamic_shared + shared, kernel.static_shared), blocks, threads, shared_width(kernel)
        )
        self.memories = Memories(self.registers, self.shared)
        self.steps = [self._build(i) for i in kernel.code]
        self.executed = np.zeros(len(self.steps), np.int64)
        self.end = len(self.steps)

    def _build(self, i: Instruction) -> tuple[Any, bool, Any, str]:
        """(guard, negated, what to do, kind); kind is "" for what only changes data."""
        guard = self.registers.source(i.guard, "pred") if i.guard else None
        try:
            if i.op == "bra":
                return guard, i.negated, self._target(i), "branch"
            if i.op in ("ret", "exit"):
                return guard, i.negated, None, "exit"
            if i.op == "nanosleep":
                return guard, i.negated, None, "sleep"
            if i.op == "trap":
                return guard, i.negated, self._trap, ""
            if i.op in ("bar", "barrier"):
                return guard, i.negated, *self._barrier(i)
            if i.op in BUILDERS:
                return guard, i.negated, BUILDERS[i.op](self.registers, i), ""
            return guard, i.negated, self.memories.build(i), ""
        except KeyError:
            raise Unsupported(f"the emulation doesn't know the instruction {i.text}") from None
        except (Unsupported, ValueError, IndexError, StopIteration) as error:
            raise Unsupported(f"the emulation doesn't know the instruction {i.text}: {error}") from error

    def _target(self, i: Instruction) -> int:
        if i.operands[0] not in self.kernel.labels:
            raise Unsupported("branch")
        return self.kernel.labels[i.operands[0]]

    @staticmethod
    def _trap(mask: Mask) -> None:
        raise EmulationError("trap: an assertion of the kernel doesn't hold")

    def _barrier(self, i: Instruction) -> tuple[Callable[[Mask], None] | None, str]:
        if i.has("warp"):
            return (lambda mask: self.shared.warp_barrier(self.memories.threads(mask))), ""
        counts = [o for o in i.operands[1:] if int(o, 0) != self.threads]
        if i.has("red", "arrive", "cluster") or counts or i.operands[:1] not in ((), ("0",)):
            raise Unsupported("barrier")
        return None, "barrier"

    def run(
        self, memory: GuardedMemory, first: int, grid: tuple[int, int, int], race_check: bool, early: bool,
        staggered: bool = False,
    ) -> None:  # fmt: skip
        """Runs the blocks from number ``first`` on, x fastest. ``staggered``: each starts when those before it end or wait."""
        self.registers.place_blocks(first, grid)
        self.memories.memory = memory
        self.memories.programs[:] = first + np.arange(self.registers.threads) // self.threads
        self.shared.reset(race_check, early)
        groups: dict[int, Mask] = {} if staggered else {0: True}
        later = range(self.blocks) if staggered else range(0)
        block_of = np.arange(self.registers.threads) // self.threads
        waiting: dict[int, Mask] = {}
        sleeping: dict[int, Mask] = {}
        budget, in_vain = LIMIT, 0
        while groups or waiting or sleeping or later:
            if not groups and waiting and self._release(groups, waiting, sleeping):
                in_vain = 0
            if not groups and later:
                groups[0] = block_of == later[0]
                later = later[1:]
            if not groups:
                in_vain += 1
                if in_vain > PATIENCE:
                    at = self.kernel.code[min(sleeping) - 1]
                    raise Hang(f"blocks wait for each other for ever, at {at.text} ({at.place})")
                groups.update(sleeping)
                sleeping.clear()
            budget = self._run_group(groups, waiting, sleeping, budget)

    def _run_group(
        self, groups: dict[int, Mask], waiting: dict[int, Mask], sleeping: dict[int, Mask], budget: int
    ) -> int:
        """Runs the hindmost group up to a branch, a barrier, a sleep, its end or the next group."""
        pc = min(groups)
        mask = groups.pop(pc)
        following = min(groups) if groups else -1
        steps, executed = self.steps, self.executed
        while pc != following:
            if pc >= self.end:
                return budget
            guard, negated, action, kind = steps[pc]
            active = mask if guard is None else _guarded(mask, guard, negated)
            executed[pc] += 1
            budget -= 1
            if budget < 0:
                raise Hang(f"more than {LIMIT} instructions, at {self.kernel.code[pc].text}")
            if kind == "":
                if active is not None:
                    try:
                        action(active)
                    except EmulationError as error:
                        i = self.kernel.code[pc]
                        raise type(error)(f"{error}; {i.text} ({i.place})") from error
                pc += 1
                continue
            pc += 1
            if active is None:
                continue
            rest = None if active is mask else _without(mask, active)
            if kind == "branch":
                self._join(groups, action, active)
            elif kind == "barrier":
                self._join(waiting, pc, active)
            elif kind == "sleep":
                self._join(sleeping, pc, active)
            if rest is not None:
                self._join(groups, pc, rest)
            return budget
        self._join(groups, pc, mask)
        return budget

    def _join(self, groups: dict[int, Mask], pc: int, mask: Mask) -> None:
        other = groups.get(pc)
        if other is not None and mask is not True:
            mask = mask | other
            mask = True if mask.all() else mask
        groups[pc] = mask

    def _release(self, groups: dict[int, Mask], waiting: dict[int, Mask], sleeping: dict[int, Mask]) -> bool:
        """Lets the blocks go on of which all threads are at a barrier; whether there are any."""
        arrived = [self._by_block(m) for m in waiting.values()]
        if len(waiting) > 1 and (np.sum(arrived, axis=0) > 1).any():
            raise EmulationError("threads of one block wait at different barriers")
        ordering = self.memories.memory.ordering
        if not sleeping:
            self.shared.barrier()
            if ordering is not None:
                ordering.barrier(np.any([np.zeros(self.blocks, bool), *arrived], axis=0))
            groups.update(waiting)
            waiting.clear()
            return bool(groups)
        free = ~np.any([self._by_block(m) for m in sleeping.values()], axis=0)
        if not any((blocks & free).any() for blocks in arrived):
            return False
        self.shared.barrier(free)
        if ordering is not None:
            ordering.barrier(free & np.any(arrived, axis=0))
        threads = np.repeat(free, self.threads)
        for pc, mask in list(waiting.items()):
            going = np.broadcast_to(mask, self.registers.threads) & threads
            if going.any():
                self._join(groups, pc, going)
                staying = np.broadcast_to(mask, self.registers.threads) & ~threads
                del waiting[pc]
                if staying.any():
                    waiting[pc] = staying
        return True

    def _by_block(self, mask: Mask) -> np.ndarray:
        """[blocks]: whether any thread of the block is in the mask."""
        return np.broadcast_to(mask, self.registers.threads).reshape(self.blocks, -1).any(axis=1)

    def counts(self) -> Counter[str]:
        """How often each opcode ran, over all groups of blocks so far."""
        total: Counter[str] = Counter()
        for i, count in zip(self.kernel.code, self.executed, strict=True):
            total[".".join(i.parts)] += int(count)
        return total


def _guarded(mask: Mask, guard: np.ndarray, negated: bool) -> Mask:
    """The part of ``mask`` where the guard holds: ``mask`` itself if that is all of it, None if it is nothing."""
    flags = ~guard if negated else guard.copy()
    if mask is True:
        return True if flags.all() else flags if flags.any() else None
    flags &= mask
    if not flags.any():
        return None
    return mask if (flags == mask).all() else flags


def _without(mask: Mask, taken: Mask) -> Mask:
    return ~taken if mask is True else mask & ~taken
