"""The pointwise passes around a library convolution: our native kernels where they serve, else ATen compositions."""

import torch
from torch import Tensor

from fastres import _library

from ..conv_stats import reference as conv_stats_reference
from ..scale_shift_act import library as ssa_library
from .layout import memory_format_of

_ops = torch.ops.fastres
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def native_serves(y: Tensor) -> bool:
    return y.device.type == "cpu" and y.dtype in NATIVE_DTYPES and _library.native_error() is None


def prologue(x: Tensor, scale: Tensor, center: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """act(scale·(x − center) + shift), [N, C, H, W]."""
    forward = _ops.scale_shift_act_native if native_serves(x) else ssa_library.forward
    return forward(x, scale, center, shift, None, None, None, None, relu)


def prologue_backward_(
    grad: Tensor, x: Tensor, scale: Tensor, center: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_scale, grad_shift) of :func:`prologue`; ``grad`` is the caller's own and may be overwritten."""
    if native_serves(x):
        grad = grad.contiguous(memory_format=memory_format_of(x))
        return grad, *_ops.scale_shift_act_backward_native_(grad, x, scale, center, shift, relu)
    grads = ssa_library.backward(grad, x, scale, center, shift, None, None, None, None, relu, False)
    return grads[0], grads[1], grads[2]


def stats(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, [C] each."""
    if native_serves(y):
        return _ops.channel_stats_native(y)
    wide = y if y.dtype == torch.float64 else y.float()
    if not y.numel():
        return wide.mean((0, 2, 3)), wide.mean((0, 2, 3))  # NaN without a warning
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, var


def stats_backward(
    grad_y: Tensor | None, y: Tensor, mean: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None
) -> Tensor:
    """Gradient of y from the gradients of y itself, of its mean and of its variance."""
    if native_serves(y):
        # gradients of [C] vectors may be expanded scalars
        grad_mean, grad_var = (None if g is None else g.contiguous() for g in (grad_mean, grad_var))
        return _ops.channel_stats_backward_native(grad_y, y, mean, grad_mean, grad_var)
    return conv_stats_reference.stats_backward(grad_y, y, mean, grad_mean, grad_var)
