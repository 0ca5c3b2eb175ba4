"""Shapes, inputs and truths for the tests of the Triton convolutions."""

from dataclasses import dataclass

import torch
from cases import lay_out, random_map, random_vectors
from torch import Tensor

from fastres.kernels.conv_stats import reference

KINDS = ("fp16", "bf16", "fp32", "tf32")
DTYPE_OF = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Case:
    """N images, C channels in, H x W, K channels out, R x S kernel; a prologue, and a layout of the input."""

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
    prologue: bool = True
    layout: str = "channels_last"

    def __str__(self) -> str:
        what = f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.k}-{self.r}x{self.s}"
        for letter, pair, usual in (("s", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            what += "" if pair == (usual, usual) else f"-{letter}{pair[0]}{pair[1]}"
        return (
            what + ("" if self.prologue else "-plain") + ("" if self.layout == "channels_last" else f"-{self.layout}")
        )

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, 1


def _square(n, c, h, w, k, r, stride=1, padding=0, dilation=1, prologue=True, layout="channels_last") -> Case:
    return Case(n, c, h, w, k, r, r, (stride,) * 2, (padding,) * 2, (dilation,) * 2, prologue, layout)


SHAPES = (
    # products: rows and channels that no block divides, one of each, several tiles both ways
    _square(2, 16, 7, 9, 24, 1),
    _square(2, 17, 5, 3, 5, 1),
    _square(1, 1, 1, 1, 1, 1),
    _square(3, 1, 5, 4, 9, 1),
    _square(1, 33, 1, 13, 1, 1, prologue=False),
    _square(2, 40, 9, 8, 70, 1, layout="offset"),
    _square(2, 8, 12, 13, 140, 1, layout="contiguous"),
    _square(1, 130, 3, 5, 66, 1),
    _square(2, 12, 5, 5, 6, 1, layout="channel_slice"),
    _square(5, 64, 1, 1, 64, 1),
    _square(1, 37, 4, 4, 33, 1, prologue=False, layout="offset"),
    # 1x1 with a stride or padding is no plain product
    _square(2, 16, 7, 7, 24, 1, stride=2),
    _square(1, 6, 8, 5, 7, 1, stride=3),
    _square(1, 20, 4, 5, 18, 1, padding=1),
    _square(2, 32, 5, 6, 16, 1, stride=2, prologue=False, layout="contiguous"),
    # 3x3
    _square(2, 16, 7, 9, 24, 3, padding=1),
    _square(2, 64, 6, 5, 72, 3, padding=1),
    _square(1, 96, 4, 4, 32, 3, padding=1),
    _square(3, 8, 9, 7, 12, 3, 2, 1),
    _square(1, 24, 8, 8, 40, 3, 2, 1, prologue=False),
    _square(2, 17, 6, 6, 9, 3, 1, 1, layout="channel_slice"),
    _square(1, 20, 11, 10, 20, 3, 3, 2),
    _square(2, 18, 6, 7, 3, 3, 1, 2, 2),
    _square(1, 16, 9, 9, 8, 3, 2, 3, 3, layout="offset"),
    _square(1, 1, 6, 6, 1, 3, 1, 1),
    _square(1, 5, 1, 9, 4, 3, 1, 1, layout="contiguous"),
    _square(1, 5, 9, 1, 4, 3, 1, 1),
    _square(2, 4, 5, 5, 6, 3, 1, 0),
    _square(1, 3, 3, 3, 2, 3, 1, 0, prologue=False),
    _square(4, 16, 6, 6, 16, 3, 1, 1),
    # other kernels
    _square(1, 3, 15, 13, 64, 7, 2, 3, prologue=False),
    _square(1, 4, 13, 15, 32, 7, 2, 3, prologue=False),
    _square(1, 3, 12, 12, 20, 7, 2, 3, layout="contiguous"),
    _square(1, 2, 8, 8, 3, 7, 3, 3),
    _square(1, 7, 8, 9, 10, 5, 1, 2),
    _square(1, 16, 7, 6, 12, 5, 2, 2),
    _square(1, 6, 7, 7, 5, 2, 2, 0),
    Case(1, 16, 6, 9, 20, 1, 7, padding=(0, 3)),
    Case(1, 5, 9, 6, 20, 7, 1, padding=(3, 0)),
    Case(2, 10, 8, 7, 11, 3, 2, (2, 1), (1, 2), (1, 2)),
    Case(1, 24, 7, 8, 9, 2, 3, (3, 2), (0, 1), (2, 1), False),
    Case(1, 34, 5, 6, 34, 3, 3, (1, 2), (1, 0)),
)
EMPTY = _square(0, 16, 6, 6, 8, 3, 1, 1)


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weight: Tensor
    vectors: tuple[Tensor | None, ...]
    relu: bool
    bias: Tensor
    residual: Tensor


def _y_shape(case: Case) -> tuple[int, ...]:
    x, w = torch.empty(case.n, case.c, case.h, case.w, device="meta"), _weight_shape(case)
    return tuple(torch.conv2d(x, torch.empty(w, device="meta"), None, *case.geometry).shape)


def _weight_shape(case: Case) -> tuple[int, int, int, int]:
    return case.k, case.c, case.r, case.s


def integers(case: Case, kind: str, seed: int = 0) -> Inputs:
    """Small integers: every product, sum and prologue is exact in every dtype, whatever the order."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g).double()

    dtype = DTYPE_OF[kind]
    x = lay_out(draw(-3, 3, case.n, case.c, case.h, case.w).to(dtype), case.layout)
    weight = draw(-2, 2, *_weight_shape(case)).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors: tuple[Tensor | None, ...] = (None, None, None)
    if case.prologue:
        vectors = tuple(draw(-2, 2, case.c).float() for _ in range(3))
    bias, residual = draw(-4, 4, case.k).float(), draw(-4, 4, *_y_shape(case)).to(dtype)
    return Inputs(x, weight, vectors, case.prologue, bias, residual.contiguous(memory_format=torch.channels_last))


def normals(case: Case, kind: str, seed: int = 0) -> Inputs:
    """Channels with other means and spreads, filters of variance 1/(C·R·S)."""
    g = torch.Generator().manual_seed(seed)
    dtype = DTYPE_OF[kind]
    x = random_map((case.n, case.c, case.h, case.w), dtype, case.layout, seed)
    weight = torch.randn(_weight_shape(case), generator=g, dtype=torch.float64) / (case.c * case.r * case.s) ** 0.5
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    vectors: tuple[Tensor | None, ...] = tuple(random_vectors(case.c, 3, seed=seed)) if case.prologue else (None,) * 3
    residual = random_map(_y_shape(case), dtype, seed=seed + 1)
    return Inputs(x, weight, vectors, case.prologue, random_vectors(case.k, 1, seed=seed)[0], residual)


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def truth_of(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) of conv_stats in float64."""
    vectors = (wide(v) for v in inputs.vectors)
    return reference.forward(
        inputs.x.double(), inputs.weight.double(), *vectors, inputs.relu, *case.geometry, stats=True
    )


def cut(x: Tensor) -> Tensor:
    """float32 with the bits that a TF32 product ignores cut off."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def peer_of(case: Case, inputs: Inputs, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) by the reference in the working precision."""
    if kind != "tf32":
        return reference.forward(inputs.x, inputs.weight, *inputs.vectors, inputs.relu, *case.geometry, stats=True)
    a = reference._activated(inputs.x, *inputs.vectors, inputs.relu)
    return reference.forward(cut(a), cut(inputs.weight), None, None, None, False, *case.geometry, stats=True)
