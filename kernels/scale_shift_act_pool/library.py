"""scale_shift_act_pool from ATen's fused affine and its max-pool; the backward scatters through the 8-bit indices."""

import torch.nn.functional as F
from torch import Tensor

from ..common.layout import memory_format_of
from ..scale_shift_act import library as pointwise
from .reference import _window_position
from .reference import backward as backward  # index arithmetic plus one scatter: the reference is the best composition
from .reference import gather as gather


def forward(y, scale, center, shift, relu: bool, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    act = pointwise.forward(y, scale, center, shift, None, None, None, None, relu)
    out, flat = F.max_pool2d(act, kernel, stride, padding, return_indices=True)
    index = _window_position(flat, y.shape[3], kernel, stride, padding)
    fmt = memory_format_of(y)
    return out.contiguous(memory_format=fmt), index.contiguous(memory_format=fmt)
