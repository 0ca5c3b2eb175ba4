"""The training loop."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from fastres.errors import CheckpointError, DivergedError
from fastres.evaluate import evaluate
from fastres.train.boards import Boards
from fastres.train.progress import Reporter
from fastres.train.records import Row, write_log
from fastres.train.run import BEST, LAST, Run
from fastres.train.settings import Settings
from fastres.train.signals import StopRequest, stop_on_signals

GPU_REPORT_INTERVAL = 25  # steps; reading a loss makes the host wait for the GPU


def train(
    settings: Settings, reporter: Reporter, on_start: Callable[[Run], None] | None = None
) -> tuple[Run, int | None]:
    """Train a network; returns the run, and the signal that stopped it early, if one did.

    Writes ``log.csv``, TensorBoard events, ``checkpoint-last.pt`` after each epoch and ``checkpoint-best.pt`` (by test
    accuracy) to ``settings.out``. A run that is stopped by SIGINT or SIGTERM saves where it is, and continues from
    there as if it had not been stopped.

    Args:
        settings: see :class:`Settings`; ``resume`` is ``"auto"`` (continue if the folder holds a run), ``"never"``,
            or a checkpoint to continue from.
        reporter: told of everything that happens.
        on_start: called once when everything is checked, before the first step.

    Raises:
        DataError, CheckpointError, UserError: see the message; nothing was written.
        DivergedError: the loss is not finite; the last checkpoint is of the epoch before.
    """
    run = Run(settings)
    source = checkpoint_to_resume(run.settings, run.out)
    changes = run.restore(source) if source is not None else []
    reporter.message(run.train_data.description)
    reporter.message(run.test_data.description)
    if source is not None:
        where = f"epoch {run.epoch}" + (f" and {run.batch} batches" if run.batch else "")
        reporter.message(
            f"continuing from {source}, after {where}" + (f"; changed: {', '.join(changes)}" if changes else "")
        )
    run.out.mkdir(parents=True, exist_ok=True)
    set_aside(run.out, keep=source)
    if on_start is not None:
        on_start(run)
    write_log(run.out / "log.csv", run.rows)
    board = Boards(run.settings, run.out, run.epoch + 1, reporter.message)
    try:
        with stop_on_signals() as stop:
            while run.epoch < run.epochs and stop.signum is None:
                if not train_epoch(run, reporter, stop):
                    run.save(LAST)
                    break
                finish_epoch(run, reporter, board)
            return run, stop.signum
    finally:
        board.close()


def train_epoch(run: Run, reporter: Reporter, stop: StopRequest) -> bool:
    """Train on the rest of the current epoch; False if a stop was asked for before its end."""
    if not run.batch:
        run.train_data.set_epoch(run.epoch)
        run.sums.zero_()
        run.seconds = run.waited = 0.0
    run.model.train()
    interval = 1 if run.device.type == "cpu" else GPU_REPORT_INTERVAL
    reporter.begin_epoch(run.epoch + 1, run.epochs, len(run.train_data), run.batch)
    batches = iter(run.train_data)
    begin = time.perf_counter() - run.seconds
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        run.waited += time.perf_counter() - asked
        if batch is not None:
            train_step(run, *batch)
        if batch is None or run.batch % interval == 0:
            loss, correct, images = run.sums.tolist()
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is no longer finite in epoch {run.epoch + 1}, iteration {run.iteration} "
                    f"(learning rate {run.optimizer.param_groups[0]['lr']:.4g}): try a smaller --lr, a longer "
                    f"--warmup or --dtype fp32; {_kept(run.out / LAST)}"
                )
            run.seconds = time.perf_counter() - begin
            if images:
                reporter.step(
                    run.batch, loss / images, correct / images, images / run.seconds, run.waited / run.seconds
                )
        if batch is None:
            return True
        if stop.signum is not None:
            run.seconds = time.perf_counter() - begin
            return False


def train_step(run: Run, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One iteration of SGD."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule(run.iteration)
    run.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        logits = run.model(images)
        loss = F.cross_entropy(logits, labels)
    loss.backward()
    run.optimizer.step()
    run.batch += 1
    run.iteration += 1
    with torch.no_grad():
        run.sums[0] += loss.double() * len(labels)
        run.sums[1] += (logits.argmax(1) == labels).sum()
        run.sums[2] += len(labels)


def finish_epoch(run: Run, reporter: Reporter, board: Boards) -> None:
    """Evaluate, record and save a finished epoch."""
    begin = time.perf_counter()
    result = evaluate(run.model, run.test_data, run.dtype)
    loss, correct, images = run.sums.tolist()
    seconds = run.seconds + time.perf_counter() - begin
    images = max(1.0, images)
    row = Row(
        epoch=run.epoch + 1, iteration=run.iteration, lr=run.optimizer.param_groups[0]["lr"], train_loss=loss / images,
        train_acc=correct / images, test_loss=result.loss, test_acc=result.top1, images_per_s=images / run.seconds,
        data_wait_share=run.waited / run.seconds, epoch_s=seconds,
        total_s=seconds + (run.rows[-1].total_s if run.rows else 0.0),
    )  # fmt: skip
    run.epoch, run.batch = run.epoch + 1, 0
    run.rows.append(row)
    best = row.test_acc > run.best
    run.best = max(run.best, row.test_acc)
    run.train_data.set_epoch(run.epoch)
    run.save(LAST, *([BEST] if best else []))
    write_log(run.out / "log.csv", run.rows)
    board.add(row)
    reporter.end_epoch(row, run.epochs, best)


def checkpoint_to_resume(settings: Settings, out: Path) -> Path | None:
    """The checkpoint that ``settings.resume`` means; None for a fresh start. Writes nothing.

    Raises:
        CheckpointError: a fresh start or another checkpoint would replace the run that ``out`` holds.
    """
    last = out / LAST
    held = next((out / name for name in (LAST, BEST) if (out / name).exists()), None)
    if settings.resume == "auto" and not settings.overwrite:
        if held is not None and held != last:
            raise CheckpointError(
                f"{out} holds {held.name} but no {LAST}; give --resume FILE, another --out, or --overwrite"
            )
        return held
    given = None if settings.resume in ("auto", "never") else Path(settings.resume)
    same = given is not None and held is not None and given.exists() and os.path.samefile(given.parent, out)
    if held is not None and not same and not settings.overwrite:
        what = "--resume never" if given is None else f"--resume {given}"
        raise CheckpointError(
            f"{held} exists, and {what} would replace that run; give another --out, --resume auto to continue it, "
            "or --overwrite to start anew (its checkpoints are kept as *.old)"
        )
    return given


def set_aside(out: Path, keep: Path | None) -> None:
    """Rename the checkpoints that are newer than where the run starts, so that nothing is lost.

    Continuing from the last checkpoint leaves both; continuing from the best one of the folder leaves that one.
    """
    if keep is not None and keep.name == LAST and os.path.samefile(keep.parent, out):
        return
    for name in (LAST, BEST):
        path = out / name
        if path.exists() and not (keep is not None and os.path.samefile(path, keep)):
            names = (out / f"{name}.old{number or ''}" for number in itertools.count())
            os.replace(path, next(free for free in names if not free.exists()))


def _kept(last: Path) -> str:
    return f"{last} still holds the epoch before" if last.exists() else "no checkpoint was written"
