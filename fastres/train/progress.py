"""What a run shows while it goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import statistics
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastres.train.records import Row

PLAIN_INTERVAL = 20.0  # seconds between lines within an epoch


class Reporter(Protocol):
    """Where a run reports to."""

    def message(self, text: str) -> None: ...
    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None: ...
    def step(self, done: int, loss: float, accuracy: float, images_per_s: float, data_wait: float) -> None: ...
    def end_epoch(self, row: Row, epochs: int, best: bool) -> None: ...
    def close(self) -> None: ...


def _line(row: Row, epochs: int, best: bool) -> str:
    return (
        f"epoch {row.epoch:>{len(str(epochs))}}/{epochs}  train loss {row.train_loss:.4f} acc {row.train_acc:7.2%}  "
        f"test loss {row.test_loss:.4f} acc {row.test_acc:7.2%}{' *' if best else '  '}  lr {row.lr:.4g}  "
        f"{row.images_per_s:,.0f} images/s  data wait {row.data_wait_share:.1%}  {row.epoch_s:.1f} s"
    )


class PlainReporter:
    """Lines for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._title, self._batches = "", 0
        self._left = TimeLeft()

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        self._title, self._batches, self._last = f"epoch {epoch}/{epochs}", batches, time.monotonic()
        self._left.begin_epoch(epoch, epochs, batches, done)

    def step(self, done: int, loss: float, accuracy: float, images_per_s: float, data_wait: float) -> None:
        if time.monotonic() - self._last >= PLAIN_INTERVAL:
            self._last = time.monotonic()
            self.message(
                f"{self._title}  {done}/{self._batches}  loss {loss:.4f} acc {accuracy:.2%}  "
                f"{images_per_s:,.0f} images/s  data wait {data_wait:.1%}  {self._left.text(done)}"
            )

    def end_epoch(self, row: Row, epochs: int, best: bool) -> None:
        self.message(_line(row, epochs, best))

    def close(self) -> None:
        pass


class Quiet:
    """Shows nothing: for every process of a distributed run but the first."""

    def message(self, text: str) -> None: ...
    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None: ...
    def step(self, done: int, loss: float, accuracy: float, images_per_s: float, data_wait: float) -> None: ...
    def end_epoch(self, row: Row, epochs: int, best: bool) -> None: ...
    def close(self) -> None: ...


class TimeLeft:
    """Estimates the rest of a run from the steps of this process, its evaluations and savings included."""

    def __init__(self) -> None:
        self._begin = self._from = self._before = self._total = 0.0

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        self._before, self._total = (epoch - 1) * batches, epochs * batches
        if not self._begin:
            self._begin, self._from = time.monotonic(), self._before + done

    def seconds(self, done: int) -> float | None:
        """Seconds until the last step, ``done`` being the finished batches of the epoch; None before the first one."""
        place = self._before + done
        if place <= self._from:
            return None
        return (time.monotonic() - self._begin) / (place - self._from) * (self._total - place)

    def text(self, done: int) -> str:
        """``1:02:03 left``."""
        seconds = self.seconds(done)
        return "" if seconds is None else f"{datetime.timedelta(seconds=round(seconds))} left"


class BarReporter:
    """A live bar of the current epoch above the lines of the finished ones, with the time left of epoch and run."""

    def __init__(self, console: Console) -> None:
        self._left = TimeLeft()
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"), console=console, transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None, figures="")

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def begin_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        self._left.begin_epoch(epoch, epochs, batches, done)
        self._progress.reset(
            self._task, total=batches, completed=done, description=f"epoch {epoch}/{epochs}", figures=""
        )

    def step(self, done: int, loss: float, accuracy: float, images_per_s: float, data_wait: float) -> None:
        figures = f"loss {loss:.3f}  acc {accuracy:.1%}  {images_per_s:,.0f} img/s  data wait {data_wait:.1%}"
        figures += f"  run {self._left.text(done)}"
        self._progress.update(self._task, completed=done, figures=figures)

    def end_epoch(self, row: Row, epochs: int, best: bool) -> None:
        self.message(_line(row, epochs, best))

    def close(self) -> None:
        self._progress.stop()


def make_reporter(console: Console) -> Reporter:
    """A bar if the console is a terminal, else plain lines."""
    return BarReporter(console) if console.is_terminal else PlainReporter(console)


def summary_table(title: str, rows: list[Row]) -> Table:
    """The figures of a whole run: last and best epoch, times, throughput."""
    last, best = rows[-1], max(rows, key=lambda row: row.test_acc)
    table = Table(title=title, show_header=True)
    for name in ("", "epoch", "test accuracy", "test loss", "train accuracy", "train loss"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in (("last", last), ("best", best)):
        table.add_row(
            name, str(row.epoch), f"{row.test_acc:.2%}", f"{row.test_loss:.4f}", f"{row.train_acc:.2%}",
            f"{row.train_loss:.4f}",
        )  # fmt: skip
    rate = statistics.median(row.images_per_s for row in rows)
    wait = statistics.fmean(row.data_wait_share for row in rows)
    table.caption = (
        f"{last.iteration} iterations in {last.total_s:.1f} s ({last.total_s / last.epoch:.1f} s an epoch), median "
        f"{rate:,.0f} images/s, data wait {wait:.1%}"
    )
    return table
