"""The cuda backend among the others: its table entries, when it is refused and why, traced and exported without a GPU."""

import json

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fastres
from fastres import _library, backends, device_tuner
from fastres.errors import BackendError
from fastres.kernels.common import cuda_images
from fastres.ops.schemas import OPS, overload

ARCHS = ["80-real", "86-real", "89-real", "90-real", "100-real", "120"]
CONV = backends.Geometry((16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)


@pytest.fixture
def loaded(monkeypatch):
    """A loaded library, also where this installation has none."""
    monkeypatch.setattr(_library, "cuda_error", lambda: None)


@pytest.fixture
def gpu(loaded, monkeypatch):
    """As if there were a GPU with a loaded library, as far as choosing a backend goes: ``gpu(7, 5)`` gives its capability."""
    monkeypatch.setattr(device_tuner, "may_measure", lambda x: False)
    monkeypatch.setattr(_library, "cuda_archs", lambda: ARCHS)
    monkeypatch.setattr(backends.tuning, "choice", lambda *a: "cuda")

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        with FakeTensorMode():
            return torch.empty(2, 16, 6, 6, device="cuda", dtype=torch.bfloat16)

    return set_capability


@pytest.mark.parametrize(
    ("arch", "runs", "not_on"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("100-real", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        ("120", [(12, 0), (12, 1), (13, 0)], [(10, 0), (8, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("75", [(7, 5), (8, 0), (12, 0)], [(7, 0)]),
        ("native", [(7, 0), (12, 0)], []),
    ],
)
def test_what_was_built_runs_on(arch, runs, not_on):
    assert all(cuda_images.runs_on(arch, capability) for capability in runs)
    assert not any(cuda_images.runs_on(arch, capability) for capability in not_on)


def test_a_device_without_an_image():
    assert all(cuda_images.no_image(ARCHS, c) is None for c in ((8, 0), (8, 7), (9, 0), (10, 3), (12, 1), (13, 0)))
    for capability in ((7, 5), (11, 0)):
        reason = cuda_images.no_image(ARCHS, capability)
        assert "80-real, 86-real" in reason and f"compute capability {capability[0]}.{capability[1]}" in reason
    assert cuda_images.no_image([], (8, 0)) is None, "nobody wrote down what was built"
    assert "need compute capability 8.0" in cuda_images.too_old(torch.bfloat16, (7, 5))
    assert cuda_images.too_old(torch.float32, (7, 5)) is None and cuda_images.too_old(torch.float16, (8, 0)) is None


@pytest.mark.parametrize(
    ("built", "running", "loads"),
    [("13.0.88", "13.0", True), ("13.1", "13.0", True), ("12.8.93", "13.0", False), ("13.0", "12.9", False),
     ("12.8", None, True), (None, "13.0", True)],
)  # fmt: skip
def test_toolkits_of_other_major_versions(built, running, loads):
    reason = cuda_images.other_major(built, running)
    assert (reason is None) == loads
    assert loads or f"built with CUDA {built}, but this torch uses CUDA {running}" in reason


class TestLoading:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch, tmp_path):
        (tmp_path / "_cuda.so").write_bytes(b"not a library")
        monkeypatch.setattr(_library, "_PACKAGE", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        _library._notes.cache_clear()
        yield
        _library._notes.cache_clear()

    def built_with(self, **cuda):
        (_library._PACKAGE / "_build.json").write_text(json.dumps({"cuda": {"archs": ARCHS, **cuda}}))

    @pytest.mark.parametrize("facts", [{"compiler": "nvcc 12.8.93"}, {"compiler": "clang 20", "toolkit": "12.8.93"}])
    def test_another_major_version_is_not_loaded_and_says_why(self, facts, monkeypatch):
        self.built_with(**facts)
        reason = _library._load_cuda()
        assert "not loaded: it was built with CUDA 12.8.93, but this torch uses CUDA 13.0" in reason
        monkeypatch.setitem(_library._errors, "cuda", reason)
        info = fastres.build_info()
        assert not info["cuda"] and info["cuda_error"] == reason
        assert info["cuda_toolkit"] == "12.8.93" and info["cuda_running"] == "13.0" and info["cuda_archs"] == ARCHS
        assert dict((name, text) for name, _, text in backends.status())["cuda"] == reason, "what doctor shows"
        assert backends.refusal("cuda", "conv_act", "cuda", torch.float32) == reason

    def test_the_same_version_and_torches_without_cuda_go_on_to_load(self, monkeypatch):
        self.built_with(compiler="nvcc 13.1.9")
        assert "did not load" in _library._load_cuda()
        self.built_with(compiler="nvcc 12.8.93")
        _library._notes.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "did not load" in _library._load_cuda()


class TestRefusals:
    def test_on_request_the_library_serves_what_has_no_image(self, gpu):
        x = gpu(7, 0)
        reason = backends.refusal("cuda", "conv_stats", "cuda", torch.bfloat16)
        assert "built for 80-real" in reason and "7.0" in reason
        with fastres.use_backend("cuda"), pytest.warns(UserWarning, match="'cuda' was requested.*the library serves"):
            choice = backends.select("conv_stats", x, CONV)
        assert choice.backend == "library" and choice.refused[0] == ("cuda", reason)

    @pytest.mark.filterwarnings("error")
    def test_auto_falls_to_the_library_with_a_reason(self, gpu):
        choice = backends.select("conv_stats", gpu(7, 0), CONV)
        assert choice.backend == "library" and choice.refused[0][0] == "cuda" and "built for" in choice.refused[0][1]
        choice = backends.select("conv_stats", gpu(8, 6), CONV)
        assert choice.backend == "cuda" and not choice.refused, "it was measured as the fastest"

    def test_old_devices_have_no_16_bit_kernels(self, gpu, monkeypatch):
        gpu(7, 5)
        monkeypatch.setattr(_library, "cuda_archs", lambda: ["75"])
        assert "16-bit" in backends.refusal("cuda", "conv_stats", "cuda", torch.float16)
        assert backends.refusal("cuda", "conv_stats", "cuda", torch.float32) is None
        assert dict((name, usable) for name, usable, _ in backends.status())["cuda"]

    def test_status_names_a_device_without_an_image(self, gpu):
        gpu(7, 0)
        _, usable, text = next(row for row in backends.status() if row[0] == "cuda")
        assert not usable and "built for 80-real" in text

    def test_a_library_that_is_not_there_raises_on_request(self, gpu, monkeypatch):
        x = gpu(7, 0)
        monkeypatch.setattr(_library, "cuda_error", lambda: "the cuda library is not installed: no nvcc")
        with fastres.use_backend("cuda"), pytest.raises(BackendError, match=r"not installed: no nvcc.*Usable here: "):
            backends.select("conv_stats", x, CONV)

    def test_dtypes(self, gpu):
        gpu(9, 0)
        assert "not float64" in backends.refusal("cuda", "conv_act", "cuda", torch.float64)


def test_explain_notes_what_is_converted(gpu):
    x = gpu(9, 0)
    with backends.recording({}) as recorder:
        backends.select("conv_act", x, CONV)
        backends.select("scale_shift_act", x)
    conv, point = (row[2].notes for row in recorder.rows)
    assert "cuda converts this input to channels_last" in conv[0] and not point


def test_it_is_a_candidate_of_the_contest(gpu, monkeypatch):
    """Next to triton and library, for every op it has."""
    gpu(9, 0)
    asked = []

    def decide(candidates, judge, timer, *, what, tie=0.0):
        asked.append([c.name for c in candidates])
        return device_tuner.Decision("cuda")

    monkeypatch.setattr(device_tuner, "decide", decide)
    monkeypatch.setattr(device_tuner, "work_of", lambda *a: device_tuner.Work(lambda backend: []))
    monkeypatch.setattr(backends, "_chip", lambda: None)  # nothing to ask how much fits on it
    for op, schema in OPS.items():
        problem = backends.Problem(op, "cuda", torch.bfloat16, (2, 16, 6, 6), CONV if "conv" in op else None)
        decision, found = device_tuner.measure(problem, "name", lambda runs: {}, capability=(9, 0))
        assert asked.pop() == ["library", *(b for b in ("triton", "cuda") if b in schema.backends)]
        assert decision.choice == found["name"]["choice"] == "cuda"
    assert backends.PREFERENCE["cuda"][-1] == "cuda", "where nothing was measured, it waits"


class Convolutions(nn.Module):
    """Both convolutions with all that surrounds them."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8, 3, 3, device=device))
        self.scale, self.center, self.shift = (nn.Parameter(torch.empty(8, device=device)) for _ in range(3))

    def forward(self, x):
        vectors = (self.scale, self.center.detach(), self.shift)
        y, mean, var = fastres.conv_stats(x, self.weight, *vectors, relu=True, padding=1, stride=2)
        residual = torch.zeros_like(y)
        return fastres.conv_act(y, self.weight, mean + var, residual, padding=1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fake_cuda_tensors(loaded, layout):
    """Tensors of a device that isn't there: shapes, dtypes and layouts, and no launch."""
    with FakeTensorMode(), fastres.use_backend("cuda"):
        x = torch.empty(2, 8, 9, 7, device="cuda").contiguous(memory_format=layout)
        out = Convolutions("cuda")(x)
        assert out.shape == (2, 8, 5, 4) and out.device.type == "cuda" and out.requires_grad
        assert out.is_contiguous(memory_format=layout)
        y = torch.empty(2, 8, 5, 4, device="cuda").contiguous(memory_format=layout)
        v, w = torch.empty(8, device="cuda"), torch.empty(8, 8, 3, 3, device="cuda")
        conv = ((2, 2), (1, 1), (1, 1), 1)
        grads = torch.ops.fastres.conv_stats_backward_cuda(y, v, v, x, w, y, v, v, v, v, True, *conv, True, True, x, v)
        assert grads[0].stride() == x.stride() and grads[1].stride() == w.stride()
        assert [g.shape for g in grads[2:]] == [(8,), (8,)] and all(g.device.type == "cuda" for g in grads)


def test_meta_tensors():
    x, w, v = (
        torch.empty(2, 8, 9, 7, device="meta"),
        torch.empty(4, 8, 3, 3, device="meta"),
        torch.empty(8, device="meta"),
    )
    y, mean, var = torch.ops.fastres.conv_stats_cuda(x, w, v, v, v, True, [1, 1], [1, 1], [1, 1], 1, True)
    assert y.shape == (2, 4, 9, 7) and mean.shape == var.shape == (4,) and mean.dtype == torch.float32
    out = torch.ops.fastres.conv_act_cuda(x.half(), w.half(), None, None, True, [1, 1], [1, 1], [1, 1], 1)
    assert out.shape == (2, 4, 9, 7) and out.dtype == torch.float16


def test_cpu_tensors_are_refused():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    for op in (fastres.conv_stats, fastres.conv_act):
        with fastres.use_backend("cuda"), pytest.raises(BackendError, match="cuda runs on cuda tensors, not on cpu"):
            op(x, w)
    with pytest.raises(NotImplementedError, match="conv_act_cuda"):  # past the choice of a backend, too
        torch.ops.fastres.conv_act_cuda(x, w, None, None, True, [1, 1], [1, 1], [1, 1], 1)


def test_ops_are_registered_for_cuda_tensors():
    for op in ("conv_stats", "conv_act"):
        for suffix in ("", "backward"):
            name = overload(op, "cuda", suffix).name()
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def test_traced_for_a_device_that_is_not_there(loaded):
    """make_fx over fake CUDA tensors records plain ops of the backend, which is what torch.compile sees."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(), fastres.use_backend("cuda"):
        model = Convolutions("cuda")
        graph = make_fx(lambda x: model(x))(torch.empty(2, 8, 9, 7, device="cuda"))
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"fastres.conv_stats_cuda.default", "fastres.conv_act_cuda.default"} <= called
