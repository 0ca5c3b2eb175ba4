"""The native CPU operators against float64 formulas: values, gradients, layouts, threads, instruction sets, errors."""

import os
import subprocess
import sys

import native_cases as cases
import pytest
import torch
from conftest import rerun_with_isa
from native_cases import DTYPES, FORMATS, NAMES, OPS, SHAPES

import fastres
from fastres import _library

pytestmark = pytest.mark.skipif(
    not (_library.build_info()["native"] or os.environ.get("FASTRES_REQUIRE_NATIVE")),
    reason=f"no native library: {_library.native_error()}",
)

formats = pytest.mark.parametrize("fmt", FORMATS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
KINDS = ("none", "plain", "affine")


def layout_of(t):
    return torch.channels_last if t.stride(1) == 1 and not t.is_contiguous() else torch.contiguous_format


def problem(shape, kind, dtype, fmt, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = cases.exact(shape, g, dtype=dtype, fmt=fmt)
    residual = None if kind == "none" else cases.exact(shape, g, dtype=dtype, fmt=fmt)
    res = cases.coefficients(shape[1], g) if kind == "affine" else None
    grad = cases.exact(shape, g, -4, 4, 1.0, dtype=dtype, fmt=fmt)
    return y, cases.coefficients(shape[1], g), residual, res, grad


def check_scale_shift_act(y, main, residual, res, grad, relu):
    args = (y, *main, residual, *(res or (None, None, None)), relu)
    out = OPS.scale_shift_act_native(*args)
    assert out.dtype == y.dtype and layout_of(out) == layout_of(y)
    assert torch.equal(out, cases.forward(y, main, residual, res, relu))
    grads = dict(zip(NAMES, OPS.scale_shift_act_backward_native(grad, *args, True), strict=True))
    expected = cases.backward(grad, y, main, residual, res, relu)
    for name, got in grads.items():
        if name in expected:
            assert torch.equal(got, expected[name]), (name, (got - expected[name]).abs().max())
        else:
            assert got.shape == (0,) and got.dtype == torch.float32, name
    assert layout_of(grads["grad_y"]) == layout_of(y)


@formats
@dtypes
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_shift_act_exact(kind, relu, dtype, fmt):
    for shape in SHAPES:
        check_scale_shift_act(*problem(shape, kind, dtype, fmt), relu)


@dtypes
def test_scale_shift_act_exact_on_views(dtype):
    y, main, residual, res, grad = problem((4, 17, 6, 5), "affine", dtype, torch.channels_last)
    for cut in (lambda t: t[1:], lambda t: t[:, :, 1:, 1:], lambda t: t[:, :, ::2], lambda t: t.transpose(2, 3)):
        check_scale_shift_act(cut(y), main, cut(residual), res, cut(grad), True)
    part = tuple(v[3:12].contiguous() for v in main), tuple(v[3:12].contiguous() for v in res)
    check_scale_shift_act(y[:, 3:12], part[0], residual[:, 3:12], part[1], grad[:, 3:12], True)
    # y decides the layout; the residual and the gradient may come in another
    check_scale_shift_act(y, main, residual.contiguous(), None, grad.contiguous(), True)
    check_scale_shift_act(y.contiguous(), main, residual, res, grad, True)
    check_scale_shift_act(y, main, residual[:1].expand(4, -1, -1, -1), None, grad[:, :1].expand(-1, 17, -1, -1), True)


def test_residual_gradient_only_where_wanted():
    y, main, residual, _, grad = problem((2, 3, 4, 4), "plain", torch.float32, torch.contiguous_format)
    for relu, need in ((True, False), (False, True)):
        got = OPS.scale_shift_act_backward_native(grad, y, *main, residual, None, None, None, relu, need)
        assert got[3].shape == (0,)


@formats
@dtypes
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2), (1, 1, 0), (2, 3, 1)])
def test_pool_exact(window, dtype, fmt):
    for shape in ((2, 1, 5, 7), (3, 3, 9, 5), (2, 17, 8, 5), (2, 64, 15, 33), (1, 130, 5, 5)):
        for relu in (True, False):
            y, main, *_ = problem(shape, "none", dtype, fmt)
            out, index = OPS.scale_shift_act_pool_native(y, *main, relu, *window)
            expected, position = cases.pool(y, main, relu, *window)
            assert torch.equal(out, expected) and torch.equal(index, position)
            assert index.dtype == torch.uint8 and layout_of(out) == layout_of(index) == layout_of(y)
            assert torch.equal(OPS.scale_shift_act_pool_gather_native(y, *main, index, relu, *window), expected)
            grad = cases.exact(out.shape, torch.Generator().manual_seed(1), -4, 4, 1.0, dtype=dtype, fmt=fmt)
            got = OPS.scale_shift_act_pool_backward_native(grad, index, y, *main, relu, *window)
            full = cases.unpool(grad, position, y, *window)
            reference = cases.backward(full, y, main, None, None, relu)
            for tensor, name in zip(got, NAMES, strict=False):
                assert torch.equal(tensor, reference[name]), name


