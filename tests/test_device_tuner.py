"""Tuning on a GPU, without one: the kernels run in the interpreter, the clock is a table, the device a few patched answers."""

import dataclasses
import json
import warnings

import pytest
import torch
from emulation.triton_interpreter import interpreter_executor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastres
from fastres import backends, device_tuner, tuner, tuning
from fastres.kernels.common import triton_choice
from fastres.kernels.common.triton_launch import Config, executing_with
from fastres.kernels.conv import triton_run
from fastres.kernels.conv_stats import triton_input_gradient, triton_weight_gradient

CONV = backends.Geometry((16, 16, 1, 1), (1, 1), (0, 0), (1, 1), 1)
TRAIN = backends.Problem("conv_stats", "cpu", torch.bfloat16, (2, 16, 6, 6), CONV)
SPACES = {
    "conv_forward": (triton_run, [Config.of(4, 2, BLOCK_M=m, BLOCK_N=16, BLOCK_K=16, GROUP_M=8, TMA=False, PATCH_H=0, PATCH_W=0)
                                  for m in (64, 128)]),
    "input_gradient_kernel": (triton_input_gradient, [Config.of(4, 2, BLOCK_M=m, BLOCK_N=16, BLOCK_K=16) for m in (64, 128)]),
    "weight_gradient_kernel": (triton_weight_gradient, [Config.of(4, 2, BLOCK_M=16, BLOCK_N=16, BLOCK_P=p) for p in (64, 128)]),
}  # fmt: skip


REAL_FINGERPRINT = tuning.fingerprint


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Two configurations a kernel, a file of choices of its own, and the interpreter in place of a device."""
    for module, configs in SPACES.values():
        monkeypatch.setattr(module, "configurations", lambda *a, configs=configs: tuple(configs))
    monkeypatch.setattr(triton_choice, "REJECTED", {})
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tune.json"))
    monkeypatch.setattr(tuning, "_said", set())
    fingerprint = {"cpu": "CPU", "cuda": "GPU X, sm_80, driver 1, torch 2"}
    monkeypatch.setattr(tuning, "fingerprint", lambda device="cpu": fingerprint[device])
    tuning.forget()
    with executing_with(interpreter_executor(check_stores=False)):
        yield fingerprint
    monkeypatch.undo()
    tuning.forget()


class Clock:
    """Milliseconds by name; the first of a kernel's configurations is slower than the second."""

    def __init__(self, **ms: float) -> None:
        self.ms, self.asked = {"library": 5.0, "native": 9.0, **ms}, []

    def __call__(self, runs):
        self.asked.append(list(runs))
        return {name: self.ms.get(name, 2.0 if "=128" in name else 3.0) for name in runs}


def measured(clock, problem=TRAIN):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decision, found = device_tuner.measure(problem, "the problem", clock, capability=(8, 0))
    return decision, found, [str(w.message) for w in caught]


def test_configurations_first_then_backends():
    clock = Clock(triton=1.0)
    decision, found, said = measured(clock)
    assert not said and decision.choice == "triton" and found["the problem"]["choice"] == "triton"
    assert [names[0] for names in clock.asked] == ["library"] * 4 and clock.asked[-1] == ["library", "native", "triton"]
    kernels = {key.split("|")[0]: entry["choice"] for key, entry in found.items() if key != "the problem"}
    assert kernels == {kernel: str(configs[1]) for kernel, (_, configs) in SPACES.items()}
    assert not triton_choice._forced, "nothing stays forced"


def test_tune_measures_each_problem_once_and_keeps_the_choices(monkeypatch):
    clock, told = Clock(triton=1.0), []
    other = dataclasses.replace(TRAIN, shape=(2, 16, 5, 5))
    monkeypatch.setattr(device_tuner.triton_choice, "capability", lambda: (8, 0))
    report = tuner._tune_gpu([("a", TRAIN), ("b", other), ("c", TRAIN)], clock, True, told.append)
    assert [row.layer for row in report.rows] == ["a", "b"] and len(told) == 2
    assert all(row.choice == "triton" and set(row.ms) == {"library", "native", "triton"} for row in report.rows)
    kept = json.loads(report.file.read_text())
    assert str(SPACES["conv_forward"][1][1]) in json.dumps(kept)
    assert tuning.choice(TRAIN.key(), "cpu") == "triton"
    with pytest.raises(fastres.errors.InputError, match="no op of fastres"):
        tuner._tune_gpu([], clock, False, told.append)


