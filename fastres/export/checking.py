"""Whether a file computes what the network computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.errors import ExportError

FLOOR = 1e-5  # of the largest output: where the network happens to round luckily
MOST = 1e-2  # of the largest output: a difference that large would tell nothing
EXACT_IMAGES = 3  # float64 is slow
ROUNDING = 4  # a file may round differently, and three times as badly: the difference is at most the sum of both errors
RULE = f"{ROUNDING} x the network's own largest difference from float64 + 1e-5 x its largest output"


@dataclass(frozen=True)
class Comparison:
    """Of a file with the network: the largest difference of an output, what is allowed, and the largest output."""

    difference: float
    allowed: float
    largest: float
    batches: tuple[int, ...]

    def __str__(self) -> str:
        batches = " and ".join(str(n) for n in self.batches)
        return (
            f"largest difference {self.difference:.2g} of outputs up to {self.largest:.3g}, allowed {self.allowed:.2g} "
            f"({RULE}); batches of {batches}"
        )


class Check:
    """The network's own outputs for random images, and how far from them a file's outputs may be.

    Args:
        own: the network as the user has it, in evaluation mode, float32, CPU.
        plain: the same in plain PyTorch; a float64 copy of it says how much the network itself rounds.
        size: (C, H, W). batches: how many images are given at a time.

    Raises:
        ExportError: the network gives no finite outputs, is chaotic, or can't take such images.
    """

    def __init__(self, own: nn.Module, plain: nn.Module, size: tuple[int, int, int], batches: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = [torch.randn((n, *size), generator=generator) for n in batches]
        self.batches = batches
        try:
            with torch.no_grad():
                self.expected = [own(x) for x in self.images]
        except Exception as error:  # the user's network, whatever it raises
            raise ExportError(f"the network can't compute images of {'x'.join(map(str, size))}: {error}") from error
        if not all(isinstance(y, Tensor) for y in self.expected):
            raise ExportError(f"the network gives a {type(self.expected[0]).__name__}, expected one tensor")
        if not all(bool(y.isfinite().all()) for y in self.expected):
            raise ExportError(
                "the network's own outputs for random images are not finite, so a file can't be compared with them; "
                "train it, or load weights"
            )
        self.largest = max(float(y.abs().max()) for y in self.expected)
        shown = torch.cat([x[:EXACT_IMAGES] for x in self.images])
        got = torch.cat([y[:EXACT_IMAGES] for y in self.expected])
        self.rounding = float((got.double() - _in_float64(plain, shown)).abs().max())
        self.allowed = ROUNDING * self.rounding + FLOOR * self.largest
        if self.allowed > MOST * self.largest > 0:
            raise ExportError(
                f"this network turns rounding errors into differences of {self.rounding:.2g} in outputs up to "
                f"{self.largest:.3g}, so a file can't be compared with it; train it, or load weights"
            )

    def compare(self, program: Callable[[Tensor], Tensor], what: str) -> Comparison:
        """Run ``program`` on the same images.

        Raises:
            ExportError: it fails, or gives other outputs than the network.
        """
        difference = 0.0
        for images, expected in zip(self.images, self.expected, strict=True):
            try:
                with torch.no_grad():
                    got = program(images.clone())
            except Exception as error:  # runtimes raise types of their own
                raise ExportError(
                    f"the {what} that was written does not run on {list(images.shape)}: {error}"
                ) from error
            if got.shape != expected.shape:
                raise ExportError(
                    f"the {what} that was written gives {list(got.shape)}, the network {list(expected.shape)}; no file was left"
                )
            each = float((got.double() - expected.double()).abs().max())
            difference = each if each != each or each > difference else difference  # NaN stays
        found = Comparison(difference, self.allowed, self.largest, self.batches)
        if not difference <= self.allowed:
            raise ExportError(f"the {what} that was written computes something else, and was deleted: {found}")
        return found


def _in_float64(plain: nn.Module, images: Tensor) -> Tensor:
    import copy

    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(images.double())
    assert isinstance(exact, Tensor)
    return exact
