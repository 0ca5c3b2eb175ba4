"""scale_shift_act_pool in Triton, in channels_last: the activated map is never written. Maths and bytes: README.md here.

A map [N, C, H, W] is a matrix [N·H·W, C] here, its pooled map [N·P·Q, C]. An element sees all windows that it lies in,
so the backward gathers and nothing is scattered.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_conv import affine_act, as_index, block_indices, inside, load_or_zero, needs_int64, pixel_of
from ..common.triton_launch import Config, Launch
from ..common.triton_sums import Tiles, part_and_columns, workspace, write_part
from ..scale_shift_act.triton_kernel import Coefficients, load_coefficients, named

FORWARD_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=width, num_warps=warps, num_stages=1)
    for elements, width, warps in ((1024, 64, 4), (512, 64, 4), (2048, 64, 8), (1024, 128, 4))
)
BACKWARD_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=64, PROGRAMS=programs, num_warps=warps, num_stages=1)
    for elements, programs, warps in ((2048, 1024, 8), (1024, 1024, 8))
)


@dataclass(frozen=True)
class PoolProblem:
    """A floor-mode pool with square windows over the activation of y [N, C, H, W]."""

    n: int
    c: int
    h: int
    w: int
    relu: bool
    kernel: int
    stride: int
    padding: int

    @classmethod
    def of(cls, y: Tensor, relu: bool, kernel: int, stride: int, padding: int) -> "PoolProblem":
        n, c, h, w = y.shape
        return cls(n, c, h, w, relu, kernel, stride, padding)

    @property
    def p(self) -> int:
        return (self.h + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def q(self) -> int:
        return (self.w + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def rows_in(self) -> int:
        return self.n * self.h * self.w

    @property
    def rows_out(self) -> int:
        return self.n * self.p * self.q

    @property
    def sizes(self) -> dict[str, int]:
        """Run-time arguments of every kernel."""
        return {"C": self.c, "H": self.h, "W": self.w, "P": self.p, "Q": self.q}

    @property
    def constants(self) -> dict[str, int | bool]:
        return {
            "KERNEL": self.kernel, "STRIDE": self.stride, "PADDING": self.padding, "RELU": self.relu,
            # the pooled map is larger where padding adds more windows than strides save
            "INT64": needs_int64(self.rows_in * self.c, self.rows_out * self.c),
        }  # fmt: skip


@triton.jit
def forward_kernel(
    y,  # [N·H·W, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    out,  # [N·P·Q, C]
    index,  # [N·P·Q, C] uint8
    M,  # N·P·Q
    C,
    H,
    W,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = max over the window of act(scale·(y − center) + shift), rounded as y is; index = its place in the window.

    The first maximum wins, a NaN beats numbers, and a later NaN an earlier one. A program owns one tile of out.
    Reads N·H·W·C elements (again, from the cache, where windows overlap), writes N·P·Q·C elements and as many bytes.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    rows = block_indices(part, BLOCK_M, INT64)
    image, p, q = pixel_of(rows, P, Q)
    top, left = p * STRIDE - PADDING, q * STRIDE - PADDING
    live, wide = rows < M, (columns < C)[None, :]
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    # where every value is −inf the first place inside the map is chosen
    place = tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0)
    chosen = tl.zeros([BLOCK_M, BLOCK_C], tl.int32) + place.to(tl.int32)[:, None]
    for kh in range(KERNEL):
        for kw in range(KERNEL):
            h, w = top + kh, left + kw
            valid = (live & inside(h, w, H, W))[:, None] & wide
            at = ((image * H + h) * W + w)[:, None] * C + columns[None, :]
            value = affine_act(load_or_zero(y + at, valid), a, mid, b, RELU)
            value = tl.where(valid, value.to(y.dtype.element_ty).to(tl.float32), float("-inf"))
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            chosen = tl.where(better, kh * KERNEL + kw, chosen)
    to = rows[:, None] * C + columns[None, :]
    mask = live[:, None] & wide
    tl.store(out + to, best.to(out.dtype.element_ty), mask=mask)
    tl.store(index + to, chosen.to(tl.uint8), mask=mask)


@triton.jit
def gather_kernel(
    y,  # [N·H·W, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    index,  # [N·P·Q, C] uint8
    out,  # [N·P·Q, C]
    M,  # N·P·Q
    C,
    H,
    W,
    P,
    Q,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = act(scale·(y − center) + shift) at the places that index names; NaN where it names one outside the map.

    A program owns one tile [BLOCK_M, BLOCK_C] of out. Reads N·P·Q·C bytes and as many elements of y, writes N·P·Q·C elements.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    rows = block_indices(part, BLOCK_M, INT64)
    image, p, q = pixel_of(rows, P, Q)
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    to = rows[:, None] * C + columns[None, :]
    place = load_or_zero(index + to, mask).to(tl.int32)
    h = (p * STRIDE - PADDING)[:, None] + place // KERNEL
    w = (q * STRIDE - PADDING)[:, None] + place % KERNEL
    valid = mask & inside(h, w, H, W)
    at = ((image * H)[:, None] + h) * W + w
    value = affine_act(load_or_zero(y + (at * C + columns[None, :]), valid), a, mid, b, RELU)
    value = tl.where(valid, value, float("nan"))
    tl.store(out + to, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad,  # [N·P·Q, C]
    index,  # [N·P·Q, C] uint8
    y,  # [N·H·W, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    grad_y,  # [N·H·W, C]
    sums,  # [parts, 2, C] float32: Σ dz·(y − center), Σ dz
    M,  # N·H·W
    C,
    H,
    W,
    P,
    Q,
    steps,  # tiles below each other that a program takes
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = Σ grad over the windows that chose the element, where the pre-activation is positive; grad_y = scale·dz; the sums.

    A program owns BLOCK_C channels of ``steps`` tiles of y below each other. An element lies in at most ⌈KERNEL / STRIDE⌉²
    windows. Reads N·H·W·C elements, N·P·Q·C elements and as many bytes (again, from the cache, where windows overlap), and
    writes N·H·W·C elements.
    """
    WINDOWS: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    part, columns = part_and_columns(C, BLOCK_C)
    wide = (columns < C)[None, :]
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    dot = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    last = tl.minimum((part + 1) * steps, tl.cdiv(M, BLOCK_M))
    for block in range(part * steps, last):
        rows = block_indices(block, BLOCK_M, INT64)
        live = rows < M
        mask = live[:, None] & wide
        at = rows[:, None] * C + columns[None, :]
        value = load_or_zero(y + at, mask)
        image, h, w = pixel_of(rows, H, W)
        bottom, right = (h + PADDING) // STRIDE, (w + PADDING) // STRIDE  # the last window over this element
        dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for i in range(WINDOWS):
            for j in range(WINDOWS):
                p, q = bottom - i, right - j
                kh, kw = h + PADDING - p * STRIDE, w + PADDING - q * STRIDE
                valid = (live & inside(p, q, P, Q) & (kh < KERNEL) & (kw < KERNEL))[:, None] & wide
                window = ((image * P + p) * Q + q)[:, None] * C + columns[None, :]
                chosen = load_or_zero(index + window, valid).to(tl.int32)
                here = valid & (chosen == (kh * KERNEL + kw)[:, None])
                dz += tl.where(here, load_or_zero(grad + window, valid).to(tl.float32), 0.0)
        if RELU:
            dz = tl.where(affine_act(value, a, mid, b, False) > 0.0, dz, 0.0)
        tl.store(grad_y + at, (a * dz).to(grad_y.dtype.element_ty), mask=mask)
        dot += dz * (value.to(tl.float32) - mid)
        total += dz
    part = as_index(part, INT64)
    write_part(sums, part, 0, 2, columns, C, dot)
    write_part(sums, part, 1, 2, columns, C, total)


