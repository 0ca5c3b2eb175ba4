"""Times of the contenders as grouped bars, one panel a dtype and batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import TITLES
from .measuring import Row
from .table import of_kind

COLOURS = dict(
    zip(TITLES, ("#0f8b6f", "#7cc4b2", "#9a9a9a", "#c2571a", "#e59a6b", "#2f6db5", "#8a5fb0", "#b03a5b"), strict=True)
)


def draw(rows: Sequence[Row], path: Path | str) -> None:
    """Writes the plot of the latency rows; the same rows give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastres"
    from matplotlib import pyplot

    latency = of_kind(rows, "latency")
    dtypes = [d for d in ("fp32", "bf16") if any(row["dtype"] == d for row in latency)] or ["fp32"]
    batches = sorted({row["batch"] for row in latency}) or [1]
    names = [name for name in TITLES if any(row["baseline"] == name and row["seconds"] for row in latency)]
    size = (4.2 * len(batches) + 0.5, 2.7 * len(dtypes) + 0.5)
    figure, axes = pyplot.subplots(len(dtypes), len(batches), figsize=size, squeeze=False, layout="constrained")
    for line, dtype in enumerate(dtypes):
        for column, batch in enumerate(batches):
            panel = [row for row in latency if row["dtype"] == dtype and row["batch"] == batch]
            _panel(axes[line][column], panel, names)
            axes[line][column].set_title(f"{dtype}, batch {batch}", loc="left", fontsize=10)
        axes[line][0].set_ylabel("ms an image")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    if names:
        figure.legend(
            handles, [TITLES[n] for n in names], loc="outside lower center", ncols=4, frameon=False, fontsize=8
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save: dict[str, Any] = {"metadata": {"Date": None}} if str(path).endswith(".svg") else {}
    figure.savefig(path, **save)
    pyplot.close(figure)


def _panel(axis: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    nets = list(dict.fromkeys(row["net"] for row in rows))
    width = 0.84 / max(len(names), 1)
    for place, name in enumerate(names):
        for row in rows:
            if row["baseline"] != name or not row["seconds"]:
                continue
            median, low, high = (1e3 * row["seconds"][key] / row["batch"] for key in ("median", "low", "high"))
            x = nets.index(row["net"]) + (place - (len(names) - 1) / 2) * width
            spread = [[max(median - low, 0)], [max(high - median, 0)]]
            axis.bar(x, median, 0.9 * width, color=COLOURS[name], yerr=spread, ecolor="#444", capsize=1.5)
    axis.set_xticks(range(len(nets)), nets, fontsize=8)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
