"""The report of one or several training runs: an HTML page with its figures inside."""

from __future__ import annotations

import html
import statistics
from pathlib import Path
from typing import Any

from fastres.errors import DataError
from fastres.evaluate.page import cards, image, page, section, svg, table
from fastres.train.curves import Runs, draw
from fastres.train.records import Row, read_log

REPORT = "report.html"


def names_of(folders: list[str]) -> list[str]:
    """A short name for each run's folder; whole paths where short ones would be equal."""
    short = [Path(folder).resolve().name.removesuffix(".csv") for folder in folders]
    return [name if short.count(name) == 1 else folder for name, folder in zip(short, folders, strict=True)]


def read_runs(folders: list[str]) -> Runs:
    """The rows of runs by name.

    Raises:
        DataError: a folder has no log.csv, or one without a finished epoch.
    """
    runs: Runs = {}
    for folder, name in zip(folders, names_of(folders), strict=True):
        rows = read_log(folder)
        if not rows:
            raise DataError(f"the log of {folder} has no finished epoch yet")
        while name in runs:
            name += "'"  # the same folder given twice
        runs[name] = rows
    return runs


def write_report(path: Path, folders: list[str]) -> None:
    """Writes the page.

    Raises:
        DataError: a run can't be read. ImportError: matplotlib is missing.
    """
    runs = read_runs(folders)
    pieces = []
    if len(runs) == 1:
        pieces.append(_figures(next(iter(runs.values()))))
    else:
        pieces.append(section("Runs", table(("run", *HEAD), [(html.escape(n), *_summary(r)) for n, r in runs.items()])))
    thin = "Thin lines: training error, on augmented images in training mode. Bold lines: test error."
    pieces.append(section("Error", f"<p>{thin}</p>", image(svg(draw(runs, "fig4")), "Error against iterations")))
    pieces.append(section("Course of the training", image(svg(draw(runs)), "Error, loss, rate, images/s, data wait")))
    for name, rows in runs.items():
        of = "" if len(runs) == 1 else f" of {name}"
        pieces.append(section(f"Epochs{of}", f'<div class="wide">{table(EPOCH_HEAD, [_epoch(r) for r in rows])}</div>'))
    for folder, name in zip(folders, runs, strict=True):
        config = Path(folder) / "config.yaml"
        if config.is_file():
            of = "" if len(runs) == 1 else f" of {name}"
            text = html.escape(config.read_text(encoding="utf-8"))
            pieces.append(section(f"Settings{of}", f"<pre>{text}</pre>"))
    about = "A report of fastres train. Everything is in this file."
    path.write_text(page(" · ".join(runs), about, pieces), encoding="utf-8")


HEAD = ("epochs", "last test error", "best test error", "epoch", "images/s (median)", "data wait", "time")
EPOCH_HEAD = (
    "epoch", "iteration", "rate", "train loss", "train error", "test loss", "test error", "images/s", "data wait", "s",
)  # fmt: skip


def _summary(rows: list[Row]) -> tuple[Any, ...]:
    last, best = rows[-1], max(rows, key=lambda row: row.test_acc)
    return (
        last.epoch, f"{1 - last.test_acc:.2%}", f"{1 - best.test_acc:.2%}", best.epoch,
        f"{statistics.median(row.images_per_s for row in rows):,.0f}",
        f"{statistics.fmean(row.data_wait_share for row in rows):.1%}", f"{last.total_s:,.0f} s",
    )  # fmt: skip


def _figures(rows: list[Row]) -> str:
    epochs, last, best, at, speed, wait, seconds = _summary(rows)
    return cards([
        (last, "test error of the last epoch"), (best, f"best test error (epoch {at} of {epochs})"),
        (speed, "training images/s, median"), (wait, "of the training time waiting for data"), (seconds, "in all"),
    ])  # fmt: skip


def _epoch(row: Row) -> tuple[Any, ...]:
    return (
        row.epoch, row.iteration, f"{row.lr:.4g}", f"{row.train_loss:.4f}", f"{1 - row.train_acc:.2%}",
        f"{row.test_loss:.4f}", f"{1 - row.test_acc:.2%}", f"{row.images_per_s:,.0f}", f"{row.data_wait_share:.1%}",
        f"{row.epoch_s:.1f}",
    )  # fmt: skip
