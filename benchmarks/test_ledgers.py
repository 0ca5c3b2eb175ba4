"""Both ledgers of the GPU kernels, as tables: nothing is run on a GPU, and nothing here is a speed.

The time that is measured is that of making them.
"""

from typing import Any

import pytest

from benchmarks import compile_ledger


@pytest.mark.parametrize("model", ["resnet50"])
def test_byte_ledger(bench: Any, model: str) -> None:
    from fastres.evaluate import gpus
    from fastres.evaluate.bytes import LEVELS, ledger, table

    found = bench.fixture.pedantic(lambda: ledger(model), rounds=1)
    lines = [("MB of one image", *(level.key for level in LEVELS))]
    lines += [table.cells(name, row) for name, row in table.rows(found, bench.size("stage", "block"))]
    for gpu in gpus.GPUS.values():
        allowed = table.ceilings(found, gpu)
        name = f"{gpu.name}, images/s at most, predicted"
        lines.append((name, *(f"{allowed[level.key]:,.0f}" for level in LEVELS)))
    bench.table(f"byte ledger: {model}, one training step, bf16, batch {found.batch}", compile_ledger.text_table(lines))
    assert found.per_image("L4") < found.per_image("L0")


def test_compile_ledger(bench: Any) -> None:
    def make() -> list[compile_ledger.Row]:
        if bench.full:
            return compile_ledger.everything()
        return [
            r for arch in compile_ledger.ARCHS for r in compile_ledger.compiled(arch, compile_ledger.quick_cases(arch))
        ]

    rows = bench.fixture.pedantic(make, rounds=1)
    bench.table(
        f"compile ledger: {len(rows)} kernels, compiled and read, not executed",
        compile_ledger.text_table(compile_ledger.summary(rows)),
    )
    assert not compile_ledger.complaints(rows, compile_ledger.load())
