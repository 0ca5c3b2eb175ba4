"""conv_stats' backward by Triton: the two gradient kernels, or for groups the library's convolution between passes."""

from torch import Tensor

from ..common.layout import absent, memory_format_of
from ..common.triton_conv import ConvProblem, channels_last
from ..common.triton_launch import require
from . import library
from .triton_gradient_tiles import Gradients, Prologue
from .triton_input_gradient import input_gradient
from .triton_weight_gradient import weight_gradient


def backward(
    grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
    relu: bool, stride, padding, dilation, groups: int, need_input: bool, need_weight: bool,
    addend: Tensor | None = None, factor: Tensor | None = None,
):  # fmt: skip
    require(x.device.type)
    problem = ConvProblem.of(x, weight, stride, padding, dilation, scale, relu)
    if groups != 1:
        return library.backward(
            grad_y, grad_mean, grad_var, x, weight, y, mean, scale, center, shift,
            relu, stride, padding, dilation, groups, need_input, need_weight, addend, factor,
        )  # fmt: skip
    gradients = Gradients.of(grad_y, grad_mean, grad_var, y, mean, factor)
    prologue = Prologue.of(x, scale, center, shift)
    grad_w = weight_gradient(problem, gradients, prologue, weight) if need_weight else absent(x)
    if not need_input:
        return absent(x), grad_w, absent(x), absent(x)
    grad_x, grad_scale, grad_shift = input_gradient(problem, gradients, channels_last(weight), prologue, addend=addend)
    grad_x = grad_x.contiguous(memory_format=memory_format_of(x))
    if grad_scale is None or grad_shift is None:
        return grad_x, grad_w, absent(x), absent(x)
    return grad_x, grad_w, grad_scale, grad_shift
