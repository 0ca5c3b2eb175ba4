"""The triton backend among the others: imported late, refused with reasons, traced, compiled and exported without a GPU."""

import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from cases import random_map, random_vectors
from emulation.mock_driver import mock_driver
from emulation.triton_interpreter import interpreter_executor
from test_ops import dispatcher_arguments
from torch import nn
from torch._subclasses import FakeTensorMode

import fastres
from fastres import backends
from fastres.errors import BackendError
from fastres.kernels.common.triton_launch import executing_with
from fastres.ops.schemas import OPS, overload

OPERATORS = [op for op, schema in OPS.items() if "triton" in schema.backends]
POINTWISE = ("scale_shift_act", "scale_shift_act_mean", "scale_shift_act_pool")


def run_python(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_fastres_does_not_import_triton():
    code = "import sys, fastres; print('triton' in sys.modules); fastres.explain(fastres.create_model('resnet20'), "
    code += "__import__('torch').randn(1, 3, 8, 8)); print('triton' in sys.modules)"
    # The second line: running on the CPU doesn't either, since nobody asks for this backend.
    assert run_python(code).split() == ["False", "False"]


def test_every_op_has_it():
    assert [op for op, schema in OPS.items() if "triton" in schema.backends] == OPERATORS


class TestRefusals:
    y = torch.randn(2, 4, 5, 5)
    vectors = (torch.ones(4),) * 3

    def test_cpu_tensors_without_the_interpreter(self):
        with (
            fastres.use_backend("triton"),
            pytest.raises(BackendError, match="only under its interpreter"),
        ):
            fastres.scale_shift_act(self.y, *self.vectors)
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):  # past the choice of a backend, too
            torch.ops.fastres.scale_shift_act_triton(self.y, *self.vectors, *[None] * 4, True)

    def test_float64(self):
        with (
            executing_with(interpreter_executor()),
            fastres.use_backend("triton"),
            pytest.raises(BackendError, match="triton takes float32, float16, bfloat16, not float64"),
        ):
            fastres.scale_shift_act(self.y.double(), *self.vectors)

    def test_another_device(self):
        assert "not on meta" in backends.refusal("triton", "conv_act", "meta", torch.float32)

    def test_without_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        assert "triton can't be imported" in backends.refusal("triton", "conv_act", "cuda", torch.float32)
        assert "triton can't be imported" in dict((name, text) for name, _, text in backends.status())["triton"]

    def test_an_old_device_falls_to_the_library_and_says_so(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
        reason = backends.refusal("triton", "conv_act", "cuda", torch.float32)
        assert "compute capability 7.5" in reason and "7.0" in reason
        with FakeTensorMode(), fastres.use_backend("triton"):
            y = torch.empty(2, 4, 5, 5, device="cuda")
            with pytest.warns(UserWarning, match="the library serves"), backends.recording({}) as recorder:
                choice = backends.select("scale_shift_act", y)
        assert choice.backend == "library" and choice.refused[0] == ("triton", reason)
        assert recorder.rows[0][2].refused[0][0] == "triton"

    def test_a_new_device_is_not_refused(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        assert backends.refusal("triton", "conv_act", "cuda", torch.bfloat16) is None

    def test_auto_on_a_gpu_takes_it_only_after_the_others(self):
        with FakeTensorMode():
            choice = backends.select("conv_act", torch.empty(1, 8, 4, 4, device="cuda"))
        assert choice.backend == "library"
        assert backends.PREFERENCE["cuda"].index("triton") > backends.PREFERENCE["cuda"].index("reference")
        assert "triton" not in backends.PREFERENCE["cpu"]


def test_explain_notes_a_layout_that_is_converted():
    class Layer(nn.Module):
        def forward(self, y):
            return fastres.scale_shift_act(y, *[torch.ones(8)] * 3)

    y = torch.randn(2, 8, 5, 5)
    with executing_with(interpreter_executor()), fastres.use_backend("triton"):
        noted = fastres.explain(Layer(), y)
        (row,) = fastres.explain(Layer(), y.contiguous(memory_format=torch.channels_last)).rows
    assert noted.rows[0].backend == row.backend == "triton"
    assert "channels_last" in noted.rows[0].reasons[0] and "channels_last" in str(noted) and not row.reasons


@pytest.mark.parametrize("op", POINTWISE)
def test_opcheck(op):
    with executing_with(interpreter_executor()):
        for dtype in (torch.float32, torch.bfloat16):
            torch.library.opcheck(overload(op, "triton"), dispatcher_arguments(op, dtype))


class Small(nn.Module):
    """All pointwise ops, and the convolutions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)) / 8)
        self.scale, self.center, self.shift = (nn.Parameter(v) for v in random_vectors(8, 3))

    def forward(self, x):
        vectors = (self.scale, self.center.detach(), self.shift)
        x = fastres.scale_shift_act_pool(x, *vectors)
        y, mean, var = fastres.conv_stats(x, self.weight, *vectors, relu=True, padding=1)
        rest = fastres.conv_act(x, self.weight, self.shift, padding=1)
        coefficients = fastres.bn_coefficients(mean, var, self.scale, self.shift, 1e-5)
        y = fastres.scale_shift_act(y, *coefficients, rest)
        return fastres.scale_shift_act_mean(y, *vectors, x, *vectors)


def step(model, x):
    """Result and gradients of one step."""
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [model.weight, model.scale, model.shift])]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled(compiler, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    model, x = Small(), random_map((2, 8, 9, 7), torch.float32)
    truth = step(Small().double(), x.double())
    executor = interpreter_executor()
    with executing_with(executor), fastres.use_backend("triton"):
        plain = step(model, x)
        names = [record.name for record in executor.record]
        executor.record.clear()
        compiled = step(torch.compile(model, backend=compiler, fullgraph=True), x)
        # a compiled graph keeps what eager code rebuilds by a gather
        assert set(names) - {"gather_kernel"} == {record.name for record in executor.record}
    for ours, eager, exact in zip(compiled, plain, truth, strict=True):
        assert torch.allclose(ours, eager, rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_compiled_is_refused_where_it_cannot_run():
    torch._dynamo.reset()
    with fastres.use_backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET=1"):
        torch.compile(Small(), backend="eager", fullgraph=True)(random_map((2, 8, 9, 7), torch.float32))


def test_exported():
    model, x = Small(), random_map((2, 8, 9, 7), torch.float32)
    with executing_with(interpreter_executor()), fastres.use_backend("triton"):
        program = torch.export.export(model, (x,))
        assert torch.allclose(program.module()(x), model(x), rtol=1e-5, atol=1e-6)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for op in OPERATORS:
        assert f"fastres.{op}_triton.default" in called


def test_fake_cuda_tensors():
    """Tensors of a device that isn't there: shapes and layouts, and no launch. (The engine of autograd wants a device.)"""
    with FakeTensorMode(), fastres.use_backend("triton"):
        model = Small()
        for name, parameter in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        x = torch.empty(2, 8, 9, 7, device="cuda", dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        out = model(x)
        assert out.shape == (2, 8) and out.device.type == "cuda" and out.requires_grad
        vectors, nothing = (model.scale, model.center, model.shift), (None,) * 4
        grad_y, grad_scale, *_ = torch.ops.fastres.scale_shift_act_backward_triton(x, x, *vectors, *nothing, True, True)
        assert grad_y.stride() == x.stride() and grad_scale.shape == (8,) and grad_scale.device.type == "cuda"


def test_a_driver_gets_every_launch():
    """The JIT's own way from fake CUDA tensors to a device, up to the call of the driver: specialised, compiled for sm_90."""
    triton_backend = import_module("fastres.kernels.scale_shift_act.triton_backend")
    with FakeTensorMode(), mock_driver(arch=90) as launches:
        y = torch.empty(4, 64, 14, 14, device="cuda", dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        )
        vectors = [torch.empty(64, device="cuda") for _ in range(3)]
        triton_backend.forward(y, *vectors, y, *vectors, True)
        triton_backend.backward(y, y, *vectors, y, *vectors, True, True)
    assert [launch.name for launch in launches] == ["forward_kernel", "backward_kernel", "merge_sums_kernel"]
    assert all(launch.shared <= 48 * 1024 for launch in launches)
    assert (launches[0].grid[0] == triton_backend.FORWARD_CONFIGS[0]["ELEMENTS"] and False) or launches[0].grid[0] > 1
    assert {"y", "residual", "out", "C"} <= set(launches[0].divisible_by_16)


NETWORK = """
import torch, fastres
from fastres.models.resnet import CifarResNet
torch.manual_seed(0)
x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 7])
model = CifarResNet(1, shortcut="B").train()
def gradients(backend, model, x):
    model.zero_grad()
    with fastres.use_backend(backend):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]
ours = gradients("triton", model, x)
peer = gradients("reference", model, x)
truth = gradients("reference", model.double(), x.double())
for a, b, c in zip(ours, peer, truth, strict=True):
    own, other = (a - c).norm(), (b - c).norm()
    assert own <= 2 * other + 1e-5 * c.norm(), (tuple(a.shape), float(own), float(other), float(c.norm()))
model = model.float().eval()
with torch.no_grad(), fastres.use_backend("triton"):
    ours = model(x)
with torch.no_grad(), fastres.use_backend("reference"):
    assert torch.allclose(ours, model(x), rtol=1e-4, atol=1e-5)
print({row[0]: row[1] for row in fastres.backends.status()}["triton"])
"""


def test_a_network_under_the_interpreter():
    """TRITON_INTERPRET=1: a residual network of one block a stage, forward and backward, as the reference computes it."""
    assert run_python(NETWORK, TRITON_INTERPRET="1").split() == ["True"]


def test_the_table_of_doctor():
    _, usable, reason = next(row for row in backends.status() if row[0] == "triton")
    assert not usable and "TRITON_INTERPRET=1" in reason
    with executing_with(interpreter_executor()):
        assert next(row for row in backends.status() if row[0] == "triton")[1]


def test_nothing_waits_for_the_device():
    """A captured CUDA graph can't read values: the host code never asks a tensor for one, which a fake one doesn't have."""
    with FakeTensorMode(), executing_with(lambda launch: None):
        for op in POINTWISE:
            tensors = (
                a.to("cuda", copy=True) if isinstance(a, torch.Tensor) else a
                for a in dispatcher_arguments(op, torch.float32)
            )
            import_module(f"fastres.kernels.{op}.triton_backend").forward(*tensors)
