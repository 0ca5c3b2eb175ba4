"""Where a run's rows go besides log.csv: TensorBoard, and Weights & Biases if it was asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.train.checkpoint import write_atomically
from fastres.train.records import COLUMNS, Row, TensorBoard
from fastres.train.settings import Settings

RUN_ID = "wandb-id.txt"


class Boards:
    """All of a run's boards. ``message`` is told of those that are not installed."""

    def __init__(self, settings: Settings, out: Path, first_epoch: int, message: Callable[[str], None]) -> None:
        # Weights & Biases first: it can fail, and then nothing must have been written for TensorBoard.
        self._wandb = None if settings.wandb is None else WeightsAndBiases(settings, out)
        self._tensorboard = TensorBoard(out, first_epoch)
        if not self._tensorboard.available:
            message("TensorBoard is not installed: only log.csv is written")

    def add(self, row: Row) -> None:
        self._tensorboard.add(row)
        if self._wandb is not None:
            self._wandb.add(row)

    def close(self) -> None:
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()


class WeightsAndBiases:
    """Sends the rows to a project of Weights & Biases; ``WANDB_MODE=offline`` keeps them in the run's folder.

    The run's name there is kept in ``wandb-id.txt``, so that a run that is continued goes on under the same name.

    Raises:
        UserError: the package is not installed, or it refuses (not logged in, for one).
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"--wandb {settings.wandb} needs Weights & Biases (pip install 'fastres[wandb]'): {error}"
            ) from error
        file = out / RUN_ID
        known = file.read_text().strip() if file.exists() else ""
        name = known if known and settings.resume != "never" else secrets.token_hex(4)
        try:
            self._run: Any = wandb.init(
                project=settings.wandb, dir=str(out), id=name, name=out.name, resume="allow", config=asdict(settings)
            )
        except Exception as error:
            raise UserError(f"Weights & Biases can't start the run: {error}") from error
        write_atomically(file, f"{name}\n".encode())

    def add(self, row: Row) -> None:
        values = {name.replace("_", "/", 1): getattr(row, name) for name in COLUMNS[2:]}
        self._run.log({"epoch": row.epoch, **values}, step=row.iteration)

    def close(self) -> None:
        self._run.finish()
