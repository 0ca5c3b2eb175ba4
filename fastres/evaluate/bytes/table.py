"""The byte ledger as rows of text and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.evaluate.gpus import Gpu
from fastres.ops.schemas import BACKENDS

from .levels import LEVELS
from .recording import Event, Ledger

GROUPS = ("stage", "block", "layer", "op")
DIRECTIONS = (("forward", False), ("backward", True))


def group_of(event: Event, by: str) -> str:
    """What an event is counted under."""
    if by == "op":
        op = event.op
        for backend in BACKENDS:
            op = op.removesuffix(f"_{backend}")
        # A forward op inside the backward pass makes an activation anew that was not kept.
        return f"{op}, backward pass" if event.backward else op
    parts = event.layer.split(".")
    return ".".join(parts[: {"stage": 1, "block": 2 if len(parts) > 2 else len(parts), "layer": len(parts)}[by]])


def rows(ledger: Ledger, by: str = "block") -> list[tuple[str, dict[str, float]]]:
    """``(group, {level: bytes of one image})`` in the order of execution, and the totals last."""
    found: dict[str, dict[str, float]] = {}
    for event in sorted(ledger.events, key=lambda e: e.backward):
        for level in event.passes:
            row = found.setdefault(group_of(event, by), {})
            row[level] = row.get(level, 0.0) + event.bytes(level) / ledger.batch
    for name, backward in DIRECTIONS:
        found[f"{name} pass"] = {level.key: ledger.per_image(level.key, backward=backward) for level in LEVELS}
    found["total"] = {level.key: ledger.per_image(level.key) for level in LEVELS}
    return list(found.items())


def cells(name: str, row: dict[str, float]) -> tuple[str, ...]:
    """One line of the table: MB of one image by level."""
    return (name, *(f"{row[level.key] / 1e6:.2f}" if level.key in row else "–" for level in LEVELS))


def ceilings(ledger: Ledger, gpu: Gpu) -> dict[str, float]:
    """Predicted images a second at most, by level."""
    compute = gpu.compute_ceiling(ledger.flops())
    return {level.key: min(gpu.ceiling(ledger.per_image(level.key)), compute) for level in LEVELS}


def notes(ledger: Ledger, gpu: Gpu) -> list[str]:
    """What the columns are, and where the ceilings come from."""
    compute = gpu.compute_ceiling(ledger.flops())
    return [
        *(f"{level.key}: {level.text}." for level in LEVELS),
        "MB of one image, forward and backward, weights shared by the batch. Every tensor counts once for each kernel that "
        "reads or writes it; vectors of a channel's length, partial sums and the optimizer are left out.",
        f"Predicted, not measured: {gpu.name} moves {gpu.bandwidth / 1e9:,.0f} GB/s and multiplies {gpu.flops / 1e12:,.0f} "
        f"TFLOP/s in 16 bits ({gpu.source}). Its tensor cores alone would allow {compute:,.0f} images/s.",
    ]


COLOURS = ("#8d8d8d", "#b08f5a", "#c2571a", "#8a5fb0", "#2f6db5", "#0f8b6f")


def draw(ledger: Ledger, gpu: Gpu, title: str, path: Path | str, by: str = "block") -> None:
    """MB by group and level on the left, predicted ceilings of ``gpu`` on the right."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastres"
    from matplotlib import pyplot

    lines = [row for row in rows(ledger, by) if row[0] not in ("total", "forward pass", "backward pass")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(2.2, 1))
    keys = [level.key for level in LEVELS]
    for number, (key, colour) in enumerate(zip(keys, COLOURS, strict=True)):
        places = [i + (number - len(keys) / 2 + 0.5) / (len(keys) + 1) for i in range(len(lines))]
        sizes = [row.get(key, 0) / 1e6 for _, row in lines]
        left.bar(places, sizes, 1 / (len(keys) + 1), color=colour, label=f"{key}: {sum(sizes):.0f} MB")
    left.set_xticks(range(len(lines)), [name for name, _ in lines], rotation=60, ha="right", fontsize=8)
    left.set_ylabel("MB of one image and step")
    left.legend(frameon=False, fontsize=8)
    _draw_ceilings(right, [(key, ceiling) for key, ceiling in ceilings(ledger, gpu).items()], ledger, gpu)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    save: dict[str, Any] = {"metadata": {"Date": None}} if str(path).endswith(".svg") else {}
    try:
        figure.savefig(path, **save)
    except ValueError as error:
        raise UserError(f"can't write {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _draw_ceilings(axis: Any, values: Sequence[tuple[str, float]], ledger: Ledger, gpu: Gpu) -> None:
    bars = axis.bar([key for key, _ in values], [v for _, v in values], color=COLOURS, alpha=0.45, hatch="//")
    axis.bar_label(bars, [f"{v:,.0f}" for _, v in values], fontsize=8)
    compute = gpu.compute_ceiling(ledger.flops())
    highest = max(v for _, v in values)
    if compute < 3 * highest:
        axis.axhline(compute, color="#b03a5b", lw=1.2, label=f"tensor cores {compute:,.0f}")
        axis.legend(frameon=False, fontsize=8)
    axis.set_ylim(0, 1.12 * max(highest, compute if compute < 3 * highest else 0))
    axis.set_ylabel("images/s at most, predicted")
    axis.set_title(f"{gpu.name}: predicted ceilings, nothing was run", fontsize=9, loc="left")
