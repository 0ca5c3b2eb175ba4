"""conv_stats by the CPU's own convolution engine (kernels/conv): the prologue on the way in, statistics on the way out,
and both gradients with the statistics' share computed while they read. What the engine has no kernel for, strided input
gradients and weight gradients without AMX or of few channels, goes to the library's convolution."""

import torch

from ..common import pointwise
from ..common.layout import absent, memory_format_of, plus, times

_aten = torch.ops.aten
_ops = torch.ops.fastres


def forward(x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool):
    return _ops.conv_forward_native(x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats)


def serves_input_gradient(weight, stride, padding, dilation, groups: int) -> bool:
    """Whether the engine computes the gradient of the input: an ordinary convolution of the gradient."""
    reach = [d * (r - 1) for d, r in zip(dilation, weight.shape[2:], strict=True)]
    return list(stride) == [1, 1] and groups == 1 and all(p <= r for p, r in zip(padding, reach, strict=True))


def serves_weight_gradient(weight, groups: int) -> bool:
    """Whether the engine computes the gradient of the weights."""
    from fastres import _library

    return groups == 1 and weight.shape[1] >= 16 and _library.has_weight_gradient()


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool, addend=None, factor=None,
):  # fmt: skip
    if grad_y is None:
        grad_y = torch.zeros_like(y)
    grad_y = times(grad_y, factor)
    has_stats = grad_mean is not None or grad_var is not None
    affine, conv = (scale, center, shift, relu), (stride, padding, dilation, groups)
    args = (grad_y, y, mean if has_stats else None, grad_mean, grad_var, x, weight, *affine, *conv)
    own_input = need_input and serves_input_gradient(weight, stride, padding, dilation, groups)
    own_weight = need_weight and serves_weight_gradient(weight, groups)
    grad_w = _ops.conv_weight_gradient_native(*args) if own_weight else absent(x)
    dx = grad_scale = grad_shift = absent(x)
    if own_input:
        dx, grad_scale, grad_shift = _ops.conv_input_gradient_native(*args)
    rest_input, rest_weight = need_input and not own_input, need_weight and not own_weight
    if rest_input or rest_weight:
        g = pointwise.stats_backward(grad_y, y, mean, grad_mean, grad_var) if has_stats else grad_y
        a = pointwise.prologue(x, *affine) if scale is not None and rest_weight else x
        da, dw, _ = _aten.convolution_backward(
            g, a, weight, None, stride, padding, dilation, False, [0, 0], groups, [rest_input, rest_weight, False]
        )
        if rest_weight:
            grad_w = dw
        if rest_input:
            dx = da.contiguous(memory_format=memory_format_of(x))
            if scale is not None:
                dx, grad_scale, grad_shift = pointwise.prologue_backward_(dx, x, *affine)
    if need_weight:
        grad_w = grad_w.contiguous(memory_format=memory_format_of(weight))
    if scale is None or not need_input:
        grad_scale = grad_shift = absent(x)
    return plus(dx, addend) if need_input else dx, grad_w, grad_scale, grad_shift
