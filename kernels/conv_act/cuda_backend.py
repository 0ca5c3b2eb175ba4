"""conv_act by the CUDA kernels of kernels/conv, in the schema's signature."""

from functools import partial

import torch
from torch import Tensor

from ..common.precision import tf32_allowed
from ..conv_stats import cuda_backend as conv_stats
from . import library

_ops = torch.ops.fastres


def forward(x, weight, bias, residual, relu: bool, stride, padding, dilation, groups: int) -> Tensor:
    if not conv_stats.serves(x, weight, stride, padding, dilation, groups):
        return library.forward(x, weight, bias, residual, relu, stride, padding, dilation, groups)
    no_prologue, conv = (None, None, None, False), (stride, padding, dilation)
    return _ops.conv_forward_cuda(x, weight, *no_prologue, bias, residual, relu, *conv, False, tf32_allowed(x.dtype))[0]


# Mask and bias sum are PyTorch's, the two convolution gradients ours.
backward = partial(library.backward, gradients=conv_stats.backward)
