"""The compile ledger: Triton's kernels, compiled ahead of time, stay within what was committed, on every architecture.

Here the configurations that run untuned, those of every dtype and problem for two architectures and the convolutions'
16-bit ones for all; ``python benchmarks/compile_ledger.py`` compares everything.
"""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compile_cases, compile_ledger, cubin  # noqa: E402
from benchmarks.compile_ledger import Row  # noqa: E402
from benchmarks.cubin import Figures  # noqa: E402
from fastres.kernels.common import triton_choice  # noqa: E402
from fastres.kernels.common.architectures import ARCHITECTURES, architecture  # noqa: E402
from fastres.kernels.common.triton_launch import Config  # noqa: E402

GOOD = Figures(registers=128, spill=0, shared=49152, occupancy=0.25, tensor=64, async_copies=24, wide=24, narrow=2)


@pytest.fixture(scope="module")
def ledger():
    return compile_ledger.load()


@pytest.mark.slow
@pytest.mark.parametrize("arch", compile_ledger.ARCHS)
def test_kernels_stay_within_the_ledger(arch, ledger):
    if ledger["versions"]["triton"] != compile_ledger.versions()["triton"]:
        pytest.skip("the ledger was made with another Triton: run python benchmarks/compile_ledger.py --update")
    rows = compile_ledger.compiled(arch, compile_ledger.quick_cases(arch))
    assert len(rows) >= 8
    assert not compile_ledger.complaints(rows, ledger)
    assert all(row.figures.spill == 0 for row in rows), "also none that is rejected runs untuned"


def row(figures: Figures, arch: int = 80, products: bool = True) -> Row:
    case = compile_cases.Case("conv_forward", "3x3 bf16", "BLOCK_M=128,warps=4,stages=2", None, True, products)
    return Row(arch, case, figures)


BAD = {
    "spills": {"spill": 16},
    "shared memory": {"shared": 170_000},
    "no tensor-core instruction": {"tensor": 0},
    "lost its 24 async copies": {"async_copies": 0},
    "lost its 24 16-byte loads": {"wide": 0},
    "registers grew from 128 to 129": {"registers": 129},
    "shared grew": {"shared": 50_000},
    "narrow grew": {"narrow": 3},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_worse_is_noticed(what):
    committed = {"kernels": {row(GOOD).case.name: {"80": list(dataclasses.asdict(GOOD).values())}}}
    assert not compile_ledger.complaints([row(GOOD)], committed)
    found = compile_ledger.complaints([row(dataclasses.replace(GOOD, **BAD[what]))], committed)
    assert len(found) == 1 and what in found[0] and "sm_80 conv_forward" in found[0]


def test_a_kernel_without_an_entry_is_noticed():
    assert "--update" in compile_ledger.complaints([row(GOOD)], {"kernels": {}})[0]


def test_rejected_configurations_are_written_and_not_offered(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_ledger, "LEDGER", tmp_path / "ledger.json")
    monkeypatch.setattr(compile_ledger, "REJECTED", tmp_path / "rejected.py")
    spilling = dataclasses.replace(GOOD, spill=8)
    compile_ledger.update([row(GOOD), row(spilling, 86), row(spilling, 90, products=False)])
    namespace: dict = {}
    exec((tmp_path / "rejected.py").read_text(), namespace)
    configuration = row(GOOD).case.config
    assert namespace["REJECTED"] == {("conv_forward", "16 bits", arch): (configuration,) for arch in (86, 90)}
    monkeypatch.setattr(triton_choice, "REJECTED", namespace["REJECTED"])
    bad, good = Config.of(BLOCK_M=128, num_warps=4), Config.of(BLOCK_M=64, num_warps=4)
    assert str(bad) == configuration
    assert triton_choice.offered("conv_forward", [bad, good], (8, 0)) == (bad, good)
    assert triton_choice.offered("conv_forward", [bad, good], (8, 6)) == (good,)
    assert triton_choice.offered("conv_forward", [bad, good], (8, 6), sixteen_bit=False) == (bad, good)
    assert triton_choice.offered("conv_forward", [bad], (9, 0)) == (bad,), "something has to run"
    assert set(json.loads((tmp_path / "ledger.json").read_text())["kernels"][row(GOOD).case.name]) == {"80", "86", "90"}


def test_the_ledger_has_no_fault_that_is_not_rejected(ledger):
    from fastres.kernels.common.triton_rejected import REJECTED

    for name, archs in ledger["kernels"].items():
        for arch, values in archs.items():
            figures = Figures(*values)
            if figures.spill or figures.shared > ARCHITECTURES[int(arch)].shared_per_block:
                kernel, *_ = name.split(", ")
                rejected = [c for key, cs in REJECTED.items() if key[0] == kernel and key[2] == int(arch) for c in cs]
                assert any(name.endswith(config) for config in rejected), (name, arch)


def test_reading_machine_code():
    text = """
 Function k:
  REG:40 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:400
        /*0010*/   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/   @!P0 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/   @P1 LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0040*/   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/   STL [R1], R4 ;
        /*0060*/   LDG.E.64 R4, desc[UR4][R2.64] ;
    """
    found = cubin.read(text, 1024, 4, 80)
    assert found == Figures(40, 8, 1024, found.occupancy, tensor=1, async_copies=1, wide=2, narrow=1)
    assert cubin.read(text.replace("STACK:8", "STACK:0"), 1024, 4, 80).spill == 1


def test_occupancy():
    """By hand, from the limits of the CUDA programming guide."""
    ampere, ada = ARCHITECTURES[80], ARCHITECTURES[89]
    assert ampere.occupancy(32, 0, 4) == 1.0
    assert ampere.occupancy(128, 0, 4) == 4 * 4 / 64  # 65536 / (128·32·4) = 4 blocks
    assert ampere.occupancy(40, 49152, 4) == 3 * 4 / 64  # 164 KiB hold three of 49 KiB
    assert ampere.occupancy(33, 0, 4) == 12 * 4 / 64  # 33 registers count as 40
    assert ada.occupancy(32, 100 * 1024, 4) == 0.0 and ada.occupancy(256, 0, 4) == 0.0
    assert [architecture(c).number for c in ((7, 0), (7, 5), (8, 7), (9, 0), (10, 3), (12, 1))] == [
        75,
        75,
        86,
        90,
        100,
        120,
    ]
