"""The command's parser, its dispatch, and how errors are shown."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace

from fastres.cli import bench, data, doctor, evaluate, explain, export, models, plot, train, tune

COMMANDS = {
    "train": (train, "train a network on a data set"),
    "eval": (evaluate, "evaluate a checkpoint, or a network with given weights"),
    "data": (data, "check, pack and time data sets of images"),
    "bench": (bench, "compare a fused network with its plain PyTorch reference"),
    "tune": (tune, "measure which kernel computes each layer fastest here, and use it"),
    "explain": (explain, "show which backend each layer takes, and why"),
    "export": (export, "write a network as ONNX, torch.export, AOTInductor or safetensors, and check the file"),
    "models": (models, "list the networks"),
    "doctor": (doctor, "show what was built and found here, and check every op on every backend"),
    "plot": (plot, "draw the curves of training runs"),
}
USAGE_ERROR = 2


class Parser(ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text, command = " ".join(str(message).split()), self.prog.replace(" [options]", "")
        print(f"{command}: error: {text} (see {command} --help)", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def make_parser() -> Parser:
    """The whole command line; importing and building it loads no network and no data."""
    import fastres

    parser = Parser(prog="fastres", description="Residual networks with fused convolution-BatchNorm-ReLU-add kernels.")
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, (module, summary) in COMMANDS.items():
        subparser = Parser(description=module.__doc__)
        module.add_arguments(subparser)
        subparser.add_argument(
            "--traceback", action="store_true", help="show where an error came from instead of one line"
        )
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 (a check failed) or 2 (the user has to change something)."""
    from fastres.errors import UserError

    parsed: Namespace = make_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    command = parsed.command
    options = parsed[command]
    try:
        return int(COMMANDS[command][0].run(options) or 0)
    except (UserError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader went away (a pager, head): say nothing more, also not when Python flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if options.traceback:
            traceback.print_exc()
        else:
            print(f"fastres {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"fastres {command}: interrupted", file=sys.stderr)
        return 130
