"""The tools that run Triton kernels without a GPU, proven: right results in each dtype, and planted errors are caught."""

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import run_python
from emulation import sample_kernels as kernels
from emulation.compiling import ARCHITECTURES, compile_launch
from emulation.errors import DoubleStore, EmulationError, Hang, OutOfBounds, ProgramRace, SharedMemoryRace, Unsupported
from emulation.memory import GuardedMemory
from emulation.mock_driver import mock_driver
from emulation.ptx import ptx_executor, run_ptx
from emulation.triton_interpreter import interpreter_executor, truncate_tf32
from parity import assert_parity
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastres.kernels.common.triton_launch import Launch, executing_with

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EXECUTORS = {"ptx": ptx_executor, "source": interpreter_executor}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
by_executor = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS.keys())


def run(launch: Launch, executor: Callable[[Launch], None]) -> None:
    with executing_with(executor):
        launch.run()


def values(*shape: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """Random, or small integers, of which every sum below is exact in float32 and, rounded once, in the dtype."""
    return (torch.randint(-2, 3, shape) if exact else torch.randn(shape)).to(dtype)


def nans(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def seen(operand: Tensor) -> Tensor:
    """What a tensor core sees of an operand, in float64: float32 is cut to TF32."""
    if operand.dtype == torch.float32:
        operand = torch.from_numpy(truncate_tf32(operand.numpy()))
    return operand.double()


def compare(ours: Tensor, truth: Tensor, exact: bool) -> None:
    rounded = truth.to(ours.dtype)
    if exact:
        assert torch.equal(ours, rounded)
    else:
        assert_parity(ours, rounded, truth)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
@by_dtype
@by_executor
def test_matmul(executor, dtype, exact):
    for (m, k, n), tile, warps in (((50, 72, 40), (32, 32, 32), 4), ((33, 7, 65), (64, 64, 16), 8)):
        a, b = values(m, k, dtype=dtype, exact=exact), values(k, n, dtype=dtype, exact=exact)
        bias, out = values(n, dtype=torch.float32, exact=exact), nans(m, n, dtype=dtype)
        run(kernels.launch_matmul(a, b, bias, out, tile, warps), executor())
        compare(out, (seen(a) @ seen(b) + bias.double()).relu(), exact)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "random"])
@by_dtype
@by_executor
def test_convolution(executor, dtype, exact):
    for channels, stride, padding, size in ((32, 1, 1, 3), (5, 2, 2, 4)):
        x, w = (
            values(2, 7, 9, channels, dtype=dtype, exact=exact),
            values(size, size, channels, 24, dtype=dtype, exact=exact),
        )
        args = seen(x).permute(0, 3, 1, 2), seen(w).permute(3, 2, 0, 1)
        truth = torch.nn.functional.conv2d(*args, stride=stride, padding=padding).permute(0, 2, 3, 1)
        y = nans(*truth.shape, dtype=dtype)
        run(kernels.launch_convolution(x, w, y, stride, padding), executor())
        compare(y, truth, exact)


@by_dtype
@by_executor
def test_reductions(executor, dtype):
    x = torch.randn(37, 83).to(dtype) + 30
    sums, statistics = nans(37), nans(2, 83)
    run(kernels.launch_row_sums(x, sums), executor())
    run(kernels.launch_column_statistics(x, statistics), executor())
    assert_parity(sums, x.float().sum(1), x.double().sum(1))
    truth = torch.stack([x.double().mean(0), x.double().var(0, unbiased=False) * 37])
    torch.testing.assert_close(statistics.double(), truth, rtol=3e-5, atol=1e-4)


@by_dtype
@by_executor
def test_pointwise(executor, dtype):
    y, scale, shift = torch.randn(13, 31).to(dtype), torch.randn(31), torch.randn(31)
    out = nans(13, 31, dtype=dtype)
    run(kernels.launch_activate(y, scale, shift, out), executor())
    assert_parity(out, (scale * y + shift).relu().to(dtype), (scale.double() * y + shift).relu())


OPERATIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": lambda a, b: -a,
    "max": torch.maximum,
    "where": lambda a, b: torch.where((a > b) & (a > 0), a, b),
    "mixed": lambda a, b: a + b.float(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@by_dtype
@by_executor
def test_arithmetic_is_torchs_bit_by_bit(executor, dtype, operation):
    scale = torch.exp2(torch.randint(-20, 9, (2048,)).float())
    a, b, out = (
        (torch.randn(2048) * scale).to(dtype),
        (torch.randn(2048) * scale.flip(0)).to(dtype),
        nans(2048, dtype=dtype),
    )
    a[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    run(kernels.launch_arithmetic(a, b, out, operation), executor())
    expected = OPERATIONS[operation](a, b).to(dtype)
    assert torch.equal(out.view(torch.int8), expected.view(torch.int8))


@by_executor
def test_float32_rounds_to_the_nearest_even_bfloat16(executor):
    bits = torch.arange(0, 2**32, 2**18 - 2**15, dtype=torch.int64)  # ties, their neighbours and the rest; infinities
    bits = torch.cat([bits, bits + 1, bits - 1, torch.tensor([0x7F7FFFFF, 0x7F800000, 0x00000001])])
    x = torch.from_numpy((bits.numpy() % 2**32).astype(np.uint32).view(np.float32))
    x = torch.where(x.isnan(), 1.0, x)
    x = torch.cat([x, torch.zeros(-len(x) % 256)])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    run(kernels.launch_arithmetic(torch.zeros_like(x), x, out, "add"), executor())
    assert torch.equal(out.view(torch.int16), (x + 0.0).bfloat16().view(torch.int16))


@by_dtype
@by_executor
def test_tensor_descriptors(executor, dtype):
    source = torch.randn(40, 64).to(dtype)
    target, expected = nans(40, 64, dtype=dtype), torch.zeros(40, 64, dtype=dtype)
    expected[1:] = 2 * source[:-1]
    run(kernels.launch_described(source, target), executor())
    assert torch.equal(target, expected)


@by_executor
def test_atomics(executor):
    at, added, out = torch.randint(0, 40, (512,)), torch.randint(-4, 5, (512,)).float(), torch.zeros(40)
    run(Launch(kernels.scatter_add, (2,), dict(at=at, values=added, out=out), dict(BLOCK=256)), executor())
    assert torch.equal(out, torch.zeros(40).index_add(0, at, added))


def test_masked_lanes_without_a_value_are_nan():
    out = torch.zeros(1)
    launch = Launch(kernels.careless_sum, (1,), dict(x=torch.ones(50), out=out, SIZE=50), dict(BLOCK=64))
    run(launch, interpreter_executor())
    assert out.isnan()


def test_bytes_are_counted_by_argument():
    a, b, bias, out = (
        torch.zeros(50, 72).half(),
        torch.zeros(72, 40).half(),
        torch.zeros(40),
        torch.zeros(50, 40).half(),
    )
    executor = interpreter_executor()
    run(kernels.launch_matmul(a, b, bias, out), executor)
    (record,) = executor.record
    assert (record.name, record.grid) == ("matmul", (4,))
    assert record.loaded == {"a": 2 * 50 * 72 * 2, "b": 2 * 72 * 40 * 2, "bias": 2 * 40 * 4}  # every tile reads its own
    assert record.unique_loaded == {"a": 50 * 72 * 2, "b": 72 * 40 * 2, "bias": 40 * 4}
    assert record.stored == record.unique_stored == {"out": 50 * 40 * 2}


def test_the_interpreter_leaves_everything_as_it_was():
    before = {**vars(tl), **vars(tl.core)}, vars(tl.tensor).copy(), vars(kernels).copy()
    call, (a, b, bias, out) = triton.runtime.jit.JITFunction.__call__, matmul_inputs()
    run(kernels.launch_row_sums(torch.ones(9, 70), nans(9)), interpreter_executor())
    with pytest.raises(OutOfBounds):
        run(kernels.launch_matmul(a[:50].clone(), b, bias, out[:50], bug=1), interpreter_executor())
    assert ({**vars(tl), **vars(tl.core)}, vars(tl.tensor).copy(), vars(kernels).copy()) == before
    assert triton.runtime.jit.JITFunction.__call__ is call
    assert "mma" in compile_launch(kernels.launch_matmul(a, b, bias, out, tile=(16, 16, 16)), 80).asm["ptx"]


def test_a_process_that_interprets_computes_bfloat16_as_torch():
    code = """if True:
        import sys
        import torch
        from emulation import sample_kernels as kernels
        from fastres.kernels.common.triton_launch import interpreted, refusal
        assert interpreted() and refusal("cpu") is None
        a, b = torch.randn(2, 1024).bfloat16()
        out = torch.empty_like(a)
        for name, function in dict(add=torch.add, mul=torch.mul, max=torch.maximum).items():
            kernels.launch_arithmetic(a, b, out, name).run()
            assert torch.equal(out, function(a, b)), name
        x, statistics = torch.randn(37, 50).bfloat16(), torch.empty(2, 50)
        kernels.launch_column_statistics(x, statistics).run()
        torch.testing.assert_close(statistics[0], x.float().mean(0), rtol=1e-5, atol=1e-5)
    """
    run_python(code, TRITON_INTERPRET="1")


# Planted errors.


def matmul_inputs(dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 160), (160, 64)))
    return a, b, torch.randn(64, generator=generator), nans(64, 64, dtype=dtype)


