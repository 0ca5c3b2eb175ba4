"""scale_shift_act in Triton: one pass over the maps each way, in channels_last. Maths and bytes: README.md in this folder.

A map [N, C, H, W] is a matrix [M, C] here, M = N·H·W.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_conv import affine, as_index, block_indices, load_channels, load_or_zero, needs_int64
from ..common.triton_launch import Config, Launch
from ..common.triton_sums import Tiles, part_and_columns, workspace, write_part

# Elements of a tile, and its widest row. 8 or 16 elements a thread: enough loads in flight, few enough registers.
FORWARD_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=width, num_warps=warps, num_stages=1)
    for elements, width, warps in ((2048, 128, 4), (1024, 128, 4), (4096, 256, 8), (2048, 256, 4))
)
# PROGRAMS: how many share the reduction. The workspace stays small, and every multiprocessor has several.
BACKWARD_CONFIGS = tuple(
    Config.of(ELEMENTS=elements, WIDTH=width, PROGRAMS=programs, num_warps=warps, num_stages=stages)
    for elements, width, programs, warps, stages in (
        (2048, 64, 1024, 8, 1), (1024, 64, 2048, 4, 2), (2048, 128, 1024, 8, 1), (1024, 128, 2048, 4, 1),
    )
)  # fmt: skip


@dataclass(frozen=True)
class PointProblem:
    """[rows, channels] of ``image`` rows an image; which terms there are."""

    rows: int
    channels: int
    image: int
    residual: int = 0  # 0: none, 1: added as it is, 2: with its own coefficients
    relu: bool = True
    mean: bool = False  # whether the gradient is that of the images' means, [N, C]
    keep_residual: bool = False  # whether its gradient is written
    masked: bool = False  # whether dz is written for all gradients that are multiples of it

    @classmethod
    def of(
        cls, y: Tensor, residual: Tensor | None, res_scale: Tensor | None, relu: bool, mean: bool = False, keep=False
    ) -> "PointProblem":
        n, c, h, w = y.shape
        kind = 0 if residual is None else 1 if res_scale is None else 2
        return cls(n * h * w, c, h * w, kind, relu, mean, kind == 2 or (kind == 1 and keep))

    @property
    def sums(self) -> int:
        return 3 if self.residual == 2 else 2

    @property
    def constants(self) -> dict[str, int | bool]:
        return {"RESIDUAL": self.residual, "RELU": self.relu, "INT64": needs_int64(self.rows * self.channels)}


@triton.jit
def load_coefficients(scale, center, shift, columns, C):
    """(scale, center, shift) of the columns as float32 rows [1, BLOCK_C]."""
    mask = columns < C
    return (
        load_channels(scale, columns, mask)[None, :],
        load_channels(center, columns, mask)[None, :],
        load_channels(shift, columns, mask)[None, :],
    )


@triton.jit
def add_residual(z, r, scale, center, shift, RESIDUAL: tl.constexpr):
    """z + R, R as RESIDUAL says."""
    if RESIDUAL == 2:
        z += affine(r, scale, center, shift)
    if RESIDUAL == 1:
        z += r.to(tl.float32)
    return z


@triton.jit
def relu_keeping_nan(z):
    """max(z, 0), but a NaN stays one."""
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def forward_kernel(
    y,  # [M, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    residual,  # [M, C] if RESIDUAL
    res_scale,  # [C] float32 if RESIDUAL == 2, as res_center and res_shift
    res_center,
    res_shift,
    out,  # [M, C]
    M,
    C,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = act(scale·(y − center) + shift + R). A program owns one tile [BLOCK_M, BLOCK_C].

    Reads M·C elements (2·M·C with a residual) and writes M·C.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    rows = block_indices(part, BLOCK_M, INT64)
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    z = affine(load_or_zero(y + at, mask), a, mid, b)
    if RESIDUAL == 1:
        z = add_residual(z, load_or_zero(residual + at, mask), 0.0, 0.0, 0.0, 1)
    if RESIDUAL == 2:
        ra, rmid, rb = load_coefficients(res_scale, res_center, res_shift, columns, C)
        z = add_residual(z, load_or_zero(residual + at, mask), ra, rmid, rb, 2)
    if RELU:
        z = relu_keeping_nan(z)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad,  # [M, C], or with MEAN [M / image, C]
    y,  # [M, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    residual,  # [M, C] if RESIDUAL == 2 or (RESIDUAL and RELU)
    res_scale,  # [C] float32 if RESIDUAL == 2, as res_center and res_shift
    res_center,
    res_shift,
    grad_y,  # [M, C]
    grad_residual,  # [M, C] if KEEP_RESIDUAL
    sums,  # [parts, 3 if RESIDUAL == 2 else 2, C] float32: Σ dz·(y − center), Σ dz, Σ dz·(residual − res_center)
    M,
    C,
    steps,  # tiles below each other that a program takes
    image,  # rows of an image, with MEAN
    inverse,  # 1 / image, with MEAN
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    KEEP_RESIDUAL: tl.constexpr,
    MASKED: tl.constexpr,
    MEAN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = grad where the pre-activation is positive; grad_y = scale·dz, grad_residual = [res_scale·]dz, and the sums.

    With MASKED grad_y is dz itself, which stands for both.

    A program owns BLOCK_C channels of ``steps`` tiles below each other. Sums are kept for each element of the tile and added up
    at the end. Reads 2·M·C elements (3·M·C with a residual; M·C less with MEAN) and writes M·C (2·M·C with KEEP_RESIDUAL).
    """
    SUMS: tl.constexpr = 3 if RESIDUAL == 2 else 2
    part, columns = part_and_columns(C, BLOCK_C)
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    if RESIDUAL == 2:
        ra, rmid, rb = load_coefficients(res_scale, res_center, res_shift, columns, C)
    dot = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    res_dot = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    last = tl.minimum((part + 1) * steps, tl.cdiv(M, BLOCK_M))
    for block in range(part * steps, last):
        rows = block_indices(block, BLOCK_M, INT64)
        mask = (rows < M)[:, None] & (columns < C)[None, :]
        at = rows[:, None] * C + columns[None, :]
        value = load_or_zero(y + at, mask)
        if MEAN:
            from_image = (rows // image)[:, None] * C + columns[None, :]
            dz = load_or_zero(grad + from_image, mask).to(tl.float32) * inverse
        else:
            dz = load_or_zero(grad + at, mask).to(tl.float32)
        if RESIDUAL == 2:
            r = load_or_zero(residual + at, mask)
        if RELU:
            z = affine(value, a, mid, b)
            if RESIDUAL == 1:
                z = add_residual(z, load_or_zero(residual + at, mask), 0.0, 0.0, 0.0, 1)
            if RESIDUAL == 2:
                z = add_residual(z, r, ra, rmid, rb, 2)
            dz = tl.where(z > 0.0, dz, 0.0)
        to_y = dz
        if not MASKED:
            to_y = a * dz
        tl.store(grad_y + at, to_y.to(grad_y.dtype.element_ty), mask=mask)
        dot += dz * (value.to(tl.float32) - mid)
        total += dz
        if RESIDUAL == 2:
            res_dot += dz * (r.to(tl.float32) - rmid)
        if KEEP_RESIDUAL:
            kept = dz
            if RESIDUAL == 2:
                kept = ra * dz
            tl.store(grad_residual + at, kept.to(grad_residual.dtype.element_ty), mask=mask)
    part = as_index(part, INT64)
    write_part(sums, part, 0, SUMS, columns, C, dot)
    write_part(sums, part, 1, SUMS, columns, C, total)
    if RESIDUAL == 2:
        write_part(sums, part, 2, SUMS, columns, C, res_dot)


Coefficients = tuple[Tensor | None, Tensor | None, Tensor | None]


def named(coefficients: Coefficients, prefix: str = "") -> dict[str, Tensor | None]:
    """(scale, center, shift) by the names that kernels give them."""
    return {f"{prefix}{name}": v for name, v in zip(("scale", "center", "shift"), coefficients, strict=True)}


def forward_launch(
    problem: PointProblem, config: Config, y: Tensor, main: Coefficients, residual: Tensor | None, other: Coefficients,
    out: Tensor,
) -> Launch:  # fmt: skip
    tiles = Tiles.of(problem.rows, problem.channels, config)
    arguments = {
        "y": y, **named(main), "residual": residual, **named(other, "res_"), "out": out,
        "M": problem.rows, "C": problem.channels,
    }  # fmt: skip
    constants = {**problem.constants, **tiles.constants}
    return Launch(forward_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages)


def backward_launch(
    problem: PointProblem, config: Config, grad: Tensor, y: Tensor, main: Coefficients, residual: Tensor | None,
    other: Coefficients, grad_y: Tensor, grad_residual: Tensor | None,
) -> tuple[Launch, Tensor]:  # fmt: skip
    """(launch, workspace of its sums)."""
    tiles = Tiles.of(problem.rows, problem.channels, config, config["PROGRAMS"])
    sums = workspace(tiles, problem.sums, y)
    arguments = {
        "grad": grad, "y": y, **named(main), "residual": residual, **named(other, "res_"),
        "grad_y": grad_y, "grad_residual": grad_residual, "sums": sums,
        "M": problem.rows, "C": problem.channels, "steps": tiles.steps,
        "image": problem.image, "inverse": 1.0 / max(problem.image, 1),
    }  # fmt: skip
    constants = {
        **problem.constants, **tiles.constants, "KEEP_RESIDUAL": problem.keep_residual, "MASKED": problem.masked,
        "MEAN": problem.mean,
    }  # fmt: skip
    return Launch(backward_kernel, tiles.grid, arguments, constants, config.num_warps, config.num_stages), sums
