"""The convolution engine, kernel by kernel: values, exact integers, magnitudes, infinities, layouts, threads, errors."""

from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, LAYOUTS, lay_out
from conftest import run_with_isa
from parity import assert_parity
from torch import Tensor

import fastres
from fastres import _library
from fastres.errors import BackendError

if _library.native_error() is None:
    from fastres import _native

    # Winograd's transforms round: it has tests of its own.
    KERNELS = [name for name in _native.conv_kernels() if "winograd" not in name]
else:
    KERNELS = []

pytestmark = pytest.mark.skipif(not KERNELS, reason=f"no native library: {_library.native_error()}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


class Case(NamedTuple):
    """N images, C channels in, H x W, K channels out, R x S kernel."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


PLAIN = (
    Case(2, 16, 7, 9, 24, 3, 3, padding=(1, 1)),
    Case(1, 33, 15, 29, 70, 3, 3, padding=(1, 1)),
    Case(9, 20, 6, 5, 17, 3, 3, padding=(1, 1)),
    Case(2, 64, 13, 11, 65, 3, 3, (2, 2), (1, 1)),
    Case(1, 18, 10, 14, 33, 3, 3, (3, 2), (0, 2)),
    Case(2, 17, 12, 9, 31, 3, 3, (1, 1), (2, 3), (2, 3)),
    Case(1, 24, 9, 17, 16, 3, 3, (2, 1), (2, 1), (2, 1)),
    Case(2, 40, 9, 8, 48, 5, 5, (1, 1), (2, 2)),
    Case(2, 3, 23, 21, 64, 7, 7, (2, 2), (3, 3)),
    Case(1, 31, 8, 14, 10, 1, 7, padding=(0, 3)),
    Case(1, 31, 14, 8, 10, 7, 1, padding=(3, 0)),
    Case(2, 64, 7, 5, 130, 1, 1),
    Case(1, 100, 1, 1, 37, 1, 1),
    Case(9, 32, 3, 3, 32, 1, 1, (2, 2)),
    Case(1, 8, 6, 7, 5, 1, 1, padding=(1, 2)),
    Case(1, 600, 5, 6, 40, 3, 3, padding=(1, 1)),
    Case(2, 1100, 4, 5, 33, 1, 1),
    Case(1, 1100, 3, 4, 20, 3, 3, (2, 2), (1, 1)),
    Case(1, 1, 9, 9, 1, 2, 3),
    Case(1, 5, 3, 40, 96, 3, 3, padding=(5, 5)),
    Case(0, 16, 6, 6, 8, 3, 3, padding=(1, 1)),
)
GROUPED = (
    Case(2, 128, 9, 15, 128, 3, 3, padding=(1, 1), groups=32),
    Case(1, 64, 8, 30, 64, 3, 3, (2, 2), (1, 1), groups=8),
    Case(2, 96, 7, 7, 96, 3, 3, padding=(1, 1), groups=6),
    Case(1, 192, 5, 6, 192, 3, 3, padding=(1, 1), groups=3),
    Case(1, 64, 6, 5, 40, 1, 1, groups=2),
    Case(2, 15, 9, 8, 15, 3, 3, padding=(1, 1), groups=5),
    Case(1, 35, 6, 18, 35, 3, 3, (1, 1), (2, 2), (2, 2), groups=7),
    Case(2, 37, 8, 16, 37, 3, 3, padding=(1, 1), groups=37),
    Case(1, 20, 7, 6, 60, 5, 5, (2, 2), (2, 2), groups=20),
    Case(1, 30, 6, 5, 12, 1, 3, padding=(0, 1), groups=6),
    Case(1, 200, 4, 5, 6, 3, 3, groups=2),
    Case(1, 48, 5, 4, 210, 3, 3, padding=(1, 1), groups=3),
    Case(9, 24, 1, 1, 24, 1, 1, groups=3),
    Case(0, 16, 6, 6, 8, 3, 3, padding=(1, 1), groups=4),
)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


def out_shape(case: Case) -> tuple[int, ...]:
    sizes = zip((case.h, case.w), case.padding, case.dilation, (case.r, case.s), case.stride, strict=True)
    return (case.n, case.k, *((x + 2 * p - d * (r - 1) - 1) // t + 1 for x, p, d, r, t in sizes))


def inputs(case: Case, dtype: torch.dtype, integers: bool = False) -> Inputs:
    """Random tensors; as integers they are so small that every sum is exact in float32."""
    g = torch.Generator().manual_seed(case.c * 31 + case.k)

    def draw(shape, spread):
        if integers:
            return torch.randint(-spread, spread + 1, shape, generator=g, dtype=torch.int32).to(dtype)
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    weight = draw((case.k, case.c // case.groups, case.r, case.s), 2)
    if not integers:
        weight = weight / (case.c // case.groups * case.r * case.s) ** 0.5
    x, residual = (
        lay_out(draw(shape, 4), "channels_last") for shape in ((case.n, case.c, case.h, case.w), out_shape(case))
    )
    return Inputs(x, weight, draw((case.k,), 3), residual)


def run(kernel: str, case: Case, t: Inputs, relu: bool = True) -> Tensor | None:
    """The convolution by one kernel, or ``None`` if it has reasons not to."""
    # What is not written shows: memory of the result's size that was just given back holds NaNs.
    dirt = torch.full(out_shape(case), float("nan"), dtype=t.x.dtype)
    del dirt
    try:
        return torch.ops.fastres.conv_kernel_native(kernel, *t, relu, *case.geometry)
    except RuntimeError as error:
        if "no convolution kernel serves this problem" in str(error):
            return None
        raise


def wide(t: Inputs) -> Inputs:
    return Inputs(*(None if v is None else v.double() for v in t))


def reference(case: Case, t: Inputs, relu: bool = True) -> Tensor:
    return torch.ops.fastres.conv_act_reference(*t, relu, *case.geometry)


def served(case: Case, t: Inputs, relu: bool = True) -> list[tuple[str, Tensor]]:
    """(kernel, result) of every kernel that serves; the ones that must, do."""
    results = [(kernel, y) for kernel in KERNELS if (y := run(kernel, case, t, relu)) is not None]
    if case.n > 0:
        assert ("direct" if case.groups == 1 else "grouped") in dict(results)
        assert "amx" not in KERNELS or case.groups > 1 or "amx" in dict(results)
    return results


def assert_close(kernel: str, case: Case, y: Tensor, peer: Tensor, truth: Tensor) -> None:
    """The rule of parity.py. Kernels that add all products of a sum in one chain round once a product, like a random
    walk, where torch adds blocks: they are allowed that much more."""
    if kernel in ("direct", "grouped") and y.dtype == torch.float32 and y.numel():
        steps = (case.c // case.groups * case.r * case.s) ** 0.5 / 4
        bound = steps * torch.finfo(y.dtype).eps * truth.abs().max()
        error = (y - truth).abs().max()
        if error <= bound:
            return
    assert_parity(y, peer, truth, f"{kernel} {case}")


def check_parity(case: Case, dtype: torch.dtype) -> None:
    full = inputs(case, dtype)
    for t, relu in ((full, True), (full._replace(bias=None, residual=None), False)):
        truth, peer = reference(case, wide(t), relu), reference(case, t, relu)
        for kernel, y in served(case, t, relu):
            assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
            assert_close(kernel, case, y, peer, truth)


def check_exact(case: Case, dtype: torch.dtype) -> None:
    full = inputs(case, dtype, integers=True)
    for t, relu in ((full, True), (full._replace(bias=None, residual=None), False)):
        want = reference(case, wide(t), relu).to(dtype)
        for kernel, y in served(case, t, relu):
            assert torch.equal(y, want), f"{kernel} {case}: {int((y != want).sum())} of {y.numel()} differ"


def check_not_finite(case: Case, dtype: torch.dtype) -> None:
    t = inputs(case, dtype)
    t = t._replace(weight=torch.where(t.weight == 0, 1.0, t.weight.double()).to(dtype), bias=None, residual=None)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), float("inf"))):
        t.x[-1, (i * 7 + 2) % case.c, (i * 5) % case.h, (i * 3 + 1) % case.w] = value
    truth = reference(case, wide(t), False)
    peer = reference(case, t._replace(x=t.x.nan_to_num(0, 0, 0)), False)
    assert truth.isnan().any() and truth.isinf().any()
    for kernel, y in served(case, t, False):
        assert torch.equal(y.isnan(), truth.isnan()), kernel
        infinite = truth.isinf()
        assert torch.equal(y.isinf(), infinite) and torch.equal(y[infinite].double(), truth[infinite]), kernel
        good = truth.isfinite()
        assert_close(kernel, case, y[good], peer[good], truth[good])


@dtypes
@pytest.mark.parametrize("case", PLAIN + GROUPED, ids=str)
def test_parity(case, dtype):
    check_parity(case, dtype)


@dtypes
@pytest.mark.parametrize("case", PLAIN + GROUPED, ids=str)
def test_integers_exactly(case, dtype):
    check_exact(case, dtype)


@dtypes
@pytest.mark.parametrize(
    "case", (PLAIN[0], PLAIN[3], PLAIN[8], PLAIN[11], PLAIN[15], *GROUPED[:3], GROUPED[5]), ids=str
)
def test_nan_and_infinity(case, dtype):
    check_not_finite(case, dtype)


@dtypes
@pytest.mark.parametrize("case", (PLAIN[1], PLAIN[3], PLAIN[11], GROUPED[0], GROUPED[7]), ids=str)
def test_layouts_and_views(case, dtype):
    t = inputs(case, dtype)
    wanted = dict(served(case, t))
    for layout in LAYOUTS:
        other = t._replace(x=lay_out(t.x, layout), residual=lay_out(t.residual, layout))
        for weight in (t.weight, t.weight.contiguous(memory_format=torch.channels_last)):
            for kernel, y in served(case, other._replace(weight=weight)):
                assert torch.equal(y, wanted[kernel]), (kernel, layout)
                assert y.is_contiguous() == (layout == "contiguous" or y[0, 0].numel() == 1)


@dtypes
@pytest.mark.parametrize("case", (*PLAIN[:6], *PLAIN[10:13], *PLAIN[15:18], *GROUPED[:6]), ids=str)
def test_same_bits_again_and_for_any_number_of_threads(case, dtype):
    t = inputs(case._replace(n=3), dtype)
    case = case._replace(n=3)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(dict(served(case, t)))
    for other in results[1:]:
        assert all(torch.equal(y, results[0][kernel]) for kernel, y in other.items())


@dtypes
@pytest.mark.parametrize("case", (PLAIN[1], PLAIN[8], PLAIN[11], GROUPED[0], GROUPED[2], GROUPED[7]), ids=str)
@pytest.mark.parametrize(
    ("x_scale", "w_scale"), [(1e30, 1.0), (1e30, 1e-30), (1e-30, 1.0), (1e18, 1e18), (1e-30, 1e30)]
)
def test_magnitudes(case, dtype, x_scale, w_scale):
    t = inputs(case, dtype)
    t = Inputs(t.x * x_scale, t.weight * w_scale, None, None)
    truth, peer = reference(case, wide(t), False), reference(case, t, False)
    for kernel, y in served(case, t, False):
        assert_close(kernel, case, y, peer, truth)


@dtypes
def test_denormals_stay_finite_and_small(dtype):
    for case in (PLAIN[1], GROUPED[0], GROUPED[2]):
        t = inputs(case, dtype)
        for x, w in ((1e-39, 1.0), (1.0, 1e-39), (1e-25, 1e-15)):
            for kernel, y in served(
                case, Inputs((t.x.double() * x).to(dtype), (t.weight.double() * w).to(dtype), None, None)
            ):
                assert y.isfinite().all() and y.double().abs().max() < 1e-37, kernel


def compact() -> None:
    """The same checks on fewer shapes, for every instruction set."""
    for dtype in DTYPES:
        for case in (*PLAIN[:9], PLAIN[11], PLAIN[15], *GROUPED[:8], *GROUPED[10:12]):
            check_parity(case, dtype)
            check_exact(case, dtype)
        for case in (PLAIN[0], PLAIN[8], GROUPED[0], GROUPED[2]):
            check_not_finite(case, dtype)


@pytest.mark.parametrize("isa", fastres.build_info()["isa_supported"])
def test_instruction_sets(isa):
    run_with_isa(isa, "from test_conv_engine import *\ncompact()")


def test_errors():
    x, w, v = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3), torch.zeros(8)
    good = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}

    def fails(text, x=x, w=w, bias=None, residual=None, kernel="direct", **changes):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.fastres.conv_kernel_native(kernel, x, w, bias, residual, False, *{**good, **changes}.values())

    fails(r"fastres::conv_kernel_native: x must be \[N, C, H, W\], got 3 dimensions", x[0])
    fails(r"x must be float32 or bfloat16, got float64", x.double(), w.double())
    fails(r"weight must be \[N, C, H, W\], got 2 dimensions", x, w[:, :, 0, 0])
    fails(r"weight must have x's dtype float32, got bfloat16", x, w.bfloat16())
    fails(r"stride must be at least 1, got 0", stride=[0, 1])
    fails(r"padding must be at least 0, got -1", padding=[0, -1])
    fails(r"dilation must be at least 1, got 0", dilation=[1, 0])
    fails(r"groups = 3 must divide both 4 input and 8 output channels", groups=3)
    fails(r"groups = 0 must divide", groups=0)
    fails(r"weight must be \[K, 2, R, S\] for 4 input channels in 2 groups, got \[8, 4, 3, 3\]", groups=2)
    fails(r"x \[2, 4, 6, 6\] is too small for the kernel \[8, 4, 3, 3\] with padding \[0, 0\] and dilation \[3, 1\]",
          padding=[0, 0], dilation=[3, 1])  # fmt: skip
    fails(r"bias must be \[8\], got \[4\]", bias=v[:4])
    fails(r"bias must be float32 or bfloat16, got float64", bias=v.double())
    fails(r"residual must have the shape \[2, 8, 6, 6\], got \[2, 8, 5, 6\]", residual=torch.zeros(2, 8, 5, 6))
    fails(r"residual must have y's dtype float32", residual=torch.zeros(2, 8, 6, 6, dtype=torch.bfloat16))
    fails(r"no convolution kernel is called 'nosuch'; this instruction set has .*direct", kernel="nosuch")
    fails(r"serves this problem \(direct: grouped convolutions\)", x, w[:, :2], groups=2)
    fails(r"serves this problem \(grouped: convolutions of one group\)", kernel="grouped")


@dtypes
def test_the_native_backend_serves_groups(dtype):
    case = GROUPED[0]
    t = inputs(case, dtype)
    with fastres.use_backend("native"):
        y = fastres.ops.conv_act(*t, relu=True, padding=1, groups=case.groups)
    assert_parity(y, reference(case, t), reference(case, wide(t)))
    with fastres.use_backend("native"), pytest.raises(BackendError, match="native takes float32, bfloat16"):
        fastres.ops.conv_act(*wide(t), padding=1, groups=case.groups)
