"""conv_act by the library: oneDNN's convolution with bias, residual and ReLU as post-operations on the CPU, cuDNN's on
CUDA, and elsewhere a convolution with one in-place pass per term."""

import torch
from torch import Tensor

from ..common.layout import absent, memory_format_of, stats_dtype
from ..conv_stats import library as conv_stats

_aten = torch.ops.aten
_MKLDNN_DTYPES = (torch.float32, torch.bfloat16)


def _onednn_serves(x: Tensor, weight: Tensor, grouped_residual: bool) -> bool:
    return bool(
        x.device.type == "cpu"
        and x.dtype in _MKLDNN_DTYPES
        # ATen fuses post-operations in channels_last only; in NCHW it falls back to separate passes, and fails in bf16
        and memory_format_of(x) == torch.channels_last
        and not grouped_residual  # not fused by ATen either
        and x.numel() > 0
        and weight.numel() > 0
        and torch.backends.mkldnn.enabled
        and torch._C._has_mkldnn
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _onednn(x, weight, bias, residual, relu, stride, padding, dilation, groups) -> Tensor:
    ops = torch.ops.mkldnn._convolution_pointwise
    conv = (list(padding), list(stride), list(dilation), groups)
    if residual is None:
        return ops(x, weight, bias, *conv, "relu" if relu else "none", [], "")
    unary = "relu" if relu else None
    return ops.binary(x, residual, weight, bias, *conv, "add", 1.0, unary, [], "")


def forward(x, weight, bias, residual, relu: bool, stride, padding, dilation, groups: int) -> Tensor:
    fmt = memory_format_of(x)
    bias = None if bias is None else bias.to(x.dtype)
    if _onednn_serves(x, weight, groups > 1 and residual is not None):
        out = _onednn(x, weight, bias, residual, relu, stride, padding, dilation, groups)
        return out.contiguous(memory_format=fmt)
    if x.device.type == "cuda" and relu and x.dtype in (torch.float16, torch.float32) and bias is not None:
        if residual is None:
            out = _aten.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        else:
            out = _aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
        return out.contiguous(memory_format=fmt)
    out = _aten.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)
    if residual is not None:
        out += residual
    if relu:
        out.relu_()
    return out.contiguous(memory_format=fmt)


def backward(
    grad, x, weight, out, relu: bool, stride, padding, dilation, groups: int,
    need_input: bool, need_weight: bool, need_bias: bool, need_residual: bool,
    gradients=conv_stats.backward,
):  # fmt: skip
    dz = _aten.threshold_backward(grad, out, 0) if relu else grad
    dz = dz.contiguous(memory_format=memory_format_of(x))
    no_stats, no_prologue = (None, None), (None, None, None)
    da, dw, *_ = gradients(
        dz,
        *no_stats,
        x,
        weight,
        dz,
        None,
        *no_prologue,
        False,
        stride,
        padding,
        dilation,
        groups,
        need_input,
        need_weight,
    )
    return (
        da,
        dw,
        dz.sum((0, 2, 3), dtype=stats_dtype(x.dtype)) if need_bias else absent(x),
        (dz if dz is not grad else dz.clone()) if need_residual else absent(x),
    )
