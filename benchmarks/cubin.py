"""What a compiled kernel needs and does, read from its machine code: registers, spills, shared memory, instructions.

``figures`` of a Triton kernel's cubin, for ``compile_ledger``; the readers below it also serve ``cuda_ledger``.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastres.kernels.common.architectures import ARCHITECTURES

# Products on tensor cores: of a warp, of a warp group (Hopper), of a pair of multiprocessors' tensor memory (Blackwell).
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA", "QMMA", "OMMA")
ASYNC = ("LDGSTS", "UTMALDG", "UBLKCP")  # copies from global to shared memory that no register waits for
LOADS, SPILLS = ("LDG", "LDGSTS"), ("LDL", "STL")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)([^;\n]*)")
_ADDRESS = re.compile(r"0x([0-9a-f]+)")
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

    def found() -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return asdict(read(disassembled(Path(file.name)), shared, warps, arch))

    return Figures(**kept(found, cubin + f"{shared},{warps},{arch}".encode(), Path(__file__), cache))


def kept(found: Callable[[], Any], content: bytes, reader: Path, cache: Path | None) -> Any:
    """What ``found`` reads of the content, as JSON; from the folder ``cache`` if the same code has read it before."""
    key = hashlib.sha256(content + b"".join(path.read_bytes() for path in {reader, Path(__file__)})).hexdigest()
    place = cache / f"{key}.json" if cache else None
    if place is not None and place.exists():
        return json.loads(place.read_text())
    value = found()
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as out:
            json.dump(value, out)
        os.replace(out.name, place)
    return value


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PATH": f"{tools()}:{os.environ.get('PATH', '')}"}
    command = [str(tools() / "cuobjdump"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr or done.stdout[-300:]}")
    return done.stdout


def disassembled(file: Path) -> str:
    """cuobjdump's resources and instructions of all kernels of a cubin."""
    return cuobjdump("-res-usage", "-sass", str(file))


class Instruction(NamedTuple):
    address: int
    family: str  # LDG
    suffixes: tuple[str, ...]  # E, 128
    operands: str

    @property
    def bytes(self) -> int:
        """What a thread moves, if this is a load, a store or a copy."""
        for bits, suffixes in ((256, {"256"}), (128, {"128"}), (64, {"64"}), (16, {"U16", "S16"}), (8, {"U8", "S8"})):
            if suffixes.intersection(self.suffixes):
                return bits // 8
        return 4


def resources(text: str) -> tuple[int, int, int]:
    """Registers, bytes of stack, bytes of static shared memory: the first in cuobjdump's output."""
    found = _RESOURCES.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump found no kernel: {text[-300:]}")
    registers, stack, static = map(int, found.groups())
    return registers, stack, static


def instructions(text: str) -> Iterator[Instruction]:
    for match in _INSTRUCTION.finditer(text):
        address, name, operands = match.groups()
        family, *suffixes = name.split(".")
        yield Instruction(int(address, 16), family, tuple(suffixes), operands)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a backward branch and its target."""
    found = []
    for branch in code:
        target = _ADDRESS.findall(branch.operands) if branch.family == "BRA" else []
        if target and int(target[-1], 16) < branch.address:
            found.append([i for i in code if int(target[-1], 16) <= i.address <= branch.address])
    return found


def spilled(stack: int, families: Iterable[str]) -> int:
    return stack or int(not set(SPILLS).isdisjoint(families))


def read(text: str, shared: int, warps: int, arch: int) -> Figures:
    """The figures of cuobjdump's output (``-res-usage -sass``)."""
    registers, stack, static = resources(text)
    counts: collections.Counter[str] = collections.Counter()
    widths: collections.Counter[str] = collections.Counter()
    for instruction in instructions(text):
        counts[instruction.family] += 1
        if instruction.family in LOADS:
            size = instruction.bytes
            widths["wide" if size >= 16 else "medium" if size == 8 else "narrow"] += 1

    def sum_of(names: Any) -> int:
        return sum(counts[name] for name in names)

    spill = spilled(stack, counts)
    total = max(shared, static)
    occupancy = round(ARCHITECTURES[arch].occupancy(registers, total, warps), 4)
    return Figures(
        registers, spill, total, occupancy, sum_of(TENSOR_CORES), sum_of(ASYNC), widths["wide"], widths["narrow"]
    )
