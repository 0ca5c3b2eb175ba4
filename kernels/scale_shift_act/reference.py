"""scale_shift_act in plain PyTorch: the definition of correct. Maths and bytes: README.md in this folder."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of, per_channel, stats_dtype


def affine(y: Tensor, scale: Tensor, center: Tensor, shift: Tensor) -> Tensor:
    """scale·(y − center) + shift with [C] vectors, in float32 or wider."""
    y = y.to(stats_dtype(y.dtype))
    return per_channel(scale) * (y - per_channel(center)) + per_channel(shift)


def pre_activation(
    y: Tensor,  # [N, C, H, W]
    scale: Tensor,  # [C], as center and shift
    center: Tensor,
    shift: Tensor,
    residual: Tensor | None,  # [N, C, H, W]
    res_scale: Tensor | None,  # [C], as res_center and res_shift; None: the residual is added as it is
    res_center: Tensor | None,
    res_shift: Tensor | None,
) -> Tensor:
    z = affine(y, scale, center, shift)
    if residual is None:
        return z
    if res_scale is None or res_center is None or res_shift is None:
        return z + residual.to(z.dtype)
    return z + affine(residual, res_scale, res_center, res_shift)


def forward(y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool) -> Tensor:
    z = pre_activation(y, scale, center, shift, residual, res_scale, res_center, res_shift)
    out = z.relu() if relu else z
    return out.to(y.dtype).contiguous(memory_format=memory_format_of(y))


def backward(
    grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, relu: bool, need_residual: bool
) -> tuple[Tensor, ...]:
    wide = stats_dtype(y.dtype)
    dz = grad.to(wide)
    if relu:
        z = pre_activation(y, scale, center, shift, residual, res_scale, res_center, res_shift)
        dz = torch.where(z > 0, dz, torch.zeros((), dtype=wide, device=y.device))

    def like(t: Tensor, map_: Tensor) -> Tensor:
        return t.to(map_.dtype).contiguous(memory_format=memory_format_of(map_))

    def dot(t: Tensor, mid: Tensor) -> Tensor:  # Σ dz·(t − mid) over N, H, W
        return (dz * (t.to(wide) - per_channel(mid))).sum((0, 2, 3))

    total = dz.sum((0, 2, 3))
    grads = [like(per_channel(scale) * dz, y), dot(y, center), total]
    if residual is not None and res_scale is not None:
        return (*grads, like(per_channel(res_scale) * dz, residual), dot(residual, res_center), total.clone())
    keep = residual is not None and need_residual and relu
    return (*grads, like(dz, residual) if keep else absent(y), absent(y), absent(y))
