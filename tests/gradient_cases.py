"""Problems for the gradients of conv_stats: shapes, the gradients that may arrive, and their truths."""

from typing import NamedTuple

import torch
from cases import lay_out
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastres.kernels.conv_stats import reference
from fastres.kernels.scale_shift_act import reference as pointwise


class Shape(NamedTuple):
    """N images [C, H, W], K output channels, kernel R x S."""

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

    def __str__(self) -> str:
        parts = (f"{self.n}x{self.c}x{self.h}x{self.w}", f"k{self.k}", f"{self.r}x{self.s}")
        pairs = (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1))
        return "-".join((*parts, *(f"{name}{a}{b}" for name, (a, b), usual in pairs if (a, b) != (usual, usual))))


def _square(
    n: int, c: int, h: int, w: int, k: int, r: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Shape:
    return Shape(n, c, h, w, k, r, r, (stride, stride), (padding, padding), (dilation, dilation))


SHAPES = (
    # 1x1: aligned, ragged, one of everything, one row, more channels than a block, empty, in padding
    _square(2, 16, 5, 5, 8, 1),
    _square(1, 1, 1, 1, 1, 1),
    _square(2, 17, 4, 8, 33, 1),
    _square(2, 8, 1, 7, 5, 1),
    _square(1, 70, 8, 8, 130, 1),
    _square(0, 16, 4, 4, 8, 1),
    _square(1, 4, 3, 3, 5, 1, 1, 1),
    # 1x1 with strides: most pixels meet no tap
    _square(2, 16, 7, 8, 24, 1, 2),
    _square(1, 5, 7, 7, 7, 1, 2),
    _square(2, 9, 1, 1, 4, 1, 2),
    _square(1, 3, 5, 5, 2, 1, 3),
    _square(1, 6, 5, 4, 3, 1, 2, 1),
    Shape(2, 33, 7, 4, 17, 1, 1, (2, 1)),
    # 3x3
    _square(2, 16, 8, 8, 16, 3, 1, 1),
    _square(2, 17, 7, 9, 5, 3, 1, 1),
    _square(1, 1, 5, 5, 1, 3, 1, 1),
    _square(4, 3, 4, 4, 40, 3, 1, 1),
    _square(1, 64, 4, 4, 66, 3, 1, 1),
    _square(1, 8, 1, 9, 8, 3, 1, 1),
    _square(0, 8, 6, 6, 4, 3, 1, 1),
    _square(2, 40, 4, 8, 24, 3, 1, 1),
    _square(1, 6, 6, 6, 7, 3),
    _square(2, 33, 3, 3, 9, 3),
    _square(1, 6, 4, 4, 7, 3, 1, 2),
    _square(1, 5, 3, 4, 6, 3, 1, 3),
    # 3x3 with strides and dilation
    _square(2, 16, 8, 8, 16, 3, 2, 1),
    _square(2, 8, 7, 7, 12, 3, 2, 1),
    _square(1, 35, 7, 8, 18, 3, 2, 1),
    _square(1, 3, 2, 2, 3, 3, 2, 1),
    _square(1, 5, 10, 11, 6, 3, 3, 1),
    _square(1, 4, 9, 9, 5, 3, 2, 0),
    _square(1, 4, 1, 8, 5, 3, 2, 1),
    _square(1, 8, 8, 8, 6, 3, 1, 2, 2),
    _square(1, 5, 7, 8, 7, 3, 2, 2, 2),
    _square(1, 4, 10, 9, 6, 3, 2, 3, 3),
    _square(1, 3, 11, 10, 4, 3, 3, 1, 2),
    Shape(1, 6, 8, 9, 5, 3, 3, (2, 1), (2, 1), (2, 1)),
    Shape(2, 7, 6, 9, 3, 3, 3, (1, 3), (0, 1)),
    # larger and other kernels
    _square(1, 3, 8, 8, 9, 5, 1, 2),
    _square(1, 9, 7, 9, 4, 5, 2, 2),
    _square(1, 3, 15, 16, 8, 7, 2, 3),
    _square(1, 1, 9, 9, 16, 7, 2, 3),
    _square(2, 4, 8, 12, 5, 7, 2, 3),
    _square(1, 2, 8, 8, 3, 7, 1, 3),
    _square(2, 5, 6, 6, 4, 2, 2),
    _square(1, 5, 5, 4, 4, 2, 1, 1),
    Shape(1, 5, 4, 6, 7, 1, 3, (1, 1), (0, 1)),
    Shape(1, 5, 7, 6, 7, 3, 1, (2, 1), (1, 0)),
    Shape(1, 3, 3, 9, 4, 1, 7, (1, 2), (0, 3)),
)

# Which gradients arrive: (of y, of mean, of var). Without the two last it is a convolution's backward pass.
ARRIVING = (
    (True, True, True),
    (True, False, False),
    (False, True, True),
    (True, False, True),
    (True, True, False),
    (False, False, True),
    (False, True, False),
)
PROLOGUES = ("relu", "affine", "none")
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # float32 maps whose products are rounded
}


