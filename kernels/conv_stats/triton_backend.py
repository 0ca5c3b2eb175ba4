"""conv_stats by the Triton kernels of kernels/conv, in the schema's signature."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of
from ..common.triton_conv import ConvProblem, require_dtype
from ..common.triton_launch import require
from ..conv.triton_run import convolution
from . import reference


def forward(x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool):
    require(x.device.type)
    require_dtype(x.dtype)
    if groups > 1:
        return _grouped(x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats)
    problem = ConvProblem.of(x, weight, stride, padding, dilation, scale, relu, stats)
    y, mean, var = convolution(problem, x, weight, (scale, center, shift))
    return y.contiguous(memory_format=memory_format_of(x)), mean, var


def _grouped(x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats) -> tuple[Tensor, ...]:
    """Grouped convolutions are the library's; the passes around it are ours."""
    a = reference._activated(x, scale, center, shift, relu)
    y = torch.conv2d(a, weight, None, stride, padding, dilation, groups)
    y = y.contiguous(memory_format=memory_format_of(x))
    if not stats:
        return y, absent(y), absent(y)
    wide = y.float()
    return y, wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
