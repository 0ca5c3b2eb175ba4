"""conv_act's backward by the CPU's own convolution engine; the forward is registered by the native library itself."""

import torch

from ..common.layout import absent, memory_format_of, stats_dtype
from ..conv_stats import native as conv

_aten = torch.ops.aten


def backward(
    grad, x, weight, out, relu: bool, stride, padding, dilation, groups: int,
    need_input: bool, need_weight: bool, need_bias: bool, need_residual: bool,
):  # fmt: skip
    dz = _aten.threshold_backward(grad, out, 0) if relu else grad
    dz = dz.contiguous(memory_format=memory_format_of(x))
    da, dw, _, _ = conv.backward(
        dz, None, None, x, weight, dz, None, None, None, None,
        False, stride, padding, dilation, groups, need_input, need_weight,
    )  # fmt: skip
    return (
        da,
        dw,
        dz.sum((0, 2, 3), dtype=stats_dtype(x.dtype)) if need_bias else absent(x),
        (dz if dz is not grad else dz.clone()) if need_residual else absent(x),
    )
