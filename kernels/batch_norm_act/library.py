"""batch_norm_act from ATen's batch normalisation, whose backward takes the statistics that the forward saved."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of
from ..scale_shift_act import library as pointwise
from ..scale_shift_act.reference import pre_activation
from .reference import inverse_deviation
from .reference import statistics as wide_statistics


def forward(y, weight, bias, residual, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not y.numel():
        mean, var = wide_statistics(y)
        return torch.empty_like(y).contiguous(memory_format=memory_format_of(y)), mean, var
    wide = y if y.dtype == torch.float64 else y.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = weight * inverse_deviation(var, eps)
    return pointwise.forward(y, scale, mean, bias, residual, None, None, None, relu), mean, var


def backward(
    grad, y, weight, bias, residual, mean, var, eps: float, relu: bool, need_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverse = inverse_deviation(var, eps)
    dz = grad
    if relu:
        z = pre_activation(y, weight * inverse, mean, bias, residual, None, None, None)
        dz = torch.where(z > 0, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
    fmt = memory_format_of(y)
    keep = residual is not None and need_residual and relu
    grad_residual = dz.contiguous(memory_format=memory_format_of(residual)) if keep else absent(y)
    if not y.numel():
        empty = torch.empty_like(y).contiguous(memory_format=fmt)
        return empty, torch.zeros_like(weight), torch.zeros_like(bias), grad_residual
    if y.device.type == "cpu":  # where ATen adds up 16-bit gradients in 16 bits
        dz, y = dz.to(weight.dtype), y.to(weight.dtype)
    dz, y = dz.contiguous(memory_format=fmt), y.contiguous(memory_format=fmt)
    grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        dz, y, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )
    return grad_y.to(grad.dtype).contiguous(memory_format=fmt), grad_weight, grad_bias, grad_residual
