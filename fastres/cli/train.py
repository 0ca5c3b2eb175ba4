"""Train a network; --out holds log.csv, TensorBoard events, checkpoint-last.pt, checkpoint-best.pt and config.yaml.
What isn't given comes from a recipe for the data. Running the same command again continues a run that was stopped."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fastres.cli.options import add_data, add_fused, add_machine, console
from fastres.train.settings import Settings


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--config", action="config", help="a YAML file of options, such as an earlier config.yaml")
    parser.add_argument("model", type=str, help="a name that fastres models lists")
    add_data(parser, "digits")
    parser.add_argument("--out", type=str, default=None, help="the run's folder (runs/MODEL-DATA)")
    parser.add_argument("--epochs", type=PositiveInt, default=None)
    parser.add_argument("--batch-size", type=PositiveInt, default=None)
    parser.add_argument("--lr", type=PositiveFloat, default=None, help="the highest learning rate")
    parser.add_argument("--momentum", type=NonNegativeFloat, default=0.9)
    parser.add_argument("--weight-decay", type=NonNegativeFloat, default=None)
    parser.add_argument(
        "--decay-all", action=ActionYesNo(no_prefix="no-"), default=False, help="decay biases and BatchNorm too"
    )
    parser.add_argument("--schedule", type=Literal["step", "cosine", "constant"], default=None)
    parser.add_argument(
        "--milestones", type=list[PositiveFloat], default=None, help="shares of the run where step divides by 10"
    )
    parser.add_argument("--warmup", type=NonNegativeFloat, default=None, help="epochs of linear warm-up")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of weights, order and augmentation")
    add_fused(parser)
    parser.add_argument(
        "--memory", type=Literal["default", "recompute"], default="default", help="recompute keeps less for backward"
    )
    parser.add_argument("--num-classes", type=PositiveInt, default=None, help="outputs (the data's classes)")
    parser.add_argument("--augment", action=ActionYesNo(no_prefix="no-"), default=True, help="augment training images")
    add_machine(parser)
    parser.add_argument(
        "--deterministic", action=ActionYesNo(no_prefix="no-"), default=False, help="refuse what varies between runs"
    )
    parser.add_argument(
        "--resume", type=str, default="auto", help="auto: continue what --out holds; never; or a checkpoint"
    )
    parser.add_argument("--wandb", type=str, default=None, metavar="PROJECT", help="log to Weights & Biases too")
    parser.add_argument(
        "--overwrite", action=ActionYesNo(no_prefix="no-"), default=False, help="start anew, keep checkpoints as *.old"
    )


def run(options: Namespace) -> int:
    """Train; returns 0, or 128 + the signal that stopped the run."""
    from fastres.train.checkpoint import write_atomically
    from fastres.train.loop import train
    from fastres.train.progress import make_reporter, summary_table
    from fastres.train.run import LAST, Run

    settings = Settings(**{field.name: plain(options[field.name]) for field in dataclasses.fields(Settings)})
    screen = console()
    reporter = make_reporter(screen)
    handler = ReportingHandler(reporter)
    logging.getLogger("fastres").addHandler(handler)

    def on_start(started: Run) -> None:
        write_atomically(started.out / "config.yaml", config_yaml(started.settings).encode())
        reporter.message(describe(started))

    try:
        finished, signum = train(settings, reporter, on_start)
    finally:
        logging.getLogger("fastres").removeHandler(handler)
        reporter.close()
    if finished.rows:
        title = f"{finished.settings.model} on {finished.settings.data}: {finished.out}"
        screen.print(summary_table(title, finished.rows))
        write_end_report(screen, finished.out)
    if signum is not None and finished.epoch < finished.epochs:
        import signal

        screen.print(
            f"stopped by {signal.Signals(signum).name} in epoch {finished.epoch + 1}; saved {finished.out / LAST}: "
            "the same command continues from there", soft_wrap=True, highlight=False,
        )  # fmt: skip
        return 128 + signum
    return 0


def write_end_report(screen: Any, out: Path) -> None:
    """``report.html``; a finished run must not fail for the want of it."""
    try:
        from fastres.train.report import REPORT, write_report

        write_report(out / REPORT, [str(out)])
    except (ImportError, OSError) as error:
        screen.print(f"no report was written: {error}", markup=False, highlight=False, soft_wrap=True)
    else:
        screen.print(f"wrote {out / REPORT}", markup=False, highlight=False, soft_wrap=True)


def plain(value: Any) -> Any:
    """The parser's numbers are of classes of its own (PositiveInt), which neither YAML nor checkpoints take."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def config_yaml(settings: Settings) -> str:
    """The settings with the recipe's values filled in; ``fastres train --config`` reads it back."""
    import yaml

    values = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    return str(yaml.safe_dump(values, sort_keys=False))


def describe(run: Any) -> str:
    """One line on what is about to be trained."""
    settings = run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    decayed = "" if settings.decay_all else " on conv and fc weights"
    return (
        f"{settings.model} ({'fused' if settings.fused else 'reference'}, {parameters:,} parameters, {settings.dtype}, "
        f"{run.device}) for {settings.epochs} epochs of {len(run.train_data)} batches of {settings.batch_size}; "
        f"SGD, lr {settings.lr:g} {settings.schedule}, warm-up {settings.warmup:g} epochs, "
        f"momentum {settings.momentum:g}, weight decay {settings.weight_decay:g}{decayed}; "
        f"seed {settings.seed}; to {Path(run.out)}"
    )


class ReportingHandler(logging.Handler):
    """Shows what the package logs (an image left out, for one) beside the progress bar."""

    def __init__(self, reporter: Any) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.message(f"{record.levelname.lower()}: {record.getMessage()}")
