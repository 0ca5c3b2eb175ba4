"""THE table, part two: fake kernels (shapes, dtypes and layouts without data), one per op, shared by all backends."""

import torch
from torch import Tensor

from fastres.kernels.common.layout import absent, empty_like, memory_format_of, stats_dtype


def _vector(like: Tensor, channels: int) -> Tensor:
    return torch.empty(channels, dtype=stats_dtype(like.dtype), device=like.device)


def conv_stats(x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats):
    y = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    y = y.contiguous(memory_format=memory_format_of(x))
    if not stats:
        return y, absent(y), absent(y)
    return y, _vector(y, weight.shape[0]), _vector(y, weight.shape[0])


def conv_stats_backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu, stride, padding, dilation, groups, need_input, need_weight, addend=None, factor=None,
):  # fmt: skip
    grad_w = empty_like(weight) if need_weight else absent(x)
    if not need_input:
        return absent(x), grad_w, absent(x), absent(x)
    if scale is None:
        return empty_like(x), grad_w, absent(x), absent(x)
    return empty_like(x), grad_w, _vector(x, x.shape[1]), _vector(x, x.shape[1])


def scale_shift_act(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu):
    return empty_like(y)


def scale_shift_act_backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu, need_residual
):
    c = y.shape[1]
    main = (empty_like(y), _vector(y, c), _vector(y, c))
    if residual is not None and res_scale is not None:
        return (*main, empty_like(residual), _vector(y, c), _vector(y, c))
    keep = residual is not None and need_residual and relu
    return (*main, empty_like(residual) if keep else absent(y), absent(y), absent(y))


def scale_shift_act_masked(grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu):
    c = y.shape[1]
    both = residual is not None and res_scale is not None
    other = (_vector(y, c), _vector(y, c)) if both else (absent(y), absent(y))
    return empty_like(y), _vector(y, c), _vector(y, c), *other


scale_shift_act_masked_triton = scale_shift_act_masked_cuda = scale_shift_act_masked
scale_shift_act_mean_masked_triton = scale_shift_act_masked


def scale_shift_act_mean(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu):
    return torch.empty(y.shape[:2], dtype=y.dtype, device=y.device)


scale_shift_act_mean_backward = scale_shift_act_backward


def batch_norm_act(y, weight, bias, residual, eps, relu):
    return empty_like(y), _vector(y, y.shape[1]), _vector(y, y.shape[1])


def batch_norm_act_backward(grad, y, weight, bias, residual, mean, var, eps, relu, need_residual):
    keep = residual is not None and need_residual and relu
    vectors = _vector(y, y.shape[1]), _vector(y, y.shape[1])
    return empty_like(y), *vectors, empty_like(residual) if keep else absent(y)


def pooled_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Output size of a floor-mode pool."""
    return (size + 2 * padding - kernel) // stride + 1


def scale_shift_act_pool(y, scale, center, shift, relu, kernel, stride, padding):
    n, c, h, w = y.shape
    shape = (n, c, pooled_size(h, kernel, stride, padding), pooled_size(w, kernel, stride, padding))
    return empty_like(y, shape), empty_like(y, shape, torch.uint8)


def scale_shift_act_pool_backward(grad, index, y, scale, center, shift, relu, kernel, stride, padding):
    return empty_like(y), _vector(y, y.shape[1]), _vector(y, y.shape[1])


def scale_shift_act_pool_gather(y, scale, center, shift, index, relu, kernel, stride, padding):
    return empty_like(y, tuple(index.shape))


def conv_act(x, weight, bias, residual, relu, stride, padding, dilation, groups):
    out = torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)
    return out.contiguous(memory_format=memory_format_of(x))


def conv_act_backward(
    grad, x, weight, out, relu, stride, padding, dilation, groups, need_input, need_weight, need_bias, need_residual
):
    return (
        empty_like(x) if need_input else absent(x),
        empty_like(weight) if need_weight else absent(x),
        _vector(x, weight.shape[0]) if need_bias else absent(x),
        empty_like(x, tuple(out.shape)) if need_residual else absent(x),
    )


def scale_shift_act_backward_native_(grad, y, scale, center, shift, relu):
    return _vector(y, y.shape[1]), _vector(y, y.shape[1])


def channel_stats_native(y):
    return _vector(y, y.shape[1]), _vector(y, y.shape[1])


def channel_stats_backward_native(grad_y, y, mean, grad_mean, grad_var):
    return empty_like(y)


def conv_kernel_native(kernel, x, weight, bias, residual, relu, stride, padding, dilation, groups):
    return conv_act(x, weight, bias, residual, relu, stride, padding, dilation, groups)


conv_forward_native = conv_stats


def conv_input_gradient_native(
    grad_y, y, mean, grad_mean, grad_var, x, weight, scale, center, shift, relu, stride, padding, dilation, groups
):
    channels = 0 if scale is None else x.shape[1]
    return empty_like(x), _vector(x, channels), _vector(x, channels)


def conv_weight_gradient_native(
    grad_y, y, mean, grad_mean, grad_var, x, weight, scale, center, shift, relu, stride, padding, dilation, groups
):
    return empty_like(weight)


def conv_refusal_cuda(x, weight, stride, padding, dilation):
    return ""


def conv_forward_cuda(
    x, weight, scale, center, shift, prologue_relu, bias, residual, relu, stride, padding, dilation, stats, tf32
):
    return conv_stats(x, weight, scale, center, shift, relu, stride, padding, dilation, 1, stats)


def conv_backward_cuda(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu, stride, padding, dilation, need_input, need_weight, addend, factor, tf32,
):  # fmt: skip
    grads = (grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift)
    return conv_stats_backward(*grads, relu, stride, padding, dilation, 1, need_input, need_weight)
