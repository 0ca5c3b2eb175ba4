"""What both gradient kernels of conv_stats share: the gradient of y as they read it, and the arguments that name it."""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.triton_conv import ConvProblem, channels_last


@triton.jit
def gradient_tile(
    grad_y,  # [N·P·Q, K], read where HAS_GRAD_Y
    y,  # [N·P·Q, K], read where HAS_GRAD_VAR
    offset,  # [rows, channels]
    mask,  # [rows, channels]
    mean,  # [1, channels] float32
    grad_mean,  # [1, channels] float32, already divided by n
    grad_var,  # [1, channels] float32, already multiplied by 2/n
    factor,  # [1, channels] float32
    HAS_GRAD_Y: tl.constexpr,
    HAS_GRAD_MEAN: tl.constexpr,
    HAS_GRAD_VAR: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """G = [factor·]grad_y + grad_mean/n + 2·grad_var·(y − mean)/n, [rows, channels] rounded to DTYPE; 0 where masked.

    The mask comes last: a pixel outside the map has no gradient, also where grad_mean gives every pixel a share.
    """
    if HAS_GRAD_Y:
        g = tl.load(grad_y + offset, mask=mask, other=0.0)
    else:
        g = tl.zeros(offset.shape, DTYPE)
    if HAS_GRAD_MEAN or HAS_GRAD_VAR or HAS_FACTOR:
        total = g.to(tl.float32)
        if HAS_FACTOR:
            total *= factor
        if HAS_GRAD_MEAN:
            total += grad_mean
        if HAS_GRAD_VAR:
            total += grad_var * (tl.load(y + offset, mask=mask, other=0.0).to(tl.float32) - mean)
        g = tl.where(mask, total, 0.0).to(DTYPE)
    return g


@triton.jit
def gradient_vectors(
    mean,  # [K] float32, as grad_mean and grad_var; read where the flags say so
    grad_mean,
    grad_var,
    factor,
    k,  # [channels]
    live,  # [channels]
    inverse_count,
    HAS_GRAD_MEAN: tl.constexpr,
    HAS_GRAD_VAR: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
):
    """(mean, grad_mean/n, 2·grad_var/n, factor) of channels ``k``, each [1, channels]; 0 where not asked for."""
    center = tl.zeros(k.shape, tl.float32)
    constant = center
    slope = center
    times = center
    if HAS_GRAD_MEAN:
        constant = tl.load(grad_mean + k, mask=live, other=0.0) * inverse_count
    if HAS_GRAD_VAR:
        slope = tl.load(grad_var + k, mask=live, other=0.0) * (2.0 * inverse_count)
        center = tl.load(mean + k, mask=live, other=0.0)
    if HAS_FACTOR:
        times = tl.load(factor + k, mask=live, other=0.0)
    return center[None, :], constant[None, :], slope[None, :], times[None, :]


@dataclass(frozen=True)
class Gradients:
    """The gradients that arrive, and the tensors that turn them into G; maps dense in channels_last, vectors float32."""

    grad_y: Tensor | None  # [N, K, P, Q]
    grad_mean: Tensor | None  # [K]
    grad_var: Tensor | None  # [K]
    y: Tensor | None  # [N, K, P, Q], kept where grad_var needs it
    mean: Tensor | None  # [K]
    factor: Tensor | None = None  # [K], of grad_y

    @classmethod
    def of(cls, grad_y, grad_mean, grad_var, y: Tensor, mean: Tensor, factor: Tensor | None = None) -> "Gradients":
        """Lays out what is there and drops what isn't read. Gradients of vectors may be expanded scalars."""
        dense = None if grad_y is None else channels_last(grad_y.to(y.dtype))
        vectors = (grad_mean, grad_var, None if dense is None else factor)
        on_mean, on_var, times = (None if v is None else v.float().contiguous() for v in vectors)
        if on_var is None:
            return cls(dense, on_mean, None, None, None, times)
        return cls(dense, on_mean, on_var, channels_last(y), mean.float().contiguous(), times)

    def arguments(self, problem: ConvProblem) -> dict[str, Tensor | float | None]:
        """Run-time arguments that every gradient kernel takes."""
        return {
            "grad_y": self.grad_y,
            "y": self.y,
            "mean": self.mean,
            "grad_mean": self.grad_mean,
            "grad_var": self.grad_var,
            "factor": self.factor,
            "inverse_count": 1.0 / max(problem.rows_out, 1),
        }

    def flags(self) -> dict[str, bool]:
        return {
            "HAS_GRAD_Y": self.grad_y is not None,
            "HAS_GRAD_MEAN": self.grad_mean is not None,
            "HAS_GRAD_VAR": self.grad_var is not None,
            "HAS_FACTOR": self.factor is not None,
        }


@dataclass(frozen=True)
class Prologue:
    """The convolution's input and what it did to it; x dense in channels_last, vectors [C] float32 or all None."""

    x: Tensor  # [N, C, H, W]
    scale: Tensor | None
    center: Tensor | None
    shift: Tensor | None

    @classmethod
    def of(cls, x: Tensor, scale: Tensor | None, center: Tensor | None, shift: Tensor | None) -> "Prologue":
        vectors = [None if v is None else v.float().contiguous() for v in (scale, center, shift)]
        return cls(channels_last(x), *vectors)

    def arguments(self) -> dict[str, Tensor | None]:
        return {"x": self.x, "scale": self.scale, "center": self.center, "shift": self.shift}


def problem_constants(problem: ConvProblem) -> dict[str, int | bool | str]:
    """Constexprs of the geometry, which both kernels are compiled for; map sizes and channels are run-time values."""
    return {
        "R": problem.r,
        "S": problem.s,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PAD_H": problem.padding[0],
        "PAD_W": problem.padding[1],
        "DIL_H": problem.dilation[0],
        "DIL_W": problem.dilation[1],
        "C_UNIT": gcd(problem.c, 16),
        "K_UNIT": gcd(problem.k, 16),
        "POINTWISE": problem.pointwise,
        "PROLOGUE": problem.prologue,
        "RELU": problem.relu,
        "INT64": problem.int64,
        "PRECISION": problem.precision,
    }


def single_elements(problem: ConvProblem) -> bool:
    """Whether channels of 16 bits can only be read one by one: registers then hold an address each, and tiles are small."""
    return problem.sixteen_bit and (problem.c % 2 == 1 or problem.k % 2 == 1)


def block(limit: int, size: int) -> int:
    """A block of at most ``limit`` for a dimension of ``size``: a power of two, at least 16, what a product can take."""
    return min(limit, max(16, triton.next_power_of_2(max(size, 1))))


def float32_like(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32 workspace or vector on the device of ``x``."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)
