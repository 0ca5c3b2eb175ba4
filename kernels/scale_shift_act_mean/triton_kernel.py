"""scale_shift_act_mean in Triton, in channels_last: a block's result is averaged where it is computed. Maths: README.md.

The backward is ``backward_kernel`` of scale_shift_act with MEAN.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_conv import affine, as_index, load_or_zero
from ..common.triton_launch import Config, Launch
from ..common.triton_sums import part_and_columns, sum_of_rows
from ..scale_shift_act.triton_kernel import (
    Coefficients,
    PointProblem,
    add_residual,
    load_coefficients,
    named,
    relu_keeping_nan,
)

# 7x7 positions are the usual map, so that 16 rows waste little; channels are many.
FORWARD_CONFIGS = tuple(
    Config.of(BLOCK_M=height, WIDTH=width, num_warps=warps, num_stages=2)
    for height, width, warps in ((16, 128, 4), (16, 64, 2), (32, 64, 4), (64, 64, 4))
)


@triton.jit
def forward_kernel(
    y,  # [N·image, C]
    scale,  # [C] float32, as center and shift
    center,
    shift,
    residual,  # [N·image, C] if RESIDUAL
    res_scale,  # [C] float32 if RESIDUAL == 2, as res_center and res_shift
    res_center,
    res_shift,
    out,  # [N, C]
    C,
    image,  # H·W
    inverse,  # 1 / image
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = mean over an image of act(scale·(y − center) + shift + R). A program owns BLOCK_C channels of one image.

    Reads N·image·C elements (twice as many with a residual) and writes N·C.
    """
    part, columns = part_and_columns(C, BLOCK_C)
    a, mid, b = load_coefficients(scale, center, shift, columns, C)
    if RESIDUAL == 2:
        ra, rmid, rb = load_coefficients(res_scale, res_center, res_shift, columns, C)
    first = as_index(part, INT64) * image
    lanes = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for start in range(0, image, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < image)[:, None] & (columns < C)[None, :]
        at = (first + rows)[:, None] * C + columns[None, :]
        z = affine(load_or_zero(y + at, mask), a, mid, b)
        if RESIDUAL == 1:
            z = add_residual(z, load_or_zero(residual + at, mask), 0.0, 0.0, 0.0, 1)
        if RESIDUAL == 2:
            z = add_residual(z, load_or_zero(residual + at, mask), ra, rmid, rb, 2)
        if RELU:
            z = relu_keeping_nan(z)
        lanes += tl.where(mask, z, 0.0)
    mean = sum_of_rows(lanes) * inverse
    tl.store(out + as_index(part, INT64) * C + columns, mean.to(out.dtype.element_ty), mask=columns < C)


def forward_launch(
    problem: PointProblem, config: Config, y: Tensor, main: Coefficients, residual: Tensor | None, other: Coefficients,
    out: Tensor,
) -> Launch:  # fmt: skip
    width = min(triton.next_power_of_2(max(problem.channels, 1)), config["WIDTH"])
    arguments = {
        "y": y, **named(main), "residual": residual, **named(other, "res_"), "out": out,
        "C": problem.channels, "image": problem.image, "inverse": 1.0 / problem.image,
    }  # fmt: skip
    constants = {**problem.constants, "BLOCK_M": config["BLOCK_M"], "BLOCK_C": width}
    grid = (out.shape[0] * triton.cdiv(problem.channels, width),)
    return Launch(forward_kernel, grid, arguments, constants, config.num_warps, config.num_stages)
