"""Every op x backend: values, gradients, gradcheck, opcheck, layouts, dtypes, empty batches, errors."""

import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, DTYPES, LAYOUTS, MAPS, lay_out, random_map, random_vectors
from parity import assert_parity

import fastres
from fastres import _library, backends, ops
from fastres.ops.schemas import HELPERS, OPS, overload

CPU_BACKENDS = ("reference", "library", "native")


def backends_of(op: str) -> list[str]:
    return [b for b in CPU_BACKENDS if b in OPS[op].backends]


def call(op, backend, *args, **kwargs):
    with fastres.use_backend(backend):
        return getattr(ops, op)(*args, **kwargs)


def leaves(*tensors, dtype=None):
    return [None if t is None else (t.to(dtype) if dtype else t).detach().clone().requires_grad_() for t in tensors]


def compare(op, backend, tensors, kwargs, truth_dtypes=torch.float64):
    """Outputs and all gradients of one call by the tolerance rule: backend against reference in the same dtype."""
    results = []
    for name, dtype in ((backend, None), ("reference", None), ("reference", truth_dtypes)):
        inputs = leaves(*tensors, dtype=dtype)
        outputs = call(op, name, *inputs, **kwargs)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.numel()]
        gen = torch.Generator().manual_seed(7)
        # the same upstream gradients for all three, representable in the working dtype
        working = {o.dtype for o in outputs} and next(t for t in tensors if t is not None).dtype
        ups = [torch.randn(o.shape, generator=gen).to(working).to(o.dtype) for o in outputs]
        wanted = [t for t in inputs if t is not None]
        pairs = [(o, up) for o, up in zip(outputs, ups, strict=True) if o.requires_grad]
        grads = (
            torch.autograd.grad([o for o, _ in pairs], wanted, [up for _, up in pairs], allow_unused=True)
            if pairs
            else []
        )
        results.append((outputs, [g for g in grads if g is not None]))
    (ours, ours_g), (peer, peer_g), (truth, truth_g) = results
    for i, group in enumerate(zip(ours, peer, truth, strict=True)):
        assert_parity(*group, what=f"output {i}")
    for i, group in enumerate(zip(ours_g, peer_g, truth_g, strict=True)):
        assert_parity(*group, what=f"gradient {i}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("backend", ["library", "native"])
def test_scale_shift_act(backend, shape, dtype, layout):
    y, residual = random_map(shape, dtype, layout), random_map(shape, dtype, layout, seed=2)
    vectors, more = random_vectors(shape[1], 3), random_vectors(shape[1], 3, seed=3)
    for extra in ((None,) * 4, (residual, None, None, None), (residual, *more)):
        for relu in (True, False):
            compare("scale_shift_act", backend, (y, *vectors, *extra), {"relu": relu})


MEAN_MAPS = [*MAPS, (2, 8, 1, 1), (1, 6, 13, 11)]


def mean_cases(shape, dtype, layout):
    """(tensors, keyword arguments)."""
    y, residual = random_map(shape, dtype, layout), random_map(shape, dtype, layout, seed=2)
    vectors, more = random_vectors(shape[1], 3), random_vectors(shape[1], 3, seed=3)
    for extra in ((None,) * 4, (residual, None, None, None), (residual, *more)):
        for relu in (True, False):
            yield (y, *vectors, *extra), {"relu": relu}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "channel_slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MEAN_MAPS, ids=str)
def test_scale_shift_act_mean(shape, dtype, layout):
    for tensors, kwargs in mean_cases(shape, dtype, layout):
        compare("scale_shift_act_mean", "library", tensors, kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MEAN_MAPS, ids=str)
def test_native_mean_is_the_two_ops_apart(shape, dtype):
    for tensors, kwargs in mean_cases(shape, dtype, "channels_last"):
        results = []
        for fused in (True, False):
            inputs = leaves(*tensors)
            if fused:
                out = call("scale_shift_act_mean", "native", *inputs, **kwargs)
            else:
                out = call("scale_shift_act", "native", *inputs, **kwargs).mean((2, 3))
            wanted = [t for i, t in enumerate(inputs) if t is not None and i not in (2, 6)]  # centers have no gradient
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
            results.append((out, *torch.autograd.grad(out, wanted, up)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("backend", ["library", "native"])
def test_scale_shift_act_pool(backend, window, dtype, layout):
    kernel, stride, padding = window
    for shape in ((2, 17, 9, 11), (1, 64, 6, 6), (2, 3, 5, 5), (0, 8, 6, 6)):
        y = random_map(shape, dtype, layout)
        kwargs = {"kernel": kernel, "stride": stride, "padding": padding}
        compare("scale_shift_act_pool", backend, (y, *random_vectors(shape[1], 3)), kwargs)


@pytest.mark.parametrize("backend", backends_of("scale_shift_act_pool"))
def test_pool_equals_torch(backend):
    y = random_map((2, 16, 13, 11), torch.float32)
    scale, center, shift = random_vectors(16, 3)
    out = call("scale_shift_act_pool", backend, y, scale, center, shift)
    act = call("scale_shift_act", backend, y, scale, center, shift)
    assert torch.equal(out, F.max_pool2d(act, 3, 2, 1))


@pytest.mark.parametrize("backend", backends_of("scale_shift_act_pool"))
def test_pool_recipe_rebuilds_the_map(backend):
    y = random_map((2, 16, 13, 11), torch.float32).requires_grad_()
    vectors = random_vectors(16, 3)
    out = call("scale_shift_act_pool", backend, y, *vectors)
    recipe = out._fastres_recipe
    assert torch.equal(recipe.rebuild(*recipe.tensors), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("prologue", ["none", "affine", "relu"])
def test_conv_stats(conv, dtype, prologue):
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(conv.k, conv.c // conv.groups, conv.r, conv.r, generator=g) / conv.r).to(dtype)
    for layout in ("channels_last", "contiguous", "channel_slice"):
        x = random_map((conv.n, conv.c, conv.h, conv.w), dtype, layout)
        vectors = [None] * 3 if prologue == "none" else random_vectors(conv.c, 3)
        kwargs = {"relu": prologue == "relu", **conv.arguments}
        compare("conv_stats", "library", (x, weight, *vectors), kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_conv_act(conv, dtype, relu):
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(conv.k, conv.c // conv.groups, conv.r, conv.r, generator=g) / conv.r).to(dtype)
    bias = torch.randn(conv.k, generator=g)
    for layout in ("channels_last", "contiguous"):
        x = random_map((conv.n, conv.c, conv.h, conv.w), dtype, layout)
        plain = F.conv2d(x, weight, None, **conv.arguments)
        for residual in (None, random_map(tuple(plain.shape), dtype, layout, seed=3)):
            compare("conv_act", "library", (x, weight, bias, residual), {"relu": relu, **conv.arguments})


def problem(op, dtype=torch.float64, n=2):
    """(tensors, keyword arguments) of a small problem that exercises every input of the op."""
    y = random_map((n, 4, 5, 5), dtype)
    a, b = random_vectors(4, 3, torch.float64), random_vectors(4, 3, torch.float64, seed=4)
    weight = torch.randn(3, 4, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    if dtype != torch.float64:
        a, b = [v.float() for v in a], [v.float() for v in b]
    if op in ("scale_shift_act", "scale_shift_act_mean"):
        return (y, *a, random_map((n, 4, 5, 5), dtype, seed=6), *b), {"relu": True}
    if op == "scale_shift_act_pool":
        return (y, *a), {"relu": True}
    if op == "batch_norm_act":
        return (y, a[0], a[2], random_map((n, 4, 5, 5), dtype, seed=6)), {"relu": True}
    if op == "conv_stats":
        return (y, weight, *a), {"relu": True, "padding": 1, "stride": 2}
    residual = random_map((n, 3, 5, 5), dtype, seed=9)
    return (y, weight, b[0][:3].contiguous(), residual), {"relu": True, "padding": 1}


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("backend", ["reference", "library"])
def test_gradcheck(op, backend):
    tensors, kwargs = problem(op)

    def f(*inputs):
        out = call(op, backend, *inputs, **kwargs)
        return tuple(o for o in out if o.is_floating_point()) if isinstance(out, tuple) else out

    centers = {
        "conv_stats": (3,),
        "scale_shift_act": (2, 6),
        "scale_shift_act_mean": (2, 6),
        "scale_shift_act_pool": (2,),
    }.get(op, ())
    # center is a constant to autograd by definition
    inputs = [t.detach().clone().requires_grad_(i not in centers) for i, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(f, inputs)


def dispatcher_arguments(op, dtype):
    tensors, _ = problem(op, dtype)
    tensors = tuple(t if t is None else t.clone().requires_grad_() for t in tensors)
    if op in ("scale_shift_act", "scale_shift_act_mean"):
        return (*tensors, True)
    if op == "scale_shift_act_pool":
        return (*tensors, True, 3, 2, 1)
    if op == "batch_norm_act":
        return (*tensors, 1e-5, True)
    if op == "conv_stats":
        return (*tensors, True, [2, 2], [1, 1], [1, 1], 1, True)
    return (*tensors, True, [1, 1], [1, 1], [1, 1], 1)


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in OPS for b in backends_of(op)])
def test_opcheck(op, backend):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(overload(op, backend), dispatcher_arguments(op, dtype))


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in OPS for b in backends_of(op)])
def test_opcheck_backward(op, backend):
    """Schema and fake kernel of the backward ops, with arguments as autograd passes them."""
    seen = []
    backward = overload(op, backend, "backward")

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is backward:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    out = overload(op, backend)(*dispatcher_arguments(op, torch.float32))
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    with Spy():
        torch.autograd.backward(out, [torch.randn_like(o) for o in out])
    assert len(seen) == 1
    args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in seen[0])
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_helpers():
    y = random_map((2, 17, 5, 5), torch.float32)
    mean, _ = torch.ops.fastres.channel_stats_native(y)
    utils = ("test_schema", "test_faketensor")
    assert set(HELPERS) >= {
        "scale_shift_act_backward_native_",
        "channel_stats_native",
        "channel_stats_backward_native",
        "conv_forward_native",
        "conv_input_gradient_native",
        "conv_weight_gradient_native",
    }
    torch.library.opcheck(
        torch.ops.fastres.scale_shift_act_backward_native_.default,
        (torch.randn_like(y), y, *random_vectors(17, 3), True),
        test_utils=utils,
    )
    torch.library.opcheck(torch.ops.fastres.channel_stats_native.default, (y,), test_utils=utils)
    args = (torch.randn_like(y), y, mean, torch.randn(17), torch.randn(17))
    torch.library.opcheck(torch.ops.fastres.channel_stats_backward_native.default, args, test_utils=utils)
    weight, vectors, conv = torch.randn(8, 17, 3, 3), random_vectors(17, 3), ((1, 1), (1, 1), (1, 1), 1)
    args = (y, weight, *vectors, True, *conv, True)
    torch.library.opcheck(torch.ops.fastres.conv_forward_native.default, args, test_utils=utils)
    out, mean, _ = torch.ops.fastres.conv_forward_native(*args)
    args = (torch.randn_like(out), out, mean, torch.randn(8), torch.randn(8), y, weight, *vectors, True, *conv)
    torch.library.opcheck(torch.ops.fastres.conv_input_gradient_native.default, args, test_utils=utils)
    if _library.has_weight_gradient():
        torch.library.opcheck(torch.ops.fastres.conv_weight_gradient_native.default, args, test_utils=utils)


@pytest.mark.parametrize(("op", "backend"), [(op, b) for op in OPS for b in backends_of(op)])
def test_double_backward_is_an_explicit_error(op, backend):
    tensors, kwargs = problem(op, torch.float32)
    inputs = [t.clone().requires_grad_() for t in tensors]
    out = call(op, backend, *inputs, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward of .* is not supported"):
        grad.sum().backward()


def test_in_place_backward_equals_the_other_one():
    for layout in ("channels_last", "contiguous"):
        y, grad = random_map((3, 17, 5, 9), torch.float32, layout), random_map((3, 17, 5, 9), torch.float32, layout, 4)
        vectors = random_vectors(17, 3)
        expected = torch.ops.fastres.scale_shift_act_backward_native(grad, y, *vectors, *[None] * 4, True, False)
        sums = torch.ops.fastres.scale_shift_act_backward_native_(grad, y, *vectors, True)
        assert all(torch.equal(a, b) for a, b in zip((grad, *sums), expected[:3], strict=True))
    with pytest.raises(RuntimeError, match="grad must be dense"):
        torch.ops.fastres.scale_shift_act_backward_native_(lay_out(grad, "channel_slice"), y, *vectors, True)


def test_every_backend_has_the_schema_of_its_op():
    for op, schema in OPS.items():
        texts = {str(overload(op, b)._schema).split("(", 1)[1] for b in schema.backends}
        assert len(texts) == 1
        texts = {str(overload(op, b, "backward")._schema).split("(", 1)[1] for b in schema.backends}
        assert len(texts) == 1


def test_composition_is_batch_norm_in_float64():
    """conv_stats, bn_coefficients and scale_shift_act compose into nn.BatchNorm2d, outputs and gradients."""
    torch.manual_seed(0)
    conv, bn = torch.nn.Conv2d(5, 7, 3, padding=1, bias=False).double(), torch.nn.BatchNorm2d(7).double()
    torch.nn.init.normal_(bn.weight)
    x = (torch.randn(3, 5, 6, 6, dtype=torch.float64) * 1e-3 + 1e3).requires_grad_()  # |mean| much larger than std
    residual = torch.randn(3, 7, 6, 6, dtype=torch.float64, requires_grad=True)
    y, mean, var = ops.conv_stats(x, conv.weight, padding=1)
    out = ops.scale_shift_act(y, *ops.bn_coefficients(mean, var, bn.weight, bn.bias, bn.eps), residual)
    expected = (bn(conv(x)) + residual).relu()
    assert (out - expected).abs().max() < 1e-8
    up = torch.randn_like(out)
    inputs = [x, residual, conv.weight, bn.weight, bn.bias]
    for ours, truth in zip(
        torch.autograd.grad(out, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True
    ):
        assert (ours - truth).norm() <= 1e-7 * truth.norm()


@pytest.mark.parametrize("backend", backends_of("scale_shift_act"))
def test_nan_passes_through(backend):
    y = random_map((2, 8, 4, 4), torch.float32)
    y[1, 3, 2, 2] = float("nan")
    out = call("scale_shift_act", backend, y, *random_vectors(8, 3))
    assert out.isnan().sum() == 1
    assert out[1, 3, 2, 2].isnan()


def test_autocast_casts_maps_and_keeps_coefficients():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, mean, var = ops.conv_stats(x, weight)
        out = ops.scale_shift_act(y, *ops.bn_coefficients(mean, var, None, None, 1e-5))
    assert (y.dtype, mean.dtype, var.dtype, out.dtype) == (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)


class TestErrors:
    x = torch.randn(2, 4, 6, 6)
    weight = torch.randn(8, 4, 3, 3)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.randn(2, 5, 6, 6), "expected 4 channels, got 5"),
            (torch.randn(4, 6, 6), "expected a 4-D tensor"),
            (torch.zeros(2, 4, 6, 6, dtype=torch.uint8), "floating-point"),
            (torch.randn(2, 4, 6, 6, device="meta"), "is on meta, but weight is on cpu"),
            (torch.randn(2, 4, 6, 6, dtype=torch.float64), "torch.float64, but weight is torch.float32"),
        ],
    )
    def test_wrong_maps(self, x, message):
        for op in (ops.conv_stats, ops.conv_act):
            with pytest.raises(ValueError, match=message):
                op(x, self.weight)

    def test_wrong_vectors(self):
        v, short = torch.ones(4), torch.ones(3)
        with pytest.raises(ValueError, match=r"shift must be \[4\]"):
            ops.conv_stats(self.x, self.weight, v, v, short)
        with pytest.raises(ValueError, match="scale given without center, shift"):
            ops.conv_stats(self.x, self.weight, v)
        with pytest.raises(ValueError, match="residual has shape"):
            ops.scale_shift_act(self.x, v, v, v, self.x[:1])
        with pytest.raises(ValueError, match="residual has shape"):
            ops.conv_act(self.x, self.weight, None, self.x)
        with pytest.raises(ValueError, match="does not fit"):
            ops.scale_shift_act_pool(self.x, v, v, v, kernel=15, padding=0)

    def test_unknown_and_unfit_backends(self, monkeypatch):
        with (
            pytest.raises(RuntimeError, match=r"unknown backend 'nativ'.*did you mean 'native'"),
            fastres.use_backend("nativ"),
        ):
            pass
        v = torch.ones(4, dtype=torch.float64)
        with fastres.use_backend("native"), pytest.raises(RuntimeError, match="native takes float32, bfloat16"):
            ops.scale_shift_act(self.x.double(), v, v, v)
        with fastres.use_backend("cuda"), pytest.raises(RuntimeError, match="runs on cuda tensors, not on cpu"):
            ops.scale_shift_act(self.x, *[torch.ones(4)] * 3)
        for op in (ops.conv_act, ops.conv_stats):
            with fastres.use_backend("cuda"), pytest.raises(RuntimeError, match="runs on cuda tensors, not on cpu"):
                op(self.x, self.weight)
        with fastres.use_backend("cuda"):  # cuda has no pool: the request does not concern it
            ops.scale_shift_act_pool(self.x, *[torch.ones(4)] * 3)
        monkeypatch.setattr(backends, "_environment_backend", "bogus")
        with pytest.raises(RuntimeError, match="FASTRES_BACKEND: unknown backend 'bogus'"):
            ops.conv_act(self.x, self.weight)


def test_offset_views_leave_their_neighbours_alone():
    base = torch.full((3, 8, 4, 4), 42.0).contiguous(memory_format=torch.channels_last)
    y = lay_out(random_map((2, 8, 4, 4), torch.float32), "offset")
    before = base.clone()
    ops.scale_shift_act(y, *random_vectors(8, 3), base[1:])
    assert torch.equal(base, before)
