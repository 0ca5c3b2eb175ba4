"""What the Triton convolution kernels share: the problem as data, and the parts that forward and gradients must do alike.

A map [N, C, H, W] in channels_last is a matrix [N·H·W, C] whose rows are pixels; weights [K, C, R, S] in channels_last
are [K, R·S·C]. A convolution is then a matrix product whose reduction runs over taps and channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.errors import BackendError

from .precision import tf32_allowed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# int32 offsets stay below this. Rows and columns past the end are computed before their mask is, so a tile or two of
# headroom keeps them from wrapping to small numbers that a mask would let through.
INT32_ELEMENTS = 2**31 - 2**20


def needs_int64(*elements: int) -> bool:
    """Whether some tensor has too many elements for int32 offsets."""
    return any(n > INT32_ELEMENTS for n in elements)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products: float32 is rounded to tf32 only where torch allows it for convolutions."""
    return "tf32" if tf32_allowed(dtype) else "ieee"


def require_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise BackendError(f"backend 'triton' takes {known}, not {str(dtype).removeprefix('torch.')}")


def channels_last(x: Tensor) -> Tensor:
    """``x`` ([N, C, H, W]) as a kernel reads it, dense [N, H, W, C]; a copy only where it isn't that already."""
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class ConvProblem:
    """y [N, K, P, Q] = conv(act(x [N, C, H, W]), weight [K, C, R, S]), ungrouped, and what surrounds the product."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: torch.dtype = torch.float16
    prologue: bool = False
    relu: bool = False
    stats: bool = False
    precision: str = "ieee"

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, stride, padding, dilation, scale: Tensor | None, relu: bool, stats: bool = False
    ) -> "ConvProblem":
        """The problem of tensors; a ReLU without a prologue is none."""
        require_dtype(x.dtype)
        n, c, h, w = x.shape
        k, _, r, s = weight.shape
        step, pad, spread = ((int(a), int(b)) for a, b in (stride, padding, dilation))
        on = scale is not None
        return cls(n, c, h, w, k, r, s, step, pad, spread, x.dtype, on, on and relu, stats, dot_precision(x.dtype))

    @property
    def p(self) -> int:
        """Rows of the output."""
        return (self.h + 2 * self.padding[0] - self.dilation[0] * (self.r - 1) - 1) // self.stride[0] + 1

    @property
    def q(self) -> int:
        """Columns of the output."""
        return (self.w + 2 * self.padding[1] - self.dilation[1] * (self.s - 1) - 1) // self.stride[1] + 1

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.p, self.q

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c, self.r, self.s

    @property
    def rows_in(self) -> int:
        """N·H·W: rows of x as a matrix."""
        return self.n * self.h * self.w

    @property
    def rows_out(self) -> int:
        """N·P·Q: rows of y as a matrix."""
        return self.n * self.p * self.q

    @property
    def int64(self) -> bool:
        return needs_int64(self.rows_in * self.c, self.rows_out * self.k, self.k * self.r * self.s * self.c)

    @property
    def pointwise(self) -> bool:
        """Whether this is a plain matrix product [N·H·W, C] x [C, K]: output pixel i reads input pixel i, nothing else."""
        ones = (1, 1)
        return (self.r, self.s) == ones and self.stride == ones and self.padding == (0, 0)

    @property
    def sixteen_bit(self) -> bool:
        return self.dtype != torch.float32

    @property
    def tensor_cores(self) -> bool:
        return self.sixteen_bit or self.precision == "tf32"


@triton.jit
def as_index(value, INT64: tl.constexpr):
    """An integer (scalar or tensor) in the width that offsets of this problem need."""
    if INT64:
        return tl.cast(value, tl.int64)
    else:
        return value


@triton.jit
def block_indices(block, BLOCK: tl.constexpr, INT64: tl.constexpr):
    """Indices [BLOCK] of block number ``block``."""
    return as_index(block, INT64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def grouped_order(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) of a program: GROUP_M row tiles take all column tiles before the next group starts.

    Programs that run at the same time then share rows of the left and columns of the right matrix in the L2 cache.
    """
    per_group = GROUP_M * tiles_n
    group = program // per_group
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    rest = program - group * per_group
    return first + rest % height, rest // height


@triton.jit
def pixel_of(row, HEIGHT, WIDTH):
    """(image, row in it, column in it) of rows of a map's matrix [N·HEIGHT·WIDTH, channels]."""
    line = row // WIDTH
    image = line // HEIGHT
    return image, line - image * HEIGHT, row - line * WIDTH


@triton.jit
def inside(h, w, H, W):
    """Whether the pixel (h, w) lies in the image; outside is padding."""
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def affine(x, scale, center, shift):
    """scale·(x − center) + shift in float32.

    The fused multiply-add is written out: the backward pass recomputes the ReLU's mask, and must round as forward did
    whatever the compiler contracts around it. Subtracting first keeps it exact when |center| is much larger than x's spread.
    """
    return tl.fma(scale, x.to(tl.float32) - center, shift)


@triton.jit
def affine_act(x, scale, center, shift, RELU: tl.constexpr):
    """act(scale·(x − center) + shift) in float32; a NaN stays one."""
    z = affine(x, scale, center, shift)
    if RELU:
        z = tl.where(z <= 0.0, 0.0, z)
    return z


@triton.jit
def load_channels(vector, index, mask):
    """Entries of a [C] vector in float32, 0 where masked: a masked channel's scale, center and shift give 0."""
    return tl.load(vector + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_or_zero(pointers, mask):
    """Elements in their own dtype, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def tile_statistics(tile, row_mask):
    """Of the rows of ``tile`` ([M, N] float32) that count: how many, their mean [N], and Σ(value − mean)² [N]."""
    count = tl.sum(row_mask.to(tl.float32), axis=0)
    keep = row_mask[:, None]
    mean = tl.sum(tl.where(keep, tile, 0.0), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(keep, tile - mean[None, :], 0.0)
    return count, mean, tl.sum(deviation * deviation, axis=0)
