"""Measure, on this machine, who computes each convolution of a network fastest, and use that from now on."""

from __future__ import annotations

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import Dtype, console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model", type=str, help="a name that fastres models lists")
    parser.add_argument("--batch-size", type=PositiveInt, default=8)
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="side of the image (the network's own)")
    parser.add_argument("--mode", choices=["train", "eval"], default="eval")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=PositiveInt, default=5, help="measurements of each candidate")
    parser.add_argument("--dtype", type=Dtype, default="fp32")
    parser.add_argument("--threads", type=PositiveInt, default=None, help="CPU threads for computing (torch's choice)")
    parser.add_argument(
        "--save", action=ActionYesNo(no_prefix="no-"), default=True, help="keep the choices in FASTRES_TUNE_CACHE"
    )


def run(options: Namespace) -> int:
    """Print each problem as it is measured, and where the choices are kept."""
    import torch

    import fastres
    from fastres import tuning
    from fastres.errors import InputError
    from fastres.train.run import DTYPES

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = console()
    file = tuning.path()
    problem = tuning.read(file)[1] if file is not None else None
    if problem is not None:
        out.print(f"{problem}; it is written anew", markup=False, highlight=False)
    channels, height, width = fastres.model_info(options.model).input_size
    size = (options.batch_size, options.image_size or height, options.image_size or width, channels)
    dtype = DTYPES[options.dtype]
    model = fastres.create_model(options.model, fused=True).train(options.mode == "train")
    training = options.mode == "train"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")
    model = (model if training else model.to(dtype)).to(options.device).to(memory_format=torch.channels_last)
    images = torch.randn(size).permute(0, 3, 1, 2)
    images = (images if training else images.to(dtype)).to(options.device)
    with torch.autocast(options.device, dtype, enabled=training and options.dtype != "fp32"):
        report = fastres.tune(
            model, images, rounds=options.rounds, save=options.save,
            progress=lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True),
        )  # fmt: skip
    preferred = ("library",) if options.device == "cuda" else ("native", "amx")
    changed = sum(row.choice not in preferred for row in report.rows)
    where = f"kept in {report.file}" if report.file else "not kept"
    out.print(f"{len(report.rows)} problems measured, {changed} are fastest by others than the preferred; {where}")
    return 0
