"""The resource ledger of the CUDA library: what nvcc made of every kernel for every architecture, read from machine code.

    python benchmarks/cuda_ledger.py                      # the installed fastres/_cuda.so against the committed figures
    python benchmarks/cuda_ledger.py build/.../_cuda.so --update   # of a library with all architectures: write them

Rules hold whatever was committed: no spills, enough warps on a multiprocessor, tensor cores fed by ldmatrix in 16-bit
products, 16-byte accesses in kernels that are chosen for them. Beyond these no figure may be worse than committed.
Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cuda_code  # noqa: E402
from benchmarks.compile_ledger import span, text_table, worse  # noqa: E402
from benchmarks.cuda_code import ACCESSES, WIDTHS, Code  # noqa: E402
from benchmarks.cuda_launches import Launch, launches  # noqa: E402
from benchmarks.report import with_figures  # noqa: E402
from fastres.kernels.common.architectures import ARCHITECTURES, RESERVED_SHARED  # noqa: E402

LEDGER = ROOT / "benchmarks" / "results" / "cuda_ledger.json"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- ledger: written by benchmarks/cuda_ledger.py --update -->", "<!-- end of ledger -->"
LIBRARY = ROOT / "fastres" / "_cuda.so"
ARCHS = (80, 86, 89, 90, 100, 120)
WARPS = {80: 8, 90: 8, 100: 8}  # resident at least: two blocks of 128 threads or one of 256; elsewhere one block


@dataclass(frozen=True)
class Figures:
    """A row of the ledger. ``shared``: static and dynamic. ``blocks``: as many fit on a multiprocessor."""

    threads: int
    registers: int
    spill: int
    shared: int
    blocks: int
    tensor: int
    matrix_loads: int
    async_copies: int
    barriers: int
    load: list[int]
    store: list[int]
    copy: list[int]

    @property
    def narrow(self) -> int:
        return sum(sum(counts[1:]) for counts in (self.load, self.store, self.copy))

    @property
    def wide_loads(self) -> int:
        return self.load[0] + self.copy[0]

    @property
    def wide_stores(self) -> int:
        return self.store[0]


COLUMNS = tuple(field.name for field in fields(Figures))
GROWS = {"registers": "registers", "shared": "shared memory", "narrow": "accesses of less than 16 bytes"}
LOST = {
    "tensor": "tensor-core instructions",
    "matrix_loads": "ldmatrix instructions",
    "async_copies": "async copies",
    "wide_loads": "16-byte loads",
    "wide_stores": "16-byte stores",
}


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture."""

    arch: int
    kernel: str
    code: Code
    launch: Launch

    @property
    def figures(self) -> Figures:
        code, launch, arch = self.code, self.launch, ARCHITECTURES[self.arch]
        # From sm_90 on, the machine code counts what the system takes for itself as the kernel's.
        static = max(0, code.static_shared - (RESERVED_SHARED if self.arch >= 90 else 0))
        shared, warps = static + launch.shared, -(-launch.threads // 32)
        blocks = round(arch.occupancy(code.registers, shared, warps) * arch.warps / warps)
        return Figures(
            launch.threads, code.registers, code.spill, shared, blocks, code.tensor, code.matrix_loads, code.async_copies,
            code.barriers, *(code.widths[family] for family in ACCESSES),
        )  # fmt: skip

    def faults(self) -> Iterator[str]:
        """What no figure that was committed excuses."""
        figures = self.figures
        if figures.spill:
            yield f"spills ({figures.spill} bytes of stack)"
        if figures.blocks * figures.threads < 32 * WARPS.get(self.arch, 1):
            yield f"{figures.blocks} blocks of {figures.threads} threads fit on a multiprocessor"
        if is_product(self.kernel) and sixteen_bit(self.kernel):
            if not any(loop.tensor and loop.matrix_loads for loop in self.code.loops):
                yield "has no loop of tensor-core instructions that ldmatrix feeds"
            if is_wide(self.kernel) and any(loop.scalar_loads for loop in self.code.loops):
                yield "loads single 16-bit elements from shared memory beside its tensor-core instructions"
        if is_wide(self.kernel):
            if not figures.wide_loads or not figures.wide_stores:
                yield "is for 16-byte accesses, but has none"
            if any(loop.narrow >= loop.wide for loop in self.code.loops):
                yield "is for 16-byte accesses, but most of those in its main loop are narrower"


# ---- What kernels are, by their names -------------------------------------------------------------------------------
def arguments(kernel: str) -> list[str]:
    """The template arguments of a short name."""
    inner, found, depth = kernel.partition("<")[2].removesuffix(">"), [""], 0
    for character in inner:
        depth += (character == "<") - (character == ">")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [argument.strip() for argument in found]


def is_product(kernel: str) -> bool:
    return "Tile<" in kernel


def sixteen_bit(kernel: str) -> bool:
    return "Half" in kernel or "BFloat" in kernel


# Kernel: which template argument says that its accesses have 16 bytes, and by which values.
FLAT, VECTOR = ("false",), ("4", "8")
WIDE = {
    "conv_forward": (2, FLAT),
    "conv_input_gradient": (2, FLAT),
    "conv_weight_gradient": (3, FLAT),
    "batch_norm_forward": (1, VECTOR),
    "batch_norm_backward": (1, VECTOR),
    "forward_rows": (1, VECTOR),
    "forward_planes": (1, VECTOR),
    "backward_rows": (1, VECTOR),
    "backward_planes": (1, VECTOR),
}


def is_wide(kernel: str) -> bool:
    name = kernel.partition("<")[0]
    return name in WIDE and arguments(kernel)[WIDE[name][0]] in WIDE[name][1]


def rows(library: Path = LIBRARY) -> tuple[list[Row], list[str]]:
    """Every kernel for every architecture of a library, and complaints about kernels whose launch isn't known."""
    with tempfile.TemporaryDirectory() as folder:
        images = cuda_code.images(library, Path(folder))
        declared = cuda_code.declarations(library, Path(folder))
    recorded = launches() if any(dynamic for _, dynamic in declared.values()) else {}
    made, complaints = [], []
    for arch, codes in sorted(images.items()):
        for kernel, (mangled, code) in zip(cuda_code.short_names(list(codes)), codes.items(), strict=True):
            threads, dynamic = declared.get(mangled, (0, False))
            launch = recorded.get(mangled) if dynamic else Launch(threads, 0)
            if not threads:
                complaints.append(f"{kernel}: there is no PTX of it in the library")
            elif launch is None:
                complaints.append(f"{kernel}: no problem of benchmarks/cuda_launches.py launches it")
            elif launch.threads > threads:
                complaints.append(f"{kernel}: is launched with {launch.threads} threads and compiled for {threads}")
            else:
                made.append(Row(arch, kernel, code, launch))
    return made, sorted(set(complaints))


# ---- The ledger -----------------------------------------------------------------------------------------------------
def load() -> dict[str, Any]:
    return json.loads(LEDGER.read_text())


def compiler() -> str:
    """Of the installed library."""
    return json.loads((LIBRARY.parent / "_build.json").read_text())["cuda"]["compiler"]


def complaints(found: Sequence[Row], ledger: Mapping[str, Any]) -> list[str]:
    """What is wrong with the kernels of a library: a broken rule, no entry, or a figure worse than committed."""
    result = []
    for row in found:
        name = f"sm_{row.arch} {row.kernel}"
        result += [f"{name}: {fault}" for fault in row.faults()]
        committed = ledger["kernels"].get(row.kernel, {}).get(str(row.arch))
        if committed is None:
            result.append(f"{name}: is not in {LEDGER.name}; run python benchmarks/cuda_ledger.py --update")
        else:
            result += [f"{name}: {what}" for what in worse(row.figures, Figures(*committed), GROWS, LOST)]
    kernels = {row.kernel for row in found}
    gone = sorted(ledger["kernels"].keys() - kernels)
    return result + [f"{kernel}: is in {LEDGER.name} but not in the library" for kernel in gone]


def update(found: Sequence[Row], compiler: str) -> None:
    """Writes the ledger and the table of docs/cuda.md."""
    kernels: dict[str, dict[str, Any]] = {}
    for row in found:
        kernels.setdefault(row.kernel, {})[str(row.arch)] = list(asdict(row.figures).values())
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(kernels.items())]
    head = json.dumps({"columns": COLUMNS, "widths": WIDTHS, "compiler": compiler})[1:-1]
    LEDGER.write_text("{" + head + ', "kernels": {\n' + ",\n".join(lines) + "\n}}\n")
    PAGE.write_text(with_figures(PAGE.read_text(), page_table(load()), BEGIN, END))


