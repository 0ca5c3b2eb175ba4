"""The tools that run CUDA kernels without a GPU: right results, and every planted error found by the detectors named here."""

import ctypes
import functools
import re
from enum import IntEnum

import pytest
import torch
from emulation import cuda
from emulation import sample_kernels as triton_samples
from emulation.cuda_problems import check
from emulation.errors import (
    Crash,
    Divergence,
    EmulationError,
    Hang,
    Misaligned,
    OutOfBounds,
    Overflow,
    SharedMemoryError,
    SharedMemoryRace,
)
from emulation.memory import GuardedMemory
from emulation.ptx import ptx_executor, run_ptx
from emulation.sanitized import Sanitized


class Plant(IntEnum):
    """tests/emulation/plants.h."""

    NOTHING = 0
    NO_BARRIER_AFTER_WAIT = 1
    NO_BARRIER_BEFORE_COPY = 2
    WAIT_FOR_TOO_FEW = 3
    GUARD_OFF_BY_ONE = 4
    WRONG_FRAGMENT = 5
    MISALIGNED = 6
    DIVERGENT_BARRIER = 7
    SHARED_OVERFLOW = 8
    NO_BARRIER_BEFORE_SUM = 9
    NO_BARRIER_IN_TREE = 10
    NARROW_SHUFFLE = 11
    DIVERGENT_SHUFFLE = 12


class Gemm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("plant", "m", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "out")),
    ]


class Sums(ctypes.Structure):
    _fields_ = [
        ("plant", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "out", "partial", "arrived")),
    ]


GEMMS = {"gemm_half": torch.float16, "gemm_bfloat": torch.bfloat16, "gemm_float": torch.float32}
SUMS = ("run_block_sums", "run_warp_sums", "run_grid_sum", "run_grid_sum_static")
THREAD, ADDRESS = Sanitized("thread"), Sanitized("address")


@functools.cache
def library():
    found = cuda.build("samples.cpp")
    check(found, "gemm_size", Gemm)
    check(found, "sums_size", Sums)
    return found


def ptx():
    return cuda.Ptx(cuda.ptx("samples.cu"))


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def gemm(function, executor, plant=Plant.NOTHING, a=None, b=None):
    """Whether the product is right to the bit; or the result for given operands."""
    dtype = GEMMS[function]
    given = a is not None
    if not given:
        a, b = integers(70, 128, dtype=dtype), integers(40, 128, dtype=dtype)
    (m, k), n = a.shape, b.shape[0]
    out = torch.full((m, n), float("nan"), dtype=dtype)
    problem = Gemm(plant, m, n, k, a.data_ptr(), b.data_ptr(), out.data_ptr())
    library().run(function, problem, executor, {"a": a, "b": b, "out": out})
    return out if given else torch.equal(out, (a.double() @ b.double().T).to(dtype))


def sums(function, executor, plant=Plant.NOTHING):
    x = integers(6, 200)
    out, partial = torch.full((6,), float("nan")), torch.full((5,), float("nan"))
    arrived = torch.zeros(1, dtype=torch.int32)
    problem = Sums(plant, *x.shape, *(t.data_ptr() for t in (x, out, partial, arrived)))
    tensors = {"x": x, "out": out, "partial": partial, "arrived": arrived}
    library().run(function, problem, executor, tensors)
    return torch.equal(out[0], x.sum()) if "grid" in function else torch.equal(out, x.sum(1))


def run(function, executor, plant=Plant.NOTHING):
    return (gemm if function in GEMMS else sums)(function, executor, plant)


# ---- Right kernels are right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [*GEMMS, *SUMS])
def test_every_executor_agrees(function):
    """The interpreter doesn't run cooperative launches; sanitizers want their shared memory dynamic."""
    others = [] if function == "run_grid_sum_static" else [THREAD, ADDRESS]
    others += [] if "grid" in function else [ptx()]
    for executor in (*cuda.fibers(), *(cuda.Fibers(seed) for seed in range(4, 12)), *others):
        assert run(function, executor), executor


