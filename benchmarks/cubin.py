"""What a compiled kernel needs and does, read from its machine code: registers, spills, shared memory, instructions."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastres.kernels.common.architectures import ARCHITECTURES

# Products on tensor cores: of a warp, of a warp group (Hopper), of a pair of multiprocessors' tensor memory (Blackwell).
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "QMMA", "OMMA")
ASYNC = ("LDGSTS", "UTMALDG", "UBLKCP")  # copies from global to shared memory that no register waits for
LOADS, SPILLS = ("LDG", "LDGSTS"), ("LDL", "STL")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True)
class Figures:
    """Of one kernel for one architecture. ``spill``: bytes of stack, which these kernels use for nothing else, or 1 where
    there are instructions on local memory without a stack. ``wide``, ``narrow``: instructions that load 16 and at most 4
    bytes of global memory a thread."""

    registers: int
    spill: int
    shared: int
    occupancy: float
    tensor: int
    async_copies: int
    wide: int
    narrow: int


def tools() -> Path:
    """Where Triton keeps NVIDIA's binary tools."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def figures(cubin: bytes, shared: int, warps: int, arch: int, cache: Path | None = None) -> Figures:
    """``shared``: dynamic shared memory in bytes. ``cache``: a folder that keeps what was read of each cubin."""
    key = hashlib.sha256(cubin + f"{shared},{warps},{arch},{_own_digest()}".encode()).hexdigest()
    kept = cache / f"{key}.json" if cache else None
    if kept is not None and kept.exists():
        return Figures(**json.loads(kept.read_text()))
    found = read(_disassembled(cubin), shared, warps, arch)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as out:
            json.dump(asdict(found), out)
        os.replace(out.name, kept)
    return found


def _own_digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools() / "cuobjdump"), "-res-usage", "-sass", file.name]
        environment = {**os.environ, "PATH": f"{tools()}:{os.environ.get('PATH', '')}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode or not _RESOURCES.search(done.stdout):
        raise RuntimeError(f"cuobjdump failed: {done.stderr or done.stdout[-300:]}")
    return done.stdout


def read(text: str, shared: int, warps: int, arch: int) -> Figures:
    """The figures of cuobjdump's output (``-res-usage -sass``)."""
    resources = _RESOURCES.search(text)
    assert resources is not None
    registers, stack, static = map(int, resources.groups())
    counts: collections.Counter[str] = collections.Counter()
    widths: collections.Counter[str] = collections.Counter()
    for match in _INSTRUCTION.finditer(text):
        family, *suffixes = match.group(1).split(".")
        counts[family] += 1
        if family in LOADS:
            widths["wide" if "128" in suffixes else "medium" if "64" in suffixes else "narrow"] += 1

    def sum_of(names: Any) -> int:
        return sum(counts[name] for name in names)

    spill = stack or int(sum_of(SPILLS) > 0)
    total = max(shared, static)
    occupancy = round(ARCHITECTURES[arch].occupancy(registers, total, warps), 4)
    return Figures(
        registers, spill, total, occupancy, sum_of(TENSOR_CORES), sum_of(ASYNC), widths["wide"], widths["narrow"]
    )