def forward_launch(
    problem: PoolProblem, config: Config, y: Tensor, main: Coefficients, out: Tensor, index: Tensor
) -> Launch:
    tiles = Tiles.of(problem.rows_out, problem.c, config)
    arguments = {"y": y, **named(main), "out": out, "index": index, "M": problem.rows_out, **problem.sizes}
    constants = {**problem.constants, **tiles.constants}
    return Launch(forward_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages)


def gather_launch(
    problem: PoolProblem, config: Config, y: Tensor, main: Coefficients, index: Tensor, out: Tensor
) -> Launch:
    tiles = Tiles.of(problem.rows_out, problem.c, config)
    arguments = {"y": y, **named(main), "index": index, "out": out, "M": problem.rows_out, **problem.sizes}
    constants = {**problem.constants, **tiles.constants}
    return Launch(gather_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages)


def backward_launch(
    problem: PoolProblem, config: Config, grad: Tensor, index: Tensor, y: Tensor, main: Coefficients, grad_y: Tensor
) -> tuple[Launch, Tensor]:
    """(launch, workspace of its sums)."""
    tiles = Tiles.of(problem.rows_in, problem.c, config, config["PROGRAMS"])
    sums = workspace(tiles, 2, y)
    arguments = {
        "grad": grad, "index": index, "y": y, **named(main), "grad_y": grad_y, "sums": sums,
        "M": problem.rows_in, **problem.sizes, "steps": tiles.steps,
    }  # fmt: skip
    constants = {**problem.constants, **tiles.constants}
    return Launch(backward_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages), sums