def changed_results(change: Callable[[str], str] | None, dtype: torch.dtype = torch.float16, **options) -> Tensor:
    inputs = matmul_inputs(dtype)
    run(kernels.launch_matmul(*inputs), ptx_executor(change=change, **options))
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
    count = len(re.findall(BARRIER, compile_launch(kernels.launch_matmul(*matmul_inputs(dtype)), 80).asm["ptx"]))
    races = 0
    for number in range(count):
        try:
            assert torch.equal(changed_results(without(BARRIER, number), dtype), good)
        except SharedMemoryRace:
            races += 1
    assert count >= 3 and races >= count - 2, f"{races} of {count}"


def test_every_removed_barrier_of_a_reduction_is_noticed_or_superfluous():
    x, good = torch.randn(64, 32), nans(2, 32)
    launch = kernels.launch_column_statistics(x, good)
    run(launch, ptx_executor())
    count, races = len(re.findall(BARRIER, compile_launch(launch, 80).asm["ptx"])), 0
    for number in range(count):
        out = nans(2, 32)
        try:
            run(kernels.launch_column_statistics(x, out), ptx_executor(change=without(BARRIER, number)))
            assert torch.equal(out, good)
        except SharedMemoryRace:
            races += 1
    assert races >= 1, f"{races} of {count}"


def test_a_reduction_whose_lanes_disagree_is_noticed():
    x, executor = torch.randn(64, 32), ptx_executor()
    run(kernels.launch_column_statistics(x, nans(2, 32)), executor)
    assert executor.ambiguous == 0
    with pytest.raises(SharedMemoryRace, match="two warps write different values"):
        run(kernels.launch_column_statistics(x, nans(2, 32), bug=True), executor)
    run(kernels.launch_column_statistics(x, nans(2, 32), warps=1, bug=True), executor)
    assert executor.ambiguous > 0


def wait_for_one_less(text: str) -> str:
    return re.sub(r"wait_group\s+(\d+)", lambda m: f"wait_group {int(m[1]) + 1}", text)


def test_a_wait_for_too_few_copies_is_a_race_and_gives_wrong_results():
    good = changed_results(None)
    with pytest.raises(SharedMemoryRace, match="asynchronous copy"):
        changed_results(wait_for_one_less)
    assert not torch.equal(changed_results(wait_for_one_less, race_check=False), good)
    assert torch.equal(changed_results(None, early=True), good)  # when copies land is no matter to a right kernel


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
    run(launch, ptx_executor())
    with pytest.raises(OutOfBounds, match="load"):
        run(launch, ptx_executor(change=lambda text: re.sub(r"@%p\d+\s+ld\.global", "ld.global", text)))


@by_executor
def test_a_mask_that_is_off_by_one_is_out_of_bounds(executor):
    a, b, bias, out = torch.randn(50, 72), torch.randn(72, 40), torch.randn(40), nans(50, 40)
    with pytest.raises(OutOfBounds, match=r"matmul: load .* holds a"):
        run(kernels.launch_matmul(a, b, bias, out, bug=1), executor())
    x, w, y = torch.randn(1, 6, 6, 16).half(), torch.randn(3, 3, 16, 16).half(), nans(1, 6, 6, 16, dtype=torch.float16)
    with pytest.raises(OutOfBounds, match=r"convolution: load .* holds x"):
        run(kernels.launch_convolution(x, w, y, bug=1), executor())


