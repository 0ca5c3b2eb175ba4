"""Loads, stores, asynchronous copies, matrix loads and atomics."""

from collections.abc import Callable
from typing import Any

import numpy as np

from emulation.errors import Misaligned, Unsupported
from emulation.memory import GuardedMemory
from emulation.ptx.arithmetic import Run
from emulation.ptx.parser import Instruction, elements, split_address
from emulation.ptx.registers import TYPES, Mask, Registers, Values, size_of
from emulation.ptx.shared import UNSIGNED, SharedMemory
from emulation.ptx.warps import whole_warps


class Memories:
    """What instructions address: global memory (of the launch that runs) and the blocks' shared memory."""

    def __init__(self, registers: Registers, shared: SharedMemory) -> None:
        self.registers, self.shared = registers, shared
        self.memory = GuardedMemory({})
        self.programs = np.zeros(registers.threads, np.int32)  # the number of each thread's block
        self.every = np.arange(registers.threads)

    def threads(self, mask: Mask) -> Values:
        return self.every if mask is True else np.flatnonzero(mask)

    def address(self, operand: str) -> Callable[[Values], Values]:
        base, offset = split_address(operand)
        r = self.registers
        if base in r.symbols:
            constant = np.int64(r.symbols[base] + offset)
            return lambda threads: np.full(len(threads), constant)
        if base not in r.rows:
            raise Unsupported(f"address {operand}")
        row = r.rows[base]
        return lambda threads: row[threads].astype(np.int64) + offset

    def build(self, i: Instruction) -> Run:
        builders = {"ld": self._load, "ldu": self._load, "st": self._store, "cp": self._copy, "ldmatrix": self._matrices,
                    "atom": self._atomic, "red": self._atomic, "prefetch": self._nothing, "fence": self._fence,
                    "membar": self._fence, "createpolicy": self._nothing, "griddepcontrol": self._nothing}  # fmt: skip
        return builders[i.op](i)

    @staticmethod
    def _nothing(i: Instruction) -> Run:
        return lambda mask: None

    def _fence(self, i: Instruction) -> Run:
        if not i.has("gl", "gpu", "sys"):
            return self._nothing(i)

        def fence(mask: Mask) -> None:
            if self.memory.ordering is not None:
                self.memory.ordering.fence(self.threads(mask))

        return fence

    def _space(self, i: Instruction) -> str:
        for part in i.parts[1:]:
            name = part.partition("::")[0]
            if name in ("param", "global", "shared"):
                if part not in ("param", "global", "shared", "shared::cta"):
                    raise Unsupported(f"state space .{part}")
                return name
            if name in ("local", "const"):
                raise Unsupported(f"state space .{part}")
        raise Unsupported("generic addressing")

    def _load(self, i: Instruction) -> Run:
        space, width = self._space(i), size_of(i.type)
        writers = [self.registers.writer(name, i.type) for name in elements(i.operands[0])]
        dtype, count, total = TYPES[i.type], len(writers), self.registers.threads
        if space == "param":
            return self._load_parameter(i, writers, width)
        address, anew = self.address(i.operands[1]), i.has("volatile", "relaxed", "acquire")

        def load(mask: Mask) -> None:
            threads = self.threads(mask)
            at = address(threads)
            if space == "shared":
                got = self.shared.read(at, threads, width, count)
            else:
                if anew and self.memory.ordering is not None:
                    self.memory.ordering.look(at, threads)
                self.memory.load(at, width * count, self.programs[threads])
                got = self.memory.gather(at, width, count)
            for number, write in enumerate(writers):
                value = np.ascontiguousarray(got[:, number])
                if mask is not True:
                    spread = np.zeros(total, value.dtype)
                    spread[threads] = value
                    value = spread
                write(value.view(dtype), mask)

        return load

    def _load_parameter(self, i: Instruction, writers: list[Callable[[Values, Mask], None]], width: int) -> Run:
        """From a parameter, or from a place in a struct of which a register has the address."""
        r, total, dtype = self.registers, self.registers.threads, TYPES[i.type]
        base, offset = split_address(i.operands[1])
        row = r.rows.get(base)
        if row is not None:
            address = row
        elif base in r.symbols:
            address = np.broadcast_to(np.uint64(r.symbols[base]), total)
        else:
            raise Unsupported(f"address {i.operands[1]}")
        view = np.lib.stride_tricks.sliding_window_view(r.parameters, width)  # bytes at every address

        def load(mask: Mask) -> None:
            at = np.minimum(address, np.uint64(len(view) - 1)).astype(np.int64) + offset  # whatever idle threads have
            at = np.clip(at, 0, len(view) - 1 - width * (len(writers) - 1))
            for number, write in enumerate(writers):
                write(view[at + number * width].view(dtype)[:, 0], mask)

        return load

    def _values(self, operands: list[str], kind: str) -> Callable[[Values], Values]:
        """[lanes, count] unsigned values of store operands."""
        dtype, total = UNSIGNED[size_of(kind)], self.registers.threads
        rows = [self.registers.source(o, kind if kind[0] != "f" or o.lower().startswith("0f") else "b" + kind[1:])
                for o in operands]  # fmt: skip
        full = [np.broadcast_to(row.view(dtype), total) for row in rows]
        return lambda threads: np.stack([row[threads] for row in full], axis=1)

    def _store(self, i: Instruction) -> Run:
        space, address = self._space(i), self.address(i.operands[0])
        values = self._values(elements(i.operands[1]), i.type)

        def store(mask: Mask) -> None:
            threads = self.threads(mask)
            at, data = address(threads), values(threads)
            if space == "shared":
                self.shared.write(at, threads, data)
            else:
                self.memory.store(at, data.itemsize * data.shape[1], data, self.programs[threads])
                self.memory.scatter(at, data)
                if self.memory.ordering is not None:
                    self.memory.ordering.store(threads)

        return store

    def _copy(self, i: Instruction) -> Run:
        if not i.has("async") or i.has("bulk", "mbarrier"):
            raise Unsupported("copy")
        if i.has("commit_group"):
            return lambda mask: self.shared.commit(self.threads(mask))
        if i.has("wait_group", "wait_all"):
            groups = -1 if i.has("wait_all") else int(i.operands[0], 0)
            return lambda mask: self.shared.wait(self.threads(mask), groups)
        target, source, size = self.address(i.operands[0]), self.address(i.operands[1]), int(i.operands[2], 0)
        amount = self.registers.source(i.operands[3], "u32") if len(i.operands) > 3 else np.array(size, np.uint32)
        amounts = np.broadcast_to(amount, self.registers.threads)

        def copy(mask: Mask) -> None:
            threads = self.threads(mask)
            taken = amounts[threads]
            if ((taken != 0) & (taken != size)).any():
                raise Unsupported("cp.async that fills a part with zeros")
            data, reads = np.zeros((len(threads), size), np.uint8), taken != 0
            at = source(threads)
            if (at[reads] % size).any():
                raise Misaligned(f"cp.async of {size} bytes")
            self.memory.load(at[reads], size, self.programs[threads[reads]])
            data[reads] = self.memory.gather(at[reads], 1, size)
            self.shared.issue(target(threads), threads, data)

        return copy

    def _matrices(self, i: Instruction) -> Run:
        if not i.has("m8n8") or i.type != "b16":
            raise Unsupported("shape")
        self._space(i)
        writers = [self.registers.writer(name, "b32") for name in elements(i.operands[0])]
        address, count, transposed = self.address(i.operands[1]), len(writers), i.has("trans")
        gives = self.registers.lane < 8 * count  # lanes whose addresses count: row 8·j + n of matrix j

        def load(mask: Mask) -> None:
            whole_warps(self.registers, mask, "ldmatrix")
            threads = self.threads(gives if mask is True else mask & gives)
            rows = self.shared.read(address(threads), threads, 2, 8).reshape(-1, count, 8, 8)
            if transposed:
                rows = rows.transpose(0, 1, 3, 2)
            # Lane 4·g + q holds columns 2q and 2q + 1 of row g of each matrix.
            words = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, count, 32)
            for number, write in enumerate(writers):
                value = words[:, number].reshape(-1)
                if mask is not True:
                    spread = np.zeros(self.registers.threads, np.uint32)
                    spread[mask] = value
                    value = spread
                write(np.ascontiguousarray(value), mask)

        return load

    def _atomic(self, i: Instruction) -> Run:
        """One lane after the other, in the order of the threads: an order that the hardware doesn't promise."""
        returns = i.op == "atom"
        operands = i.operands[1:] if returns else i.operands
        space, address, kind = self._space(i), self.address(operands[0]), i.type
        names = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        op = next((p for p in i.parts if p in names), "")
        if kind in ("f16x2", "bf16x2", "bf16") or op in ("", "inc", "dec") or any(o.startswith("{") for o in operands):
            raise Unsupported("atomic")
        values = [np.broadcast_to(self.registers.source(o, kind), self.registers.threads) for o in operands[1:]]
        write = self.registers.writer(i.operands[0], kind) if returns else None
        dtype, width = TYPES[kind], size_of(kind)
        combine: dict[str, Callable[[Any, Any], Any]] = {
            "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor, "exch": lambda old, new: new}  # fmt: skip

        def run(mask: Mask) -> None:
            threads = self.threads(mask)
            at, old = address(threads), np.zeros(self.registers.threads, dtype)
            if space == "global":
                self.memory.atomic(at, width)
                if self.memory.ordering is not None:
                    self.memory.ordering.atomic(at, threads)
            for lane, thread in enumerate(threads):
                one, here = at[lane : lane + 1], threads[lane : lane + 1]
                if space == "shared":
                    before = self.shared.atomic_read(one, here, width).view(dtype)[0, 0]
                else:
                    before = self.memory.gather(one, width, 1).view(dtype)[0, 0]
                old[thread] = before
                if op == "cas":
                    after = values[1][thread] if before == values[0][thread] else before
                else:
                    after = combine[op](before, values[0][thread])
                data = np.array([[after]], dtype).view(UNSIGNED[width])
                if space == "shared":
                    self.shared.atomic_write(one, here, data)
                else:
                    self.memory.scatter(one, data)
            if write is not None:
                write(old, mask)

        return run
