"""Options that several subcommands share."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser
from jsonargparse.typing import PositiveInt

Dtype = Literal["fp32", "bf16"]


def add_data(parser: ArgumentParser, default: str | None) -> None:
    """The data set and how it is read."""
    parser.add_argument(
        "--data", type=str, default=default, help="digits, fashion-mnist, or a folder with train/<class>/*.jpg, val/…"
    )
    parser.add_argument("--data-dir", type=str, default=None, help="folder of fashion-mnist's IDX files")
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="side of the images (32; folders 224)")
    parser.add_argument("--workers", type=PositiveInt, default=2, help="threads that decode images")
    parser.add_argument(
        "--on-bad-image", type=Literal["stop", "skip"], default="stop", help="what a file that can't be decoded does"
    )
    parser.add_argument(
        "--normalize", type=Literal["channel", "pixel"] | None, default=None,
        help="subtract the mean of a channel (default) or, as the ResNet paper on CIFAR, the mean image",
    )  # fmt: skip
    parser.add_argument("--limit", type=PositiveInt, default=None, help="use only this many images of each split")


def add_machine(parser: ArgumentParser, dtype: Dtype | None = "fp32", half: bool = False) -> None:
    """Where and how exactly to compute. ``dtype`` None: the subcommand decides where the user does not. ``half``: it may be
    fp16 as well."""
    kind: Any = Dtype if dtype is not None else Dtype | None
    kind = Literal["fp32", "bf16", "fp16"] if half else kind
    text = (
        "bf16 and fp16 compute under autocast, fp16 with scaled gradients" if half else "bf16 computes under autocast"
    )
    parser.add_argument("--dtype", type=kind, default=dtype, help=f"{text} (fp32)")
    parser.add_argument("--threads", type=PositiveInt, default=None, help="CPU threads for computing (torch's choice)")
    parser.add_argument("--device", type=str, default="auto", help="auto (a GPU if there is one), cpu or cuda")


def add_fused(parser: ArgumentParser) -> None:
    """--fused/--no-fused."""
    parser.add_argument(
        "--fused", action=ActionYesNo(no_prefix="no-"), default=True,
        help="fused kernels, or plain PyTorch with the same weights",
    )  # fmt: skip


def console() -> Any:
    """Standard output for tables and progress; wide enough for a table when it is a file or a pipe."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=160)
