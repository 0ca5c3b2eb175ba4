"""conv_act in plain PyTorch: the definition of correct. Maths and bytes: README.md in this folder."""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..common.layout import absent, memory_format_of, stats_dtype


def forward(x, weight, bias, residual, relu: bool, stride, padding, dilation, groups: int) -> Tensor:
    wide = stats_dtype(x.dtype)
    z = torch.conv2d(x, weight, None, stride, padding, dilation, groups).to(wide)  # [N, K, P, Q]
    if bias is not None:
        z = z + bias.to(wide).view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual.to(wide)
    return (z.relu() if relu else z).to(x.dtype).contiguous(memory_format=memory_format_of(x))


def backward(
    grad, x, weight, out, relu: bool, stride, padding, dilation, groups: int,
    need_input: bool, need_weight: bool, need_bias: bool, need_residual: bool,
):  # fmt: skip
    dz = grad
    if relu:
        dz = torch.where(out > 0, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    dz = dz.contiguous(memory_format=memory_format_of(x))
    conv = (stride, padding, dilation, groups)
    return (
        conv2d_input(x.shape, weight, dz, *conv).contiguous(memory_format=memory_format_of(x))
        if need_input
        else absent(x),
        conv2d_weight(x, weight.shape, dz, *conv).contiguous(memory_format=memory_format_of(weight))
        if need_weight
        else absent(x),
        dz.to(stats_dtype(x.dtype)).sum((0, 2, 3)) if need_bias else absent(x),
        dz.clone() if need_residual else absent(x),
    )