Groups = dict[tuple[str, str], dict[int, list[Figures]]]


def grouped(entries: Iterable[tuple[str, int, Figures]]) -> Groups:
    """By kernel and the bits of its maps, then by architecture: the figures of the variants."""
    groups: Groups = {}
    for kernel, arch, figures in entries:
        key = kernel.partition("<")[0], "16 bits" if sixteen_bit(kernel) else "32 bits"
        groups.setdefault(key, {}).setdefault(arch, []).append(figures)
    return dict(sorted(groups.items()))


def page_table(ledger: Mapping[str, Any]) -> str:
    """The ledger's summary, as Markdown."""
    groups = grouped(
        (kernel, int(arch), Figures(*values))
        for kernel, archs in ledger["kernels"].items()
        for arch, values in archs.items()
    )
    lines = ["| kernel | maps | variants | shared KiB | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |"]
    lines.append("|---|---|" + "---:|" * (2 + len(ARCHS)))
    for (kernel, bits), archs in groups.items():
        cells = [kernel, bits, str(len(archs[ARCHS[0]])), span([f.shared / 1024 for f in archs[ARCHS[0]]])]
        for arch in ARCHS:
            warps = [f.blocks * f.threads / 32 for f in archs[arch]]
            cells.append(f"{span([f.registers for f in archs[arch]])}; {span(warps)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"{len(ledger['kernels'])} kernels, compiled by {ledger['compiler']}. No kernel spills."]
    )


