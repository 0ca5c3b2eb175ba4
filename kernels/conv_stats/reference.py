"""conv_stats in plain PyTorch: the definition of correct. Maths and bytes: README.md in this folder."""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from ..common.layout import absent, memory_format_of, per_channel, plus, stats_dtype, times
from ..scale_shift_act import reference as pointwise


def _activated(x, scale, center, shift, relu: bool) -> Tensor:
    if scale is None:
        return x
    return pointwise.forward(x, scale, center, shift, None, None, None, None, relu)


def forward(x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool):
    a = _activated(x, scale, center, shift, relu)  # [N, C, H, W]; zero padding is applied after the prologue
    y = torch.conv2d(a, weight, None, stride, padding, dilation, groups)  # [N, K, P, Q]
    y = y.contiguous(memory_format=memory_format_of(x))
    if not stats:
        return y, absent(y), absent(y)
    wide = y.to(stats_dtype(y.dtype))  # statistics of the rounded y that is stored
    mean = wide.mean((0, 2, 3))
    return y, mean, (wide - per_channel(mean)).square().mean((0, 2, 3))


def stats_backward(grad_y, y, mean, grad_mean, grad_var) -> Tensor:
    """Total gradient of y: g + g_mean/n + 2·g_var·(y − mean)/n, with n = N·P·Q."""
    n = max(y.numel() // max(y.shape[1], 1), 1)
    wide = stats_dtype(y.dtype)
    total = torch.zeros(y.shape, dtype=wide, device=y.device) if grad_y is None else grad_y.to(wide)
    if grad_mean is not None:
        total = total + per_channel(grad_mean / n)
    if grad_var is not None:
        total = total + per_channel(2 * grad_var / n) * (y.to(wide) - per_channel(mean))
    return total.to(y.dtype).contiguous(memory_format=memory_format_of(y))


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool,
    addend: Tensor | None = None, factor: Tensor | None = None,
):  # fmt: skip
    grad_y = times(grad_y, factor)
    g = grad_y if grad_mean is None and grad_var is None else stats_backward(grad_y, y, mean, grad_mean, grad_var)
    a = _activated(x, scale, center, shift, relu)
    conv = (stride, padding, dilation, groups)
    grad_w = absent(x)
    if need_weight:
        grad_w = conv2d_weight(a, weight.shape, g, *conv).contiguous(memory_format=memory_format_of(weight))
    if not need_input:
        return absent(x), grad_w, absent(x), absent(x)
    da = conv2d_input(a.shape, weight, g, *conv).contiguous(memory_format=memory_format_of(x))
    if scale is None:
        return plus(da, addend), grad_w, absent(x), absent(x)
    dx, grad_scale, grad_shift, *_ = pointwise.backward(
        da, x, scale, center, shift, None, None, None, None, relu, False
    )
    return plus(dx, addend), grad_w, grad_scale, grad_shift