@by_executor
def test_two_programs_that_store_to_one_address_are_noticed(executor):
    y, scale = torch.randn(20, 31), torch.randn(31)
    with pytest.raises(DoubleStore):
        run(kernels.launch_activate(y, scale, scale, torch.empty_like(y), bug=True), executor())


@by_executor
def test_a_program_that_reads_what_another_one_stores_is_noticed(executor):
    memory = torch.randn(1040)
    with pytest.raises(ProgramRace):  # shifted by 16: a block's last results are the next one's first operands
        run(kernels.launch_arithmetic(memory[:1024], torch.ones(1024), memory[16:], "add"), executor())


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


# Host code.


def test_launches_compile_for_every_architecture_from_tensors_without_memory():
    wants = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
    for arch in ARCHITECTURES:
        a, b, bias = (
            torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((256, 256), (256, 256), 256)
        )
        launch = kernels.launch_matmul(a, b, bias.float(), a, (128, 64, 64))
        compiled = compile_launch(launch, arch)
        assert wants[arch] in compiled.asm["ptx"] and compiled.metadata.target.arch == arch
        assert compile_launch(launch, arch) is compiled


def test_alignment_decides_what_is_compiled():
    a, b, bias, out = (torch.empty(s, device="meta", dtype=torch.half) for s in ((65, 64), (64, 64), 64, (64, 64)))
    aligned = kernels.launch_matmul(a[1:], b, bias.float(), out)
    offset = kernels.launch_matmul(a.view(-1)[1:4097].view(64, 64), b, bias.float(), out)
    assert "cp.async.cg.shared.global" in compile_launch(aligned, 80).asm["ptx"]
    copies = [len(re.findall(r"cp\.async\.c[ag]", compile_launch(x, 80).asm["ptx"])) for x in (aligned, offset)]
    assert copies[1] < copies[0]


def test_a_mock_driver_records_launches_on_fake_cuda_tensors():
    before = triton.runtime.driver._active
    with FakeTensorMode(), mock_driver(90) as launches:
        a, b, bias = (torch.empty(s, device="cuda", dtype=torch.half) for s in ((64, 1), (1, 50), 50))
        out = torch.empty(64, 50, device="cuda", dtype=torch.half)
        kernels.launch_matmul(a, b, bias.float(), out).run()
        kernels.launch_matmul(a, b, bias.float(), out).run()
    assert triton.runtime.driver._active is before
    launch = launches[0]
    assert len(launches) == 2 and launch.name == "matmul" and launch.grid == (4, 1, 1) and launch.num_warps == 4
    assert list(launch.arguments)[:5] == ["a", "b", "out", "bias", "M"] and launch.arguments["out"] is out
    assert launch.signature["K"] == "constexpr" and launch.signature["N"] == "i32"  # K is one
    assert "M" in launch.divisible_by_16 and "N" not in launch.divisible_by_16
    assert launch.compiled.metadata.target.arch == 90 and launch.shared == launch.compiled.metadata.shared
    with FakeTensorMode(), mock_driver(80) as launches:
        a, b, bias = (torch.empty(s, device="cuda", dtype=torch.half) for s in ((64, 1), (1, 50), 50))
        kernels.launch_matmul(a, b, bias.float(), torch.empty(64, 50, device="cuda", dtype=torch.half)).run()
    assert launches[0].compiled.metadata.target.arch == 80


def test_a_device_with_too_little_shared_memory_refuses():
    from triton.runtime.errors import OutOfResources

    with FakeTensorMode(), mock_driver(86):
        a = torch.empty(512, 512, device="cuda", dtype=torch.half)
        with pytest.raises(OutOfResources):
            kernels.launch_matmul(a, a, a[0].float(), a, (128, 128, 128), 8, 4).run()


def test_interpreted_kernels_are_refused_by_the_compiler():
    with pytest.raises(TypeError, match="TRITON_INTERPRET"):
        compile_launch(Launch(SimpleNamespace(), (1,), {}), 80)
