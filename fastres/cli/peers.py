"""``fastres bench --peers``: whole networks against other runtimes, in one process and in turns, after a parity check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import Dtype, console

NETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
Contender = Literal[
    "fastres", "fastres-modules", "eager", "compile", "compile-max", "openvino", "onnxruntime", "zentorch"
]
MEMORY_BATCH = 8


def add_arguments(parser: ArgumentParser) -> None:
    """Declare what only matters with --peers."""
    parser.add_argument(
        "--peers", action="store_true",
        help="inference against eager PyTorch, torch.compile, OpenVINO, ONNX Runtime and zentorch, as far as installed",
    )  # fmt: skip
    parser.add_argument("--nets", nargs="+", type=str, default=list(NETS), help="networks of --peers")
    parser.add_argument("--batches", nargs="+", type=PositiveInt, default=[1, 8, 32], help="batch sizes of --peers")
    parser.add_argument("--dtypes", nargs="+", type=Dtype, default=["fp32", "bf16"], help="dtypes of --peers")
    parser.add_argument(
        "--contenders", nargs="+", type=Contender, default=None,
        help="of --peers: fastres fastres-modules eager compile compile-max openvino onnxruntime zentorch (all)",
    )  # fmt: skip
    parser.add_argument(
        "--peak-memory", action="store_true",
        help=f"with --peers: also the peak memory of one process for each contender at batch {MEMORY_BATCH}",
    )  # fmt: skip
    parser.add_argument("--scaling", action="store_true", help="with --peers: also the plan with 1 and 2 threads")
    parser.add_argument("--output", type=str, default=None, metavar="FILE", help="of --peers: figures as JSON")
    parser.add_argument("--plot", type=str, default=None, metavar="FILE", help="of --peers: bars as svg, png or pdf")


def run(options: Namespace) -> int:
    """Measure and print; returns 1 if the logits of fastres itself are wrong somewhere."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    import fastres
    from fastres.evaluate.machine import machine
    from fastres.evaluate.peers import CONTENDERS, Reference, run_case, scaling
    from fastres.evaluate.peers.memory import memory_row
    from fastres.evaluate.peers.plot import draw
    from fastres.evaluate.peers.table import rich_tables

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = options.contenders or list(CONTENDERS)
    for net in options.nets:
        fastres.model_info(net)  # an unknown name is a user's error before anything is measured
    screen = console()
    rows: list[dict[str, Any]] = []
    parts = len(options.batches) + options.scaling * len(options.batches) + options.peak_memory * len(names)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("", total=len(options.nets) * len(options.dtypes) * parts)

        def tell(text: str) -> None:
            progress.update(task, description=text)

        for net in options.nets:
            tell(f"{net}: logits in float64")
            reference = Reference(net, options.image_size)
            for dtype in options.dtypes:
                for batch in options.batches:
                    rows += run_case(reference.problem(batch, dtype), names, options.rounds, tell)
                    progress.advance(task)
                    if options.scaling:
                        tell(f"{net}-{dtype}-b{batch}: threads")
                        rows += scaling(reference, batch, dtype, options.rounds)
                        progress.advance(task)
                for name in names if options.peak_memory else ():
                    tell(f"{net}-{dtype}: memory of {name}")
                    threads = torch.get_num_threads()
                    rows.append(memory_row(net, MEMORY_BATCH, dtype, name, threads, options.image_size))
                    progress.advance(task)
    for table in rich_tables(rows):
        screen.print(table)
    about = machine()
    screen.print(f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}", markup=False, highlight=False)
    if options.output:
        Path(options.output).write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    if options.plot:
        draw(rows, options.plot)
    own = (row for row in rows if row["baseline"].startswith("fastres") and row["reason"])
    return int(any("parity" in row["reason"] for row in own))
