"""Draw the curves of one or several training runs, as an overview, in the ResNet paper's styles, or as an HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from fastres.cli.options import console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("runs", nargs="+", type=str, metavar="DIR", help="folders that fastres train wrote")
    parser.add_argument("-o", "--output", type=str, default="curves.png", metavar="FILE", help="png, svg, pdf or html")
    parser.add_argument(
        "--style", type=Literal["overview", "fig1", "fig4", "fig6"], default="overview",
        help="fig1: training and test error side by side; fig4: thin training, bold test error; fig6: dashed training",
    )  # fmt: skip


def run(options: Namespace) -> int:
    """Draw and say where."""
    from fastres.errors import UserError

    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"plot needs matplotlib (pip install matplotlib): {error}") from error

    from fastres.train.curves import draw
    from fastres.train.report import read_runs, write_report

    output = Path(options.output)
    if output.suffix in (".html", ".htm"):
        write_report(output, options.runs)
    else:
        figure = draw(read_runs(options.runs), options.style)
        try:
            figure.savefig(output, dpi=130)
        except ValueError as error:
            raise UserError(f"can't write {options.output}: {error}") from error
    console().print(f"wrote {options.output}", markup=False, highlight=False, soft_wrap=True)
    return 0
