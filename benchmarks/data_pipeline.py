"""Input pipelines against each other: 224x224 random resized crops, mirrored, uint8, from JPEG files.

    python -m benchmarks.data_pipeline [FOLDER] [--rounds 7] [--resized] [--save]

FOLDER has ``train/<class>/*.JPEG``; without one it is made (see benchmarks/photographs.py). The contenders take turns;
a figure is the median over rounds of one epoch's images a second. ``--resized`` first resizes the short sides to 256, as
``fastres data shard --short-side 256`` does. ``--memory EPOCHS`` measures the growth of the resident memory instead.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.record import save
from fastres.data import create_loader

BATCH, WORKERS, SIZE = 64, 2, 224


def own(folder: Path, backend: str) -> Callable[[], int]:
    """One of fastres's pipelines; returns a function that runs an epoch and says how many images it gave."""
    loader = create_loader(
        folder, "train", batch_size=BATCH, workers=WORKERS, backend=backend, output="uint8", drop_last=True
    )
    epoch = iter(range(1_000_000))

    def run() -> int:
        loader.set_epoch(next(epoch))
        return sum(len(labels) for _, labels in loader)

    return run


def torchvision_loader(folder: Path, decoder: str) -> Callable[[], int]:
    """torchvision's transforms v2 in two processes of torch's DataLoader, decoded by Pillow or by torchvision."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]
    if decoder == "pillow":
        dataset = ImageFolder(str(folder / "train"), v2.Compose([*steps, v2.PILToTensor()]))
    else:
        dataset = ImageFolder(
            str(folder / "train"), v2.Compose(steps), loader=lambda p: decode_jpeg(read_file(p), ImageReadMode.RGB)
        )
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True)

    def run() -> int:
        return sum(len(labels) for _, labels in loader)

    return run


def dali_alone(folder: Path) -> Callable[[], int]:
    """DALI's own reader, fused random-crop decoder, resize and flip, as its examples have them."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, seed=1)
    def pipeline():
        encoded, label = fn.readers.file(
            file_root=str(folder / "train"), random_shuffle=True, pad_last_batch=True, name="Reader"
        )
        pixels = fn.decoders.image_random_crop(encoded, output_type=types.RGB)
        pixels = fn.resize(pixels, size=[SIZE, SIZE], antialias=True)
        return fn.flip(pixels, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()
    steps = len(list((folder / "train").rglob("*.JPEG"))) // BATCH

    def run() -> int:
        for _ in range(steps):
            images, _ = built.run()
            torch.from_dlpack(images.as_tensor()).clone()
        return steps * BATCH

    return run


def rounds(contenders: dict[str, Callable[[], int]], count: int) -> dict[str, list[float]]:
    """Images a second of each contender by round; the first, untimed, starts processes and fills the page cache."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name, run in contenders.items():
            begin = time.perf_counter()
            images = run()
            if number:
                rates[name].append(images / (time.perf_counter() - begin))
    return rates


def memory(folder: Path, epochs: int) -> Iterator[tuple[int, float]]:
    """Resident MiB of this process after each epoch."""
    run = own(folder, "auto")
    for epoch in range(epochs):
        run()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        yield epoch + 1, pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def resize_folder(source: Path, target: Path) -> None:
    """Copies of the images whose short side has 256 pixels, quality 90."""
    from fastres.data.packing import shrink

    for path in sorted((source / "train").rglob("*.JPEG")):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(shrink(path.read_bytes(), 256, 90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resized", action="store_true")
    parser.add_argument("--memory", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of this process; every contender has two threads or processes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            from benchmarks.photographs import make

            folder = Path(temporary) / "made"
            make(folder)
        if options.memory:
            for epoch, size in memory(folder, options.memory):
                print(f"epoch {epoch:3d}: {size:.1f} MiB resident", flush=True)
            return
        if options.resized:
            resized = Path(temporary) / "resized"
            resize_folder(folder, resized)
            folder = resized
        report(folder, options)


def report(folder: Path, options: argparse.Namespace) -> None:
    """Run the rounds and print, or store, the medians."""
    contenders = {
        "fastres": own(folder, "auto"),
        "fastres, torchvision engine": own(folder, "torchvision"),
        "fastres, DALI alone": own(folder, "dali-only"),
        "DALI's example": dali_alone(folder),
        "torchvision, decode_jpeg + v2": torchvision_loader(folder, "torchvision"),
        "torchvision, Pillow + v2": torchvision_loader(folder, "pillow"),
    }
    rates = rounds(contenders, options.rounds)
    rows, first = [], rates["fastres"]
    load = os.getloadavg()[0]
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        median = statistics.median(values)
        print(
            f"{name:32s} {median:7.0f} images/s ({min(values):.0f} to {max(values):.0f}); fastres is {ratio:.2f} times"
        )
        rows.append({
            "suite": "data", "case": "short side 256" if options.resized else "500x375", "contender": name,
            "images_per_s": median, "ratio": ratio, "rounds": len(values),
        })  # fmt: skip
    print(f"load average at the end {load:.1f}")
    if options.save:
        save(rows, {"rounds": options.rounds, "batch": BATCH, "workers": WORKERS})


if __name__ == "__main__":
    main()
