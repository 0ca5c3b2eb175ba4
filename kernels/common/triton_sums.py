"""Sums over the rows of a matrix, channel by channel, in two stages without atomics: the same bits at every run.

Stage one is part of a pointwise kernel: program ``part`` adds up its own rows and writes one row of a workspace
[parts, sums, C]. Stage two, :func:`merge_sums_kernel`, adds the parts. Both cuts depend on shapes alone.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import Config, Launch


@dataclass(frozen=True)
class Tiles:
    """How a matrix [rows, channels] is cut: into tiles [BLOCK_M, BLOCK_C], of which a program takes ``steps`` below each
    other. ``Tiles.of`` chooses the tile from the number of its elements; narrow matrices get taller tiles."""

    rows: int
    channels: int
    BLOCK_M: int
    BLOCK_C: int
    steps: int = 1

    @classmethod
    def of(cls, rows: int, channels: int, config: Config, programs: int | None = None) -> "Tiles":
        """Tiles of ``config["ELEMENTS"]`` elements and at most ``config["WIDTH"]`` columns; about ``programs`` programs, or
        one a tile."""
        width = min(triton.next_power_of_2(max(channels, 1)), config["WIDTH"])
        height = max(config["ELEMENTS"] // width, 1)
        tiles = cls(rows, channels, height, width)
        if programs is None:
            return tiles
        wanted = max(triton.cdiv(programs, tiles.columns), 1)
        return cls(rows, channels, height, width, max(triton.cdiv(triton.cdiv(rows, height), wanted), 1))

    @property
    def columns(self) -> int:
        return triton.cdiv(self.channels, self.BLOCK_C)

    @property
    def parts(self) -> int:
        """Programs below each other: rows of a workspace."""
        return triton.cdiv(self.rows, self.BLOCK_M * self.steps)

    @property
    def grid(self) -> tuple[int]:
        """One dimension, columns fastest: programs that run at the same time then read memory that lies together."""
        return (self.parts * self.columns,)

    @property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_C": self.BLOCK_C}


@triton.jit
def part_and_columns(C, BLOCK_C: tl.constexpr):
    """(part, columns [BLOCK_C]) that this program owns, in the order of ``Tiles.grid``."""
    program = tl.program_id(0)
    tiles = tl.cdiv(C, BLOCK_C)
    return program // tiles, (program % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def sum_of_rows(lanes):
    """Σ over rows of [M, N] -> [N], as a tree: M values lose no more digits than log₂ M additions do.

    (``tl.sum`` is the same on a GPU; Triton's interpreter adds in a row.)
    """
    return tl.reduce(lanes, 0, _add)


@triton.jit
def write_part(sums, part, which, SUMS: tl.constexpr, columns, C, lanes):
    """sums[part, which, columns] = Σ over the rows of ``lanes`` [BLOCK_M, BLOCK_C]."""
    tl.store(sums + (part * SUMS + which) * C + columns, sum_of_rows(lanes), mask=columns < C)


@triton.jit
def _merged(sums, which, parts, C, columns, SUMS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Σ over parts of sums[part, which, columns], [BLOCK_C]."""
    lanes = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (rows < parts) & (columns[None, :] < C)
        lanes += tl.load(sums + (rows * SUMS + which) * C + columns[None, :], mask=mask, other=0.0)
    return sum_of_rows(lanes)


@triton.jit
def merge_sums_kernel(
    sums,  # [parts, SUMS, C] float32
    out_0,  # [C] float32, as the others; those that are not asked for are None
    out_1,
    out_1_again,  # a second copy of out_1
    out_2,
    parts,
    C,
    SUMS: tl.constexpr,  # 2 or 3
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Second stage of all sums of a pointwise backward. A program owns BLOCK_C channels.

    Reads parts·SUMS·C·4 bytes and writes SUMS·C·4 (one vector more where a copy is asked for).
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = columns < C
    tl.store(out_0 + columns, _merged(sums, 0, parts, C, columns, SUMS, BLOCK_P, BLOCK_C), mask=mask)
    second = _merged(sums, 1, parts, C, columns, SUMS, BLOCK_P, BLOCK_C)
    tl.store(out_1 + columns, second, mask=mask)
    if SUMS == 3:
        tl.store(out_1_again + columns, second, mask=mask)
        tl.store(out_2 + columns, _merged(sums, 2, parts, C, columns, SUMS, BLOCK_P, BLOCK_C), mask=mask)


def workspace(tiles: Tiles, sums: int, like: Tensor) -> Tensor:
    """[parts, sums, C] float32, uninitialised."""
    return torch.empty((tiles.parts, sums, tiles.channels), dtype=torch.float32, device=like.device)


def merge_sums(sums: Tensor) -> tuple[Launch, tuple[Tensor, ...]]:
    """(launch, results) for a workspace of two sums -> (out_0, out_1), or of three -> (out_0, out_1, out_2, out_1 again)."""
    parts, count, channels = sums.shape
    outs = tuple(torch.empty(channels, dtype=torch.float32, device=sums.device) for _ in range(2 * count - 2))
    out_0, out_1, out_2, again = outs if count == 3 else (*outs, None, None)
    # Where there are many parts, fewer columns a program: one memory sector, and more programs to share the work.
    block_c = min(triton.next_power_of_2(max(channels, 1)), 32 if parts <= 512 else 8)
    block_p = min(triton.next_power_of_2(max(parts, 1)), 2048 // block_c)
    arguments = {
        "sums": sums, "out_0": out_0, "out_1": out_1, "out_1_again": again, "out_2": out_2, "parts": parts, "C": channels,
    }  # fmt: skip
    constants = {"SUMS": count, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return Launch(merge_sums_kernel, (triton.cdiv(channels, block_c),), arguments, constants), outs
