"""Peak memory of a process that prepares one contender and runs it: ``python -m fastres.evaluate.peers.memory NET …``."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS, LIMITS, Reference
from .measuring import Row, one_line

TINY = "resnet20"
CALLS = 3


def status_bytes(name: str) -> int:
    """A size from /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _forget_peak() -> None:
    """Sets VmHWM, the highest resident memory so far, to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_here(net: str, batch: int, dtype: str, contender: str, side: int | None) -> dict[str, Any]:
    """In a fresh process: bytes above what it has once all code is loaded, and the error of the logits.

    Runtimes load much of their code when they are first used, so a tiny network goes first.

    ``peak_bytes``: highest, with preparation (the network in PyTorch that all start from, conversion, packing).
    ``running_bytes``: highest while it only infers, what it started from given back.
    """
    import torch

    tiny = Reference(TINY).problem(1, dtype, with_truth=False)
    CONTENDERS[contender](tiny)()
    del tiny
    torch._dynamo.reset()
    gc.collect()
    loaded = status_bytes("VmRSS")
    _forget_peak()
    problem = Reference(net, side).problem(batch, dtype, with_truth=False)
    call = CONTENDERS[contender](problem)
    for _ in range(CALLS):
        logits = call().clone()
    peak = status_bytes("VmHWM") - loaded
    del problem
    gc.collect()
    _forget_peak()
    call()
    running = status_bytes("VmHWM") - loaded
    error = Reference(net, side).problem(batch, dtype).error(logits)
    return {"peak_bytes": peak, "running_bytes": running, "error": error}


def memory_row(
    net: str, batch: int, dtype: str, contender: str, threads: int, side: int | None = None, timeout_s: float = 900
) -> Row:
    """The figures of one contender from a process of its own; no figure where parity fails or it can't run."""
    row: Row = {
        "case": f"{net}-{dtype}-b{batch}-memory-{contender}", "baseline": contender, "kind": "memory",
        "net": net, "dtype": dtype, "batch": batch, "threads": threads, "allowed": LIMITS[dtype],
        "peak_bytes": None, "running_bytes": None, "error": None, "reason": None,
    }  # fmt: skip
    arguments = [net, str(batch), dtype, contender, str(threads), *([str(side)] if side else [])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, *arguments], capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"took more than {timeout_s:.0f} s"}
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {**row, "reason": last[:160]}
    if "reason" in found:
        return {**row, "reason": found["reason"]}
    if not found["error"] <= LIMITS[dtype]:
        reason = f"parity failed: logits off by {found['error']:.1e}, allowed {LIMITS[dtype]:.0e}"
        return {**row, "reason": reason}
    return {**row, **found}


def main(arguments: list[str]) -> None:
    """Prints one line of JSON: the figures, or the reason why there are none."""
    import torch

    net, batch, dtype, contender, threads, *side = arguments
    torch.set_num_threads(int(threads))
    result: dict[str, Any]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = measure_here(net, int(batch), dtype, contender, int(side[0]) if side else None)
    except Exception as error:
        result = {"reason": one_line(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