@pytest.mark.parametrize("function", GEMMS)
def test_products_are_rounded_once(function):
    """Random operands: exact products, added in double; TF32 operands are cut."""
    a, b = torch.randn(33, 64).to(GEMMS[function]), torch.randn(24, 64).to(GEMMS[function])
    seen = [
        t.double() if t.dtype != torch.float32 else (t.view(torch.int32) & -(2**13)).view(t.dtype).double()
        for t in (a, b)
    ]
    truth = seen[0] @ seen[1].T
    fibers, interpreted = gemm(function, cuda.Fibers(2), a=a, b=b), gemm(function, ptx(), a=a, b=b)
    # Each of the 4 or 8 products is rounded to float32.
    exact = a.dtype == torch.float32
    torch.testing.assert_close(fibers, truth.to(a.dtype), rtol=2e-7 if exact else 0, atol=1e-5)
    torch.testing.assert_close(interpreted, fibers, rtol=1e-6 if exact else torch.finfo(a.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("function", GEMMS)
def test_fragments_are_tritons(function):
    """Triton's compiler knows where the elements of fragments lie; its PTX gives what ours gives."""
    a, b = integers(70, 128, dtype=GEMMS[function]), integers(40, 128, dtype=GEMMS[function])
    out, executor = torch.full((70, 40), float("nan"), dtype=a.dtype), ptx_executor()
    right = b.T.contiguous()
    triton_samples.run(triton_samples.launch_matmul(a, right, torch.full((40,), 4096.0), out), executor)
    assert "mma.sync" in executor.compiled[0].asm["ptx"]
    expected = a.double() @ b.double().T
    assert torch.equal(out, (expected + 4096).relu().to(a.dtype))
    for executor in (cuda.Fibers(), ptx()):
        assert torch.equal(gemm(function, executor, a=a, b=b), expected.to(a.dtype))


def test_static_and_dynamic_shared_memory_together():
    """With fused products, to the bit."""
    x, results = torch.randn(20, 200), []
    for executor in (*cuda.fibers(), THREAD, ADDRESS, ptx()):
        out = torch.full((20,), float("nan"))
        problem = Sums(0, *x.shape, x.data_ptr(), out.data_ptr())
        library().run("run_fused_sums", problem, executor, {"x": x, "out": out})
        results.append(out)
        assert torch.equal(out, results[0]), executor


FUSED = """
.visible .entry fused(.param .u64 p) {
  .reg .b64 %rd<2>; .reg .b32 %f<5>;
  ld.param.u64 %rd1, [p];
  ld.global.v2.f32 {%f1, %f2}, [%rd1];
  ld.global.f32 %f3, [%rd1+8];
  fma.rn.f32 %f4, %f1, %f2, %f3;
  st.global.f32 [%rd1+12], %f4;
  ret;
}"""


def test_the_interpreter_rounds_a_fused_product_once():
    """The sum ends a little above a tie of two floats, so little that a double has lost it before it is rounded again."""
    for sign in (1, -1):
        for x, y in ((12895669, 12021954), (15953599, 13301434), (15094723, 9250781)):  # odd * 2^40 + less than 2^11
            numbers = torch.tensor([sign * x, y, sign * 2.0**64, float("nan")])
            run_ptx(FUSED, GuardedMemory({"p": numbers}), (1,), 1, 0, [numbers.data_ptr()])
            assert abs(int(numbers[3]) - sign * (x * y + 2**64)) < 2**40  # half the distance of floats there


def test_half_conversions():
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    out = torch.empty(2**16)
    library().call("to_floats", halves, out, 2**16, result=None)
    expected = halves.view(torch.float16).float()
    assert torch.equal(out.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(out.isnan(), expected.isnan())
    near = torch.cat([expected[expected.isfinite()], (expected[:0x7C00] + expected[1:0x7C01]) / 2])
    x = torch.cat(
        [near, near.nextafter(torch.tensor(1e9)), near.nextafter(torch.tensor(-1e9)), torch.randn(10000) * 1e-5]
    )
    x = torch.cat([x, torch.tensor([65504.0, 65519.996, 65520.0, 1e30, float("inf"), -float("inf"), float("nan")])])
    back = torch.empty(len(x), dtype=torch.int16)
    library().call("to_halves", x, back, len(x), result=None)
    wanted = x.half()
    assert torch.equal(back[~x.isnan()], wanted.view(torch.int16)[~x.isnan()]) and back.view(torch.float16)[-1].isnan()


# ---- Planted errors --------------------------------------------------------------------------------------------------
# (function, plant): who finds it and how; a class of error, or None for wrong numbers.
FOUND = {
    ("gemm_half", Plant.NO_BARRIER_AFTER_WAIT): {"fibers": None, "thread": SharedMemoryRace, "ptx": SharedMemoryRace},
    ("gemm_half", Plant.NO_BARRIER_BEFORE_COPY): {"starved": None, "thread": SharedMemoryRace, "ptx": SharedMemoryRace},
    ("gemm_half", Plant.WAIT_FOR_TOO_FEW): {"late": None, "thread": SharedMemoryRace, "ptx": SharedMemoryRace},
    ("gemm_half", Plant.GUARD_OFF_BY_ONE): {"address": OutOfBounds, "ptx": OutOfBounds},
    ("gemm_half", Plant.WRONG_FRAGMENT): {"fibers": None, "ptx": None},
    ("gemm_half", Plant.MISALIGNED): {"fibers": Misaligned, "address": Misaligned, "ptx": Misaligned},
    ("gemm_half", Plant.DIVERGENT_BARRIER): {"fibers": Divergence, "thread": EmulationError, "ptx": EmulationError},
    ("gemm_half", Plant.SHARED_OVERFLOW): {"fibers": SharedMemoryError, "address": SharedMemoryError, "ptx": SharedMemoryError},
    ("run_block_sums", Plant.NO_BARRIER_BEFORE_SUM): {"fibers": None, "thread": SharedMemoryRace, "ptx": SharedMemoryRace},
    ("run_block_sums", Plant.NO_BARRIER_IN_TREE): {"fibers": None, "thread": SharedMemoryRace, "ptx": SharedMemoryRace},
    ("run_block_sums", Plant.GUARD_OFF_BY_ONE): {"address": OutOfBounds, "ptx": OutOfBounds},
    ("run_block_sums", Plant.SHARED_OVERFLOW): {"fibers": OutOfBounds, "address": SharedMemoryError, "ptx": SharedMemoryError},
    ("run_block_sums", Plant.DIVERGENT_BARRIER): {"fibers": Divergence},
    ("run_warp_sums", Plant.NARROW_SHUFFLE): {"fibers": None, "ptx": None},
    ("run_warp_sums", Plant.DIVERGENT_SHUFFLE): {"fibers": Divergence, "ptx": EmulationError},
    ("run_grid_sum", Plant.NO_BARRIER_BEFORE_SUM): {"fibers": None, "thread": SharedMemoryRace},
    ("run_grid_sum", Plant.DIVERGENT_BARRIER): {"fibers": Hang},
}  # fmt: skip
EXECUTORS = {
    "fibers": cuda.fibers,
    "starved": lambda: [cuda.Fibers(seed, order="starving", landing="early") for seed in range(3)],
    "late": lambda: [cuda.Fibers(seed, landing="late") for seed in range(4)],
    "thread": lambda: [THREAD],
    "address": lambda: [ADDRESS],
    "ptx": lambda: [ptx()],
}


@pytest.mark.parametrize(("function", "plant", "kind"), [(f, p, k) for (f, p), found in FOUND.items() for k in found],
                         ids=lambda v: v.name.lower() if isinstance(v, Plant) else v)  # fmt: skip
def test_planted(function, plant, kind):
    """Of several schedules one that isn't starved may give right numbers by luck."""
    error, wrong = FOUND[function, plant][kind], []
    for executor in EXECUTORS[kind]():
        if error is None:
            wrong.append(not run(function, executor, plant))
        else:
            with pytest.raises(error) as found:
                run(function, executor, plant)
            assert "gemm" in str(found.value) or function[4:] in str(found.value)  # where it happened
    assert error is not None or (any(wrong) if kind in ("fibers", "late") else all(wrong)), wrong


def test_host_code_and_addresses_fail_with_a_message():
    numbers = integers(64, 64, dtype=torch.float16)
    for m, a, error, words in (
        (0, numbers.data_ptr(), EmulationError, r"a grid of \(0, 2, 1\)"),
        (2**31 - 1, numbers.data_ptr(), Overflow, "a sum is too large"),
        (64, 4096, Crash, "segmentation fault at address 0x1"),
    ):
        problem = Gemm(0, m, 64, 64, a, numbers.data_ptr(), 4096)
        for executor in cuda.fibers():
            with pytest.raises(error, match=words):
                library().run("gemm_half", problem, executor, {"numbers": numbers})
    assert gemm("gemm_half", cuda.Fibers())  # and the next launch runs


def test_what_the_wheel_holds_can_be_read():
    path = cuda.ROOT / "fastres" / "_cuda.so"
    if not path.exists():
        pytest.skip("built without CUDA")
    text = cuda.ptx_of_library(path)
    assert text is not None, "the library has no PTX for sm_80, which the tests execute"
    assert re.search(r"\.entry \w*forward_rows", text) and cuda.ptx_of_library(path, "sm_70") is None
