"""The functions a fused network's forward calls."""

from typing import Any

import torch
from torch import Tensor, nn

from fastres.nn.functional import (
    Activation,
    Pending,
    conv_arguments,
    fused_conv_bn_act,
    fused_pool,
    materialize,
)
from fastres.nn.statistics import BatchNorm

__all__ = ["conv_bn_act", "conv_bn_add_act", "fused_pool", "materialize"]


def conv_bn_act(x: Activation, conv: nn.Conv2d, bn: BatchNorm, relu: bool) -> Activation:
    """``act(bn(conv(x)))``, pending in training: see :func:`fastres.nn.functional.fused_conv_bn_act`."""
    return fused_conv_bn_act(x, conv, bn, relu)


def conv_bn_add_act(x: Activation, conv: nn.Conv2d, bn: BatchNorm, relu: bool, residual: Any) -> Tensor:
    """``act(bn(conv(x)) + residual)``. A residual of another shape or dtype is broadcast and promoted as by ``+``."""
    if _same_kind(x, conv, residual):
        return materialize(fused_conv_bn_act(x, conv, bn, relu, residual))
    other = materialize(residual) if isinstance(residual, Pending) else residual
    out = materialize(fused_conv_bn_act(x, conv, bn, False)) + other
    return torch.relu(out) if relu else out


def _same_kind(x: Activation, conv: nn.Conv2d, residual: Any) -> bool:
    """Whether the residual has the shape, device and dtype of the convolution's result."""
    x, residual = (t.y if isinstance(t, Pending) else t for t in (x, residual))
    if not isinstance(residual, Tensor) or residual.dim() != 4 or x.dim() != 4:
        return False
    if residual.device != x.device or not (residual.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
        return False
    args: dict[str, Any] = conv_arguments(conv)
    sizes = zip(x.shape[2:], conv.kernel_size, args["stride"], args["padding"], args["dilation"], strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return list(residual.shape) == [x.shape[0], conv.out_channels, *out]
