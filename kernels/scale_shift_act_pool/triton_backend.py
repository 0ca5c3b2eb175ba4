"""scale_shift_act_pool by Triton: allocates results in channels_last and launches the kernels of triton_kernel.py."""

import torch
from torch import Tensor

from ..common.layout import empty_channels_innermost, in_format_of
from ..common.triton_conv import channels_last
from ..common.triton_sums import merge_sums
from ..scale_shift_act.triton_backend import vectors
from .triton_kernel import (
    BACKWARD_CONFIGS,
    FORWARD_CONFIGS,
    PoolProblem,
    backward_launch,
    forward_launch,
    gather_launch,
)


def forward(y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    problem = PoolProblem.of(y, relu, kernel, stride, padding)
    shape = (problem.n, problem.c, problem.p, problem.q)
    out, index = empty_channels_innermost(y, shape), empty_channels_innermost(y, shape, torch.uint8)
    main = vectors(scale, center, shift)
    forward_launch(problem, FORWARD_CONFIGS[0], channels_last(y), main, out, index).run()
    return in_format_of(out, y), in_format_of(index, y)


def backward(
    grad, index, y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    problem = PoolProblem.of(y, relu, kernel, stride, padding)
    grad_y = empty_channels_innermost(y)
    maps = (channels_last(grad), channels_last(index), channels_last(y))
    launch, sums = backward_launch(problem, BACKWARD_CONFIGS[0], *maps, vectors(scale, center, shift), grad_y)
    launch.run()
    merge, (grad_scale, grad_shift) = merge_sums(sums)
    merge.run()
    return in_format_of(grad_y, y), grad_scale, grad_shift


def gather(y, scale, center, shift, index, relu: bool, kernel: int, stride: int, padding: int) -> Tensor:
    problem = PoolProblem.of(y, relu, kernel, stride, padding)
    out = empty_channels_innermost(y, tuple(index.shape))
    main = vectors(scale, center, shift)
    gather_launch(problem, FORWARD_CONFIGS[0], channels_last(y), main, channels_last(index), out).run()
    return in_format_of(out, y)
