"""The compile ledger: every Triton kernel compiled ahead of time for six architectures, without a GPU.

    python benchmarks/compile_ledger.py            # compare with benchmarks/results/compile_ledger.json, print a table
    python benchmarks/compile_ledger.py --update   # write it, and the list of rejected configurations

A configuration that spills, asks for more shared memory than an architecture has, or has no tensor-core instruction in a
16-bit convolution is rejected: ``kernels/common/triton_rejected.py`` names it, and it is not offered there. What is left
must stay within the committed figures. Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compile_cases, cubin  # noqa: E402
from benchmarks.compile_cases import Case  # noqa: E402
from benchmarks.cubin import Figures  # noqa: E402
from fastres.kernels.common.architectures import ARCHITECTURES  # noqa: E402
from fastres.kernels.common.triton_choice import width  # noqa: E402

LEDGER = ROOT / "benchmarks" / "results" / "compile_ledger.json"
REJECTED = ROOT / "kernels" / "common" / "triton_rejected.py"
CACHE = ROOT / "build" / "triton"  # machine code and what was read of it; what CI keeps within a run
ARCHS = (80, 86, 89, 90, 100, 120)
HEADER = '''"""Configurations that an architecture is not offered; written by benchmarks/compile_ledger.py --update."""

# (kernel, width of the maps, architecture): what spills, does not fit into shared memory, or lost the tensor cores
REJECTED: dict[tuple[str, str, int], tuple[str, ...]] = {'''
WHOLE = (80, 90)  # architectures of quick_cases with all kernels
COLUMNS = tuple(Figures.__dataclass_fields__)


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    arch: int
    case: Case
    figures: Figures

    @property
    def key(self) -> tuple[str, str, int]:
        return self.case.kernel, width(self.case.sixteen_bit), self.arch

    def faults(self) -> list[str]:
        """Why this configuration must not be offered on this architecture."""
        limit = ARCHITECTURES[self.arch].shared_per_block
        found = []
        if self.figures.spill:
            found.append(f"spills ({self.figures.spill} bytes of stack)")
        if self.figures.shared > limit:
            found.append(f"asks for {self.figures.shared} bytes of shared memory, sm_{self.arch} has {limit}")
        if self.case.products and not self.figures.tensor:
            found.append("has no tensor-core instruction")
        return found


def compiled(arch: int, wanted: Sequence[Case], threads: int = 2) -> list[Row]:
    """Compiles and reads each case. Triton lets go of the interpreter's lock while it compiles."""
    import triton
    from emulation.compiling import compile_launch

    def one(case: Case) -> Row:
        kernel = compile_launch(case.launch, arch)
        read = (kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.num_warps, arch)
        return Row(arch, case, cubin.figures(*read, cache=CACHE / "figures"))

    before, triton.knobs.cache.dir = triton.knobs.cache.dir, str(CACHE / "code")
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(one, wanted))
    finally:
        triton.knobs.cache.dir = before


def everything(archs: Iterable[int] = ARCHS, defaults: bool = False, threads: int = 2) -> list[Row]:
    """The whole ledger, or the configurations that run untuned."""
    return [
        row for arch in archs for row in compiled(arch, list(compile_cases.cases(arch, defaults=defaults)), threads)
    ]


def quick_cases(arch: int) -> list[Case]:
    """What a test run has time for: the configurations that run untuned; for most architectures only those of the 16-bit
    convolutions with a prologue, which need the most of everything."""
    cases = list(compile_cases.cases(arch, defaults=True))
    return cases if arch in WHOLE else [c for c in cases if c.products and "prologue" in c.problem]


def load() -> dict[str, Any]:
    return json.loads(LEDGER.read_text())


def versions() -> dict[str, str]:
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}


