"""Evaluate a checkpoint of fastres train, or a network by name with --weights. --protocol chooses the views of an image,
--ensemble averages several checkpoints, --out saves the report. Under torchrun the processes share the images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from fastres.cli.options import add_data, add_fused, add_machine, console


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("source", metavar="CHECKPOINT|MODEL", type=str, help="a checkpoint file, or a network's name")
    parser.add_argument(
        "--ensemble",
        nargs="+",
        type=str,
        default=[],
        metavar="CHECKPOINT",
        help="more of them: probabilities are averaged",
    )
    add_data(parser, None)
    parser.add_argument("--weights", type=str, default=None, help="for a MODEL: a file, or a name of torchvision's")
    parser.add_argument("--batch-size", type=PositiveInt, default=256, help="views that are computed at once (256)")
    parser.add_argument(
        "--protocol", type=str, default="loader",
        help="loader (centre 224 of 256 for folders), 1-crop, 10-crop, multi-scale (fully convolutional), 144-crop",
    )  # fmt: skip
    parser.add_argument("--crop", type=PositiveInt, default=None, help="side of the crops (224; named data their own)")
    parser.add_argument(
        "--scales", type=list[PositiveInt], default=None, help="lengths of the shorter side, such as [224,256,384]"
    )
    parser.add_argument(
        "--combine", type=Literal["softmax", "scores"], default="softmax", help="average probabilities or raw scores"
    )
    parser.add_argument(
        "--population-bn", action=ActionYesNo(no_prefix="no-"), default=False,
        help="recompute BatchNorm's statistics over the training set first",
    )  # fmt: skip
    add_fused(parser)
    add_machine(parser)
    parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--out", type=str, default=None, metavar="DIR", help="write eval.html, eval.json and tables as CSV there"
    )


def run(options: Namespace) -> int:
    """Evaluate, print tables and save what was asked for."""
    import torch

    from fastres.errors import UserError
    from fastres.evaluate import assess, population_statistics
    from fastres.evaluate.report import rich_tables, write_files, write_json
    from fastres.train.run import DTYPES, pick_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with processes(options) as (rank, world):
        device = pick_device(options.device)
        opened = [open_model(options, source) for source in [options.source, *options.ensemble]]
        for (_, saved), source in zip(opened, [options.source, *options.ensemble], strict=True):
            if saved.get("classes") != opened[0][1].get("classes"):
                raise UserError(f"{source} was trained on other classes than {options.source}: no ensemble")
        models = [model.to(device).to(memory_format=torch.channels_last) for model, _ in opened]
        saved = opened[0][1]
        loader = open_data(options, saved, "test", device)
        data = options.data or saved["settings"]["data"]
        source, protocol = views(options, data, loader, device, world)
        dtype = DTYPES[options.dtype]
        screen = console()
        if options.population_bn:
            for index, (model, (_, own)) in enumerate(zip(models, opened, strict=True)):
                train_data = open_data(options, own, "train", device)
                what = f"BatchNorm statistics {index + 1}/{len(models)}"
                with bar(screen, what, train_data.samples, rank) as step:
                    batches = (batch for i, batch in enumerate(train_data) if i % world == rank)
                    population_statistics(model, batches, dtype, step)
        with bar(screen, "evaluation", -(-source.samples // world), rank) as step:
            result = assess(
                models, source, protocol, combine=options.combine, dtype=dtype, batch_size=options.batch_size, step=step
            )
        if rank:
            return 0
        from fastres.data.names import readable

        names = readable(source.classes)
        rows = [dataclasses.replace(row, name=name) for row, name in zip(result.summary.classes, names, strict=False)]
        rows += result.summary.classes[len(rows) :]
        result = dataclasses.replace(result, summary=dataclasses.replace(result.summary, classes=rows))
        kind = "fused" if options.fused else "reference"
        name = " + ".join(f"{model.config['name']}" for model in models) + f" ({kind})"
        title = (
            f"{options.source}{f' and {len(models) - 1} more' if len(models) > 1 else ''} on {data}, {options.dtype}"
        )
        about = {
            "source": options.source, "ensemble": list(options.ensemble), "network": name, "data": data,
            "dtype": options.dtype, "fused": options.fused, "population_bn": options.population_bn,
        }  # fmt: skip
        screen.print(source.description, markup=False, highlight=False, soft_wrap=True)
        for table in rich_tables(result, title, name):
            screen.print(table)
        if options.json:
            write_json(Path(options.json), result, about)
        if options.out:
            for path in write_files(Path(options.out), result, about, title):
                screen.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def open_data(options: Namespace, saved: dict[str, Any], split: Literal["train", "test"], device: Any) -> Any:
    """The loader of the data that were named, or of those that the checkpoint was trained on."""
    from fastres.data import create_loader
    from fastres.errors import UserError

    trained = saved.get("settings", {})
    data = options.data or trained.get("data")
    if data is None:
        raise UserError("--data is missing: digits, fashion-mnist, or a folder with val/<class>/*.jpg")
    batch = options.batch_size if split == "test" else trained.get("batch_size") or options.batch_size
    loader = create_loader(
        data, split, batch_size=batch, workers=options.workers, device=device,
        image_size=options.image_size or (split == "test" and trained.get("test_image_size")) or trained.get("image_size"),
        on_bad_image=options.on_bad_image, normalize=trained.get("normalize") or options.normalize or "channel",
        limit=options.limit, drop_last=split == "train",
        data_dir=options.data_dir or trained.get("data_dir"),
    )  # fmt: skip
    if "classes" in saved and saved["classes"] != loader.classes:
        raise UserError(f"the checkpoint was trained on the classes {saved['classes']}, {data} has {loader.classes}")
    return loader


def views(options: Namespace, data: str, loader: Any, device: Any, world: int) -> tuple[Any, Any]:
    """Where the views come from, and which they are. Protocols on a folder need its whole images."""
    from fastres.data.folder import ImageLoader
    from fastres.evaluate import FolderSource, LoaderSource, make_protocol

    folder = isinstance(loader, ImageLoader)
    scales = tuple(int(scale) for scale in options.scales) if options.scales else None
    crop, name = options.crop, options.protocol
    if not folder and name != "loader" and crop is None:
        crop = loader.input_shape[1]  # a CIFAR-sized image has its own "224"
    if folder and name == "loader" and world > 1:
        name, crop = "1-crop", loader.input_shape[1]  # the same view, and a rank decodes its share only
    protocol = make_protocol(name, None if crop is None else int(crop), scales)
    if folder and name != "loader":
        return FolderSource(data, options.workers, options.on_bad_image, device), protocol
    return LoaderSource(loader), protocol


@contextmanager
def processes(options: Namespace) -> Iterator[tuple[int, int]]:
    """Joins the processes of torchrun, if it started this one: (rank, their number)."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield 0, 1
        return
    import torch

    gpu = options.device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextmanager
def bar(screen: Any, what: str, total: int, rank: int) -> Iterator[Any]:
    """A progress bar with an estimate of the time that is left, on a terminal, of rank 0."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=rank > 0 or not screen.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def open_model(options: Namespace, source: str) -> tuple[Any, dict[str, Any]]:
    """The network, and the checkpoint's content if it came from one."""
    import fastres
    from fastres.errors import UserError
    from fastres.train.checkpoint import load_checkpoint

    if Path(source).exists() or Path(source).suffix in (".pt", ".pth") or len(Path(source).parts) > 1:
        if options.weights is not None:
            raise UserError("--weights is for a network's name; a checkpoint has its own weights")
        saved = load_checkpoint(source)
        model = fastres.create_model(**{**saved["config"], "fused": options.fused})
        average = saved.get("ema") or {}
        if int(average.get("n_averaged", 0)):  # what the training evaluated, too
            weights = {name.removeprefix("module."): v for name, v in average.items() if name.startswith("module.")}
        else:
            weights = saved["model"]
        model.load_state_dict(weights)
        return model, saved
    if options.weights is None:
        fastres.model_info(source)
        raise UserError(f"{source} without --weights is untrained; give --weights, or a checkpoint file")
    return fastres.create_model(source, fused=options.fused, weights=options.weights), {}