@formats
@dtypes
def test_channel_stats(dtype, fmt):
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for mean, std in ((0.0, 1.0), (100.0, 0.5), (-3.0, 0.0)):
            y = (mean + std * torch.randn(shape, generator=g)).to(dtype).contiguous(memory_format=fmt)
            got_mean, got_var = OPS.channel_stats_native(y)
            wide = y.double()
            want_mean, want_var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
            if std == 0.0:
                assert torch.equal(got_mean, want_mean.float()) and not got_var.any()
            torch.testing.assert_close(got_mean.double(), want_mean, rtol=2e-7, atol=2e-6 * std)
            torch.testing.assert_close(got_var.double(), want_var, rtol=2e-5, atol=1e-12)


def test_channel_stats_with_a_far_mean_and_an_outlier_first():
    g = torch.Generator().manual_seed(0)
    for fmt in FORMATS:
        y = (1e4 + torch.randn((4, 40, 50, 50), generator=g)).contiguous(memory_format=fmt)
        wide = y.double()
        torch.testing.assert_close(
            OPS.channel_stats_native(y)[1].double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0
        )
        y = torch.randn((4, 40, 50, 50), generator=g).contiguous(memory_format=fmt)
        y[0, :, 0, 0] = 3e3
        torch.testing.assert_close(
            OPS.channel_stats_native(y)[1].double(), y.double().var((0, 2, 3), unbiased=False), rtol=5e-6, atol=0
        )


@formats
@dtypes
def test_channel_stats_backward_exact(dtype, fmt):
    for shape in ((2, 1, 4, 4), (2, 17, 4, 8), (1, 130, 8, 8), (2, 64, 32, 32)):  # n is a power of two: exact
        g = torch.Generator().manual_seed(0)
        y, grad = (cases.exact(shape, g, dtype=dtype, fmt=fmt) for _ in range(2))
        mean, grad_mean, grad_var = (cases.exact((shape[1],), g) for _ in range(3))
        n = shape[0] * shape[2] * shape[3]
        slope = 2 * cases.per_channel(grad_var) * (y.double() - cases.per_channel(mean)) / n
        offset = cases.per_channel(grad_mean) / n
        for gy, gm, gv in (
            (grad, grad_mean, grad_var),
            (None, grad_mean, grad_var),
            (grad, None, grad_var),
            (grad, grad_mean, None),
        ):
            want = (0 if gy is None else gy.double()) + (0 if gm is None else offset) + (0 if gv is None else slope)
            got = OPS.channel_stats_backward_native(gy, y, mean, gm, gv)
            assert torch.equal(got, want.to(dtype).expand(shape)) and layout_of(got) == layout_of(y)
        assert not OPS.channel_stats_backward_native(None, y, mean, None, None).any()


@formats
def test_empty(fmt):
    v = torch.zeros(5)
    for shape in ((0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)):
        y = torch.empty(shape).contiguous(memory_format=fmt)
        assert OPS.scale_shift_act_native(y, v, v, v, y, v, v, v, True).shape == shape
        grads = OPS.scale_shift_act_backward_native(y, y, v, v, v, y, v, v, v, True, True)
        assert grads[0].shape == grads[3].shape == shape
        assert all(torch.equal(grads[i], torch.zeros(5)) for i in (1, 2, 4, 5))
        mean, var = OPS.channel_stats_native(y)
        assert mean.isnan().all() and var.isnan().all() and mean.shape == (5,)
        assert OPS.channel_stats_backward_native(y, y, v, v, v).shape == shape
    y, v = torch.empty(2, 0, 4, 4), torch.empty(0)
    assert OPS.scale_shift_act_native(y, v, v, v, None, None, None, None, True).shape == y.shape
    assert OPS.channel_stats_native(y)[0].shape == (0,)
    y, v = torch.empty(0, 5, 8, 8), torch.zeros(5)
    out, index = OPS.scale_shift_act_pool_native(y, v, v, v, True, 3, 2, 1)
    assert out.shape == index.shape == (0, 5, 4, 4)
    assert OPS.scale_shift_act_pool_backward_native(out, index, y, v, v, v, True, 3, 2, 1)[0].shape == y.shape


