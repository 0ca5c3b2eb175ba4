"""Every layer of a network by every backend: how fast cuda, triton and the library (cuDNN) compute it on this device.

    python -m benchmarks.layers --device cuda                          # ResNet-50, a training step's ops, bf16, batch 64
    python -m benchmarks.layers --device cuda --mode eval --save       # inference; into benchmarks/results/layers.json

It is what ``fastres.tune`` measures, by its rules: each candidate's results are compared with the library's first, kernels with
several configurations run with their fastest, contenders take turns, the median counts. In training a figure is a forward and a
backward pass. Nothing is kept for later runs.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import fastres
from benchmarks import record
from fastres import tuner
from fastres.train.run import DTYPES


def measure(
    name: str, device: str, mode: str, dtype: torch.dtype, batch: int, side: int | None, rounds: int
) -> list[record.Row]:
    """One row a problem of the network, with how often it occurs."""
    channels, height, width = fastres.model_info(name).input_size
    training = mode == "train"
    model = fastres.create_model(name, fused=True).train(training)
    model = (model if training else model.to(dtype)).to(device).to(memory_format=torch.channels_last)
    x = torch.randn(
        batch, channels, side or height, side or width, device=device, dtype=torch.float32 if training else dtype
    )
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, dtype, enabled=training and dtype != torch.float32):
        times = Counter(problem.key() for _, problem in tuner._problems(model, x, all_ops=device == "cuda"))
        report = fastres.tune(model, x, rounds=rounds, save=False, progress=lambda line: print(line, flush=True))
    return [
        {
            "suite": "layers", "case": f"{name} {mode} {row.problem}", "layer": row.layer, "count": times[row.problem],
            "ms": row.ms, "dropped": row.dropped,
        }
        for row in report.rows if row.problem in times
    ]  # fmt: skip


def totals(rows: Sequence[record.Row]) -> dict[str, float]:
    """Milliseconds of the network's ops by backend, the library's where a backend has none; "best" takes each one's fastest."""
    names = dict.fromkeys(name for row in rows for name in row["ms"])
    found = {
        name: sum(row["count"] * row["ms"].get(name, row["ms"].get("library", 0.0)) for row in rows) for name in names
    }
    return {**found, "best": sum(row["count"] * min(row["ms"].values(), default=0.0) for row in rows)}


def table(rows: Sequence[record.Row]) -> str:
    """A line a problem, and the sums."""
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    lines = [f"{'layer':28s} {'times':>5s} " + " ".join(f"{name:>10s}" for name in names) + "  fastest"]
    for row in rows:
        figures = " ".join(f"{row['ms'][n]:10.3f}" if n in row["ms"] else f"{'-':>10s}" for n in names)
        best = min(row["ms"], key=row["ms"].__getitem__, default="-")
        lines.append(f"{row['layer'][:28]:28s} {row['count']:5d} {figures}  {best}")
        lines += [f"    {name} dropped: {why}" for name, why in row["dropped"].items()]
    sums = totals(rows)
    lines.append(f"{'all, ms':28s} {sum(r['count'] for r in rows):5d} " + " ".join(f"{sums[n]:10.3f}" for n in names))
    return "\n".join([*lines, f"each by its fastest: {sums['best']:.3f} ms"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/layers.json")
    options: Any = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    rows = measure(
        options.model,
        options.device,
        options.mode,
        DTYPES[options.dtype],
        options.batch_size,
        options.image_size,
        options.rounds,
    )
    print(table(rows))
    if options.save:
        settings = {"dtype": options.dtype, "batch": options.batch_size, "device": options.device}
        for path in record.save(rows, settings):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
