"""batch_norm_act in plain PyTorch: the definition of correct. Maths and bytes: README.md in this folder."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of, per_channel, stats_dtype
from ..scale_shift_act import reference as pointwise


def inverse_deviation(var: Tensor, eps: float) -> Tensor:
    return (var + eps).rsqrt()


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] each; NaN of an empty map."""
    wide = y.to(stats_dtype(y.dtype))
    mean = wide.mean((0, 2, 3))
    return mean, (wide - per_channel(mean)).square().mean((0, 2, 3))


def forward(y, weight, bias, residual, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = statistics(y)
    scale = weight * inverse_deviation(var, eps)
    return pointwise.forward(y, scale, mean, bias, residual, None, None, None, relu), mean, var


def backward(
    grad, y, weight, bias, residual, mean, var, eps: float, relu: bool, need_residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverse = inverse_deviation(var, eps) if y.numel() else torch.zeros_like(var)  # an empty sum is 0
    scale = weight * inverse
    wide = y.to(scale.dtype) - per_channel(mean)
    dz = grad.to(scale.dtype)
    if relu:
        z = pointwise.pre_activation(y, scale, mean, bias, residual, None, None, None)
        dz = torch.where(z > 0, dz, torch.zeros((), dtype=dz.dtype, device=y.device))
    total, against = dz.sum((0, 2, 3)), (dz * wide).sum((0, 2, 3))
    rows = max(y.shape[0] * y.shape[2] * y.shape[3], 1)
    drift = per_channel(against / rows * (inverse * inverse)) * wide
    grad_y = per_channel(scale) * (dz - per_channel(total / rows) - drift)

    def like(t: Tensor, map_: Tensor) -> Tensor:
        return t.to(map_.dtype).contiguous(memory_format=memory_format_of(map_))

    keep = residual is not None and need_residual and relu
    return like(grad_y, y), against * inverse, total, like(dz, residual) if keep else absent(y)
