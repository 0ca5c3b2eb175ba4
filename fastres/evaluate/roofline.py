"""Every step of a plan against what this machine can do: min(peak arithmetic, intensity x bandwidth), measured on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres import _library
from fastres.errors import UserError

# An fp32 product as bf16 tiles: three parts a factor, of whose nine products the six largest are computed.
TILE_PRODUCTS = 6
KINDS = {"fp32": "vector fp32", "bf16": "vector bf16", "bf16_tiles": "bf16 tiles"}


@dataclass(frozen=True)
class Limits:
    """``flops``: operations a second by kind of instruction. ``read``: bytes a second by bytes of each thread's buffer.
    All threads together."""

    threads: int
    flops: dict[str, float]
    read: dict[int, float]

    def best(self, other: Limits) -> Limits:
        """The larger of each: what was possible at one time is possible. For a machine that others disturb."""
        flops = {kind: max(rate, other.flops[kind]) for kind, rate in self.flops.items()}
        return Limits(self.threads, flops, {size: max(rate, other.read[size]) for size, rate in self.read.items()})

    def peak(self, dtype: str) -> tuple[float, str]:
        """Operations a second that a convolution could reach in ``dtype`` (fp32, bf16), and by what."""
        found = [(self.flops["fp32"], KINDS["fp32"])]
        if "bf16_tiles" in self.flops:
            share = TILE_PRODUCTS if dtype == "fp32" else 1
            name = f"{KINDS['bf16_tiles']} / {share}" if share > 1 else KINDS["bf16_tiles"]
            found.append((self.flops["bf16_tiles"] / share, name))
        if dtype == "bf16" and "bf16" in self.flops:
            found.append((self.flops["bf16"], KINDS["bf16"]))
        return max(found)

    def bandwidth(self, size: float) -> float:
        """Bytes a second of the smallest measured buffer that holds a thread's share of ``size`` bytes."""
        sizes = sorted(self.read)
        return self.read[next((s for s in sizes if s * self.threads >= size), sizes[-1])]


def measure_limits(threads: int) -> Limits:
    """About three seconds.

    Raises:
        UserError: no native library, or one that is older than these sources.
    """
    if _library.native_error() is not None:
        raise UserError(f"machine limits need the native library: {_library.native_error()}")
    measure = getattr(_library._native, "machine_limits", None)
    if measure is None:
        raise UserError("the native library is older than these Python sources; build it again")
    found = measure(threads)
    return Limits(found["threads"], dict(found["flops"]), dict(found["read"]))


@dataclass(frozen=True)
class Line:
    """One step. ``size``: bytes of activations and weights, each read or written once. ``least_s``: at the limit."""

    name: str
    kernel: str
    seconds: float
    flops: float
    size: float
    least_s: float

    @property
    def intensity(self) -> float:
        return self.flops / self.size if self.size else 0.0

    @property
    def fraction(self) -> float:
        """Of the machine's limit: 1 is as fast as it could be."""
        return self.least_s / self.seconds if self.seconds else 0.0


def lines_of(steps: Sequence[dict[str, Any]], dtype: str, limits: Limits) -> list[Line]:
    """Steps of ``CompiledNetwork.profile`` with what they could take at least."""
    peak, _ = limits.peak(dtype)
    lines = []
    for step in steps:
        size = float(step["activation_bytes"] + step["weight_bytes"])
        least = max(step["flops"] / peak, size / limits.bandwidth(size))
        kernel = step["kernel"] or step["op"]
        lines.append(Line(step["name"], kernel, step["seconds"], step["flops"], size, least))
    return lines


def total_of(lines: Sequence[Line]) -> Line:
    """The sum; its fraction is that of a network whose steps all reach their limits one after the other."""
    sums = [sum(getattr(line, field) for line in lines) for field in ("seconds", "flops", "size", "least_s")]
    return Line("total", "", *sums)


def measure(model: nn.Module, images: torch.Tensor, repeats: int, threads: int) -> tuple[list[Line], Limits]:
    """Profiles the plan of ``model`` ([N, C, H, W] in float32 or bfloat16, on the CPU); limits are measured before and
    after."""
    import fastres

    limits, before = measure_limits(threads), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = fastres.compile(model, images).profile(images, repeats)
    finally:
        torch.set_num_threads(before)
    limits = limits.best(measure_limits(threads))
    return lines_of(steps, "bf16" if images.dtype == torch.bfloat16 else "fp32", limits), limits


