"""The registers of all threads that run side by side: one row a register, seen as whatever type an instruction asks for."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from emulation.errors import Unsupported
from emulation.ptx.parser import BITS, Kernel
from fastres.kernels.common.triton_interpreter import round_bfloat16, widen_bfloat16

# True (all threads) or one flag a thread; numpy's ``where``.
Mask = Any
Values = np.ndarray

TYPES: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64, "tf32": np.float32}  # fmt: skip
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Registers:
    """``threads`` per block, ``blocks`` blocks; ``place_blocks`` says which blocks of the grid they are."""

    def __init__(self, kernel: Kernel, threads: int, blocks: int) -> None:
        self.threads = threads * blocks
        names: dict[int, list[str]] = {}
        for name, bits in kernel.registers.items():
            names.setdefault(bits, []).append(name)
        self.rows: dict[str, Values] = {}
        for bits, some in names.items():
            bank = np.zeros((len(some), self.threads), UNSIGNED[bits])
            self.rows.update(zip(some, bank, strict=True))
        self.symbols, at = dict(kernel.shared), 0  # addresses in shared memory, and in that of the parameters
        for name, _, size in kernel.parameters:
            self.symbols[name] = at
            at += -(-size // 16) * 16
        self.parameters = np.zeros(at, np.uint8)
        thread = np.tile(np.arange(threads, dtype=np.uint32), blocks)
        zero, one = np.zeros(self.threads, np.uint32), np.ones(self.threads, np.uint32)
        self.ctaid = {axis: np.zeros(self.threads, np.uint32) for axis in "xyz"}
        self.nctaid = {axis: np.zeros(self.threads, np.uint32) for axis in "xyz"}
        self.special = {
            "%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%laneid": thread % np.uint32(32),
            "%warpid": thread // np.uint32(32), "%ntid.x": one * np.uint32(threads), "%ntid.y": one, "%ntid.z": one,
            **{f"%ctaid.{a}": v for a, v in self.ctaid.items()},
            **{f"%nctaid.{a}": v for a, v in self.nctaid.items()},
        }  # fmt: skip
        self.lane = np.arange(self.threads) % 32
        self.warp_base = np.arange(self.threads) // 32 * 32

    def place_blocks(self, first: int, grid: tuple[int, int, int]) -> None:
        threads = int(self.special["%ntid.x"][0])
        number = first + np.arange(self.threads) // threads
        self.ctaid["x"][:] = number % grid[0]
        self.ctaid["y"][:] = number // grid[0] % grid[1]
        self.ctaid["z"][:] = number // (grid[0] * grid[1])
        for axis, size in zip("xyz", grid, strict=True):
            self.nctaid[axis][:] = size

    def set_parameter(self, name: str, kind: str, value: Any) -> None:
        buffer = self.parameters[self.symbols[name] :]
        if isinstance(value, bytes):  # a struct
            buffer[: len(value)] = np.frombuffer(value, np.uint8)
            return
        dtype = TYPES[kind if kind[0] == "f" else "s" + kind[1:] if value < 0 else "u" + kind[1:]]
        buffer[: np.dtype(dtype).itemsize] = np.array([value]).astype(dtype).view(np.uint8)

    def source(self, operand: str, kind: str) -> Values:
        """A live view of an operand as ``kind``: a row of a register, or a constant."""
        dtype = np.dtype(TYPES[kind])
        row = self.rows.get(operand)
        if row is None:
            row = self.special.get(operand)
        if row is None:
            return self._constant(operand, kind, dtype)
        if row.dtype == np.bool_ or dtype == np.bool_:
            if row.dtype != dtype:
                raise Unsupported(f"predicate {operand} as {kind}")
            return row
        if row.itemsize == dtype.itemsize:
            return row.view(dtype)
        if row.itemsize > dtype.itemsize:  # the low part
            return row.view(dtype)[:: row.itemsize // dtype.itemsize]
        raise Unsupported(f"register {operand} is narrower than {kind}")

    def _constant(self, operand: str, kind: str, dtype: np.dtype) -> Values:
        if operand in self.symbols:
            return np.array(self.symbols[operand], dtype)
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", operand):
            value = np.array(int(operand[2:], 16), np.uint32).view(np.float32)
            return value.astype(dtype) if dtype.kind == "f" else value.view(dtype)
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", operand):
            return np.array(int(operand[2:], 16), np.uint64).view(np.float64).astype(dtype)
        try:
            number = int(operand.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {operand}") from None
        if dtype == np.bool_:
            return np.array(number != 0)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array(number & ((1 << 8 * dtype.itemsize) - 1), unsigned).view(dtype)

    def target(self, operand: str, kind: str) -> Values:
        """The row of a destination register of exactly the size of ``kind``."""
        row = self.rows.get(operand)
        if row is None:
            raise Unsupported(f"destination {operand}")
        dtype = np.dtype(TYPES[kind])
        if row.itemsize != dtype.itemsize or (row.dtype == np.bool_) != (dtype == np.bool_):
            raise Unsupported(f"destination {operand} isn't of the size of {kind}")
        return row.view(dtype)

    def writer(self, operand: str, kind: str) -> Callable[[Values, Mask], None]:
        """Writes values of ``kind`` to a register that may be wider: signed types are extended by their sign."""
        if operand == "_":
            return lambda values, mask: None
        row = self.rows.get(operand)
        if row is None:
            raise Unsupported(f"destination {operand}")
        dtype = np.dtype(TYPES[kind])
        if row.itemsize < dtype.itemsize:
            raise Unsupported(f"destination {operand} is narrower than {kind}")
        if row.itemsize == dtype.itemsize:
            view = row.view(dtype)
            return lambda values, mask: np.copyto(view, values, where=mask)
        wide = row.view(f"{'i' if dtype.kind == 'i' else 'u'}{row.itemsize}")
        narrow = dtype if dtype.kind in "iu" else np.dtype(f"u{dtype.itemsize}")
        return lambda values, mask: np.copyto(wide, values.view(narrow).astype(wide.dtype), where=mask)

    def reader(self, operand: str, kind: str) -> Callable[[], Values]:
        """An operand's values in a type that computes: bfloat16 widened to float32, pairs as [threads, 2]."""
        if kind == "bf16":
            row = self._half_constant(operand, kind)
            return lambda: widen_bfloat16(row)
        if kind in ("f16x2", "bf16x2"):
            bits = np.atleast_1d(self.source(operand, "b32"))
            pairs = bits.view(np.float16 if kind == "f16x2" else np.uint16).reshape(-1, 2)
            return (lambda: pairs) if kind == "f16x2" else (lambda: widen_bfloat16(pairs))
        row = self._half_constant(operand, kind) if kind == "f16" else self.source(operand, kind)
        return lambda: row

    def _half_constant(self, operand: str, kind: str) -> Values:
        if operand in self.rows or operand.lower().startswith("0f"):
            return self.source(operand, kind)
        return self.source(operand, "b16").view(TYPES[kind])

    def float_writer(self, operand: str, kind: str) -> Callable[[Values, Mask], None]:
        """Rounds computed values to ``kind`` and writes them."""
        if kind == "bf16":
            put = self.writer(operand, kind)
            return lambda values, mask: put(round_bfloat16(values), mask)
        if kind in ("f16x2", "bf16x2"):
            pairs = self.target(operand, "b32").view(np.float16 if kind == "f16x2" else np.uint16).reshape(-1, 2)
            convert = (lambda v: v.astype(np.float16)) if kind == "f16x2" else round_bfloat16

            def write(values: Values, mask: Mask) -> None:
                np.copyto(pairs, convert(values), where=mask if mask is True else mask[:, None])

            return write
        row, dtype = self.target(operand, kind), TYPES[kind]
        return lambda values, mask: np.copyto(row, values.astype(dtype, copy=False), where=mask)


def size_of(kind: str) -> int:
    return BITS[kind] // 8
