"""List the registered networks: exact counts, the error in the paper that they are from, and whether fastres fuses them."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from fastres.cli.options import console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("pattern", nargs="?", type=str, default=None, help="a shell pattern, such as 'resnet*'")


def run(options: Namespace) -> int:
    """Print a table of the networks that match."""
    from rich.table import Table

    import fastres
    from fastres.errors import UserError

    names = fastres.list_models(options.pattern)
    if not names:
        count = len(fastres.list_models())
        raise UserError(f"no network matches {options.pattern!r}; fastres models lists all {count}")
    table = Table("name", "family", "input", "classes")
    for title in ("parameters", "multiply-adds"):
        table.add_column(title, justify="right")
    table.add_column("published error, %")
    table.add_column("fused")
    table.add_column("source")
    for name in names:
        info = fastres.model_info(name)
        size = "x".join(str(n) for n in info.input_size)
        table.add_row(
            name, info.family, size, str(info.num_classes), f"{info.params:,}", f"{info.macs:,}", info.published,
            "yes" if info.fusible else "no", info.source,
        )  # fmt: skip
    console().print(table)
    return 0
