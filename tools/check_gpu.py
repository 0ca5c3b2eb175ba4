"""Everything that wants a GPU, on a machine that has one: python tools/check_gpu.py (make gpu)

1. pytest -m gpu: parity of triton and cuda with the float64 reference, CUDA graphs, the same bits twice, refusals.
2. The cuda kernels under compute-sanitizer, where it is on the path: memcheck, racecheck and synccheck, on some of these tests.

Without a GPU nothing runs, and nothing has failed. Arguments go to pytest.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
# Under the sanitizer a kernel takes a hundred times as long: one dtype of each width, and the shapes with most to get wrong.
SHAPES = "points or (16x7x9 and k24) or 17x6x6 or 1x3x15 or (64x4x4 and k66) or bits"
SANITIZED = f"cuda and not triton and (fp16 or tf32 or float16) and ({SHAPES})"


def commands(sanitizer: str | None, arguments: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """(what it is, command) of each step."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    found = [("parity and behaviour", [*pytest, "-ra", *arguments])]
    if sanitizer is not None:
        options = ["--error-exitcode", "1", "--target-processes", "all"]
        for tool in TOOLS:
            found.append((tool, [sanitizer, "--tool", tool, *options, *pytest, "-k", SANITIZED]))
    return found


def environment(step: str, current: Mapping[str, str]) -> dict[str, str]:
    """Nothing that is asked for may be skipped; the sanitizer sees each tensor as an allocation of its own."""
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step in TOOLS else {}
    return {**current, "FASTRES_CI": "1", **alone}


def main(arguments: Sequence[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing was run. On a machine with a GPU: make gpu")
        return 0
    sanitizer = shutil.which("compute-sanitizer")
    failed = []
    for step, command in commands(sanitizer, arguments):
        print(f"== {step}: {' '.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=environment(step, os.environ)).returncode:
            failed.append(step)
    if sanitizer is None:
        print("compute-sanitizer is not on the path (it comes with the CUDA toolkit): the kernels did not run under it")
    print(f"FAILED: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