@formats
@dtypes
def test_nan_and_infinity(dtype, fmt):
    y, main, *_ = problem((2, 17, 6, 8), "none", dtype, fmt)
    main[0].fill_(1.0)
    y[0, 3, 2, 2], y[1, 5, 0, 0], y[1, 6, 5, 7] = float("nan"), float("inf"), -float("inf")
    out = OPS.scale_shift_act_native(y, *main, None, None, None, None, True)
    assert torch.equal(out, cases.forward(y, main, None, None, True)) or out[0, 3, 2, 2].isnan()
    assert out.isnan().sum() == 1 and out[1, 5, 0, 0] == float("inf") and out[1, 6, 5, 7] == 0
    grads = OPS.scale_shift_act_backward_native(torch.ones_like(y), y, *main, None, None, None, None, True, False)
    assert grads[0][0, 3, 2, 2] == 0 and grads[0].isfinite().all()
    pooled, index = OPS.scale_shift_act_pool_native(y, *main, True, 3, 2, 1)
    want, position = cases.pool(y, main, True, 3, 2, 1)
    torch.testing.assert_close(pooled, want, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(index, position)
    mean, var = OPS.channel_stats_native(y)
    assert mean[3].isnan() and var[3].isnan() and mean[5].isnan() and var[5].isnan()
    assert mean.isfinite().sum() == 14
    low = y.float().fill_(-float("inf"))  # without ReLU every element of a window may be -inf
    pooled, index = OPS.scale_shift_act_pool_native(low, *main, False, 3, 2, 1)
    want, position = cases.pool(low, main, False, 3, 2, 1)
    assert torch.equal(pooled, want) and torch.equal(index, position)


def test_bf16_rounding():
    values = torch.arange(2**16, dtype=torch.int32)
    as_float = ((values << 16) | torch.randint(0, 2**16, (2**16,), dtype=torch.int32)).view(torch.float32)
    one, zero = torch.ones(1), torch.zeros(1)
    for bits in (as_float, (values << 16 | 0x8000).view(torch.float32), (values << 16 | 0x7FFF).view(torch.float32)):
        # shift carries the float32 value into a bf16 result: 0*(0 - 0) + shift
        y = torch.zeros(1, 2**16, 1, 1, dtype=torch.bfloat16)
        c = torch.zeros(2**16)
        out = OPS.scale_shift_act_native(y, c, c, bits, None, None, None, None, False).flatten()
        want = bits.to(torch.bfloat16)
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out.view(torch.int16)[~want.isnan()], want.view(torch.int16)[~want.isnan()])
    assert (
        OPS.scale_shift_act_native(torch.full((1, 1, 1, 1), -0.0), one, zero, -zero, None, None, None, None, False) == 0
    )


def random_results(fmt, dtype):
    g = torch.Generator().manual_seed(3)
    y, residual, grad = (
        torch.randn(3, 48, 41, 37, generator=g).to(dtype).contiguous(memory_format=fmt) for _ in range(3)
    )
    main, res = (tuple(torch.randn(48, generator=g) for _ in range(3)) for _ in range(2))
    args = (y, *main, residual, *res, True)
    out, index = OPS.scale_shift_act_pool_native(y, *main, True, 3, 2, 1)
    return [
        OPS.scale_shift_act_native(*args),
        *OPS.scale_shift_act_backward_native(grad, *args, True),
        *OPS.channel_stats_native(y),
        out,
        *OPS.scale_shift_act_pool_backward_native(out, index, y, *main, True, 3, 2, 1),
    ]


