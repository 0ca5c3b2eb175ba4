"""The tools that run Triton kernels without a GPU catch errors planted in compiled PTX and in sources."""

import re
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from emulation import sample_kernels as kernels
from emulation.compiling import compile_launch
from emulation.errors import DoubleStore, EmulationError, Hang, OutOfBounds, ProgramRace, SharedMemoryRace, Unsupported
from emulation.memory import GuardedMemory
from emulation.ptx import ptx_executor, run_ptx
from emulation.ptx.shared import SharedMemory
from emulation.triton_interpreter import interpreter_executor
from torch import Tensor

by_executor = pytest.mark.parametrize("executor", [ptx_executor, interpreter_executor], ids=["ptx", "source"])


def changed_results(change: Callable[[str], str] | None, dtype: torch.dtype = torch.float16, **options) -> Tensor:
    inputs = kernels.matmul_inputs(dtype)
    kernels.run(kernels.launch_matmul(*inputs), ptx_executor(change=change, **options))
    return inputs[-1]


def without(pattern: str, number: int) -> Callable[[str], str]:
    """Removes one of the places where the pattern is found."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + text[found.end() :]

    return change


BARRIER = r"bar\.sync\s+0;"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
def test_every_removed_barrier_of_a_matmul_is_noticed_or_superfluous(dtype):
    good = changed_results(None, dtype)
    count = len(
        re.findall(BARRIER, compile_launch(kernels.launch_matmul(*kernels.matmul_inputs(dtype)), 80).asm["ptx"])
    )
    races = 0
    for number in range(count):
        try:
            assert torch.equal(changed_results(without(BARRIER, number), dtype), good)
        except SharedMemoryRace:
            races += 1
    assert count >= 3 and races >= count - 2, f"{races} of {count}"


def test_every_removed_barrier_of_a_reduction_is_noticed_or_superfluous():
    x, good = torch.randn(64, 32), kernels.nans(2, 32)
    launch = kernels.launch_column_statistics(x, good)
    kernels.run(launch, ptx_executor())
    count, races = len(re.findall(BARRIER, compile_launch(launch, 80).asm["ptx"])), 0
    for number in range(count):
        out = kernels.nans(2, 32)
        try:
            kernels.run(kernels.launch_column_statistics(x, out), ptx_executor(change=without(BARRIER, number)))
            assert torch.equal(out, good)
        except SharedMemoryRace:
            races += 1
    assert races >= 1, f"{races} of {count}"


def test_a_reduction_whose_lanes_disagree_is_noticed():
    x, executor = torch.randn(64, 32), ptx_executor()
    kernels.run(kernels.launch_column_statistics(x, kernels.nans(2, 32)), executor)
    assert executor.ambiguous == 0
    with pytest.raises(SharedMemoryRace, match="two warps write different values"):
        kernels.run(kernels.launch_column_statistics(x, kernels.nans(2, 32), bug=True), executor)
    kernels.run(kernels.launch_column_statistics(x, kernels.nans(2, 32), warps=1, bug=True), executor)
    assert executor.ambiguous > 0


def wait_for_one_less(text: str) -> str:
    return re.sub(r"wait_group\s+(\d+)", lambda m: f"wait_group {int(m[1]) + 1}", text)


def test_a_wait_for_too_few_copies_is_a_race_and_gives_wrong_results():
    good = changed_results(None)
    with pytest.raises(SharedMemoryRace, match="asynchronous copy"):
        changed_results(wait_for_one_less)
    assert not torch.equal(changed_results(wait_for_one_less, race_check=False), good)
    assert torch.equal(changed_results(None, early=True), good)  # when copies land is no matter to a right kernel


def test_shared_memory_is_exchanged_by_barriers_and_waits_only():
    memory = SharedMemory(256, blocks=1, threads=64, cell=4)
    memory.reset(race_check=True, early=False)
    one, near, far = np.array([1]), np.array([2]), np.array([40])  # threads 1 and 2 share a warp
    at, value = np.array([16]), np.array([[7]], np.uint32)

    def read(thread: np.ndarray) -> int:
        return int(memory.read(at, thread, 4, 1)[0, 0])

    assert read(one) == 0xFFFFFFFF  # NaN
    memory.barrier()
    memory.write(at, one, value)
    assert read(one) == 7
    with pytest.raises(SharedMemoryRace, match="reads what another thread writes"):
        read(near)
    memory.warp_barrier(np.arange(32))
    assert read(near) == 7
    with pytest.raises(SharedMemoryRace):
        read(far)
    memory.barrier()
    assert read(far) == 7
    with pytest.raises(SharedMemoryRace, match="writes what another thread reads"):
        memory.write(at, one, value)
    memory.barrier()
    memory.issue(at, one, np.full((1, 4), 1, np.uint8))
    with pytest.raises(SharedMemoryRace, match="reads what an asynchronous copy"):
        read(one)
    memory.commit(one)
    memory.barrier()
    with pytest.raises(SharedMemoryRace, match="reads what an asynchronous copy"):
        read(far)
    memory.wait(one, 0)
    assert read(one) == 0x01010101
    with pytest.raises(SharedMemoryRace, match="reads what another thread writes"):
        read(far)


def test_a_wrong_type_of_matrix_product_gives_wrong_results():
    wrong = changed_results(lambda text: text.replace("f32.f16.f16.f32", "f32.bf16.bf16.f32"))
    assert not torch.allclose(wrong, changed_results(None), atol=0.1)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 1, 0, 3), (0, 1, 3, 2)], ids=str)
def test_swapped_registers_of_a_fragment_give_wrong_results(order):
    def swap(match: re.Match[str]) -> str:
        names = [n.strip() for n in match[2].split(",")]
        return f"{match[1]}{{ {', '.join(names[i] for i in order)} }}"

    wrong = changed_results(lambda text: re.sub(r"(mma\.sync[^{]*\{[^}]*\}, )\{([^}]*)\}", swap, text))
    assert not torch.allclose(wrong, changed_results(None), atol=0.1)


def test_an_untransposed_matrix_load_gives_wrong_results():
    wrong = changed_results(lambda text: text.replace("x4.trans.shared", "x4.shared"))
    assert not torch.allclose(wrong, changed_results(None), atol=0.1)


def test_a_lost_predicate_is_out_of_bounds():
    y, scale = torch.randn(13, 31), torch.randn(31)
    launch = kernels.launch_activate(y, scale, scale, torch.empty_like(y))
    kernels.run(launch, ptx_executor())
    with pytest.raises(OutOfBounds, match="load"):
        kernels.run(launch, ptx_executor(change=lambda text: re.sub(r"@%p\d+\s+ld\.global", "ld.global", text)))


@by_executor
def test_a_mask_that_is_off_by_one_is_out_of_bounds(executor):
    a, b, bias, out = torch.randn(50, 72), torch.randn(72, 40), torch.randn(40), kernels.nans(50, 40)
    with pytest.raises(OutOfBounds, match=r"matmul: load .* holds a"):
        kernels.run(kernels.launch_matmul(a, b, bias, out, bug=1), executor())
    x, w, y = (
        torch.randn(1, 6, 6, 16).half(),
        torch.randn(3, 3, 16, 16).half(),
        kernels.nans(1, 6, 6, 16, dtype=torch.float16),
    )
    with pytest.raises(OutOfBounds, match=r"convolution: load .* holds x"):
        kernels.run(kernels.launch_convolution(x, w, y, bug=1), executor())


@by_executor
def test_two_programs_that_store_to_one_address_are_noticed(executor):
    y, scale = torch.randn(20, 31), torch.randn(31)
    with pytest.raises(DoubleStore):
        kernels.run(kernels.launch_activate(y, scale, scale, torch.empty_like(y), bug=True), executor())


@by_executor
def test_a_program_that_reads_what_another_one_stores_is_noticed(executor):
    memory = torch.randn(1040)
    with pytest.raises(ProgramRace):  # shifted by 16: a block's last results are the next one's first operands
        kernels.run(kernels.launch_arithmetic(memory[:1024], torch.ones(1024), memory[16:], "add"), executor())


def test_only_the_elements_of_a_view_may_be_touched():
    storage = torch.zeros(4, 10)
    view = storage[:, 2:6]
    memory = GuardedMemory({"view": view})
    start = view.data_ptr()
    memory.load(np.array([start, start + 12, start + 40]), 4)
    memory.store(np.array([start + 40]), 4)
    for offset in (-4, 16, 40 * 4):  # before it, in a gap, behind the storage
        with pytest.raises(OutOfBounds):
            memory.load(np.array([start + offset]), 4)
    assert memory.traffic().loaded == {"view": 12} and memory.traffic().unique_stored == {"view": 4}


# PTX by hand: what the kernels above don't contain.

HEADER = """.version 8.0
.target sm_80
.visible .entry hand(.param .u64 out)
{ .reg .pred %p<4>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
"""
FOOTER = """ ld.param.u64 %rd1, [out]; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r2; ret; }"""


def by_hand(code: str, threads: int = 64) -> Tensor:
    out = torch.full((threads,), -1, dtype=torch.int32)
    text = HEADER + "mov.u32 %r1, %tid.x;\n" + code + FOOTER
    run_ptx(text, GuardedMemory({"out": out}), (1,), threads, 0, [out])
    return out


def test_threads_that_loop_for_different_times_meet_again():
    out = by_hand("""
        and.b32 %r3, %r1, 3; mov.b32 %r2, 0; mov.b32 %r4, 0;
    again: setp.ge.u32 %p1, %r4, %r3;
        @%p1 bra done;
        add.s32 %r2, %r2, 10; add.s32 %r4, %r4, 1;
        bra again;
    done: activemask.b32 %r5;
        bar.sync 0;
        @%p1 add.s32 %r2, %r2, %r5;
    """)
    lane = torch.arange(64, dtype=torch.int32)
    assert torch.equal(out, lane % 4 * 10 - 1)  # all 32 threads are active again: the mask is -1


def test_shuffles_votes_and_bits():
    lane = torch.arange(64, dtype=torch.int32)
    assert torch.equal(by_hand("shfl.sync.down.b32 %r2, %r1, 3, 31, -1;"), lane + 3 * (lane % 32 < 29))
    assert torch.equal(by_hand("shfl.sync.up.b32 %r2, %r1, 2, 0, -1;"), lane - 2 * (lane % 32 > 1))
    assert torch.equal(by_hand("shfl.sync.idx.b32 %r2, %r1, 5, 31, -1;"), lane // 32 * 32 + 5)
    odd = "and.b32 %r3, %r1, 1; setp.eq.s32 %p1, %r3, 1; "
    assert (by_hand(odd + "vote.sync.ballot.b32 %r2, %p1, -1;") == int(np.uint32(0xAAAAAAAA).view(np.int32))).all()
    assert torch.equal(by_hand("prmt.b32 %r2, %r1, 7, 0x5410;"), lane + 7 * 65536)
    assert torch.equal(by_hand("bfe.s32 %r2, %r1, 1, 2;"), (lane // 2 % 4 + 2) % 4 - 2)
    assert torch.equal(by_hand("mov.b32 %r3, -7; div.s32 %r2, %r3, 2;"), torch.full_like(lane, -3))
    assert torch.equal(by_hand("mov.b32 %r3, -7; rem.s32 %r2, %r3, 2;"), torch.full_like(lane, -1))


def test_what_the_emulation_does_not_know_is_named():
    with pytest.raises(Unsupported, match=r"wgmma\.fence\.sync\.aligned"):
        by_hand("wgmma.fence.sync.aligned;")
    with pytest.raises(Unsupported, match=r"ld\.local\.b32"):
        by_hand("ld.local.b32 %r2, [%rd1];")


def test_hangs_and_divergent_barriers_are_noticed(monkeypatch):
    monkeypatch.setattr(sys.modules["emulation.ptx.machine"], "LIMIT", 2000)
    with pytest.raises(Hang):
        by_hand("again: bra again;")
    with pytest.raises(EmulationError, match="different barriers"):
        by_hand(
            "setp.eq.u32 %p1, %r1, 0; @%p1 bra other; bar.sync 0; bra done; other: bar.sync 0; done: mov.b32 %r2, 0;"
        )