HEADER = ("step", "kernel", "ms", "share", "GFLOP/s", "MB", "FLOP/byte", "of the limit")


def cells(line: Line, whole: float) -> tuple[str, ...]:
    """``line`` below ``HEADER``; ``whole``: seconds of all steps."""
    rate = f"{line.flops / line.seconds / 1e9:.1f}" if line.seconds and line.flops else "–"
    share = f"{line.seconds / whole:.1%}" if whole else "–"
    intensity = f"{line.intensity:.1f}" if line.flops else "–"
    return (
        line.name, line.kernel, f"{1e3 * line.seconds:.3f}", share, rate, f"{line.size / 1e6:.2f}", intensity,
        f"{line.fraction:.0%}",
    )  # fmt: skip


def notes(limits: Limits, dtype: str, lines: Sequence[Line]) -> list[str]:
    """What the limits are, and how they are to be read."""
    peaks = ", ".join(f"{KINDS[kind]} {rate / 1e9:.0f} GFLOP/s" for kind, rate in limits.flops.items())
    reads = ", ".join(
        f"{rate / 1e9:.0f} GB/s from {size // 1024} KiB a thread" for size, rate in sorted(limits.read.items())
    )
    peak, kind = limits.peak(dtype)
    found = [
        f"Measured on {limits.threads} threads: {peaks}; reading {reads}.",
        f"Limit of {dtype}: {peak / 1e9:.0f} GFLOP/s ({kind}), and the bandwidth of the smallest of these buffers that "
        "holds a thread's share of the step's bytes.",
    ]
    if dtype == "fp32" and "bf16_tiles" in limits.flops:
        found.append(
            f"The kernel amx computes an fp32 convolution as {TILE_PRODUCTS} products of bf16 parts on tiles: the limit "
            f"is the peak of bf16 tiles / {TILE_PRODUCTS}."
        )
    if any("winograd" in line.kernel for line in lines):
        found.append("GFLOP/s of Winograd kernels are those of the direct convolution; they do fewer operations.")
    if any(line.fraction > 1 for line in lines):
        found.append(
            "More than 100 %: data that was still in a nearer cache than its size says, or an algorithm with fewer "
            "operations than are counted (two a multiply-add of the direct convolution)."
        )
    return found


def draw(lines: Sequence[Line], dtype: str, limits: Limits, title: str, path: Path | str) -> None:
    """GFLOP/s over FLOP/byte of the steps that compute, below the limits; the area is the share of time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastres"
    from matplotlib import pyplot

    computing = [line for line in lines if line.flops and line.seconds]
    peak, kind = limits.peak(dtype)
    low = min([1.0, *(line.intensity / 2 for line in computing)])
    high = max([1000.0, *(2 * line.intensity for line in computing)])
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for shade, (size, rate) in zip((0.75, 0.6, 0.45, 0.3), sorted(limits.read.items()), strict=False):
        corner = min(max(peak / rate, low), high)
        axis.plot(
            [low, corner, high], [low * rate / 1e9, min(corner * rate, peak) / 1e9, peak / 1e9],
            color=str(shade), lw=1.2, label=f"reading {size // 1024} KiB a thread, {rate / 1e9:.0f} GB/s",
        )  # fmt: skip
    axis.axhline(peak / 1e9, color="#c2571a", lw=1.5, label=f"{kind}, {peak / 1e9:.0f} GFLOP/s")
    whole = sum(line.seconds for line in lines)
    for colour, kernel in zip(
        ("#0f8b6f", "#2f6db5", "#8a5fb0", "#b03a5b"), sorted({line.kernel for line in computing}), strict=False
    ):
        mine = [line for line in computing if line.kernel == kernel]
        axis.scatter(
            [line.intensity for line in mine], [line.flops / line.seconds / 1e9 for line in mine],
            s=[20 + 2000 * line.seconds / whole for line in mine], color=colour, alpha=0.55, lw=0, label=kernel,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP / byte")
    axis.set_ylabel("GFLOP/s")
    axis.set_title(title, loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    axis.grid(alpha=0.2, which="both")
    save: dict[str, Any] = {"metadata": {"Date": None}} if str(path).endswith(".svg") else {}
    try:
        figure.savefig(path, **save)
    except ValueError as error:
        raise UserError(f"can't write {path}: {error}") from error
    finally:
        pyplot.close(figure)