def summary(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each kernel and architecture."""
    lines = [("kernel", "maps", "arch", "variants", "registers", "shared KiB", "warps", "HMMA", "LDSM", "LDGSTS")]
    for (kernel, bits), archs in grouped((row.kernel, row.arch, row.figures) for row in found).items():
        for arch, group in archs.items():
            lines.append((
                kernel, bits, f"sm_{arch}", str(len(group)), span([f.registers for f in group]),
                span([f.shared / 1024 for f in group]), span([f.blocks * f.threads / 32 for f in group]),
                span([f.tensor for f in group]), span([f.matrix_loads for f in group]),
                span([f.async_copies for f in group]),
            ))  # fmt: skip
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--update", action="store_true", help="write the ledger: needs all architectures")
    options = parser.parse_args()
    begin = time.perf_counter()
    found, problems = rows(options.library)
    print("\n".join(text_table(summary(found))))
    print(f"{len(found)} kernels of {options.library.name} read in {time.perf_counter() - begin:.0f} s")
    if options.update:
        if {row.arch for row in found} != set(ARCHS) or problems:
            sys.exit("\n".join([*problems, f"the ledger is of a library with all of {ARCHS} and known launches"]))
        update(found, compiler())
        print(f"wrote {LEDGER.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
        problems = [f"sm_{row.arch} {row.kernel}: {fault}" for row in found for fault in row.faults()]
    else:
        problems += complaints(found, load())
    print("\n".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
