"""conv_stats by the Triton kernels of kernels/conv and of this folder, in the schema's signature."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of
from ..common.triton_conv import ConvProblem, require_dtype
from ..common.triton_launch import require
from ..conv.triton_run import convolution
from ..scale_shift_act import triton_backend as pointwise
from . import triton_stats
from .triton_gradients import backward

__all__ = ["backward", "forward"]


def forward(x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool):
    require(x.device.type)
    require_dtype(x.dtype)
    if groups > 1 or not x.numel():
        return _by_library(x, weight, scale, center, shift, relu, (stride, padding, dilation, groups), stats)
    problem = ConvProblem.of(x, weight, stride, padding, dilation, scale, relu, stats)
    y, mean, var = convolution(problem, x, weight, (scale, center, shift))
    return y.contiguous(memory_format=memory_format_of(x)), mean, var


def _by_library(x, weight, scale, center, shift, relu: bool, geometry, stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped and empty convolutions are the library's; the passes around it are ours."""
    nothing = (None,) * 4
    a = x if scale is None else pointwise.forward(x, scale, center, shift, *nothing, relu)
    y = torch.conv2d(a, weight, None, *geometry).contiguous(memory_format=memory_format_of(x))
    return y, *(triton_stats.stats(y) if stats else (absent(y), absent(y)))
