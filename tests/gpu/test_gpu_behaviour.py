"""What a device adds to results: CUDA graphs, streams, the same bits twice, no waiting, refusals, whole networks."""

import copy

import pytest
import torch
from on_device import DEVICE, moved, on_backends, poisoned, require_backend, synchronize  # noqa: F401
from torch import nn

import fastres
from fastres import backends, device_tuner, tuning
from fastres.evaluate.parity import network_parity, op_parity
from fastres.ops.schemas import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA itself")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Layers(nn.Module):
    """Every op, forward and backward, as a network joins them."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Parameter(torch.randn(24, 3, 7, 7, generator=generator) / 12)
        self.weight = nn.Parameter(torch.randn(24, 24, 3, 3, generator=generator) / 15)
        self.gamma, self.beta = (nn.Parameter(torch.randn(24, generator=generator)) for _ in range(2))

    def forward(self, x):
        def normalised(statistics):
            return fastres.ops.bn_coefficients(*statistics, self.gamma, self.beta, 1e-5)

        y, *statistics = fastres.conv_stats(x, self.stem.to(x.dtype), stride=2, padding=3)
        x = fastres.scale_shift_act_pool(y, *normalised(statistics))
        weight = self.weight.to(x.dtype)
        y, *statistics = fastres.conv_stats(x, weight, padding=1)
        y, *statistics = fastres.conv_stats(y, weight, *normalised(statistics), relu=True, padding=1)
        x = fastres.scale_shift_act(y, *normalised(statistics), x)
        x = fastres.conv_act(x, weight, self.beta, x, padding=1)
        y, *statistics = fastres.conv_stats(x, weight, padding=1, stride=2)
        return fastres.scale_shift_act_mean(y, *normalised(statistics))


def images(dtype, seed=0, n=5):
    x = torch.randn(n, 3, 37, 41, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return moved(x.contiguous(memory_format=torch.channels_last))


def step(model, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(model.parameters()))]


def ready(backend, dtype):
    for op in OPS:
        if backend in OPS[op].backends:
            require_backend(op, backend, dtype)
    return Layers().to(DEVICE)


@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(backend, dtype):
    model, x = ready(backend, dtype), images(dtype)
    with fastres.use_backend(backend):
        first = [t.detach().clone() for t in step(model, x)]
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, step(model, x), strict=True))
    assert all(t.isfinite().all() for t in first)


@only_cuda
@on_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_captured_in_a_cuda_graph(backend, dtype):
    """Captured with one batch and replayed with another: the same bits as eager mode gives for it."""
    model, x, other = ready(backend, dtype), images(dtype), images(dtype, seed=1)
    with fastres.use_backend(backend):
        expected = [t.detach().clone() for t in step(model, other)]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(model, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(model, x)
    x.copy_(other)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@only_cuda
@on_backends
def test_nothing_waits_for_the_device(backend):
    model, x = ready(backend, torch.bfloat16), images(torch.bfloat16)
    with fastres.use_backend(backend):
        step(model, x)  # compiled and loaded
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_cuda
@on_backends
def test_work_goes_to_the_current_stream(backend):
    """Behind long work on a side stream: whoever queued on another stream would read what isn't there yet."""
    model, x = ready(backend, torch.float32), images(torch.float32)
    with fastres.use_backend(backend):
        expected = [t.detach().clone() for t in step(model, x)]
        late, side = torch.full_like(x, float("nan")), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            late.copy_(x)
            found = step(model, late)
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@only_cuda
@on_backends
def test_a_device_that_is_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    model, x = ready(backend, torch.float32), images(torch.float32)
    with fastres.use_backend(backend):
        expected = step(model, x)
        found = step(copy.deepcopy(model).to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.allclose(a, b.to("cuda:0"), rtol=1e-3, atol=1e-4) for a, b in zip(expected, found, strict=True))


@only_cuda
def test_refusals_of_the_cuda_operators():
    require_backend("conv_stats", "cuda", torch.float32)
    x, weight, v = (
        torch.randn(2, 8, 6, 6, device="cuda"),
        torch.randn(4, 8, 3, 3, device="cuda"),
        torch.ones(8, device="cuda"),
    )
    ops, conv = torch.ops.fastres, ([1, 1], [1, 1], [1, 1])
    with pytest.raises(RuntimeError, match="conv_forward_cuda: weight is on cpu, but x is on cuda:0"):
        ops.conv_forward_cuda(x, weight.cpu(), v, v, v, True, None, None, False, *conv, True, False)
    with pytest.raises(RuntimeError, match="conv_forward_cuda: scale must be float32, got float16"):
        ops.conv_stats_cuda(x, weight, v.half(), v, v, True, *conv, 1, True)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        ops.conv_stats_cuda(x.double(), weight.double(), None, None, None, False, *conv, 1, True)
    with pytest.raises(RuntimeError, match="scale_shift_act_cuda: center is on cpu, but y is on cuda:0"):
        ops.scale_shift_act_cuda(x, v, v.cpu(), v, None, None, None, None, True)
    with fastres.use_backend("cuda"), pytest.raises(fastres.errors.BackendError, match="not float64"):
        fastres.conv_act(x.double(), weight.double())
    torch.cuda.synchronize()  # no check came too late


@only_cuda
def test_auto_measures_a_shape_and_takes_the_best(monkeypatch, tmp_path):
    monkeypatch.delenv(device_tuner.VARIABLE)
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tune.json"))
    tuning.forget()
    x, weight = (
        torch.randn(4, 64, 28, 28, device="cuda").bfloat16(),
        torch.randn(64, 64, 3, 3, device="cuda").bfloat16(),
    )
    conv = backends.Geometry(tuple(weight.shape), (1, 1), (1, 1), (1, 1), 1)
    try:
        choice = backends.select("conv_stats", x, conv)
        kept = (tmp_path / "tune.json").read_text()
    finally:
        tuning.forget()
    assert choice.backend in ("library", "triton", "cuda") and '"library"' in kept
    assert all(
        f'"{b}"' in kept for b in ("triton", "cuda") if backends.refusal(b, "conv_stats", "cuda", x.dtype) is None
    )


@on_backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_a_network(backend, dtype, training):
    ready(backend, dtype)
    torch.manual_seed(0)
    plain = fastres.create_model("resnet20", fused=False).to(DEVICE).to(memory_format=torch.channels_last)
    fused = fastres.create_model("resnet20", fused=True).to(DEVICE).to(memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())
    x = moved(torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    with fastres.use_backend(backend):
        row = network_parity(fused, plain, x, torch.arange(4, device=DEVICE), dtype, training)
    synchronize()
    assert not row.failed, row


@on_backends
def test_compiled(backend):
    model, x = ready(backend, torch.float32), images(torch.float32)
    torch._dynamo.reset()
    with fastres.use_backend(backend):
        eager = step(model, x)
        compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(eager, compiled, strict=True))


def test_the_matrix_of_doctor():
    rows = op_parity(DEVICE)
    assert not [row for row in rows if row.failed]
    assert {row.backend for row in rows} >= {"reference", "library"}