def complaints(rows: Sequence[Row], ledger: dict[str, Any]) -> list[str]:
    """What is wrong with compiled kernels: a fault that is not rejected, no entry, or a figure worse than committed."""
    from fastres.kernels.common.triton_rejected import REJECTED as rejected

    found = []
    for row in rows:
        name = f"sm_{row.arch} {row.case.name}"
        faults = row.faults()
        if faults and row.case.config not in rejected.get(row.key, ()):
            found.append(f"{name}: {'; '.join(faults)}")
        committed = ledger["kernels"].get(row.case.name, {}).get(str(row.arch))
        if committed is None:
            found.append(f"{name}: is not in {LEDGER.name}; run python benchmarks/compile_ledger.py --update")
        elif not faults:
            found += [f"{name}: {what}" for what in worse(row.figures, Figures(*committed))]
    return found


GROWS = {name: name for name in ("registers", "shared", "narrow")}
LOST = {"tensor": "tensor-core instructions", "async_copies": "async copies", "wide": "16-byte loads"}


def worse(now: Any, committed: Any, grows: Mapping[str, str] = GROWS, lost: Mapping[str, str] = LOST) -> list[str]:
    """In what ``now`` is worse than what was committed: figures that must not grow, and that must not become 0."""
    found = [
        f"{what} grew from {getattr(committed, name)} to {getattr(now, name)}"
        for name, what in grows.items()
        if getattr(now, name) > getattr(committed, name)
    ]
    return found + [
        f"lost its {getattr(committed, name)} {what}"
        for name, what in lost.items()
        if getattr(committed, name) and not getattr(now, name)
    ]


def update(rows: Sequence[Row]) -> None:
    """Writes the ledger and the list of rejected configurations."""
    kernels: dict[str, dict[str, list[float]]] = {}
    rejected: dict[tuple[str, str, int], dict[str, list[str]]] = {}
    for row in rows:
        kernels.setdefault(row.case.name, {})[str(row.arch)] = list(asdict(row.figures).values())
        if faults := row.faults():
            rejected.setdefault(row.key, {})[row.case.config] = faults
    lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(kernels.items())]
    head = json.dumps({"columns": COLUMNS, "versions": versions()})[1:-1]
    LEDGER.write_text("{" + head + ', "kernels": {\n' + ",\n".join(lines) + "\n}}\n")
    text = [HEADER]
    for (kernel, bits, arch), configs in sorted(rejected.items()):
        text.append(f'    ("{kernel}", "{bits}", {arch}): (')
        text += [f'        "{config}",  # {faults[0]}' for config, faults in sorted(configs.items())]
        text.append("    ),")
    REJECTED.write_text(("\n".join([*text, "}"]) + "\n").replace("{\n}", "{}"))


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line for each kernel and architecture: configurations, rejected ones, and the range of what is kept."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case.kernel, row.arch), []).append(row)
    lines = [
        ("kernel", "arch", "compiled", "rejected", "registers", "shared KiB", "occupancy", "tensor", "async", "wide")
    ]
    for (kernel, arch), group in sorted(groups.items()):
        kept = [r.figures for r in group if not r.faults()] or [r.figures for r in group]

        lines.append((
            kernel, f"sm_{arch}", str(len(group)), str(sum(bool(r.faults()) for r in group)),
            span([f.registers for f in kept]), span([f.shared / 1024 for f in kept], "{:.1f}"),
            span([100 * f.occupancy for f in kept]) + " %", span([f.tensor for f in kept]),
            span([f.async_copies for f in kept]), span([f.wide for f in kept]),
        ))  # fmt: skip
    return lines


def span(values: Sequence[float], form: str = "{:.0f}") -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def text_table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--update", action="store_true", help="write the ledger and the list of rejected configurations"
    )
    parser.add_argument(
        "--defaults", action="store_true", help="only the configurations that run where nothing was tuned"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    begin = time.perf_counter()
    rows = everything(defaults=options.defaults and not options.update, threads=options.threads)
    print("\n".join(text_table(summary(rows))))
    print(f"{len(rows)} kernels in {time.perf_counter() - begin:.0f} s")
    if options.update:
        update(rows)
        print(f"wrote {LEDGER.relative_to(ROOT)} and {REJECTED.relative_to(ROOT)}")
        return 0
    found = complaints(rows, load())
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
