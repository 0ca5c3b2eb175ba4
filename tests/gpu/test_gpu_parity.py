"""The GPU backends on a device against the float64 reference: the shapes and the rule of the emulated tests, and whole numbers
bit for bit."""

import pytest
import torch
from cases import LAYOUTS, lay_out, random_map, random_vectors
from gradient_cases import ARRIVING, DTYPES, PROLOGUES, arguments, tf32_peer
from gradient_cases import SHAPES as GRADIENT_SHAPES
from on_device import moved, on_backends, poisoned, precision, require_backend  # noqa: F401
from parity import SLACK, assert_parity, error_of, floor_of
from triton_cases import MEANS, POINTS, POOLS, whole_numbers, whole_vectors
from triton_conv_cases import DTYPE_OF, EMPTY, KINDS, SHAPES, cut, integers, normals, peer_of, truth_of

from fastres.kernels.common.layout import memory_format_of
from fastres.kernels.conv_act import reference as act_reference
from fastres.kernels.conv_stats import reference
from fastres.ops.schemas import overload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]


def call(op, backend, *arguments, suffix=""):
    """The op on the device; results back on the CPU."""
    found = overload(op, backend, suffix)(*(moved(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    return [t.cpu() for t in (found if isinstance(found, tuple) else (found,))]


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


@on_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_conv_stats(case, kind, backend):
    require_backend("conv_stats", backend, DTYPE_OF[kind])
    for inputs in (integers(case, kind), normals(case, kind, SHAPES.index(case))):
        with precision(kind):
            x, *rest = inputs.x, inputs.weight, *inputs.vectors, inputs.relu, *case.geometry, True
            y, mean, var = call("conv_stats", backend, x, *rest)
        truth = truth_of(case, inputs)
        assert y.dtype == x.dtype and y.is_contiguous(memory_format=memory_format_of(x))
        if torch.equal(x, x.round()):
            assert torch.equal(y, truth[0].to(y.dtype)), f"{int((y != truth[0].to(y.dtype)).sum())} differ"
            stored = y.double()
            torch.testing.assert_close(
                mean.double(), stored.mean((0, 2, 3)), rtol=1e-6, atol=1e-6 * float(stored.abs().max())
            )
            torch.testing.assert_close(var.double(), stored.var((0, 2, 3), correction=0), rtol=4e-6, atol=1e-6)
        else:
            for name, own, peer, exact in zip(
                ("y", "mean", "var"), (y, mean, var), peer_of(case, inputs, kind), truth, strict=True
            ):
                assert_parity(own, peer, exact, name)


@on_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_conv_act(case, kind, backend):
    require_backend("conv_act", backend, DTYPE_OF[kind])
    index = SHAPES.index(case)
    relu, with_bias, with_residual = index % 2 == 0, index % 3 != 0, index % 5 != 0
    for inputs in (integers(case, kind), normals(case, kind, index)):
        x, weight = inputs.x, inputs.weight
        bias, residual = inputs.bias if with_bias else None, inputs.residual if with_residual else None
        with precision(kind):
            (out,) = call("conv_act", backend, x, weight, bias, residual, relu, *case.geometry)
        truth = act_reference.forward(*wide((x, weight, bias, residual, relu, *case.geometry)))
        operands = (cut(x), cut(weight)) if kind == "tf32" else (x, weight)
        if torch.equal(x, x.round()):
            assert torch.equal(out, truth.to(x.dtype))
        assert_parity(out, act_reference.forward(*operands, bias, residual, relu, *case.geometry), truth)


@on_backends
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("index", range(len(GRADIENT_SHAPES)), ids=lambda i: str(GRADIENT_SHAPES[i]))
def test_gradients(index, kind, backend):
    """Whole numbers bit for bit; random ones by the rule, sums by the peer's worst of some draws."""
    require_backend("conv_stats", backend, DTYPES[kind])
    shape, arriving = GRADIENT_SHAPES[index], ARRIVING[index % 7 if index % 3 else 0]
    prologue, layout = PROLOGUES[(index // 2) % 3], LAYOUTS[(index // 3) % 4]
    a = arguments(shape, DTYPES[kind], arriving, prologue, layout, seed=index)
    adds, scales = index % 4 == 1, index % 4 == 2
    addend = whole_numbers(tuple(a.x.shape), a.x.dtype, layout, 1) if adds else None
    a = a._replace(addend=addend, factor=whole_vectors(a.weight.shape[0], 2)[0] if scales else None)
    with precision(kind):
        ours = call("conv_stats", backend, *a, suffix="backward")
    for got, exact in zip(ours, reference.backward(*a.double()), strict=True):
        assert got.shape == exact.shape and torch.equal(got, exact.to(got.dtype))

    peers = tf32_peer if kind == "tf32" else lambda b: reference.backward(*b)
    a = arguments(shape, DTYPES[kind], arriving, prologue, layout, exact=False, seed=index)
    with precision(kind):
        ours = call("conv_stats", backend, *a, suffix="backward")
    truth, peer = reference.backward(*a.double()), peers(a)
    for got, other, exact in zip(ours[:2], peer, truth, strict=False):
        assert_parity(got, other, exact)
    worst = [0.0, 0.0]
    for seed in range(4):
        b = arguments(shape, DTYPES[kind], arriving, prologue, layout, exact=False, seed=100 * seed + index)
        for j, (other, exact) in enumerate(zip(peers(b)[2:], reference.backward(*b.double())[2:], strict=True)):
            if exact.any():
                worst[j] = max(worst[j], error_of(other, exact, "max") / exact.abs().max().item())
    for got, exact, relative in zip(ours[2:], truth[2:], worst, strict=True):
        allowed = SLACK * relative * exact.abs().max().item() if exact.numel() else 0.0
        assert error_of(got, exact, "max") <= allowed + floor_of(exact, got.dtype)


def compare(op, backend, arguments, exact, need=()):
    """Forward and backward of a pointwise op: bit for bit, or by the rule against the reference in the working dtype."""
    out, *index = call(op, backend, *arguments)
    peer, truth = overload(op, "reference")(*arguments), overload(op, "reference")(*wide(arguments))
    if index:
        peer, truth = peer[0], truth[0]
    generator = torch.Generator().manual_seed(3)
    up = torch.randint(-4, 5, tuple(out.shape), generator=generator).to(out.dtype)
    up = lay_out(up, "channels_last") if out.dim() == 4 else up
    places = overload(op, "reference")(*arguments)[1:] if index else ()
    grads = call(op, backend, up, *index, *arguments, *need, suffix="backward")
    backward = overload(op, "reference", "backward")
    others = backward(up, *places, *arguments, *need)
    exacts = backward(up.double(), *places, *wide(arguments), *need)
    assert all(torch.equal(a, b) for a, b in zip(index, places, strict=True))
    triples = [(out, peer, truth), *zip(grads, others, exacts, strict=True)]
    for got, other, true in triples:
        if exact:
            assert torch.equal(got, true.to(got.dtype))
        else:
            assert_parity(got, other, true)


@on_backends
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("op", ("scale_shift_act", "scale_shift_act_mean"))
def test_points(op, dtype, backend):
    require_backend(op, backend, dtype)
    for index, shape in enumerate(POINTS if op == "scale_shift_act" else MEANS):
        kind, relu, layout = index % 3, index % 2 == 0, LAYOUTS[(index // 3) % 4]
        c = shape[1]
        for exact, maps, vectors in (
            (True, whole_numbers, whole_vectors), (False, random_map, lambda c, s: random_vectors(c, 3, seed=s)),
        ):  # fmt: skip
            y, rest = maps(shape, dtype, layout, 1), maps(shape, dtype, layout, 2)
            extra = ((None,) * 4, (rest, None, None, None), (rest, *vectors(c, 4)))[kind]
            compare(op, backend, (y, *vectors(c, 3), *extra, relu), exact, need=(True,))


@on_backends
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_pools(dtype, backend):
    require_backend("scale_shift_act_pool", backend, dtype)
    for index, case in enumerate(POOLS):
        y = whole_numbers(case.shape, dtype, LAYOUTS[(index // 3) % 4], 1)
        compare("scale_shift_act_pool", backend, (y, *whole_vectors(case.c, 3), index % 2 == 0, *case[4:]), True)


@on_backends
def test_empty_batches_and_groups_are_served(backend):
    require_backend("conv_stats", backend, torch.float32)
    with precision("fp32"):
        inputs = integers(EMPTY, "fp32")
        y, mean, var = call(
            "conv_stats", backend, inputs.x, inputs.weight, *inputs.vectors, inputs.relu, *EMPTY.geometry, True
        )
        assert y.shape == truth_of(EMPTY, inputs)[0].shape and mean.isnan().all() and var.isnan().all()
        x, weight = lay_out(random_map((2, 8, 6, 6), torch.float32), "channels_last"), torch.randn(4, 4, 3, 3)
        conv = ([1, 1], [1, 1], [1, 1], 2)
        y, mean, var = call("conv_stats", backend, x, weight, None, None, None, False, *conv, True)
        assert torch.allclose(y, torch.conv2d(x, weight, None, *conv), atol=1e-5)
        grads = call(
            "conv_stats",
            backend,
            y,
            mean,
            var,
            x,
            weight,
            y,
            mean,
            *[None] * 3,
            False,
            *conv,
            True,
            True,
            suffix="backward",
        )
        exact = reference.backward(y, mean, var, x, weight, y, mean, *[None] * 3, False, *conv, True, True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(grads, exact, strict=True))
