"""``fastres explain --bytes``: what a training step moves in memory, by level of fusion, and what that allows a GPU."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from fastres.cli.options import console

BATCH = 256  # where no other is given: weights are shared by this many images


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what only matters with --bytes."""
    parser.add_argument(
        "--bytes", action="store_true",
        help=f"count what one training step reads and writes (bf16 and batch {BATCH} if not given; nothing is run)",
    )  # fmt: skip
    parser.add_argument("--gpu", type=str, default="h100", help="GPU of --bytes, whose ceilings are predicted")
    parser.add_argument(
        "--by", type=Literal["stage", "block", "layer", "op"], default="block", help="what a row of --bytes is"
    )
    parser.add_argument("--plot", type=str, default=None, metavar="FILE", help="plot of --bytes as svg, png or pdf")


def run(options: Namespace) -> int:
    """Count, print and draw."""
    from rich.table import Table
    from rich.text import Text

    from fastres.evaluate import gpus
    from fastres.evaluate.bytes import LEVELS, ledger, table

    gpu = gpus.find(options.gpu)
    found = ledger(options.model, options.batch_size or BATCH, options.dtype or "bf16", options.image_size)
    size = "x".join(map(str, found.image))
    title = f"{found.model}, batch {found.batch}, {size}, {found.dtype}, training step: MB of one image"
    shown = Table(title=title)
    shown.add_column(options.by)
    for level in LEVELS:
        shown.add_column(level.key, justify="right")
    lines = table.rows(found, options.by)
    for name, row in lines[:-3]:
        shown.add_row(*map(Text, table.cells(name, row)))
    shown.add_section()
    for name, row in lines[-3:]:
        shown.add_row(*map(Text, table.cells(name, row)), style="bold" if name == "total" else None)
    shown.add_section()
    allowed = table.ceilings(found, gpu)
    predicted = [f"{allowed[level.key]:,.0f}" for level in LEVELS]
    shown.add_row(*map(Text, (f"{gpu.name} images/s at most, predicted", *predicted)), style="italic")
    screen = console()
    screen.print(shown)
    for note in table.notes(found, gpu):
        screen.print(note, markup=False, highlight=False, soft_wrap=True)
    if options.plot:
        table.draw(found, gpu, title, options.plot, options.by)
        screen.print(f"wrote {options.plot}", markup=False, highlight=False, soft_wrap=True)
    return 0
