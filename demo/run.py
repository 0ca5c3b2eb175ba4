"""``make demo``: trains a fused and a reference network with the same seed, evaluates and times both, writes a report.

Everything goes through the command line that users have; this file only calls it and collects what it wrote.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
# Threads that spin while they wait slow everything down where other programs run too; read when torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

MODEL, DATA, SEED = "resnet20", "digits", 0
KINDS = ("fused", "reference")


@dataclass
class Demo:
    """What is run and what came out."""

    quick: bool
    out: Path
    start: float = field(default_factory=time.monotonic)
    commands: list[tuple[str, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return 6 if self.quick else 7

    def say(self, number: int, what: str) -> None:
        """One line a step, with the time since the start."""
        print(f"\n\033[1m[{number}/{self.steps}] {what}\033[0m  ({time.monotonic() - self.start:.0f} s)", flush=True)

    def fastres(self, *arguments: str) -> None:
        """Runs a fastres command with its progress shown."""
        shown = shlex.join(["fastres", *arguments])
        print(f"$ {shown}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "fastres", *arguments], cwd=ROOT).returncode
        if code:
            sys.exit(f"demo: the command above failed with exit code {code}")
        self.commands.append((shown, time.monotonic() - began))

    def path(self, name: str) -> str:
        """A path for commands, as short as possible."""
        path = self.out / name
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def result(self, name: str) -> Any:
        return json.loads((self.out / name).read_text())


def switch(kind: str) -> str:
    return "--fused" if kind == "fused" else "--no-fused"


def train_and_evaluate(demo: Demo) -> None:
    """Steps 1 to 3."""
    small = ["--epochs", "2", "--limit", "256"] if demo.quick else ["--epochs", "8"]
    for number, kind in enumerate(KINDS, 1):
        demo.say(number, f"training {MODEL} ({kind}) on scikit-learn's digits")
        demo.fastres(
            "train", MODEL, "--data", DATA, "--out", demo.path(kind), *small,
            "--seed", str(SEED), switch(kind), "--resume", "never", "--overwrite",
        )  # fmt: skip
    demo.say(3, "evaluating both")
    for kind in KINDS:
        checkpoint = demo.path(f"{kind}/checkpoint-last.pt")
        demo.fastres("eval", checkpoint, "--data", DATA, switch(kind), "--json", demo.path(f"eval-{kind}.json"))


def benchmark(demo: Demo) -> list[dict[str, Any]]:
    """The network of the demo, and unless quick an ImageNet network."""
    demo.say(4, f"timing {MODEL}, fused and reference in turns")
    rounds = ["--rounds", "3" if demo.quick else "9"]
    demo.fastres("bench", MODEL, "--batch-size", "64", *rounds, "--json", demo.path("bench.json"))
    results = [demo.result("bench.json")]
    if not demo.quick:
        demo.say(5, "timing resnet50, fused and reference in turns")
        small = ["--batch-size", "4", "--image-size", "160", "--rounds", "5"]
        demo.fastres("bench", "resnet50", *small, "--json", demo.path("bench-resnet50.json"))
        results.append(demo.result("bench-resnet50.json"))
    return results


def memory_rows() -> list[tuple[str, int, int, int]]:
    """(network, bytes saved for backward by the reference, fused, fused with recomputation) at batch 1."""
    import torch

    import fastres
    from benchmarks.memory import saved_bytes

    rows = []
    for name in (MODEL, "resnet18", "resnet50"):
        x = torch.randn(1, *fastres.model_info(name).input_size).contiguous(memory_format=torch.channels_last)
        options: tuple[dict[str, Any], ...] = ({"fused": False}, {}, {"memory": "recompute"})
        models = [fastres.create_model(name, **o).to(memory_format=torch.channels_last) for o in options]
        sizes = [saved_bytes(model.train(), x) for model in models]
        rows.append((name, sizes[0], sizes[1], sizes[2]))
        reference, fused, recompute = (size / 2**20 for size in sizes)
        print(f"{name}: reference {reference:.1f} MiB, fused {fused:.1f} MiB, recompute {recompute:.1f} MiB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two short epochs and few rounds: shows that everything runs"
    )
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for runs and figures")
    parser.add_argument("--report", type=Path, default=HERE / "report.html")
    options = parser.parse_args()
    demo = Demo(options.quick, options.out.resolve())
    demo.out.mkdir(parents=True, exist_ok=True)

    train_and_evaluate(demo)
    benches = benchmark(demo)
    demo.say(demo.steps - 1, "counting the bytes saved for backward")
    memory = memory_rows()

    demo.say(demo.steps, "writing the report")
    from report import write

    from fastres.train.records import read_log

    write(
        options.report, model=MODEL, logs={kind: read_log(demo.out / kind) for kind in KINDS},
        evaluations={kind: demo.result(f"eval-{kind}.json") for kind in KINDS}, benches=benches, memory=memory,
        commands=demo.commands, seconds=time.monotonic() - demo.start, quick=demo.quick,
    )  # fmt: skip
    print(f"open {options.report}   (training, evaluation and timing took {time.monotonic() - demo.start:.0f} s)")


if __name__ == "__main__":
    main()
