"""What a kernel moves between memory and chip: the byte model that every ``kernels/<op>/bytes.py`` is written in.

A :class:`Pass` is one kernel launch. Each tensor counts once for every launch that reads or writes it, with the bytes
that are touched at least once: halos, tiles read again and rows that lie in a cache are left out. So are vectors of a
channel's length and partial sums, which are written as a share of a tile and never grow with the image alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

WEIGHTS = ("weight", "grad_weight")


@dataclass(frozen=True)
class Pass:
    """One launch: bytes read and written, by the name of the tensor. ``flops``: of a convolution or a product."""

    kernel: str
    reads: Mapping[str, float] = field(default_factory=dict)
    writes: Mapping[str, float] = field(default_factory=dict)
    flops: float = 0

    @property
    def total(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def weights(self) -> float:
        """The part that does not grow with the batch."""
        return sum(moved.get(name, 0) for moved in (self.reads, self.writes) for name in WEIGHTS)

    @property
    def maps(self) -> float:
        """The part that grows with the batch."""
        return self.total - self.weights


def size(t: Tensor | None) -> int:
    """Bytes of a tensor; 0 for none."""
    return 0 if t is None else t.numel() * t.element_size()


def named(**tensors: Tensor | float | None) -> dict[str, float]:
    """``{name: bytes}`` of the tensors that are there; figures pass through."""
    sizes = {name: size(t) if t is None or isinstance(t, Tensor) else t for name, t in tensors.items()}
    return {name: bytes_ for name, bytes_ in sizes.items() if bytes_}


def total(passes: Iterable[Pass]) -> float:
    return sum(p.total for p in passes)


def touched_positions(length: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``length`` input positions some window of a convolution covers, in one direction."""
    seen = {p * stride - padding + r * dilation for p in range(out) for r in range(kernel)}
    return sum(0 <= i < length for i in seen)


def conv_out(length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def conv_reads(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[float, int]:
    """(bytes of ``x`` [N, C, H, W] that a convolution touches, multiply-adds x 2). A 1x1 of stride 2 skips three of four
    positions, and with channels innermost it does not fetch them."""
    n, c, *map_size = x.shape
    k, per_group, *window = weight.shape
    positions, outputs = n, n
    for length, r, s, p, d in zip(map_size, window, stride, padding, dilation, strict=True):
        out = conv_out(length, r, s, p, d)
        outputs *= out
        positions *= touched_positions(length, out, r, s, p, d)
    return positions * c * x.element_size(), 2 * outputs * k * per_group * window[0] * window[1]
