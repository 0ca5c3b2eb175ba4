"""The rows of log.csv, and their twins in TensorBoard."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fastres.errors import DataError
from fastres.train.checkpoint import write_atomically


@dataclass(frozen=True)
class Row:
    """One epoch. Accuracies and the data wait are shares of 1, losses in nats, times in seconds.

    ``train_loss`` and ``train_acc`` are running means over the epoch, on augmented images and in training mode.
    ``images_per_s`` and ``data_wait_share`` are of the training part; ``epoch_s`` includes the evaluation;
    ``total_s`` is the sum of ``epoch_s``.
    """

    epoch: int
    iteration: int
    lr: float
    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float
    images_per_s: float
    data_wait_share: float
    epoch_s: float
    total_s: float


COLUMNS = [field.name for field in fields(Row)]


def write_log(path: Path, rows: list[Row]) -> None:
    """Write all rows anew, in one step: a resumed run has exactly the rows of its checkpoint and those after it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    write_atomically(path, text.getvalue().encode())


def read_log(folder: str | Path) -> list[Row]:
    """Read a run's ``log.csv``, or a copy of one that is given itself (``….csv``).

    Raises:
        DataError: it is missing or not a log; the message names it.
    """
    path = Path(folder)
    path = path if path.suffix == ".csv" else path / "log.csv"
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        return [Row(int(r["epoch"]), int(r["iteration"]), *(float(r[name]) for name in COLUMNS[2:])) for r in lines]
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}; expected the folder of a training run") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not the log of a training run: {error}") from error


class TensorBoard:
    """Writes the rows as scalars, where TensorBoard is installed; ``available`` says so.

    Earlier events of epoch ``purge_from`` and later ones are hidden: an earlier run in the folder, or epochs that are
    trained again.
    """

    def __init__(self, folder: Path, purge_from: int) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    @property
    def available(self) -> bool:
        return self._writer is not None

    def add(self, row: Row) -> None:
        if self._writer is not None:
            for name in COLUMNS[2:]:
                self._writer.add_scalar(name.replace("_", "/", 1), getattr(row, name), row.epoch)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
