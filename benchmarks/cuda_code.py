"""Reads a library's CUDA machine code and PTX: what each kernel needs, which instructions it has, what its main loop does."""

from __future__ import annotations

import collections
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import cubin

CACHE = Path(__file__).resolve().parent.parent / "build" / "cuda_ledger"
WIDTHS = (16, 8, 4, 2, 1)
ACCESSES = ("LDG", "STG", "LDGSTS")  # loads and stores of global memory, copies from it to shared memory


@dataclass(frozen=True)
class Loop:
    """The innermost loop with tensor-core instructions: how many, how many LDSM feed them, and loads of single 16-bit
    elements from shared memory. ``wide``, ``narrow``: accesses to global memory of 16 and of fewer bytes."""

    tensor: int
    matrix_loads: int
    scalar_loads: int
    wide: int
    narrow: int


@dataclass(frozen=True)
class Code:
    """What one kernel's machine code says. ``widths``: for each of ACCESSES, how many move 16, 8, 4, 2 and 1 bytes."""

    registers: int
    spill: int
    static_shared: int
    instructions: int
    tensor: int
    matrix_loads: int
    async_copies: int
    barriers: int
    widths: dict[str, list[int]]
    loops: list[Loop]


def read_code(text: str) -> Code:
    """Of cuobjdump's resources and instructions of one kernel."""
    registers, stack, static = cubin.resources(text)
    code = list(cubin.instructions(text))
    counts = collections.Counter(i.family for i in code)
    widths = {family: [0] * len(WIDTHS) for family in ACCESSES}
    for i in code:
        if i.family in ACCESSES:
            widths[i.family][WIDTHS.index(min(i.bytes, 16))] += 1
    products = [loop for loop in cubin.loops(code) if any(i.family in cubin.TENSOR_CORES for i in loop)]
    inner = [loop for loop in products if not any(set(other) < set(loop) for other in products)]
    tensor = sum(counts[name] for name in cubin.TENSOR_CORES)
    return Code(
        registers, cubin.spilled(stack, counts), static, len(code), tensor, counts["LDSM"], counts["LDGSTS"],
        counts["BAR"], widths, [read_loop(loop) for loop in inner],
    )  # fmt: skip


def read_loop(loop: list[cubin.Instruction]) -> Loop:
    counts = collections.Counter(i.family for i in loop)
    accesses = [i.bytes for i in loop if i.family in ACCESSES]
    scalar = sum(i.family == "LDS" and i.bytes < 4 for i in loop)
    wide = sum(size >= 16 for size in accesses)
    return Loop(sum(counts[f] for f in cubin.TENSOR_CORES), counts["LDSM"], scalar, wide, len(accesses) - wide)


def read_image(file: Path) -> dict[str, Code]:
    """All kernels of one cubin, by mangled name."""

    def found() -> dict[str, Any]:
        text = cubin.disassembled(file)
        heads = dict(re.findall(r"^ Function (\S+):\n(.*REG:.*)$", text, re.M))
        bodies = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)[1:]
        return {n: asdict(read_code(f"{heads[n]}\n{body}")) for n, body in zip(bodies[::2], bodies[1::2], strict=True)}

    read = cubin.kept(found, file.read_bytes(), Path(__file__), CACHE)
    return {name: Code(**{**code, "loops": [Loop(**loop) for loop in code["loops"]]}) for name, code in read.items()}


def images(library: Path, folder: Path, threads: int = 2) -> dict[int, dict[str, Code]]:
    """By architecture and mangled name: the code of every kernel in the library."""
    cubin.cuobjdump("-xelf", "all", str(library.resolve()), cwd=folder)
    files = sorted(folder.glob("*.cubin"))
    found: dict[int, dict[str, Code]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for file, codes in zip(files, pool.map(read_image, files), strict=True):
            found.setdefault(int(re.findall(r"\.sm_(\d+)\w*\.cubin$", file.name)[0]), {}).update(codes)
    return found


def declarations(library: Path, folder: Path) -> dict[str, tuple[int, bool]]:
    """``entries`` of all PTX in a library."""
    cubin.cuobjdump("-xptx", "all", str(library.resolve()), cwd=folder)
    return {name: entry for file in folder.glob("*.ptx") for name, entry in entries(file.read_text()).items()}


def entries(ptx: str) -> dict[str, tuple[int, bool]]:
    """Of the kernels in PTX: threads of a block (``__launch_bounds__``), and whether they use dynamic shared memory."""
    dynamic = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", ptx)
    found = {}
    for text in re.split(r"\.entry ", ptx)[1:]:
        threads = re.search(r"\.maxntid (\d+)", text)
        uses = any(re.search(rf"\b{re.escape(name)}\b", text) for name in dynamic)
        found[text.partition("(")[0].strip()] = (int(threads.group(1)) if threads else 1024, uses)
    return found


def short_names(mangled: Sequence[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [short(name) for name in done.stdout.splitlines()]


def short(demangled: str) -> str:
    """``conv_forward<Tile<Half, false, 64, 64, 32, 32, 3>, Raw, false, true>`` of what c++filt prints."""
    name = demangled.replace("fastres::cuda::", "").removeprefix("void ")
    name = re.sub(r"\((\w+)\)(\d+)", r"\2", name)  # an enumerator
    depth = 0
    for place, character in enumerate(name):  # cut the parameters off
        depth += (character == "<") - (character == ">")
        if character == "(" and not depth:
            return name[:place]
    return name
