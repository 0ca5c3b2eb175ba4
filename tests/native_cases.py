"""Inputs and float64 formulas for the tests of the native (and emulated CUDA) kernels.

The exact inputs are small multiples of powers of two, so that every product and sum is exact in float32: results are
compared bit for bit, and no index, mask, padding or tail mistake can hide in a tolerance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

OPS = torch.ops.fastres
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)

# Odd sizes, one channel, one position, several parts of rows, several pieces of a plane, wide and shallow.
SHAPES = (
    (2, 1, 5, 7),
    (3, 3, 9, 4),
    (2, 17, 6, 5),
    (5, 64, 1, 1),
    (2, 64, 40, 33),
    (3, 130, 7, 7),
    (1, 3, 150, 140),
    (17, 2048, 2, 1),
)


def exact(shape, generator, low=-8, high=8, step=0.25, dtype=torch.float32, fmt=torch.contiguous_format) -> Tensor:
    """Random multiples of ``step`` in [low, high]*step, in the given dtype and memory format."""
    t = torch.randint(low, high + 1, shape, generator=generator).to(torch.float32) * step
    t = t.to(dtype)
    return t.contiguous(memory_format=fmt) if t.dim() == 4 else t


def coefficients(channels: int, generator) -> tuple[Tensor, Tensor, Tensor]:
    """scale (zero and negative ones included), center, shift: float32 [C], exact."""
    scale = torch.tensor([0.5, -1.0, 2.0, 0.0, -0.5, 1.0])[torch.randint(0, 6, (channels,), generator=generator)]
    return scale, exact((channels,), generator, -4, 4, 0.5), exact((channels,), generator, -6, 6, 0.25)


def per_channel(v: Tensor) -> Tensor:
    return v.double().view(1, -1, 1, 1)


def pre_activation(y, main, residual=None, res=None) -> Tensor:
    """z in float64."""
    z = per_channel(main[0]) * (y.double() - per_channel(main[1])) + per_channel(main[2])
    if residual is not None and res is not None:
        return z + per_channel(res[0]) * (residual.double() - per_channel(res[1])) + per_channel(res[2])
    return z if residual is None else z + residual.double()


def forward(y, main, residual, res, relu: bool) -> Tensor:
    z = pre_activation(y, main, residual, res)
    return (z.relu() if relu else z).to(y.dtype)


def backward(grad, y, main, residual, res, relu: bool) -> dict[str, Tensor]:
    """Every gradient, in float64 and then y's dtype (maps) or float32 (vectors)."""
    dz = grad.double()
    if relu:
        dz = torch.where(pre_activation(y, main, residual, res) > 0, dz, 0.0)
    total = dz.sum((0, 2, 3))
    out = {
        "grad_y": (per_channel(main[0]) * dz).to(y.dtype),
        "grad_scale": (dz * (y.double() - per_channel(main[1]))).sum((0, 2, 3)).float(),
        "grad_shift": total.float(),
    }
    if residual is not None and res is None and relu:
        out["grad_residual"] = dz.to(y.dtype)
    if residual is not None and res is not None:
        out["grad_residual"] = (per_channel(res[0]) * dz).to(y.dtype)
        out["grad_res_scale"] = (dz * (residual.double() - per_channel(res[1]))).sum((0, 2, 3)).float()
        out["grad_res_shift"] = total.float()
    return out


NAMES = ("grad_y", "grad_scale", "grad_shift", "grad_residual", "grad_res_scale", "grad_res_shift")


def pool(y, main, relu: bool, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Pooled map in y's dtype and the position inside each window, through torch's own max_pool2d."""
    act = forward(y, main, None, None, relu).double()
    out, flat = F.max_pool2d(act, kernel, stride, padding, return_indices=True)
    top = torch.arange(out.shape[2]).view(-1, 1) * stride - padding
    left = torch.arange(out.shape[3]) * stride - padding
    return out.to(y.dtype), ((flat // y.shape[3] - top) * kernel + flat % y.shape[3] - left).to(torch.uint8)


def unpool(grad, index, y, kernel: int, stride: int, padding: int) -> Tensor:
    """The gradient of the activated map, float64: each pooled gradient at the position that index names."""
    top = torch.arange(grad.shape[2]).view(-1, 1) * stride - padding
    left = torch.arange(grad.shape[3]) * stride - padding
    flat = (index.long() // kernel + top) * y.shape[3] + index.long() % kernel + left
    full = torch.zeros(y.shape, dtype=torch.float64)
    full.flatten(2).scatter_add_(2, flat.flatten(2), grad.double().flatten(2))
    return full
