"""Fails when a source file is longer than the project allows: ``python tools/check_lines.py [FILE …]``."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

LIMIT = 400
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
ROOT = Path(__file__).resolve().parent.parent
# Folders with files of others, or made by tools.
SKIPPED = {"build", "dist", "venv", "__pycache__", "node_modules"}


def sources(root: Path = ROOT) -> Iterable[Path]:
    """Every source file of the project, once; links are not followed."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(
            n for n in names if n not in SKIPPED and not n.startswith(".") and not n.endswith(".egg-info")
        )
        yield from (Path(folder, f) for f in sorted(files) if Path(f).suffix in SUFFIXES)


def too_long(files: Iterable[Path], limit: int = LIMIT) -> list[str]:
    """A message for each file with more than ``limit`` lines."""
    counts = ((f, f.read_bytes().count(b"\n")) for f in files)
    return [f"{f}: {n} lines, the limit is {limit}: split it by what its parts are for" for f, n in counts if n > limit]


if __name__ == "__main__":
    given = [Path(a) for a in sys.argv[1:] if Path(a).suffix in SUFFIXES] if len(sys.argv) > 1 else list(sources())
    problems = too_long(given)
    print("\n".join(problems) if problems else f"{len(given)} files within {LIMIT} lines")
    sys.exit(bool(problems))
