"""conv_act by the Triton kernels of kernels/conv and kernels/conv_stats, in the schema's signature."""

from functools import partial

from torch import Tensor

from ..common.layout import memory_format_of
from ..common.triton_conv import ConvProblem, require_dtype
from ..common.triton_launch import require
from ..conv.triton_run import Epilogue, convolution
from ..conv_stats import triton_gradients
from . import library


def forward(x, weight, bias, residual, relu: bool, stride, padding, dilation, groups: int) -> Tensor:
    require(x.device.type)
    require_dtype(x.dtype)
    if groups > 1 or not x.numel():  # the library's
        return library.forward(x, weight, bias, residual, relu, stride, padding, dilation, groups)
    problem = ConvProblem.of(x, weight, stride, padding, dilation, None, False)
    y, _, _ = convolution(problem, x, weight, epilogue=Epilogue(bias, residual, relu))
    return y.contiguous(memory_format=memory_format_of(x))


# Mask and bias sum are PyTorch's, the two convolution gradients ours.
backward = partial(library.backward, gradients=triton_gradients.backward)
