"""conv_stats and conv_act by the convolution engine: values, statistics and every gradient against float64."""

from itertools import product

import pytest
import torch
from cases import DTYPES, random_map, random_vectors
from conftest import run_with_isa
from parity import assert_parity
from test_conv_engine import GROUPED, PLAIN, Case, out_shape

import fastres
from fastres import _library, ops

pytestmark = pytest.mark.skipif(
    _library.native_error() is not None, reason=f"no native library: {_library.native_error()}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])

CASES = (
    *PLAIN[:7],
    PLAIN[8]._replace(
        n=3
    ),  # of 2 images, the chance of three sums' rounding decides whether the peer is within half of ours
    PLAIN[11],
    PLAIN[13],
    PLAIN[14],
    Case(2, 130, 6, 7, 36, 1, 1),
    Case(3, 16, 33, 20, 16, 3, 3, padding=(1, 1)),
    Case(1, 288, 5, 4, 40, 3, 3, padding=(1, 1)),
    Case(2, 32, 5, 6, 33, 3, 3),
    PLAIN[-1],
    GROUPED[0],
    GROUPED[1],
    GROUPED[7],
)
PROLOGUES = ("none", "affine", "relu")
UPSTREAM = ("all", "y", "stats", "mean", "var")  # which outputs a gradient comes from


def tensors_of(case: Case, dtype: torch.dtype, prologue: str) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(case.c)
    inner = case.c // case.groups
    weight = torch.randn(case.k, inner, case.r, case.s, generator=g) / (inner * case.r * case.s) ** 0.5
    vectors = [None] * 3 if prologue == "none" else random_vectors(case.c, 3)
    return [random_map((case.n, case.c, case.h, case.w), dtype), weight.to(dtype), *vectors]


def call(backend: str, case: Case, tensors, prologue: str, upstream: str, dtype: torch.dtype | None = None):
    """(outputs, gradients by name) of one backend; in `dtype` if given."""
    inputs = [None if t is None else (t.to(dtype) if dtype else t).detach().clone() for t in tensors]
    for i, t in enumerate(inputs):
        if t is not None and i != 3:  # the center is a constant
            t.requires_grad_()
    stride, padding, dilation, groups = case.geometry
    with fastres.use_backend(backend):
        outputs = ops.conv_stats(
            *inputs, relu=prologue == "relu", stride=stride, padding=padding, dilation=dilation, groups=groups
        )
    used = {"all": (0, 1, 2), "y": (0,), "stats": (1, 2), "mean": (1,), "var": (2,)}[upstream]
    g = torch.Generator().manual_seed(7)
    # The same gradients for everybody, representable in the working dtype; a mean's is a sum over many positions.
    working, n = tensors[0].dtype, max(1, outputs[0][:, 0].numel())
    ups = [torch.randn(o.shape, generator=g).to(working).to(o.dtype) * (n if i else 1) for i, o in enumerate(outputs)]
    names = [name for name, t in zip(("x", "weight", "scale", "center", "shift"), inputs, strict=True) if t is not None]
    wanted = [
        (name, t) for name, t in zip(names, filter(lambda t: t is not None, inputs), strict=True) if t.requires_grad
    ]
    grads = torch.autograd.grad([outputs[i] for i in used], [t for _, t in wanted], [ups[i] for i in used])
    return outputs, dict(zip([name for name, _ in wanted], grads, strict=True))


def check(case: Case, dtype: torch.dtype, prologue: str, upstream: str) -> None:
    tensors = tensors_of(case, dtype, prologue)
    ours, ours_g = call("native", case, tensors, prologue, upstream)
    peer, peer_g = call("library", case, tensors, prologue, upstream)
    truth, truth_g = call("reference", case, tensors, prologue, upstream, torch.float64)
    what = f"{case} {prologue} {upstream}"
    for name, *group in zip(("y", "mean", "var"), ours, peer, truth, strict=True):
        assert_parity(*group, what=f"{what}: {name}")
    for name in truth_g:
        assert ours_g[name].dtype == peer_g[name].dtype
        assert_parity(ours_g[name], peer_g[name], truth_g[name], what=f"{what}: gradient of {name}")
    if case.n:  # gradients lie in memory as what they belong to
        assert ours_g["x"].is_contiguous(memory_format=torch.channels_last) and ours_g["weight"].is_contiguous()


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_conv_stats(prologue, case, dtype):
    for upstream in UPSTREAM if case.n else ("y",):
        check(case, dtype, prologue, upstream)


@dtypes
@pytest.mark.parametrize("ratio", [1e2, 1e4])
@pytest.mark.parametrize("case", [PLAIN[0], PLAIN[2], PLAIN[11], GROUPED[0], Case(4, 16, 40, 37, 48, 3, 3)], ids=str)
def test_statistics_with_a_far_mean(case, ratio, dtype):
    """The variance of what was stored, where the mean is many times the spread."""
    x, weight, *_ = tensors_of(case, dtype, "none")
    weight = weight.abs() + 0.1
    x = (x.double() + ratio * (1 if dtype == torch.float32 else 0.05)).to(dtype)
    stride, _, dilation, groups = case.geometry
    kwargs = {"stride": stride, "padding": [0, 0], "dilation": dilation, "groups": groups}
    with fastres.use_backend("native"):
        y, mean, var = ops.conv_stats(x, weight, **kwargs)
    wide = y.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


def test_statistics_of_a_constant_map_are_exact():
    for case in (Case(2, 32, 9, 14, 48, 1, 1), GROUPED[0]._replace(padding=(0, 0))):
        x = torch.full((case.n, case.c, case.h, case.w), 3.0)
        weight = torch.ones(case.k, case.c // case.groups, case.r, case.s)
        with fastres.use_backend("native"):
            y, mean, var = ops.conv_stats(x, weight, groups=case.groups)
        assert torch.equal(mean, torch.full((case.k,), 3.0 * weight[0].numel())) and not var.any()
        assert torch.equal(y, torch.full_like(y, 3.0 * weight[0].numel()))


@dtypes
def test_integer_gradients_exactly(dtype):
    """Small integers: every sum is exact in float32, so every bit of dx, dw, dscale and dshift is known."""
    for case in (CASES[0], CASES[1], CASES[2], PLAIN[11], Case(3, 20, 9, 8, 36, 3, 3, padding=(1, 1))):
        g = torch.Generator().manual_seed(case.k)

        def draw(*shape, high=3, g=g):
            return torch.randint(-high, high + 1, shape, generator=g).double()

        x, weight = draw(case.n, case.c, case.h, case.w), draw(case.k, case.c, case.r, case.s, high=2)
        scale, center, shift = draw(case.c, high=2), draw(case.c, high=1), draw(case.c, high=1)
        up = draw(*out_shape(case), high=1)
        geometry = dict(zip(("stride", "padding", "dilation", "groups"), case.geometry, strict=True))
        results = []
        for backend, kind in (("native", dtype), ("reference", torch.float64)):
            wide = torch.float32 if kind == dtype else torch.float64
            leaves = [t.to(kind if t.dim() == 4 else wide).requires_grad_() for t in (x, weight, scale, shift)]
            with fastres.use_backend(backend):
                y, _, _ = ops.conv_stats(
                    leaves[0], leaves[1], leaves[2], center.to(wide), leaves[3], relu=True, **geometry
                )
            results.append((y, *torch.autograd.grad(y, leaves, up.to(kind))))
        # scale multiplies once more after dx was summed; a bf16 dscale sums what float holds exactly
        for name, ours, truth in zip(("y", "x", "weight", "scale", "shift"), *results, strict=True):
            assert torch.equal(ours, truth.to(ours.dtype)), (case, name)


@dtypes
def test_same_bits_again(dtype):
    for case in (CASES[0], CASES[1], CASES[3]):
        tensors = tensors_of(case, dtype, "relu")
        first, first_g = call("native", case, tensors, "relu", "all")
        again, again_g = call("native", case, tensors, "relu", "all")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(first_g[name], again_g[name]) for name in first_g)


@dtypes
@pytest.mark.parametrize("case", [PLAIN[0], PLAIN[3], PLAIN[11], GROUPED[0]], ids=str)
def test_conv_act_gradients(case, dtype):
    x, weight, *_ = tensors_of(case, dtype, "none")
    bias, residual = random_vectors(case.k, 1)[0], random_map(out_shape(case), dtype, seed=5)
    geometry = dict(zip(("stride", "padding", "dilation", "groups"), case.geometry, strict=True))
    for relu in (True, False):
        results = []
        for backend, kind in (("native", None), ("library", None), ("reference", torch.float64)):
            leaves = [
                (t.to(kind) if kind else t).detach().clone().requires_grad_() for t in (x, weight, bias, residual)
            ]
            with fastres.use_backend(backend):
                y = ops.conv_act(*leaves, relu=relu, **geometry)
            up = random_map(tuple(y.shape), dtype, seed=9).to(y.dtype)
            results.append((y, *torch.autograd.grad(y, leaves, up)))
        for name, *group in zip(("y", "x", "weight", "bias", "residual"), *results, strict=True):
            assert_parity(*group, what=f"{case} {relu} {name}")


def compact() -> None:
    """The same checks on fewer shapes, for every instruction set."""
    for dtype, case in product(DTYPES, (CASES[0], CASES[1], CASES[3], CASES[8], GROUPED[0], GROUPED[7])):
        check(case, dtype, "relu", "all")
        check(case, dtype, "none", "stats")
    test_statistics_of_a_constant_map_are_exact()
    for dtype in DTYPES:
        test_integer_gradients_exactly(dtype)


@pytest.mark.parametrize("isa", fastres.build_info()["isa_supported"])
def test_instruction_sets(isa):
    run_with_isa(isa, "from test_conv_engine_training import *\ncompact()")


def test_errors():
    x, w, y = torch.zeros(2, 4, 6, 6), torch.zeros(8, 4, 3, 3), torch.zeros(2, 8, 4, 4)
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    vectors = [torch.zeros(4)] * 3
    forward = torch.ops.fastres.conv_forward_native
    gradients = (torch.ops.fastres.conv_input_gradient_native, torch.ops.fastres.conv_weight_gradient_native)

    def fails(text, f, *args):
        with pytest.raises(RuntimeError, match=text):
            f(*args)

    fails(
        r"scale, center and shift must be given together, got 2 of 3",
        forward,
        x,
        w,
        *vectors[:2],
        None,
        True,
        *geometry,
        True,
    )
    fails(r"scale must be \[C\] = \[4\]", forward, x, w, torch.zeros(3), *vectors[1:], True, *geometry, True)
    fails(
        r"stride must have 1 or 2 elements|Expected|stride",
        forward,
        x,
        w,
        None,
        None,
        None,
        True,
        [1, 1, 1],
        *geometry[1:],
        True,
    )
    if _library.has_weight_gradient():
        for f in gradients:
            fails(r"grad_y must have the shape \[2, 8, 4, 4\], got \[2, 8, 5, 4\]",
                  f, torch.zeros(2, 8, 5, 4), y, None, None, None, x, w, None, None, None, False, *geometry)  # fmt: skip
            fails(r"grad_mean and grad_var need the mean, got none",
                  f, y, y, None, torch.zeros(8), None, x, w, None, None, None, False, *geometry)  # fmt: skip
    fails(r"only stride 1 and one group are served, got stride \[2, 2\] and 1 groups",
          gradients[0], torch.zeros(2, 8, 2, 2), torch.zeros(2, 8, 2, 2), None, None, None, x, w, None, None, None, False,
          [2, 2], *geometry[1:])  # fmt: skip
