"""Shapes for the Triton kernels of pointwise ops: odd, tiny, one channel, one row, channels around a block, empty."""

from typing import NamedTuple

import torch
from cases import lay_out
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# [N, C, H, W]
POINTS = (
    (2, 64, 7, 7), (3, 17, 5, 9), (2, 3, 8, 8), (4, 130, 3, 5), (2, 1, 6, 5), (5, 8, 1, 1), (1, 33, 1, 7), (0, 16, 4, 4),
    (1, 1, 1, 1), (1, 2, 1, 3), (7, 5, 1, 1), (2, 16, 4, 4), (1, 24, 9, 2), (2, 96, 3, 3), (1, 128, 4, 5), (3, 129, 2, 2),
    (2, 127, 3, 2), (1, 256, 2, 3), (1, 257, 2, 2), (2, 300, 1, 2), (1, 7, 16, 16), (1, 64, 1, 1), (2, 65, 2, 1), (1, 63, 5, 3),
    (1, 12, 13, 11), (2, 4, 10, 3), (3, 6, 2, 7), (1, 9, 31, 1), (1, 10, 1, 31), (4, 11, 3, 3), (2, 13, 6, 6), (1, 15, 8, 5),
    (2, 31, 4, 3), (1, 32, 7, 7), (3, 36, 2, 4), (1, 40, 5, 5), (2, 48, 2, 2), (1, 72, 3, 8), (1, 80, 4, 4), (2, 112, 1, 5),
    (1, 512, 1, 2), (1, 2, 40, 33),
)  # fmt: skip

# [N, C, H, W] of as many positions as a power of two: a mean of whole numbers is exact there
MEANS = (
    (2, 64, 4, 4), (3, 17, 8, 2), (2, 3, 8, 8), (4, 130, 1, 4), (2, 1, 4, 8), (5, 8, 1, 1), (1, 33, 1, 8), (0, 16, 4, 4),
    (1, 1, 1, 1), (1, 2, 1, 2), (7, 5, 1, 1), (2, 16, 4, 4), (1, 24, 8, 2), (2, 96, 2, 2), (1, 128, 4, 4), (3, 129, 2, 2),
    (2, 127, 1, 2), (1, 256, 2, 4), (1, 257, 2, 2), (2, 300, 1, 2), (1, 7, 16, 16), (1, 64, 1, 1), (2, 65, 2, 1), (1, 63, 4, 2),
    (1, 12, 16, 8), (2, 4, 8, 4), (3, 6, 2, 8), (1, 9, 32, 1), (1, 10, 1, 32), (4, 11, 2, 4), (2, 13, 4, 8), (1, 15, 8, 4),
    (2, 31, 4, 2), (1, 32, 8, 8), (3, 36, 2, 4), (1, 40, 4, 4), (2, 48, 2, 2), (1, 72, 2, 8), (1, 80, 4, 4), (2, 112, 1, 4),
    (1, 512, 1, 2),
)  # fmt: skip


class Pool(NamedTuple):
    """A map and a window."""

    n: int
    c: int
    h: int
    w: int
    kernel: int
    stride: int
    padding: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self[:4]

    @property
    def window(self) -> dict[str, int]:
        return {"kernel": self.kernel, "stride": self.stride, "padding": self.padding}


POOLS = tuple(
    Pool(*sizes)
    for sizes in (
        (2, 17, 9, 11, 3, 2, 1), (1, 64, 6, 6, 3, 2, 1), (2, 3, 5, 5, 3, 2, 1), (0, 8, 6, 6, 3, 2, 1), (1, 1, 3, 3, 3, 1, 1),
        (1, 1, 1, 1, 1, 1, 0), (2, 5, 7, 4, 1, 2, 0), (1, 33, 8, 8, 2, 2, 0), (1, 16, 5, 7, 2, 2, 1), (2, 9, 6, 5, 2, 1, 0),
        (1, 130, 4, 4, 3, 2, 1), (1, 12, 7, 7, 3, 3, 0), (1, 12, 8, 7, 3, 3, 1), (2, 4, 9, 9, 5, 3, 2), (1, 6, 10, 9, 5, 2, 2),
        (1, 7, 11, 8, 7, 2, 3), (1, 8, 7, 7, 7, 3, 3), (1, 3, 9, 12, 4, 2, 2), (1, 20, 6, 6, 4, 3, 1), (3, 2, 5, 5, 5, 1, 2),
        (1, 65, 4, 3, 3, 1, 1), (1, 63, 3, 4, 3, 1, 0), (2, 64, 1, 5, 1, 1, 0), (1, 31, 2, 9, 2, 2, 0), (1, 128, 3, 3, 3, 2, 1),
        (1, 256, 2, 2, 2, 2, 0), (4, 1, 8, 3, 3, 2, 1), (1, 48, 5, 5, 3, 2, 0), (2, 11, 4, 6, 3, 2, 1), (1, 14, 6, 4, 2, 3, 1),
        (1, 24, 3, 11, 3, 1, 1), (1, 40, 4, 4, 4, 1, 2), (1, 72, 5, 2, 2, 1, 1), (5, 3, 3, 3, 3, 3, 1), (1, 96, 3, 2, 2, 2, 1),
        (1, 10, 12, 5, 5, 1, 1), (2, 15, 7, 3, 3, 2, 1), (1, 36, 6, 6, 6, 2, 3), (1, 1, 15, 15, 15, 4, 7),
        (1, 3, 20, 20, 3, 2, 1), (2, 2, 13, 13, 11, 3, 5),
    )
)  # fmt: skip


def whole_numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int, largest: int = 4) -> Tensor:
    """Small whole numbers, of which no dtype rounds a sum or a product here."""
    generator = torch.Generator().manual_seed(seed)
    return lay_out(torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype), layout)


def whole_vectors(channels: int, seed: int) -> list[Tensor]:
    """(scale, center, shift), [C] float32."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (channels,), generator=generator).float() for _ in range(3)]
