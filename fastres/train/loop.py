"""The training loop."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastres.errors import CheckpointError, DivergedError, RankError
from fastres.evaluate import evaluate
from fastres.evaluate.single_crop import Evaluation
from fastres.train.boards import Boards
from fastres.train.distributed import World, error_of_others, join_world, leave_world, lost_another, tell_others
from fastres.train.progress import Quiet, Reporter
from fastres.train.records import Row, write_log
from fastres.train.run import BEST, LAST, Run
from fastres.train.saving import clear_partial, numbered
from fastres.train.settings import Settings
from fastres.train.signals import StopRequest, stop_on_signals
from fastres.train.stepping import train_step

GPU_REPORT_INTERVAL = 25  # steps; reading a loss makes the host wait for the GPU


def train(
    settings: Settings, reporter: Reporter, on_start: Callable[[Run], None] | None = None
) -> tuple[Run, int | None]:
    """Train a network; returns the run, and the signal that stopped it early, if one did.

    Writes ``log.csv``, TensorBoard events, ``checkpoint-last.pt`` after each epoch (and each ``save_every`` iterations)
    and ``checkpoint-best.pt`` (by test accuracy) to ``settings.out``. A run that is stopped by SIGINT or SIGTERM saves
    where it is, and continues from there as if it had not been stopped. Started by torchrun, each process trains on its
    part of every batch; the first one writes and reports.

    Args:
        settings: see :class:`Settings`; ``resume`` is ``"auto"`` (continue if the folder holds a run), ``"never"``,
            or a checkpoint to continue from.
        reporter: told of everything that happens.
        on_start: called once when everything is checked, before the first step; in the first process only.

    Raises:
        DataError, CheckpointError, UserError: see the message; nothing was written.
        DivergedError: the loss is not finite; the last checkpoint is of the epoch before.
        RankError: another process ended; the message holds its error.
    """
    world = join_world(settings.device)
    try:
        return _train(settings, reporter if world.first else Quiet(), on_start, world)
    except BaseException as error:
        if world.several and lost_another(error):
            raise error_of_others(world, error) from error
        if not isinstance(error, RankError):
            tell_others(world, error)
        raise
    finally:
        if world.several:
            leave_world()


def _train(
    settings: Settings, reporter: Reporter, on_start: Callable[[Run], None] | None, world: World
) -> tuple[Run, int | None]:
    run = Run(settings, world)
    source = checkpoint_to_resume(run.settings, run.out)
    changes = run.restore(source) if source is not None else []
    reporter.message(run.train_data.description)
    reporter.message(run.test_data.description)
    for note in run.notes:
        reporter.message(note)
    if source is not None:
        where = f"epoch {run.epoch}" + (f" and {run.batch} batches" if run.batch else "")
        reporter.message(
            f"continuing from {source}, after {where}" + (f"; changed: {', '.join(changes)}" if changes else "")
        )
    world.any(0, run.device)  # every process has read what it continues from before the first one moves files
    board: Boards | None = None
    if world.first:
        run.out.mkdir(parents=True, exist_ok=True)
        clear_partial(run.out)
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
            run.saver.wait()
            return run, stop.signum
    finally:
        if board is not None:
            board.close()


def train_epoch(run: Run, reporter: Reporter, stop: StopRequest) -> bool:
    """Train on the rest of the current epoch; False if a stop was asked for before its end."""
    if not run.batch:
        run.begin_epoch()
        run.sums.zero_()
        run.seconds = run.waited = 0.0
    run.model.train()
    interval = 1 if run.device.type == "cpu" else GPU_REPORT_INTERVAL
    reporter.begin_epoch(run.epoch + 1, run.epochs, len(run.train_data), run.batch)
    batches = iter(run.train_data)
    begin = time.perf_counter() - run.seconds
    while True:
        asked = time.perf_counter()
        batch = next(batches, None) if run.iteration < run.iterations else None
        run.waited += time.perf_counter() - asked
        if batch is not None:
            train_step(run, *batch)
        if batch is None or run.batch % interval == 0:
            loss, correct, images = run.sums.tolist()
            if not math.isfinite(loss):
                run.saver.wait()
                raise DivergedError(
                    f"the loss is no longer finite in epoch {run.epoch + 1}, iteration {run.iteration} "
                    f"(learning rate {run.optimizer.param_groups[0]['lr']:.4g}): try a smaller --lr, a longer "
                    f"--warmup or --dtype fp32; {_kept(run.out / LAST)}"
                )
            run.seconds = time.perf_counter() - begin
            if images:
                reporter.step(
                    run.batch, loss / images, correct / images, images * run.world.size / run.seconds,
                    run.waited / run.seconds,
                )  # fmt: skip
            # A signal may reach one process only, or each at another step: all stop behind the same one.
            stop.signum = run.world.any(stop.signum or 0, run.device) or None
        if batch is None:
            return True
        if stop.signum is not None and run.batch % interval == 0:
            run.seconds = time.perf_counter() - begin
            return False
        if run.settings.save_every and run.iteration % run.settings.save_every == 0:
            run.seconds = time.perf_counter() - begin
            run.save(LAST)


def finish_epoch(run: Run, reporter: Reporter, board: Boards | None) -> None:
    """Evaluate, record and save a finished epoch."""
    begin = time.perf_counter()
    result = evaluate_together(run)
    loss, correct, images = run.world.total(run.sums).tolist()
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
    if board is not None:
        write_log(run.out / "log.csv", run.rows)
        board.add(row)
    reporter.end_epoch(row, run.epochs, best)


def evaluate_together(run: Run) -> Evaluation:
    """Evaluate the network, each process on its part of the test images."""
    run.world.same_buffers(run.model, run.ema)
    result = evaluate(run.evaluated, run.test_data, run.dtype)
    if not run.world.several:
        return result
    count = result.samples
    parts = torch.tensor(
        [result.top1 * count, result.top5 * count, result.loss * count, count], dtype=torch.float64, device=run.device
    )
    top1, top5, loss, samples = run.world.total(parts).tolist()
    return Evaluation(round(top1) / samples, round(top5) / samples, loss / samples, int(samples))


def checkpoint_to_resume(settings: Settings, out: Path) -> Path | None:
    """The checkpoint that ``settings.resume`` means; None for a fresh start. Writes nothing.

    Raises:
        CheckpointError: a fresh start or another checkpoint would replace the run that ``out`` holds.
    """
    last = out / LAST
    kept = [path.name for _, path in reversed(numbered(out))]
    held = next((out / name for name in (LAST, BEST, *kept) if (out / name).exists()), None)
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
    start = next((number for number, path in numbered(out) if keep is not None and path.name == keep.name), -1)
    for path in (out / LAST, out / BEST, *(path for number, path in numbered(out) if number > start)):
        name = path.name
        if path.exists() and not (keep is not None and os.path.samefile(path, keep)):
            names = (out / f"{name}.old{number or ''}" for number in itertools.count())
            os.replace(path, next(free for free in names if not free.exists()))


def _kept(last: Path) -> str:
    return f"{last} still holds the epoch before" if last.exists() else "no checkpoint was written"
