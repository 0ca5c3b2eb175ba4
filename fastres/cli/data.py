"""Look after data sets of images: check decodes every file, shard packs them into tar files, bench times the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from fastres.cli.options import console

BAD_LIST = "bad-images.txt"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("action", type=Literal["check", "shard", "bench"], help="what to do")
    parser.add_argument("data", type=str, help="a folder with train/<class>/*.jpg and val/…, or with shards")
    parser.add_argument("out", nargs="?", type=str, default=None, help="shard: the folder to write")
    parser.add_argument(
        "--split", type=Literal["train", "test", "all"], default=None, help="which images (bench: train, else all)"
    )
    parser.add_argument("--workers", type=PositiveInt, default=2, help="threads")
    parser.add_argument(
        "--bad-list", type=str, default=BAD_LIST, help="check: where the names of bad images go; --exclude takes it"
    )
    parser.add_argument("--shard-size", type=PositiveInt, default=256, help="shard: MiB of a tar file")
    parser.add_argument(
        "--short-side", type=PositiveInt, default=None, help="shard: resize larger images; 256 trains much faster"
    )
    parser.add_argument("--quality", type=PositiveInt, default=90, help="shard: of the JPEG files that are resized")
    parser.add_argument("--batch-size", type=PositiveInt, default=64, help="bench")
    parser.add_argument("--image-size", type=PositiveInt, default=224, help="bench")
    parser.add_argument("--batches", type=PositiveInt, default=30, help="bench: how many to time")
    parser.add_argument(
        "--backend", type=Literal["auto", "dali", "dali-only", "torchvision"], default="auto", help="bench"
    )
    parser.add_argument("--device", type=str, default="cpu", help="bench: where batches go")
    parser.add_argument("--run", type=str, default=None, metavar="DIR", help="bench: a training run to judge")
    parser.add_argument("--needed", type=PositiveFloat, default=None, help="bench: images/s that training consumes")


def run(options: Namespace) -> int:
    """Returns 1 if ``check`` found a bad image."""
    return {"check": _check, "shard": _shard, "bench": _bench}[options.action](options)


def _splits(options: Namespace) -> list[str]:
    if options.split not in (None, "all"):
        return [options.split]
    from fastres.data.shards import SPLITS, find_shards

    root = Path(options.data).absolute()
    found = [
        split
        for split, names in SPLITS.items()
        if find_shards(root, split) or any((root / name).is_dir() for name in names)
    ]
    return found or ["train"]  # where there is neither, opening it explains what is missing


class _Bar:
    """A progress bar; nothing where the output is no terminal."""

    def __init__(self, what: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        screen = console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=screen, disable=not screen.is_terminal)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


def _check(options: Namespace) -> int:
    from fastres.data.check import Report, check_source, write_bad_list
    from fastres.data.scan import open_source

    screen, joint = console(), Report()
    for split in _splits(options):
        source = open_source(options.data, split)
        with _Bar(f"checking {split}") as bar:
            report = check_source(source, options.workers, bar)
        _say(screen, source.place, report)
        joint.images += report.images
        joint.bad |= report.bad
    # Also when nothing is bad: an older list must not go on excluding what was mended.
    write_bad_list(Path(options.bad_list), joint, options.data)
    screen.print(f"{len(joint.bad)} of {joint.images} images are bad; list in {options.bad_list}", soft_wrap=True)
    return 1 if joint.bad else 0


def _say(screen: Any, place: str, report: Any) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.formats.most_common())
    good = max(1, report.images - len(report.bad))
    smallest = f", smallest {report.smallest[1]}x{report.smallest[0]}" if report.smallest else ""
    lines = [f"{place}: {report.images} images: {kinds or 'none can be decoded'}"]
    lines.append(f"  mean {report.size / good / 1e3:.1f} KB and {report.pixels / good / 1e6:.2f} megapixels{smallest}")
    if report.misnamed:
        lines.append(f"  {len(report.misnamed)} are of another format than their name says, which does no harm: "
                     f"{', '.join(report.misnamed[:3])}")  # fmt: skip
    lines += [f"  bad: {name}: {reason}" for name, reason in list(report.bad.items())[:20]]
    if len(report.bad) > 20:
        lines.append(f"  and {len(report.bad) - 20} more")
    screen.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _shard(options: Namespace) -> int:
    from fastres.data.packing import pack
    from fastres.errors import UserError

    if options.out is None:
        raise UserError("give the folder to write: fastres data shard FOLDER OUT")
    screen = console()
    for split in _splits(options):
        with _Bar(f"packing {split}") as bar:
            done = pack(
                options.data, options.out, split, shard_bytes=int(options.shard_size) << 20,
                short_side=options.short_side and int(options.short_side), quality=int(options.quality),
                workers=options.workers, progress=bar,
            )  # fmt: skip
        screen.print(
            f"{split}: {done.images} images in {len(done.shards)} shards, {done.size / 2**20:.1f} MiB, in "
            f"{done.shards[0].parent}", soft_wrap=True, highlight=False,
        )  # fmt: skip
    return 0


def _bench(options: Namespace) -> int:
    from rich.table import Table

    from fastres.data import create_loader
    from fastres.data.folder import ImageLoader
    from fastres.data.measuring import measure_pipeline, measure_stages, read_run, verdict

    screen = console()
    loader = create_loader(
        options.data, "test" if options.split == "test" else "train", batch_size=int(options.batch_size),
        image_size=int(options.image_size), workers=int(options.workers), backend=options.backend,
        device=options.device,
    )  # fmt: skip
    needed, wait = options.needed and float(options.needed), None
    if options.run is not None:
        consumed = read_run(Path(options.run))
        needed, wait = consumed.images_per_s, consumed.wait_share
    screen.print(loader.description, markup=False, highlight=False, soft_wrap=True)
    table = Table("stage", title=f"{options.workers} threads, batches of {options.batch_size}")
    table.add_column("images/s", justify="right")
    table.add_column("ms/image", justify="right")
    rows = measure_stages(loader) if isinstance(loader, ImageLoader) else []
    whole = measure_pipeline(loader, int(options.batches))
    for name, rate in [*((stage.name, stage.images_per_s) for stage in rows), ("whole pipeline", whole)]:
        table.add_row(name, f"{rate:,.0f}", f"{1e3 / rate:.3f}")
    screen.print(table)
    if needed:
        screen.print(verdict(whole, needed, wait), soft_wrap=True, highlight=False)
    return 0