@formats
@dtypes
def test_same_bits_for_any_number_of_threads(dtype, fmt):
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(random_results(fmt, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@formats
def test_masks_agree_with_the_forward_on_random_inputs(fmt):
    g = torch.Generator().manual_seed(5)
    y, residual = (torch.randn(2, 37, 30, 30, generator=g).contiguous(memory_format=fmt) for _ in range(2))
    main, res = (tuple(torch.randn(37, generator=g) for _ in range(3)) for _ in range(2))
    # put many pre-activations within rounding of zero
    residual = (
        residual * 1e-7 - cases.pre_activation(y, main).float() - cases.per_channel(res[2]).float()
    ) / cases.per_channel(res[0])
    residual = (residual + cases.per_channel(res[1])).float().contiguous(memory_format=fmt)
    out = OPS.scale_shift_act_native(y, *main, residual, *res, True)
    grad_shift_map = OPS.scale_shift_act_backward_native(
        torch.ones_like(y), y, torch.ones(37), *main[1:], None, None, None, None, False, False
    )
    assert grad_shift_map[0].eq(1).all()
    grads = OPS.scale_shift_act_backward_native(torch.ones_like(y), y, *main, residual, *res, True, True)
    kept = grads[3] != 0
    assert torch.equal(kept, out > 0) and 0.1 < kept.float().mean() < 0.9


def test_dtype_shape_and_device_errors():
    y, v = torch.zeros(2, 3, 4, 4), torch.zeros(3)
    op = OPS.scale_shift_act_native
    none = (None, None, None, None)

    def fails(match, f, *args, error=RuntimeError):
        with pytest.raises(error, match=match):
            f(*args)

    fails(r"y must be float32 or bfloat16, got float64", op, y.double(), v, v, v, *none, True)
    fails(r"y must be float32 or bfloat16, got int64", op, y.long(), v, v, v, *none, True)
    fails(r"y must be \[N, C, H, W\], got 3 dimensions: \[3, 4, 4\]", op, y[0], v, v, v, *none, True)
    fails(r"scale must be \[C\] = \[3\] .*got \[4\]", op, y, torch.zeros(4), v, v, *none, True)
    fails(r"center must be float32, got float64", op, y, v, v.double(), v, *none, True)
    fails(r"shift must be contiguous, got stride 2", op, y, v, v, torch.zeros(6)[::2], *none, True)
    fails(
        r"residual must have the shape \[2, 3, 4, 4\], got \[1, 3, 4, 4\]",
        op,
        y,
        v,
        v,
        v,
        y[:1],
        None,
        None,
        None,
        True,
    )
    fails(r"residual must have y's dtype float32, got bfloat16", op, y, v, v, v, y.bfloat16(), None, None, None, True)
    fails(r"given together, got 2 of 3", op, y, v, v, v, y, v, v, None, True)
    fails(r"need a residual, got none", op, y, v, v, v, None, v, v, v, True)
    back = OPS.scale_shift_act_backward_native
    fails(r"grad must have the shape", back, y[:, :2], y, v, v, v, *none, True, False)
    pool = OPS.scale_shift_act_pool_native
    fails(r"kernel must be from 1 to 15.*got 16", pool, y, v, v, v, True, 16, 2, 1)
    fails(r"kernel must be from 1 to 15.*got 0", pool, y, v, v, v, True, 0, 2, 0)
    fails(r"stride must be at least 1, got 0", pool, y, v, v, v, True, 3, 0, 1)
    fails(r"padding must be from 0 to half the kernel \(1\), got 2", pool, y, v, v, v, True, 3, 2, 2)
    fails(r"too small for a window of 7 with padding 0: \[2, 3, 4, 4\]", pool, y, v, v, v, True, 7, 2, 0)
    fails(r"too small", pool, y[:, :, :0], v, v, v, True, 3, 2, 1)
    out, index = pool(y, v, v, v, True, 3, 2, 1)
    pool_back = OPS.scale_shift_act_pool_backward_native
    fails(r"index must be uint8, got int64", pool_back, out, index.long(), y, v, v, v, True, 3, 2, 1)
    fails(
        r"grad must have the shape \[2, 3, 2, 2\], got \[2, 3, 4, 4\]", pool_back, y, index, y, v, v, v, True, 3, 2, 1
    )
    fails(r"index must have the shape", OPS.scale_shift_act_pool_gather_native, y, v, v, v, index[:1], True, 3, 2, 1)
    stats_back = OPS.channel_stats_backward_native
    fails(r"grad_mean must be \[C\] = \[3\]", stats_back, y, y, v, torch.zeros(1), v)


def test_wrong_index_reads_nothing_outside():
    y, main, *_ = problem((1, 16, 4, 4), "none", torch.float32, torch.channels_last)
    index = torch.full((1, 16, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert OPS.scale_shift_act_pool_gather_native(y, *main, index, True, 3, 2, 1).isnan().all()
    grads = OPS.scale_shift_act_pool_backward_native(torch.ones(1, 16, 2, 2), index, y, *main, True, 3, 2, 1)
    assert not any(g.any() for g in grads)


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("isa", [i for i in fastres.build_info()["isa_supported"] if i != fastres.build_info()["isa"]])
def test_other_instruction_sets(isa):
    """The exact tests above, with a lower instruction set forced."""
    rerun_with_isa(isa, __file__, "exact or stats or threads or masks or nan or rounding")
    assert python("import fastres; print(fastres.build_info()['isa'])", FASTRES_ISA=isa) == isa


def test_unknown_instruction_set_is_an_error_in_words():
    code = """
import torch, fastres
print(fastres.build_info()["native"], fastres.build_info()["isa"], fastres.build_info()["native_error"])
y, v = torch.zeros(1, 2, 3, 3), torch.zeros(2)
try:
    torch.ops.fastres.scale_shift_act_native(y, v, v, v, None, None, None, None, True)
except RuntimeError as error:
    print(error)
"""
    lines = python(code, FASTRES_ISA="bogus").splitlines()
    text = "FASTRES_ISA=bogus is not an instruction set of this build; expected one of: baseline"
    assert lines[0].startswith(f"False None {text}") and lines[1].startswith(text)
