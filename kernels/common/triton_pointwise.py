"""The passes around a library convolution by Triton's kernels, with the names of :mod:`.pointwise`: what the triton backend
gives to convolutions that it has no kernel for."""

from torch import Tensor

from ..conv_stats.triton_stats import stats as stats
from ..conv_stats.triton_stats import stats_backward as stats_backward
from ..scale_shift_act import triton_backend


def prologue(x: Tensor, scale: Tensor, center: Tensor, shift: Tensor, relu: bool) -> Tensor:
    """act(scale·(x − center) + shift), [N, C, H, W]."""
    return triton_backend.forward(x, scale, center, shift, None, None, None, None, relu)


def prologue_backward_(
    grad: Tensor, x: Tensor, scale: Tensor, center: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_scale, grad_shift) of :func:`prologue`."""
    grads = triton_backend.backward(grad, x, scale, center, shift, None, None, None, None, relu, False)
    return grads[0], grads[1], grads[2]