def test_problems_of_a_network_are_all_ops():
    net = fastres.create_model("resnet20", fused=True).train()
    before = {k: v.clone() for k, v in net.named_buffers()}
    found = {problem.op for _, problem in tuner._problems(net, torch.randn(2, 3, 16, 16), all_ops=True)}
    assert {"conv_stats", "scale_shift_act"} <= found
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())


def test_the_library_keeps_what_is_not_faster():
    assert measured(Clock(triton=4.95))[0].choice == "library"


def damaged(monkeypatch, kernel, config, damage):
    """Triton's results of one configuration, and when it is the one that runs."""
    real = device_tuner.overload

    def overload(op, backend, suffix=""):
        call = real(op, backend, suffix)

        def run(*arguments):
            results = call(*arguments)
            wrong = backend == "triton" and triton_choice._forced.get(kernel) == config
            return [damage(r) for r in results] if wrong else results

        return run

    monkeypatch.setattr(device_tuner, "overload", overload)


def test_two_tf32_products_agree_to_its_unit(monkeypatch):
    """By default float32 convolutions may use TF32 on a GPU: candidates that do so differently are not wrong."""
    real, problem = device_tuner.overload, dataclasses.replace(TRAIN, dtype=torch.float32)

    def overload(op, backend, suffix=""):
        call = real(op, backend, suffix)
        return (lambda *a: [r * (1 + 2e-4) for r in call(*a)]) if backend == "triton" else call

    monkeypatch.setattr(device_tuner, "overload", overload)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    decision, _, said = measured(Clock(triton=1.0), problem)
    assert decision.choice == "triton" and not said, said
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    decision, _, said = measured(Clock(triton=1.0), problem)
    assert decision.choice == "library" and "triton" in decision.dropped and said


def raising(result):
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("damage", [lambda r: r * 1.1, lambda r: r / 0, raising], ids=["wrong", "not finite", "raises"])
def test_a_wrong_configuration_is_dropped_and_named(monkeypatch, damage):
    wrong = SPACES["input_gradient_kernel"][1][1]  # the faster one
    damaged(monkeypatch, "input_gradient_kernel", wrong, damage)
    clock = Clock(triton=1.0)
    decision, found, said = measured(clock)
    chosen = {key.split("|")[0]: entry["choice"] for key, entry in found.items()}
    assert decision.choice == "triton" and chosen["input_gradient_kernel"] == str(SPACES["input_gradient_kernel"][1][0])
    assert len(said) == 1 and str(wrong) in said[0] and "input_gradient_kernel" in said[0]


def test_a_backend_whose_configurations_are_all_wrong_is_dropped(monkeypatch):
    real = device_tuner.overload

    def overload(op, backend, suffix=""):
        call = real(op, backend, suffix)
        return (lambda *a: [r + 1 for r in call(*a)]) if backend == "triton" else call

    monkeypatch.setattr(device_tuner, "overload", overload)
    decision, found, said = measured(Clock(triton=0.1))
    assert decision.choice == "library" and set(found) == {"the problem"}
    assert "triton" in decision.dropped and len(said) == 7


@pytest.mark.parametrize("op", ["scale_shift_act", "scale_shift_act_mean", "scale_shift_act_pool", "conv_act"])
def test_every_op_can_be_measured(op):
    problem = backends.Problem(op, "cpu", torch.bfloat16, (2, 16, 6, 6), CONV if op == "conv_act" else None)
    decision, _, said = measured(Clock(triton=1.0), problem)
    assert decision.choice == "triton" and not said


