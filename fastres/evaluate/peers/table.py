"""Rows of :mod:`.measuring` and :mod:`.memory` as cells, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .contenders import PLAN, TITLES
from .measuring import Row

LATENCY_HEADER = ("network", "dtype", "batch", "contender", "ms/image", "logits error", "time / fastres plan")
MEMORY_HEADER = ("network", "dtype", "batch", "contender", "peak MiB", "running MiB", "logits error")
SCALING_HEADER = ("network", "dtype", "batch", "threads", "ms/image", "speed-up")
NONE = "–"


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """The rows of one table."""
    return [row for row in rows if row["kind"] == kind]


def ms_per_image(row: Row) -> str:
    """``1.23 [1.20, 1.31]``, or why there is no figure."""
    if row["seconds"] is None:
        return str(row["reason"] or "not timed")
    median, low, high = (1e3 * row["seconds"][key] / row["batch"] for key in ("median", "low", "high"))
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def ratio(spread: dict[str, float] | None) -> str:
    """Median and quartiles of paired ratios."""
    return NONE if spread is None else f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]"


def error(row: Row) -> str:
    return NONE if row["error"] is None else f"{row['error']:.1e}"


def place(row: Row) -> tuple[str, str, str]:
    return row["net"], row["dtype"], str(row["batch"])


def latency_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Cells below ``LATENCY_HEADER``; the fastest of the other runtimes is marked with a star."""
    for row in of_kind(rows, "latency"):
        star = " *" if row["best_peer"] else ""
        over = ratio(row["over_plan"]) if row["baseline"] != PLAN else NONE
        yield (*place(row), TITLES[row["baseline"]] + star, ms_per_image(row), error(row), over)


def memory_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Cells below ``MEMORY_HEADER``."""
    for row in of_kind(rows, "memory"):
        peak, running = (NONE if row[k] is None else f"{row[k] / 2**20:.0f}" for k in ("peak_bytes", "running_bytes"))
        yield (*place(row), TITLES[row["baseline"]], row["reason"] or peak, running, error(row))


def scaling_lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Cells below ``SCALING_HEADER``."""
    for row in of_kind(rows, "scaling"):
        yield (*place(row), str(row["threads"]), ms_per_image(row), ratio(row["speed_up"]))


TABLES = (
    ("ms/image: median, quartiles; * the fastest other runtime; above 1: slower than the plan", LATENCY_HEADER, latency_lines),
    ("memory of one process above what it has once its code is loaded", MEMORY_HEADER, memory_lines),
    ("the plan on one and more threads", SCALING_HEADER, scaling_lines),
)  # fmt: skip


def rich_tables(rows: Sequence[Row]) -> Iterator[Any]:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    for title, header, lines in TABLES:
        table = Table(title=title)
        for name in header:
            table.add_column(name, justify="left" if name in header[:4] else "right")
        before = None
        for cells in lines(rows):
            if before is not None and cells[:3] != before:
                table.add_section()
            before = cells[:3]
            table.add_row(*map(Text, cells))  # brackets are no markup here
        if table.row_count:
            yield table


def text_tables(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of plain text."""
    for title, header, lines in TABLES:
        cells = list(lines(rows))
        if cells:
            yield title
            widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
            for line in (header, *cells):
                yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each network, dtype and batch, a column for each contender; then what the missing figures lack."""
    latency = of_kind(rows, "latency")
    names = [name for name in TITLES if any(row["baseline"] == name and row["seconds"] for row in latency)]
    yield "Inference on the CPU, ms an image (median), every contender's logits checked against float64. The last column is"
    yield "the time of the fastest other runtime / the time of the fastres plan, median (quartiles) of the rounds: above 1"
    yield "the plan is faster."
    yield ""
    yield f"| network | dtype | batch | {' | '.join(TITLES[n] for n in names)} | best other / plan |"
    yield f"|---|---|---:|{'---:|' * len(names)}---:|"
    for case in dict.fromkeys(row["case"] for row in latency):
        mine = {row["baseline"]: row for row in latency if row["case"] == case}
        any_row = next(iter(mine.values()))
        cells = []
        for name in names:
            row = mine.get(name)
            timed = row is not None and row["seconds"]
            text = f"{1e3 * row['seconds']['median'] / row['batch']:.2f}" if row is not None and timed else NONE
            cells.append(f"**{text}**" if row is not None and row["best_peer"] else text)
        best = next((row for row in mine.values() if row["best_peer"]), None)
        over = best["over_plan"] if best else None
        last = f"{over['median']:.2f} ({over['low']:.2f}–{over['high']:.2f})" if over else NONE
        yield f"| {' | '.join(place(any_row))} | {' | '.join(cells)} | {last} |"
    missing = dict.fromkeys(
        f"{TITLES[row['baseline']]} ({row['dtype']}): {row['reason']}" for row in latency if row["reason"]
    )
    if missing:
        yield ""
        yield f"No figure: {'; '.join(missing)}."
    memory = of_kind(rows, "memory")
    if memory:
        yield ""
        yield "Peak memory of one process above what it has once its code is loaded: with preparation, and while inferring."
        yield ""
        yield "| network | dtype | batch | contender | with preparation | inferring |"
        yield "|---|---|---:|---|---:|---:|"
        for row in memory:
            if row["peak_bytes"] is not None:
                running = NONE if row["running_bytes"] is None else f"{row['running_bytes'] / 2**20:.0f} MiB"
                peak = f"{row['peak_bytes'] / 2**20:.0f} MiB"
                yield f"| {' | '.join(place(row))} | {TITLES[row['baseline']]} | {peak} | {running} |"
