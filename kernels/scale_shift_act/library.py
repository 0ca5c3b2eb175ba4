"""scale_shift_act from in-place ATen calls: fewer temporaries than the reference, the same rounding, any device."""

from torch import Tensor

from ..common.layout import memory_format_of, per_channel, stats_dtype
from .reference import backward as backward  # ATen has no fused backward: the reference is the best composition


def _affine(y: Tensor, scale: Tensor, center: Tensor, shift: Tensor) -> Tensor:
    wide = y.to(stats_dtype(y.dtype)) - per_channel(center)
    return wide.mul_(per_channel(scale)).add_(per_channel(shift))


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> Tensor:
    z = _affine(y, scale, center, shift)
    if residual is not None:
        z += residual if res_scale is None else _affine(residual, res_scale, res_center, res_shift)
    if relu:
        z.relu_()
    return z.to(y.dtype).contiguous(memory_format=memory_format_of(y))
