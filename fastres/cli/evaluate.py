"""Evaluate a checkpoint of fastres train, or a network by name with --weights, on one view of each test image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import add_data, add_fused, add_machine, console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("source", metavar="CHECKPOINT|MODEL", type=str, help="a checkpoint file, or a network's name")
    add_data(parser, None)
    parser.add_argument("--weights", type=str, default=None, help="for a MODEL: a file, or a name of torchvision's")
    parser.add_argument("--batch-size", type=PositiveInt, default=256)
    add_fused(parser)
    add_machine(parser)
    parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write the figures there too")


def run(options: Namespace) -> int:
    """Evaluate and print a table."""
    import torch
    from rich.table import Table

    from fastres.data import create_loader
    from fastres.errors import UserError
    from fastres.evaluate import evaluate
    from fastres.train.run import DTYPES, pick_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    model, saved = open_model(options)
    trained = saved.get("settings", {})
    data = options.data or trained.get("data")
    if data is None:
        raise UserError("--data is missing: digits, fashion-mnist, or a folder with val/<class>/*.jpg")
    loader = create_loader(
        data, "test", batch_size=options.batch_size, workers=options.workers, device=device,
        image_size=options.image_size or trained.get("test_image_size") or trained.get("image_size"),
        on_bad_image=options.on_bad_image,
        normalize=trained.get("normalize") or options.normalize or "channel", limit=options.limit,
        data_dir=options.data_dir or trained.get("data_dir"),
    )  # fmt: skip
    if "classes" in saved and saved["classes"] != loader.classes:
        raise UserError(f"the checkpoint was trained on the classes {saved['classes']}, {data} has {loader.classes}")
    model = model.to(device).to(memory_format=torch.channels_last)
    result = evaluate(model, loader, DTYPES[options.dtype])
    screen = console()
    screen.print(loader.description, markup=False, highlight=False, soft_wrap=True)
    table = Table("network", "images", "top-1", "top-5", "loss", title=f"{options.source} on {data}, {options.dtype}")
    name = f"{model.config['name']} ({'fused' if options.fused else 'reference'})"
    table.add_row(name, str(result.samples), f"{result.top1:.2%}", f"{result.top5:.2%}", f"{result.loss:.4f}")
    screen.print(table)
    if options.json:
        about = {"source": options.source, "data": data, "dtype": options.dtype, "fused": options.fused}
        Path(options.json).write_text(json.dumps({**about, **vars(result)}, indent=1) + "\n")
    return 0


def open_model(options: Namespace) -> tuple[Any, dict[str, Any]]:
    """The network, and the checkpoint's content if it came from one."""
    import fastres
    from fastres.errors import UserError
    from fastres.train.checkpoint import load_checkpoint

    source = options.source
    if Path(source).exists() or Path(source).suffix in (".pt", ".pth") or len(Path(source).parts) > 1:
        if options.weights is not None:
            raise UserError("--weights is for a network's name; a checkpoint has its own weights")
        saved = load_checkpoint(source)
        model = fastres.create_model(**{**saved["config"], "fused": options.fused})
        model.load_state_dict(saved["model"])
        return model, saved
    if options.weights is None:
        fastres.model_info(source)
        raise UserError(f"{source} without --weights is untrained; give --weights, or a checkpoint file")
    return fastres.create_model(source, fused=options.fused, weights=options.weights), {}
