"""Layout and dtype rules that every backend and every fake kernel shares."""

import torch
from torch import Tensor


def memory_format_of(y: Tensor) -> torch.memory_format:
    """The format of outputs that follow ``y`` ([N, C, H, W]): channels_last when channels are innermost, else contiguous.

    Defined on strides alone, so that C++ and the fake kernels can repeat it; a tensor that is both (C = 1 or
    H = W = 1) counts as contiguous.
    """
    if y.dim() == 4 and y.stride(1) == 1 and not y.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def dense(y: Tensor) -> Tensor:
    """``y`` itself when it is dense in its own memory format, else a dense copy."""
    return y.contiguous(memory_format=memory_format_of(y))


def empty_like(y: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised tensor in the memory format of ``y``."""
    return torch.empty(
        y.shape if shape is None else shape,
        dtype=dtype or y.dtype,
        device=y.device,
        memory_format=memory_format_of(y),
    )


def empty_channels_innermost(
    like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Uninitialised [N, C, H, W] whose memory is the dense matrix [N·H·W, C] that Triton's kernels read and write, with the
    strides of ``like``'s format where both formats are the same memory."""
    shape = tuple(like.shape) if shape is None else shape
    n, c, h, w = shape
    fmt = memory_format_of(like) if c == 1 or h * w == 1 or not n * c * h * w else torch.channels_last
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=fmt)


def in_format_of(out: Tensor, like: Tensor) -> Tensor:
    """``out`` in the memory format that every backend promises for an input ``like``; a copy where it is in another."""
    return out.contiguous(memory_format=memory_format_of(like))


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of means, variances and coefficients: float32, or float64 for float64 maps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]."""
    return v.view(1, -1, 1, 1)


def plus(grad: Tensor, addend: Tensor | None) -> Tensor:
    """``grad + addend`` in the dtype and layout of ``grad``; without an addend ``grad`` itself."""
    return grad if addend is None else (grad + addend).to(grad.dtype).contiguous(memory_format=memory_format_of(grad))


def times(grad: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """``factor·grad``, [N, C, H, W] and [C], in the dtype of ``grad``; without a factor ``grad`` itself."""
    if grad is None or factor is None:
        return grad
    return (grad.to(factor.dtype) * per_channel(factor)).to(grad.dtype)


def absent(like: Tensor) -> Tensor:
    """Stands for an output that was not asked for: op schemas have no optional results."""
    return torch.empty(0, dtype=stats_dtype(like.dtype), device=like.device)
