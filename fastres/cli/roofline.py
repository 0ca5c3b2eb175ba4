"""``fastres explain --roofline``: every step of a network's plan against what this machine can do."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what only matters with --roofline."""
    parser.add_argument(
        "--roofline", action="store_true",
        help="time each step of the inference plan on the CPU and compare it with the machine's limits, measured now",
    )  # fmt: skip
    parser.add_argument("--repeats", type=PositiveInt, default=20, help="timed runs of each step of --roofline")
    parser.add_argument(
        "--output", type=str, default=None, metavar="FILE", help="plot of --roofline as svg, png or pdf"
    )


def run(options: Namespace) -> int:
    """Measure, print and draw."""
    import torch
    from rich.table import Table
    from rich.text import Text

    import fastres
    from fastres._cpu import cpu_name
    from fastres.evaluate import roofline
    from fastres.evaluate.peers import Reference

    fastres.model_info(options.model)
    threads = options.threads or torch.get_num_threads()
    problem = Reference(options.model, options.image_size).problem(options.batch_size, options.dtype, with_truth=False)
    model, images = problem.prepared()
    lines, limits = roofline.measure(model, images, options.repeats, threads)
    total = roofline.total_of(lines)
    size = "x".join(map(str, images.shape))
    title = f"{options.model}, {size}, {options.dtype}, {limits.threads} threads, {cpu_name()}"
    table = Table(title=title)
    for name in roofline.HEADER:
        table.add_column(name, justify="left" if name in roofline.HEADER[:2] else "right")
    for line in lines:
        table.add_row(*map(Text, roofline.cells(line, total.seconds)))
    table.add_section()
    table.add_row(*map(Text, roofline.cells(total, total.seconds)), style="bold")
    screen = console()
    screen.print(table)
    for note in roofline.notes(limits, options.dtype, lines):
        screen.print(note, markup=False, highlight=False, soft_wrap=True)
    if options.output:
        roofline.draw(lines, options.dtype, limits, title, options.output)
        screen.print(f"wrote {options.output}", markup=False, highlight=False, soft_wrap=True)
    return 0
