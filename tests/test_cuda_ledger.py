"""The resource ledger of the CUDA library: the installed one's kernels keep the rules and stay within what was committed.

``python benchmarks/cuda_ledger.py LIBRARY`` compares a library with all architectures.
"""

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cubin, cuda_code, cuda_ledger  # noqa: E402
from benchmarks.cuda_code import Code, Loop  # noqa: E402
from benchmarks.cuda_launches import Launch  # noqa: E402
from benchmarks.cuda_ledger import Figures, Row  # noqa: E402
from benchmarks.report import with_figures  # noqa: E402

LOOP = Loop(tensor=16, matrix_loads=8, scalar_loads=0, wide=4, narrow=3)
WIDTHS = {"LDG": [0, 0, 2, 1, 0], "STG": [4, 0, 0, 0, 0], "LDGSTS": [4, 0, 3, 0, 0]}
GOOD = Code(128, 0, 0, 2000, 16, 8, 7, 5, WIDTHS, [LOOP])
LAUNCH = Launch(threads=128, shared=49152)
KERNEL = "conv_forward<Tile<Half, false, 64, 64, 32, 32, 3>, Activation, false, true>"


def test_the_installed_library_stays_within_the_ledger():
    if not cuda_ledger.LIBRARY.exists():
        pytest.skip("there is no CUDA library")
    ledger = cuda_ledger.load()
    if ledger["compiler"] != cuda_ledger.compiler():
        pytest.skip(f"the ledger is of {ledger['compiler']}, the library of {cuda_ledger.compiler()}")
    rows, unknown = cuda_ledger.rows()
    assert not unknown and len(rows) >= len(ledger["kernels"])
    assert not cuda_ledger.complaints(rows, ledger)


def test_the_ledger_holds_all_architectures():
    for name, archs in cuda_ledger.load()["kernels"].items():
        assert tuple(map(int, archs)) == cuda_ledger.ARCHS, name
        for values in archs.values():
            assert Figures(*values).spill == 0


def test_the_page_shows_the_ledger():
    page, ledger = cuda_ledger.PAGE.read_text(), cuda_ledger.load()
    assert page == with_figures(page, cuda_ledger.page_table(ledger), cuda_ledger.BEGIN, cuda_ledger.END)


def row(code: Code = GOOD, kernel: str = KERNEL, arch: int = 80, launch: Launch = LAUNCH) -> Row:
    return Row(arch, kernel, code, launch)


def committed(one: Row) -> dict:
    return {"kernels": {one.kernel: {str(one.arch): list(dataclasses.asdict(one.figures).values())}}}


def changed(**values) -> Code:
    return dataclasses.replace(GOOD, **values)


WORSE = {
    "spills": changed(spill=8),
    "registers grew from 128 to 130": changed(registers=130),
    "shared memory grew from 49152 to 49280": changed(static_shared=128),
    "lost its 16 tensor-core instructions": changed(tensor=0),
    "lost its 8 ldmatrix instructions": changed(matrix_loads=0),
    "lost its 7 async copies": changed(async_copies=0),
    "accesses of less than 16 bytes grew from 6 to 7": changed(widths={**WIDTHS, "LDG": [0, 0, 2, 2, 0]}),
    "lost its 4 16-byte stores": changed(widths={**WIDTHS, "STG": [0, 0, 0, 0, 0]}),
}


@pytest.mark.parametrize("what", WORSE)
def test_what_is_worse_is_noticed(what):
    assert not cuda_ledger.complaints([row()], committed(row()))
    found = cuda_ledger.complaints([row(WORSE[what])], committed(row()))
    assert any(what in one and f"sm_80 {KERNEL}" in one for one in found), found


BROKEN = {
    "is for 16-byte accesses, but has none": row(changed(widths={**WIDTHS, "STG": [0, 4, 0, 0, 0]})),
    "most of those in its main loop are narrower": row(changed(loops=[dataclasses.replace(LOOP, narrow=4)])),
    "no loop of tensor-core instructions": row(changed(loops=[dataclasses.replace(LOOP, matrix_loads=0)])),
    "loads single 16-bit elements": row(changed(loops=[dataclasses.replace(LOOP, scalar_loads=1)])),
    "1 blocks of 128 threads fit": row(launch=Launch(128, 90000)),
    "0 blocks of 128 threads fit": row(arch=89, launch=Launch(128, 110000)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_rule_is_noticed_though_it_was_committed(what):
    found = cuda_ledger.complaints([BROKEN[what]], committed(BROKEN[what]))
    assert len(found) == 1 and what in found[0]


def test_the_share_of_the_system_is_counted_once():
    ours, hopper = changed(static_shared=512), changed(static_shared=512 + 1024)
    assert row(ours).figures.shared == row(hopper, arch=90).figures.shared == 512 + LAUNCH.shared
    assert row(arch=90).figures.shared == LAUNCH.shared


def test_one_block_must_do_where_shared_memory_is_small():
    assert not list(row(arch=89, launch=Launch(128, 90000)).faults())


def test_kernels_without_an_entry_and_entries_without_a_kernel_are_noticed():
    found = cuda_ledger.complaints([row()], {"kernels": {"gone": {}}})
    assert "--update" in found[0] and "gone: is in cuda_ledger.json but not in the library" in found[1]


def test_reading_machine_code():
    text = """
  REG:40 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:400
        /*0010*/   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0040*/   LDSM.16.M88.4 R4, [R2] ;
        /*0050*/   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/   LDS.U16 R4, [R1] ;
        /*0070*/   LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*0080*/   @P0 BRA 0x30 ;
        /*0090*/   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/   @!P1 BRA P2, 0x10 ;
        /*00c0*/   BRA 0xf0 ;
    """
    found = cuda_code.read_code(text)
    assert found == Code(
        40, 0, 16, 12, tensor=1, matrix_loads=1, async_copies=2, barriers=1,
        widths={"LDG": [1, 0, 0, 1, 0], "STG": [0, 1, 0, 0, 0], "LDGSTS": [1, 0, 1, 0, 0]},
        loops=[Loop(tensor=1, matrix_loads=1, scalar_loads=1, wide=1, narrow=1)],
    )  # fmt: skip
    assert [len(loop) for loop in cubin.loops(list(cubin.instructions(text)))] == [6, 11]


def test_reading_ptx():
    text = """
.extern .shared .align 128 .b8 memory[];
.visible .entry _Zone(
.param .align 8 .b8 _Zone_param_0[216]
)
.maxntid 128, 1, 1
.minnctapersm 2
{ mov.u32 %r1, memory; }
.visible .entry _Ztwo()
.maxntid 256, 1, 1
{ ret; }
"""
    assert cuda_code.entries(text) == {"_Zone": (128, True), "_Ztwo": (256, False)}


def test_names():
    name = "_ZN7fastres4cuda12forward_rowsINS0_6BFloatELi8ELNS0_8ResidualE2EEEvNS0_7ProblemEi"
    assert cuda_code.short_names([name]) == ["forward_rows<BFloat, 8, 2>"]
    assert cuda_ledger.arguments(KERNEL) == ["Tile<Half, false, 64, 64, 32, 32, 3>", "Activation", "false", "true"]
    assert cuda_ledger.is_wide(KERNEL) and not cuda_ledger.is_wide(KERNEL.replace("Activation, false", "Raw, true"))
    assert not cuda_ledger.is_wide("merge") and not cuda_ledger.is_wide("forward_rows<Half, 1, 2>")
