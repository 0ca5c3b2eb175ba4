"""conv_stats by the CUDA kernels of kernels/conv, in the schema's signature. Their operators (csrc/cuda/conv.h) check,
allocate and launch. What they don't serve goes to the library: groups, empty maps, filters beyond their limits."""

import torch
from torch import Tensor

from ..common.precision import tf32_allowed
from . import library

_ops = torch.ops.fastres


def serves(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether the kernels compute this convolution and its gradients."""
    if groups != 1 or not x.numel() or not weight.numel():
        return False
    return not _ops.conv_refusal_cuda(x, weight, stride, padding, dilation)


def forward(x, weight, scale, center, shift, relu: bool, stride, padding, dilation, groups: int, stats: bool):
    if not serves(x, weight, stride, padding, dilation, groups):
        return library.forward(x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats)
    epilogue, tf32 = (None, None, False), tf32_allowed(x.dtype)
    prologue = (scale, center, shift, relu)
    return _ops.conv_forward_cuda(x, weight, *prologue, *epilogue, stride, padding, dilation, stats, tf32)


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool,
    addend: Tensor | None = None, factor: Tensor | None = None,
):  # fmt: skip
    if not serves(x, weight, stride, padding, dilation, groups):
        return library.backward(
            grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
            relu, stride, padding, dilation, groups, need_input, need_weight, addend, factor,
        )  # fmt: skip
    # without a gradient of the variance y and its mean may be anything
    raw = (None, None) if grad_var is None else (y, mean)
    return _ops.conv_backward_cuda(
        grad_y, grad_mean, grad_var, x, weight, *raw, scale, center, shift,
        relu, stride, padding, dilation, need_input, need_weight, addend, factor, tf32_allowed(x.dtype),
    )  # fmt: skip