class Arguments(NamedTuple):
    """The arguments of conv_stats' backward up to ``groups``, and what it needs."""

    grad_y: Tensor | None
    grad_mean: Tensor | None
    grad_var: Tensor | None
    x: Tensor
    weight: Tensor
    y: Tensor
    mean: Tensor
    scale: Tensor | None
    center: Tensor | None
    shift: Tensor | None
    relu: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    need_input: bool = True
    need_weight: bool = True
    addend: Tensor | None = None
    factor: Tensor | None = None

    def double(self) -> "Arguments":
        return self._make(a.double() if isinstance(a, Tensor) else a for a in self)


def _exact_share(share: Tensor, count: int, factor: float) -> Tensor:
    """The gradient g with g·(factor/count) = ``share`` exactly: a power of two for a count, else there is none, and 0.

    A product that only rounds to ``share`` won't do, since a compiler may fuse it with the addition that follows.
    """
    return (share * count / factor if count & (count - 1) == 0 else torch.zeros_like(share)).float()


def arguments(
    shape: Shape,
    dtype: torch.dtype,
    arriving=(True, True, True),
    prologue="relu",
    layout="channels_last",
    exact=True,
    seed=0,
) -> Arguments:
    """Small integers of which every result is exact before it is rounded, or random numbers."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int, span: int = 2) -> Tensor:
        if exact:
            return torch.randint(-span, span + 1, size, generator=g).double()
        return torch.randn(size, generator=g, dtype=torch.float64)

    x = draw(shape.n, shape.c, shape.h, shape.w)
    weight = draw(shape.k, shape.c, shape.r, shape.s, span=1)
    y = draw(*torch.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation).shape)
    count = max(y.numel() // shape.k, 1)
    grad_y, grad_mean, grad_var, mean = draw(*y.shape), draw(shape.k), draw(shape.k), draw(shape.k)
    if exact:
        grad_mean, grad_var = _exact_share(grad_mean, count, 1.0), _exact_share(grad_var, count, 2.0)
    else:
        grad_mean, grad_var = grad_mean * count, grad_var * count
    vectors = [draw(shape.c).float() if prologue != "none" else None for _ in range(3)]

    def map_(t: Tensor) -> Tensor:
        return lay_out(t.to(dtype), layout)

    dense = "contiguous" if layout == "contiguous" else "channels_last"
    return Arguments(
        map_(grad_y) if arriving[0] else None,
        grad_mean.float() if arriving[1] else None,
        grad_var.float() if arriving[2] else None,
        map_(x),
        lay_out(weight.to(dtype), dense),
        map_(y),
        mean.float(),
        *vectors,
        prologue == "relu",
        shape.stride,
        shape.padding,
        shape.dilation,
    )


def truncated(t: Tensor) -> Tensor:
    """What a tensor core reads of float32: sign, exponent and ten bits."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_peer(a: Arguments) -> tuple[Tensor, ...]:
    """The reference, float32, with operands of the products truncated."""
    g = a.grad_y
    if a.grad_mean is not None or a.grad_var is not None:
        g = reference.stats_backward(a.grad_y, a.y, a.mean, a.grad_mean, a.grad_var)
    assert g is not None
    g, weight = truncated(g), truncated(a.weight)
    affine = (a.scale, a.center, a.shift)
    activated = a.x if a.scale is None else pointwise.forward(a.x, *affine, None, None, None, None, a.relu)
    conv = (a.stride, a.padding, a.dilation, a.groups)
    grad_weight = conv2d_weight(truncated(activated), a.weight.shape, g, *conv)
    grad_a = conv2d_input(a.x.shape, weight, g, *conv)
    if a.scale is None:
        return grad_a, grad_weight, torch.empty(0), torch.empty(0)
    grad_x, grad_scale, grad_shift, *_ = pointwise.backward(grad_a, a.x, *affine, None, None, None, None, a.relu, False)
    return grad_x, grad_weight, grad_scale, grad_shift
