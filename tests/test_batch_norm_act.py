"""batch_norm_act on the CPU's backends: the rule, PyTorch's own modules, and what is said where it can't be served."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, MAPS, random_map, random_vectors
from test_ops import call, compare

import fastres
from fastres import backends
from fastres.errors import BackendError, InputError
from fastres.kernels.batch_norm_act.capacity import Chip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MAPS, (2, 8, 1, 1), (1, 6, 1, 1)], ids=str)
def test_batch_norm_act(shape, dtype, layout):
    y, weight, bias = random_map(shape, dtype, layout), *random_vectors(shape[1], 2)
    for residual in (None, random_map(shape, dtype, layout, seed=2)):
        for relu in (True, False):
            compare("batch_norm_act", "library", (y, weight, bias, residual), {"relu": relu})


@pytest.mark.parametrize("backend", ["reference", "library"])
def test_batch_norm_act_is_pytorchs(backend):
    """Values, statistics and gradients of nn.BatchNorm2d, an addition and a ReLU, in float64."""
    bn = torch.nn.BatchNorm2d(6, dtype=torch.float64, momentum=1.0)
    torch.nn.init.normal_(bn.weight)
    torch.nn.init.normal_(bn.bias)
    y, residual = (random_map((3, 6, 5, 4), torch.float64, seed=s).requires_grad_() for s in (1, 2))
    inputs = (y, bn.weight, bn.bias, residual)
    expected = F.relu(bn(y) + residual)
    out, mean, var = call("batch_norm_act", backend, *inputs, eps=bn.eps)
    assert not mean.requires_grad and not var.requires_grad
    assert torch.allclose(mean, bn.running_mean) and torch.allclose(var * 60 / 59, bn.running_var)
    up = torch.randn_like(out)
    for ours, theirs in zip(
        (out, *torch.autograd.grad(out, inputs, up)),
        (expected, *torch.autograd.grad(expected, inputs, up)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_empty_map():
    y = torch.empty(0, 4, 3, 3, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    for backend in ("reference", "library"):
        out, mean, var = call("batch_norm_act", backend, y, weight, bias)
        assert out.shape == y.shape and mean.isnan().all() and var.isnan().all()
        grads = torch.autograd.grad(out.sum(), [y, weight, bias])
        assert grads[0].shape == y.shape and not grads[1].any() and not grads[2].any()


def test_gradients_that_nobody_asks_for():
    y, residual = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    for backend, relu in (("reference", True), ("library", False)):
        out, mean, _ = call("batch_norm_act", backend, y, torch.ones(3), torch.zeros(3), residual, relu=relu)
        assert not mean.requires_grad
        (grad,) = torch.autograd.grad(out.sum(), [residual])
        assert torch.equal(grad, (out > 0).float() if relu else torch.ones_like(out))


def test_wrong_arguments():
    y, v = torch.randn(2, 3, 4, 4), torch.ones(3)
    for wrong, message in (
        ((y[0], v, v), "4-D"),
        ((y, v[:2], v), "weight must be"),
        ((y, v.double(), v), "weight is torch.float64"),
        ((y, v, v, y[:1]), "residual has shape"),
    ):
        with pytest.raises(InputError, match=message):
            fastres.batch_norm_act(*wrong)


def test_a_map_that_does_not_fit_is_refused_with_the_reason(monkeypatch):
    """A pure decision, made of the shape and a GPU's figures."""
    monkeypatch.setattr(backends._library, "cuda_error", lambda: None)
    monkeypatch.setattr(backends, "_chip", lambda: Chip(108, 164 << 10, 163 << 10))
    question = ("cuda", "batch_norm_act", "cuda", torch.float16)
    assert backends.refusal(*question) is None
    assert backends.refusal(*question, (32, 2048, 7, 7)) is None
    reason = backends.refusal(*question, (256, 256, 56, 56))
    assert reason is not None and "doesn't fit" in reason and "shared memory" in reason
    assert backends.refusal("cuda", "scale_shift_act", "cuda", torch.float16, (256, 256, 56, 56)) is None
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        y = torch.empty(256, 256, 56, 56, device="cuda", dtype=torch.float16)
    with fastres.use_backend("cuda"), pytest.raises(BackendError, match="shared memory of all multiprocessors"):
        backends.select("batch_norm_act", y)
    monkeypatch.setattr(backends, "preference", lambda problem: ("cuda", "library"))
    choice = backends.select("batch_norm_act", y)
    assert choice.backend == "library" and "shared memory" in choice.refused[0][1]
