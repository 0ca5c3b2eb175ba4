"""scale_shift_act by Triton: allocates results in channels_last and launches the kernels of triton_kernel.py."""

from dataclasses import replace

import torch
from torch import Tensor

from ..common.layout import absent, empty_channels_innermost, in_format_of
from ..common.triton_conv import channels_last
from ..common.triton_sums import merge_sums
from .triton_kernel import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    Coefficients,
    PointProblem,
    backward_launch,
    forward_launch,
)


def vector(v: Tensor | None) -> Tensor | None:
    """A [C] vector as kernels read it: dense float32."""
    return None if v is None else v.to(torch.float32).contiguous()


def vectors(*values: Tensor | None) -> Coefficients:
    scale, center, shift = (vector(v) for v in values)
    return scale, center, shift


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> Tensor:
    problem = PointProblem.of(y, residual, res_scale, relu)
    out = empty_channels_innermost(y)
    main, other = vectors(scale, center, shift), vectors(res_scale, res_center, res_shift)
    rest = None if residual is None else channels_last(residual)
    forward_launch(problem, FORWARD_CONFIGS[0], channels_last(y), main, rest, other, out).run()
    return in_format_of(out, y)


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> tuple[Tensor, ...]:
    problem = PointProblem.of(y, residual, res_scale, relu, keep=need_residual and relu)
    return run_backward(
        problem, channels_last(grad), y, scale, center, shift, residual, res_scale, res_center, res_shift
    )


def masked(grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> tuple[Tensor, ...]:
    """(dz, grad_scale, grad_shift, grad_res_scale, grad_res_shift): the backward of those who scale dz themselves."""
    problem = replace(PointProblem.of(y, residual, res_scale, relu), keep_residual=False, masked=True)
    dz, on_scale, on_shift, _, *others = run_backward(
        problem, channels_last(grad), y, scale, center, shift, residual, res_scale, res_center, res_shift
    )
    return dz, on_scale, on_shift, *others


def run_backward(
    problem: PointProblem, grad, y, scale, center, shift, residual, res_scale, res_center, res_shift
) -> tuple[Tensor, ...]:
    """The six gradients, from that of the result ([N, C, H, W]) or of its means ([N, C]), dense."""
    grad_y = empty_channels_innermost(y)
    # Without a ReLU the residual's values enter only through a sum against them.
    used = problem.residual == 2 or (problem.residual == 1 and problem.relu)
    rest = channels_last(residual) if used else None
    grad_residual = empty_channels_innermost(residual) if problem.keep_residual else None
    main, other = vectors(scale, center, shift), vectors(res_scale, res_center, res_shift)
    launch, sums = backward_launch(
        problem, BACKWARD_CONFIGS[0], grad, channels_last(y), main, rest, other, grad_y, grad_residual
    )
    launch.run()
    merge, totals = merge_sums(sums)
    merge.run()
    grad_y = in_format_of(grad_y, y)
    kept = absent(y) if grad_residual is None else in_format_of(grad_residual, residual)
    res_sums = totals[2:] if problem.residual == 2 else (absent(y), absent(y))
    return (grad_y, *totals[:2], kept, *res_sums)