def test_measured_configurations_run(monkeypatch):
    monkeypatch.setattr(triton_choice, "measured", lambda key: str(SPACES["conv_forward"][1][1]))
    triton_choice.forget()
    problem = device_tuner._triton_problem(torch.empty(TRAIN.shape), torch.empty(CONV.weight), None, CONV)
    assert triton_run.default_config(problem) == SPACES["conv_forward"][1][1]
    monkeypatch.setattr(triton_choice, "measured", lambda key: "a configuration of another version")
    triton_choice.forget()
    assert triton_run.default_config(problem) == SPACES["conv_forward"][1][0]


@pytest.fixture
def cuda(monkeypatch):
    """As if there were a GPU, as far as choosing a backend goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 0))
    monkeypatch.setattr(device_tuner, "may_measure", lambda x: True)
    with FakeTensorMode():
        return torch.empty(2, 16, 6, 6, device="cuda", dtype=torch.bfloat16)


def test_auto_measures_a_shape_once(cuda, monkeypatch):
    seen = []

    def measure(problem, name, timer, **_):
        seen.append(name)
        return device_tuner.Decision("triton"), {name: {"choice": "triton", "ms": {}}}

    monkeypatch.setattr(device_tuner, "measure", measure)
    monkeypatch.setattr(device_tuner, "cuda_timer", lambda: None)
    for _ in range(2):
        assert backends.select("conv_stats", cuda, CONV).backend == "triton"
    tuning.forget()  # the file knows as well
    assert backends.select("conv_stats", cuda, CONV).backend == "triton"
    assert len(seen) == 1 and seen[0].endswith("|cuda")
    assert backends.select("scale_shift_act", cuda).backend == "triton" and len(seen) == 2
    with backends.use_backend("library"):
        assert backends.select("conv_stats", cuda, CONV).backend == "library"


def test_a_problem_that_cannot_be_measured_stays_with_the_library(cuda, monkeypatch):
    def measure(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_tuner, "measure", measure)
    monkeypatch.setattr(device_tuner, "cuda_timer", lambda: None)
    with pytest.warns(RuntimeWarning, match="out of memory.*the library serves"):
        assert backends.select("conv_stats", cuda, CONV).backend == "library"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert backends.select("conv_stats", cuda, CONV).backend == "library"


def test_when_nothing_is_timed(monkeypatch):
    class Stand:
        device = torch.device("cuda")

    monkeypatch.setattr(device_tuner, "Tensor", Stand)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert device_tuner.may_measure(Stand())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not device_tuner.may_measure(Stand()), "a CUDA graph is captured"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not device_tuner.may_measure(Stand())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    monkeypatch.setenv(device_tuner.VARIABLE, "OFF")
    assert not device_tuner.may_measure(Stand())
    monkeypatch.delenv(device_tuner.VARIABLE)
    with FakeTensorMode():
        assert not device_tuner.may_measure(Stand()), "fake tensors"
    assert not device_tuner.may_measure(torch.empty(1))


def test_files_of_other_versions_are_measured_again(small):
    file = tuning.path()
    file.write_text(json.dumps({"GPU X, sm_80, driver 0, torch 2": {"a": {"choice": "triton"}}, "CPU": {"b": {}}}))
    with pytest.warns(RuntimeWarning, match="other versions: it is measured again"):
        assert tuning.choice("a", "cuda") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        tuning.forget()
        assert tuning.choice("a", "cuda") is None
        tuning.save({"a": {"choice": "cuda"}}, "cuda")
    assert set(json.loads(file.read_text())) == {small["cuda"], "CPU"}
    file.write_text("{ broken")
    tuning.forget()
    with pytest.warns(RuntimeWarning, match="could not be read"):
        assert tuning.choice("a", "cuda") is None
    tuning.save({"a": {"choice": "triton"}}, "cuda")
    assert tuning.choice("a", "cuda") == "triton"


def test_what_a_measurement_on_a_gpu_holds_for(monkeypatch):
    tuning._gpu_fingerprint.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU Y")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = REAL_FINGERPRINT("cuda")
    parts = ("GPU Y, sm_90, driver ", f"torch {torch.__version__}", "triton 3", f"kernels {tuning.kernel_version()}")
    assert all(part in found for part in parts), found
    tuning._gpu_fingerprint.cache_clear()

    def nothing():
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "get_device_name", nothing)
    assert REAL_FINGERPRINT("cuda") == "unknown GPU"
