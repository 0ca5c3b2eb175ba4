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


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of means, variances and coefficients: float32, or float64 for float64 maps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]."""
    return v.view(1, -1, 1, 1)


def absent(like: Tensor) -> Tensor:
    """Stands for an output that was not asked for: op schemas have no optional results."""
    return torch.empty(0, dtype=stats_dtype(like.dtype), device=like.device)
