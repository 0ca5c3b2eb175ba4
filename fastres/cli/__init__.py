"""The ``fastres`` command: one file a subcommand, each with ``add_arguments(parser)`` and ``run(options)``."""

from fastres.cli.command import main

__all__ = ["main"]
