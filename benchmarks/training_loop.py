"""What the training loop costs beside the network, and what a second process brings.

    python -m benchmarks.training_loop overhead
    python -m benchmarks.training_loop processes

Both take turns, so that what else runs on the machine meets both sides, and report medians and bests over rounds.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import time
from typing import Any


class Synthetic:
    """The same batch again and again, as a loader."""

    def __init__(self, images: Any, labels: Any, batches: int) -> None:
        self.images, self.labels, self.batches = images, labels, batches
        self.samples, self.num_classes = len(labels) * batches, 10
        self.input_shape = tuple(images.shape[1:])
        self.classes, self.description = [str(i) for i in range(10)], "synthetic"

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Any:
        for _ in range(self.batches):
            yield self.images, self.labels

    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


def make_run(options: argparse.Namespace, batch_size: int, world: Any = None) -> Any:
    """A run on synthetic data of three channels."""
    import torch

    from fastres.train import Settings
    from fastres.train.run import Run

    torch.set_num_threads(options.threads)
    settings = Settings(
        options.model, batch_size=batch_size, threads=options.threads, epochs=100, device="cpu", limit=512
    )
    run = Run(settings, world)
    shape = (batch_size // run.world.size, run.train_data.input_shape[0], options.image_size, options.image_size)
    images = torch.randn(shape).to(memory_format=torch.channels_last)
    run.train_data = Synthetic(images, torch.arange(shape[0]) % 10, options.steps)  # type: ignore[assignment]
    return run


def overhead(options: argparse.Namespace) -> None:
    """The loop's time of a step against that of the bare network, loss, gradients and optimizer."""
    import torch
    from torch.nn import functional as F

    from fastres.train.loop import train_epoch
    from fastres.train.progress import make_reporter
    from fastres.train.signals import StopRequest

    run = make_run(options, options.batch_size)
    run.begin_epoch = lambda: None
    from rich.console import Console

    reporter = make_reporter(Console(file=io.StringIO(), force_terminal=options.bar))
    images, labels = run.train_data.images, run.train_data.labels

    def bare() -> None:
        for _ in range(options.steps):
            run.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(run.model(images), labels).backward()
            run.optimizer.step()

    def loop() -> None:
        run.batch = 0
        train_epoch(run, reporter, StopRequest())

    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    times: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in ("bare", "loop") for clock in clocks}
    run.model.train()
    bare(), loop()
    for number in range(options.rounds):
        for name, function in (("bare", bare), ("loop", loop))[:: 1 if number % 2 else -1]:
            begin = {clock: read() for clock, read in clocks.items()}
            function()
            for clock, read in clocks.items():
                times[name, clock].append((read() - begin[clock]) / options.steps)
    reporter.close()
    torch.set_num_threads(1)
    for clock in clocks:
        ratios = [loop / bare for loop, bare in zip(times["loop", clock], times["bare", clock], strict=True)]
        print(
            f"{options.model}, batch {options.batch_size}, {options.image_size} pixels, {options.threads} thread(s), "
            f"{clock} time: bare {min(times['bare', clock]) * 1e3:.2f} ms, loop {min(times['loop', clock]) * 1e3:.2f} ms; "
            f"overhead {100 * (statistics.median(ratios) - 1):+.2f} % (median of {options.rounds} pairs), "
            f"{100 * (min(times['loop', clock]) / min(times['bare', clock]) - 1):+.2f} % (of the bests)"
        )


def member(options: argparse.Namespace) -> None:
    """One process of ``processes``: prints images/s of all processes together for each round."""
    import torch

    from fastres.train.distributed import join_world, leave_world
    from fastres.train.stepping import train_step

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ.get("LOCAL_RANK", 0))]})
    world = join_world("cpu")
    run = make_run(options, options.batch_size * world.size, world)
    run.model.train()
    for number in range(options.rounds + 1):
        world.any(0, torch.device("cpu"))
        begin, busy = time.perf_counter(), time.process_time()
        for batch in run.train_data:
            train_step(run, *batch)
            world.any(0, torch.device("cpu"))
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
        busy = max(world.gathered(busy))  # before the rate: all processes take part
        if number and world.first:
            images = run.train_data.samples * world.size
            print(images / seconds, images / busy)
    leave_world()


def processes(options: argparse.Namespace) -> None:
    """Images/s of two processes with a core each against one with a core."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    busy: dict[int, list[float]] = {
        1: [],
        2: [],
    }  # by CPU time of the busiest process: without waiting, and without others
    same = ["member", "--model", options.model, "--batch-size", str(options.batch_size), "--threads", "1"]
    same += ["--image-size", str(options.image_size), "--steps", str(options.steps), "--rounds", "2"]
    for number in range(options.rounds):
        for count in (1, 2) if number % 2 else (2, 1):
            start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            done = subprocess.run([*start, __file__, *same], capture_output=True, text=True, check=True)
            found = [float(value) for value in done.stdout.split()]
            rates[count] += found[::2]
            busy[count] += found[1::2]
    ratios = {name: pick(rates[2]) / pick(rates[1]) for name, pick in (("medians", statistics.median), ("bests", max))}
    ratios["CPU time, medians"] = statistics.median(busy[2]) / statistics.median(busy[1])
    for count, found in rates.items():
        print(
            f"{count} process(es): median {statistics.median(found):.1f}, best {max(found):.1f} images/s; "
            f"{statistics.median(busy[count]):.1f} images/s of CPU time"
        )
    print(f"{options.model}, batch {options.batch_size} a process, {options.image_size} pixels: {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "processes", "member"])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bar", action="store_true", help="show the progress bar, into the void")
    options = parser.parse_args()
    {"overhead": overhead, "processes": processes, "member": member}[options.what](options)


if __name__ == "__main__":
    main()
