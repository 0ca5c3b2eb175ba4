"""Peak memory of a process that prepares one contender and runs it: ``python -m fastres.evaluate.peers.memory NET …``."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .contenders import LIMITS, Reference
from .measuring import Row, prepare

# What a contender imports while it prepares: code, which is no memory of the inference, and loaded before it is measured.
IMPORTS = {
    "openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "compile": ("torch._dynamo", "torch._inductor.compile_fx"), "zentorch": ("zentorch",),
    "compile-max": ("torch._dynamo", "torch._inductor.compile_fx"),
}  # fmt: skip
CALLS = 3


def status_bytes(name: str) -> int:
    """A size from /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure_here(net: str, batch: int, dtype: str, contender: str, side: int | None) -> dict[str, Any]:
    """In a fresh process: bytes above what it has after its imports.

    ``peak_bytes``: highest, with preparation (conversion, packing, the network in PyTorch that it starts from).
    ``running_bytes``: highest while it only infers, the network that it started from given back.
    """
    for name in IMPORTS.get(contender, ()):
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            importlib.import_module(name)
    imported = status_bytes("VmHWM")
    reference = Reference(net, side)
    reference.__dict__["truth"] = reference.images.new_zeros(len(reference.images), 1)  # float64 would be the peak
    problem = reference.problem(batch, dtype)
    (run,) = prepare(problem, [contender])
    if run.error is None:
        return {"reason": run.reason}
    (call,) = run.kept
    del reference, problem
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest resident memory so far
        cleared = True
    except OSError:
        cleared = False
    return {"imported": imported, "call": call, "cleared": cleared}
