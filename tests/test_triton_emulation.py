"""The tools that run Triton kernels without a GPU: right results in each dtype, bytes counted, host code recorded."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conftest import run_python
from emulation import sample_kernels as kernels
from emulation.compiling import ARCHITECTURES, compile_launch
from emulation.errors import OutOfBounds
from emulation.mock_driver import mock_driver
from emulation.ptx import ptx_executor
from emulation.triton_interpreter import interpreter_executor, truncate_tf32
from parity import assert_parity
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastres.kernels.common.triton_launch import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EXECUTORS = {"ptx": ptx_executor, "source": interpreter_executor}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
by_executor = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=EXECUTORS.keys())


def values(*shape: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """Random, or small integers, of which every sum below is exact in float32 and, rounded once, in the dtype."""
    return (torch.randint(-2, 3, shape) if exact else torch.randn(shape)).to(dtype)


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
        bias, out = values(n, dtype=torch.float32, exact=exact), kernels.nans(m, n, dtype=dtype)
        kernels.run(kernels.launch_matmul(a, b, bias, out, tile, warps), executor())
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
        y = kernels.nans(*truth.shape, dtype=dtype)
        kernels.run(kernels.launch_convolution(x, w, y, stride, padding), executor())
        compare(y, truth, exact)


@by_dtype
@by_executor
def test_reductions(executor, dtype):
    x = torch.randn(37, 83).to(dtype) + 30
    sums, statistics = kernels.nans(37), kernels.nans(2, 83)
    kernels.run(kernels.launch_row_sums(x, sums), executor())
    kernels.run(kernels.launch_column_statistics(x, statistics), executor())
    assert_parity(sums, x.float().sum(1), x.double().sum(1))
    truth = torch.stack([x.double().mean(0), x.double().var(0, unbiased=False) * 37])
    torch.testing.assert_close(statistics.double(), truth, rtol=3e-5, atol=1e-4)


@by_dtype
@by_executor
def test_pointwise(executor, dtype):
    y, scale, shift = torch.randn(13, 31).to(dtype), torch.randn(31), torch.randn(31)
    out = kernels.nans(13, 31, dtype=dtype)
    kernels.run(kernels.launch_activate(y, scale, shift, out), executor())
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
        kernels.nans(2048, dtype=dtype),
    )
    a[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    kernels.run(kernels.launch_arithmetic(a, b, out, operation), executor())
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
    kernels.run(kernels.launch_arithmetic(torch.zeros_like(x), x, out, "add"), executor())
    assert torch.equal(out.view(torch.int16), (x + 0.0).bfloat16().view(torch.int16))


@by_dtype
@by_executor
def test_tensor_descriptors(executor, dtype):
    source = torch.randn(40, 64).to(dtype)
    target, expected = kernels.nans(40, 64, dtype=dtype), torch.zeros(40, 64, dtype=dtype)
    expected[1:] = 2 * source[:-1]
    kernels.run(kernels.launch_described(source, target), executor())
    assert torch.equal(target, expected)


@by_executor
def test_atomics(executor):
    at, added, out = torch.randint(0, 40, (512,)), torch.randint(-4, 5, (512,)).float(), torch.zeros(40)
    kernels.run(Launch(kernels.scatter_add, (2,), dict(at=at, values=added, out=out), dict(BLOCK=256)), executor())
    assert torch.equal(out, torch.zeros(40).index_add(0, at, added))


def test_masked_lanes_without_a_value_are_nan():
    out = torch.zeros(1)
    launch = Launch(kernels.careless_sum, (1,), dict(x=torch.ones(50), out=out, SIZE=50), dict(BLOCK=64))
    kernels.run(launch, interpreter_executor())
    assert out.isnan()


def test_bytes_are_counted_by_argument():
    a, b, bias, out = (
        torch.zeros(50, 72).half(),
        torch.zeros(72, 40).half(),
        torch.zeros(40),
        torch.zeros(50, 40).half(),
    )
    executor = interpreter_executor()
    kernels.run(kernels.launch_matmul(a, b, bias, out), executor)
    (record,) = executor.record
    assert (record.name, record.grid) == ("matmul", (4,))
    assert record.loaded == {"a": 2 * 50 * 72 * 2, "b": 2 * 72 * 40 * 2, "bias": 2 * 40 * 4}  # every tile reads its own
    assert record.unique_loaded == {"a": 50 * 72 * 2, "b": 72 * 40 * 2, "bias": 40 * 4}
    assert record.stored == record.unique_stored == {"out": 50 * 40 * 2}


def test_the_interpreter_leaves_everything_as_it_was():
    before = {**vars(tl), **vars(tl.core)}, vars(tl.tensor).copy(), vars(kernels).copy()
    call, (a, b, bias, out) = triton.runtime.jit.JITFunction.__call__, kernels.matmul_inputs()
    kernels.run(kernels.launch_row_sums(torch.ones(9, 70), kernels.nans(9)), interpreter_executor())
    with pytest.raises(OutOfBounds):
        kernels.run(kernels.launch_matmul(a[:50].clone(), b, bias, out[:50], bug=1), interpreter_executor())
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
