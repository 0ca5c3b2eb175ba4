"""Statistics of a map's channels in Triton, and their gradient: the passes after a convolution that has no epilogue.

A map [N, C, H, W] in channels_last is a matrix [M, C] here, M = N·H·W. Maths: README.md in this folder.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.layout import empty_channels_innermost, in_format_of
from ..common.triton_conv import as_index, block_indices, channels_last, load_channels, load_or_zero, needs_int64
from ..common.triton_launch import Config, Launch
from ..common.triton_sums import Tiles, part_and_columns, sum_of_rows
from ..conv.triton_run import merged

STATS_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=64, PROGRAMS=programs, num_warps=warps, num_stages=2)
    for elements, programs, warps in ((2048, 1024, 4), (1024, 2048, 4), (4096, 1024, 8))
)
BACKWARD_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=width, num_warps=warps, num_stages=1)
    for elements, width, warps in ((2048, 128, 4), (1024, 128, 4), (4096, 256, 8))
)


@triton.jit
def statistics_kernel(
    y,  # [M, C]
    counts,  # [programs] float32: the program's rows
    parts,  # [programs, 2, C] float32: mean and M2 = Σ (y − mean)² of the program's rows
    M,
    C,
    steps,  # tiles below each other that a program takes
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One reading of y, M·C elements. A program owns BLOCK_C channels of ``steps`` tiles below each other.

    Every element of the tile keeps the mean and M2 of what passed it (Welford); they are merged at the end. Values are taken
    relative to the program's first row, so that a running mean loses no digits where |mean| is much larger than the deviation.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    origin = as_index(part, INT64) * steps * BLOCK_M * C + columns
    pivot = load_or_zero(y + origin, columns < C).to(tl.float32)
    count = tl.zeros([BLOCK_M, 1], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    last = tl.minimum((part + 1) * steps, tl.cdiv(M, BLOCK_M))
    for block in range(part * steps, last):
        rows = block_indices(block, BLOCK_M, INT64)
        live = (rows < M)[:, None]
        at = rows[:, None] * C + columns[None, :]
        value = load_or_zero(y + at, live & (columns < C)[None, :]).to(tl.float32) - pivot[None, :]
        count += live.to(tl.float32)
        deviation = tl.where(live, value - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)
        m2 += deviation * tl.where(live, value - mean, 0.0)
    rows_here = sum_of_rows(count)  # [1]
    joint = sum_of_rows(mean * count) / rows_here  # [BLOCK_C]
    apart = mean - joint[None, :]
    joint_m2 = sum_of_rows(tl.where(count > 0.0, m2 + count * apart * apart, 0.0))
    to = parts + as_index(part, INT64) * 2 * C + columns
    tl.store(to, joint + pivot, mask=columns < C)
    tl.store(to + C, joint_m2, mask=columns < C)
    lanes = tl.arange(0, BLOCK_C)
    tl.store(counts + part + lanes, rows_here + tl.zeros([BLOCK_C], tl.float32), mask=columns == 0)


@triton.jit
def statistics_backward_kernel(
    grad_y,  # [M, C] or None
    y,  # [M, C], if there is a grad_var
    mean,  # [C] float32, if there is a grad_var
    grad_mean,  # [C] float32 or None
    grad_var,  # [C] float32 or None
    out,  # [M, C]
    M,
    C,
    inverse,  # 1 / M
    HAS_GRAD: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_VAR: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = grad_y + grad_mean / M + 2·grad_var·(y − mean) / M. A program owns one tile [BLOCK_M, BLOCK_C].

    Reads 2·M·C elements (those that are there) and writes M·C.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    lanes = columns < C
    rows = block_indices(part, BLOCK_M, INT64)
    mask = (rows < M)[:, None] & lanes[None, :]
    at = rows[:, None] * C + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if HAS_GRAD:
        total = load_or_zero(grad_y + at, mask).to(tl.float32)
    if HAS_MEAN:
        total += (load_channels(grad_mean, columns, lanes) * inverse)[None, :]
    if HAS_VAR:
        slope = 2.0 * load_channels(grad_var, columns, lanes) * inverse
        apart = load_or_zero(y + at, mask).to(tl.float32) - load_channels(mean, columns, lanes)[None, :]
        total = tl.fma(slope[None, :] + tl.zeros_like(apart), apart, total)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def statistics_launch(tiles: Tiles, config: Config, y: Tensor, counts: Tensor, parts: Tensor) -> Launch:
    arguments = {"y": y, "counts": counts, "parts": parts, "M": tiles.rows, "C": tiles.channels, "steps": tiles.steps}
    constants = {"INT64": needs_int64(tiles.rows * tiles.channels), **tiles.constants}
    return Launch(statistics_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages)


def stats(y: Tensor, config: Config = STATS_CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] float32 each, of y [N, C, H, W]; NaN for an empty map."""
    y = channels_last(y)
    n, c, h, w = y.shape
    tiles = Tiles.of(n * h * w, c, config, config["PROGRAMS"])
    counts = torch.empty(tiles.parts, dtype=torch.float32, device=y.device)
    parts = counts.new_empty((tiles.parts, 2, c))
    statistics_launch(tiles, config, y, counts, parts).run()
    return merged(counts, parts)


def stats_backward(
    grad_y: Tensor | None, y: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
) -> Tensor:
    """Gradient of y from the gradients of y itself, of its mean and of its variance; in the format of y."""
    n, c, h, w = y.shape
    config = BACKWARD_CONFIGS[0]
    tiles, out = Tiles.of(n * h * w, c, config), empty_channels_innermost(y)
    vectors = {
        name: None if v is None else v.to(torch.float32).contiguous()
        for name, v in (("mean", mean), ("grad_mean", grad_mean), ("grad_var", grad_var))
    }
    arguments = {
        "grad_y": None if grad_y is None else channels_last(grad_y), "y": channels_last(y), **vectors, "out": out,
        "M": tiles.rows, "C": c, "inverse": 1.0 / max(tiles.rows, 1),
    }  # fmt: skip
    constants = {
        "HAS_GRAD": grad_y is not None, "HAS_MEAN": grad_mean is not None, "HAS_VAR": grad_var is not None,
        "INT64": needs_int64(tiles.rows * c), **tiles.constants,
    }  # fmt: skip
    Launch(statistics_backward_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages).run()
    return in_format_of(out, y)
