"""conv_stats around the library's convolution (oneDNN, cuDNN) with fused pointwise passes before and after it."""

import torch

from ..common import pointwise
from ..common.layout import absent, memory_format_of, plus, times

_aten = torch.ops.aten


def forward(
    x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool, passes=pointwise
):
    """``passes``: who computes what is around the convolution."""
    a = x if scale is None else passes.prologue(x, scale, center, shift, relu)
    y = _aten.convolution(a, weight, None, stride, padding, dilation, False, [0, 0], groups)
    y = y.contiguous(memory_format=memory_format_of(x))
    mean, var = passes.stats(y) if stats else (absent(y), absent(y))
    return y, mean, var


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool, addend=None, factor=None,
    passes=pointwise,
):  # fmt: skip
    g = grad_y = times(grad_y, factor)
    if grad_mean is not None or grad_var is not None:
        g = passes.stats_backward(grad_y, y, mean, grad_mean, grad_var)
    a = x
    if scale is not None and need_weight:  # the activated input was not saved: it is recomputed
        a = passes.prologue(x, scale, center, shift, relu)
    da, grad_w, _ = _aten.convolution_backward(
        g, a, weight, None, stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, False]
    )
    grad_w = grad_w.contiguous(memory_format=memory_format_of(weight)) if need_weight else absent(x)
    if not need_input:
        return absent(x), grad_w, absent(x), absent(x)
    if scale is None:
        return plus(da.contiguous(memory_format=memory_format_of(x)), addend), grad_w, absent(x), absent(x)
    dx, grad_scale, grad_shift = passes.prologue_backward_(da, x, scale, center, shift, relu)
    return plus(dx, addend), grad_w, grad_scale, grad_shift
