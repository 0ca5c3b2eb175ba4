"""The shapes, layouts and problems that tests share, in one place."""

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("channels_last", "contiguous", "offset", "channel_slice")

# [N, C, H, W]: odd everything, vector remainders, one channel, one value per channel and image, empty, many channels
MAPS = (
    (2, 64, 7, 7),
    (3, 17, 5, 9),
    (2, 3, 8, 8),
    (4, 130, 3, 5),
    (2, 1, 6, 5),
    (5, 8, 1, 1),
    (1, 33, 1, 7),
    (0, 16, 4, 4),
)


class Conv(NamedTuple):
    """A convolution problem: N images, C channels in, H x W, K channels out, R x R kernel."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def arguments(self) -> dict[str, int]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}


CONVS = (
    Conv(2, 16, 7, 9, 24, 3, 1, 1),
    Conv(2, 17, 8, 8, 5, 1),
    Conv(3, 8, 9, 7, 12, 3, 2, 1),
    Conv(2, 3, 17, 17, 8, 7, 2, 3),
    Conv(2, 8, 8, 8, 8, 3, 1, 2, 2, 4),
    Conv(1, 6, 6, 6, 7, 1, 2),
    Conv(0, 8, 6, 6, 4, 3, 1, 1),
)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """``x`` with the same values in another layout: dense, or a view at an offset with sentinels around it."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    sentinel = min(1e30, torch.finfo(x.dtype).max)
    if layout == "offset":  # one image further in, channels_last
        big = torch.full((n + 1, c, h, w), sentinel, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        big[1:] = x
        return big[1:]
    assert layout == "channel_slice"  # neither dense nor aligned
    big = torch.full((n, c + 3, h, w), sentinel, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    big[:, 1 : c + 1] = x
    return big[:, 1 : c + 1]


def random_map(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last", seed: int = 0) -> Tensor:
    """A map with another mean and spread in every channel."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    c = shape[1]
    spread = torch.rand(c, generator=g, dtype=torch.float64) + 0.5
    mean = torch.randn(c, generator=g, dtype=torch.float64)
    return lay_out((x * spread.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)).to(dtype), layout)


def random_vectors(channels: int, count: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """[C] vectors; the first (scale) has positive, negative and zero entries."""
    g = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(channels, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]
    if channels > 2:
        vectors[0][1] = 0.0
    return vectors
