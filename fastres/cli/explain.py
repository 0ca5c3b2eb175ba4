"""Show which backend each layer of a network takes here, and why the others do not serve. With --roofline: how close each
step of its inference plan comes to what this machine can do. With --bytes: what a training step moves in memory, and what
that allows a GPU."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli import ledger, roofline
from fastres.cli.options import add_machine, console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("model", type=str, help="a name that fastres models lists")
    parser.add_argument("--batch-size", "--batch", type=PositiveInt, default=None, help="images (1)")
    parser.add_argument("--image-size", type=PositiveInt, default=None, help="side of the image (the network's own)")
    parser.add_argument("--mode", choices=["train", "eval"], default="eval")
    add_machine(parser, dtype=None)
    roofline.add_arguments(parser)
    ledger.add_arguments(parser)


def run(options: Namespace) -> int:
    """Print fastres.explain of the network on a random image."""
    if options.bytes:
        return ledger.run(options)
    options.batch_size, options.dtype = options.batch_size or 1, options.dtype or "fp32"
    if options.roofline:
        return roofline.run(options)
    import torch

    import fastres
    from fastres.train.run import DTYPES, pick_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    info = fastres.model_info(options.model)
    channels, height, width = info.input_size
    height, width = (options.image_size or height), (options.image_size or width)
    model = fastres.create_model(options.model, fused=True).train(options.mode == "train")
    model = model.to(device).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch_size, height, width, channels, device=device).permute(0, 3, 1, 2)
    with torch.autocast(device.type, DTYPES[options.dtype], enabled=options.dtype != "fp32"):
        explanation = fastres.explain(model, images)
    console().print(str(explanation), markup=False, highlight=False, soft_wrap=True)
    return 0
