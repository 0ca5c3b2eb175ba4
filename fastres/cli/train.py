"""Train a network; --out holds log.csv, TensorBoard events, checkpoint-last.pt, checkpoint-best.pt and config.yaml.
What isn't given comes from a recipe for the data. Running the same command again continues a run that was stopped."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fastres.cli.options import add_data, add_fused, add_machine, console
from fastres.train.settings import Settings

SAVED = (
    75  # EX_TEMPFAIL of sysexits.h: stopped by SIGTERM, saved, to be started again; a shell shows a killed run as 143
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("--config", action="config", help="a YAML file of options, such as an earlier config.yaml")
    parser.add_argument("model", type=str, help="a name that fastres models lists")
    add_data(parser, "digits")
    parser.add_argument("--out", type=str, default=None, help="the run's folder (runs/MODEL-DATA)")
    parser.add_argument("--recipe", type=str, default=None, help="a recipe's name, or a YAML file (by the data)")
    parser.add_argument(
        "--print-config", dest="show_config", action="store_true", help="print the settings as YAML and train nothing"
    )
    add_recipe(parser)
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of weights, order and augmentation")
    add_fused(parser)
    parser.add_argument(
        "--memory", type=Literal["default", "recompute"], default="default", help="recompute keeps less for backward"
    )
    parser.add_argument("--num-classes", type=PositiveInt, default=None, help="outputs (the data's classes)")
    switch(parser, "augment", "augment training images", default=True)
    add_machine(parser, half=True)
    switch(parser, "deterministic", "refuse what varies between runs")
    parser.add_argument(
        "--resume", type=str, default="auto", help="auto: continue what --out holds; never; or a checkpoint"
    )
    parser.add_argument("--wandb", type=str, default=None, metavar="PROJECT", help="log to Weights & Biases too")
    switch(parser, "overwrite", "start anew, keep checkpoints as *.old")
    parser.add_argument("--save-every", type=NonNegativeInt, default=0, help="iterations between checkpoints too")
    parser.add_argument("--keep", type=PositiveInt, default=1, help="newest checkpoints to keep, numbered if several")
    switch(parser, "async-save", "write checkpoints while training goes on", default=True)
    switch(parser, "channels-last", "memory layout of weights and maps", default=True)
    switch(parser, "compile", "torch.compile the network")
    switch(parser, "cuda-graphs", "capture the network's passes (one GPU)")
    parser.add_argument("--accumulate", type=PositiveInt, default=1, help="parts of a batch, one after another")
    switch(parser, "sync-bn", "BatchNorm over the batches of all processes")
    switch(parser, "zero", "divide the optimizer's state among processes")
    switch(parser, "compress", "exchange gradients in 16 bits")
    switch(parser, "reshard", "continue with another number of processes")


def switch(parser: ArgumentParser, name: str, text: str, default: bool | None = False) -> None:
    """--name and --no-name."""
    parser.add_argument(f"--{name}", action=ActionYesNo(no_prefix="no-"), default=default, help=text)


def add_recipe(parser: ArgumentParser) -> None:
    """Declare an option for each key of a recipe that has none yet."""
    from fastres.train.recipes import KEYS

    hints = get_type_hints(Settings)
    for key, text in KEYS.items():
        if key in ("image_size", "normalize", "augment"):
            continue
        (kind,) = (part for part in get_args(hints[key]) if part is not type(None))
        if kind is bool:
            switch(parser, key.replace("_", "-"), text, default=None)
            continue
        if kind is float:
            kind = PositiveFloat if key == "lr" else NonNegativeFloat
        elif kind is int:
            kind = PositiveInt
        elif kind == list[float]:
            kind = list[NonNegativeFloat]
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, default=None, help=text)


def run(options: Namespace) -> int:
    """Train; returns 0, 75 if SIGTERM stopped the run, or 130 if SIGINT did; both save first."""
    settings = Settings(**{field.name: plain(options[field.name]) for field in dataclasses.fields(Settings)})
    if options.show_config:
        print(config_yaml(settings.resolved(), comments=True), end="")
        return 0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun shows the error of the process that failed first, if that process leaves it in its file.
        from torch.distributed.elastic.multiprocessing.errors import record

        return int(record(_run)(settings) or 0)
    return _run(settings)


def _run(settings: Settings) -> int:
    from fastres.train.checkpoint import write_atomically
    from fastres.train.loop import train
    from fastres.train.progress import make_reporter, summary_table
    from fastres.train.run import LAST, Run

    screen = console()
    first = os.environ.get("RANK", "0") == "0"
    reporter = make_reporter(screen)
    handler = ReportingHandler(reporter)
    if first:
        logging.getLogger("fastres").addHandler(handler)

    def on_start(started: Run) -> None:
        write_atomically(started.out / "config.yaml", config_yaml(started.settings).encode())
        reporter.message(describe(started))

    try:
        finished, signum = train(settings, reporter, on_start)
    finally:
        logging.getLogger("fastres").removeHandler(handler)
        reporter.close()
    if finished.rows and first:
        title = f"{finished.settings.model} on {finished.settings.data}: {finished.out}"
        screen.print(summary_table(title, finished.rows))
        write_end_report(screen, finished.out)
    if signum is not None and finished.epoch < finished.epochs:
        import signal

        if first:
            screen.print(
                f"stopped by {signal.Signals(signum).name} in epoch {finished.epoch + 1}; saved {finished.out / LAST}: "
                "the same command continues from there", soft_wrap=True, highlight=False,
            )  # fmt: skip
        return SAVED if signum == signal.SIGTERM else 128 + signum
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


def config_yaml(settings: Settings, comments: bool = False) -> str:
    """The settings with the recipe's values filled in; ``fastres train --config`` reads it back.

    ``comments`` puts the meaning of each key of a recipe above it.
    """
    import yaml

    from fastres.train.recipes import KEYS

    lines = []
    for name, value in dataclasses.asdict(settings).items():
        if value is not None:
            lines += [f"# {KEYS[name]}\n"] if comments and name in KEYS else []
            lines.append(str(yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=False)))
    return "".join(lines)


def describe(run: Any) -> str:
    """One line on what is about to be trained."""
    settings = run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    length = (
        f"{run.epochs} epochs" if settings.iterations is None else f"{run.iterations} iterations, {run.epochs} epochs"
    )
    processes = f", {run.world.size} processes" if run.world.several else ""
    decayed = "" if settings.decay_all else " on conv and fc weights"
    return (
        f"{settings.model} ({'fused' if settings.fused else 'reference'}, {parameters:,} parameters, {settings.dtype}, "
        f"{run.device}{processes}) for {length} of {len(run.train_data)} batches of {settings.batch_size}; "
        f"{settings.optimizer}, lr {settings.lr:g} {settings.schedule}, warm-up {run.schedule.warmup} iterations, "
        f"{'Nesterov ' if settings.nesterov else ''}momentum {settings.momentum:g}, "
        f"weight decay {settings.weight_decay:g}{decayed}; "
        f"seed {settings.seed}; to {Path(run.out)}"
    )


class ReportingHandler(logging.Handler):
    """Shows what the package logs (an image left out, for one) beside the progress bar."""

    def __init__(self, reporter: Any) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.message(f"{record.levelname.lower()}: {record.getMessage()}")
