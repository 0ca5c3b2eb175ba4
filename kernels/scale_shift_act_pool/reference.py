"""scale_shift_act followed by max-pooling, in plain PyTorch: the definition of correct. Maths: README.md in this folder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.layout import memory_format_of, stats_dtype
from ..scale_shift_act import reference as pointwise


def _window_position(flat: Tensor, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Flat input positions [N, C, P, Q] (h·W + w) -> positions inside each window (kh·kernel + kw), uint8."""
    p = torch.arange(flat.shape[2], device=flat.device).view(-1, 1) * stride - padding
    q = torch.arange(flat.shape[3], device=flat.device) * stride - padding
    return ((flat // width - p) * kernel + (flat % width - q)).to(torch.uint8)


def _flat_position(index: Tensor, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """The inverse of :func:`_window_position`, int64."""
    p = torch.arange(index.shape[2], device=index.device).view(-1, 1) * stride - padding
    q = torch.arange(index.shape[3], device=index.device) * stride - padding
    wide = index.long()
    return (wide // kernel + p) * width + (wide % kernel + q)


def forward(y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    wide = pointwise.affine(y, scale, center, shift)
    act = (wide.relu() if relu else wide).to(y.dtype)
    out, flat = F.max_pool2d(act, kernel, stride, padding, return_indices=True)
    index = _window_position(flat, y.shape[3], kernel, stride, padding)
    fmt = memory_format_of(y)
    return out.contiguous(memory_format=fmt), index.contiguous(memory_format=fmt)


def backward(
    grad, index, y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    flat = _flat_position(index, y.shape[3], kernel, stride, padding)
    full = torch.zeros(y.shape, dtype=stats_dtype(y.dtype), device=y.device)
    full.flatten(2).scatter_add_(2, flat.flatten(2), grad.to(full.dtype).flatten(2))
    grad_y, grad_scale, grad_shift, *_ = pointwise.backward(
        full, y, scale, center, shift, None, None, None, None, relu, False
    )
    return grad_y, grad_scale, grad_shift


def gather(y, scale, center, shift, index, relu: bool, kernel: int, stride: int, padding: int) -> Tensor:
    flat = _flat_position(index, y.shape[3], kernel, stride, padding)
    picked = y.flatten(2).gather(2, flat.flatten(2)).view(index.shape)
    wide = pointwise.affine(picked, scale, center, shift)
    return (wide.relu() if relu else wide).to(y.dtype).contiguous(memory_format=memory_format_of(y))
