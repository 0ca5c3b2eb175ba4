"""Inference plans over time: changed weights, threads, memory, and the plans that networks use by themselves."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from fusion_cases import randomise
from test_compile import check, images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres.errors import CompileError
from fastres.inference import automatic, why_not
from fastres.inference import network as network_module

pytestmark = pytest.mark.skipif(fastres.build_info()["native_error"] is not None, reason="the native library is absent")


@pytest.fixture
def off(monkeypatch):
    monkeypatch.setenv("FASTRES_PLAN", "OFF")


def small(fused: bool = True, **options) -> nn.Module:
    return randomise(fastres.create_model("resnet20", fused=fused, **options)).eval()


# ---- weights that change ----
def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()


def swap_storage(model):
    model.conv1.weight.data = model.conv1.weight.data * 1.5


def replace_parameter(model):
    model.layer1[0].conv1.weight = nn.Parameter(model.layer1[0].conv1.weight.detach() * 1.5)


def replace_module(model):
    model.fc = nn.Linear(64, 10)


def replace_activation(model):
    model.layer1[0] = nn.Identity()


def change_eps(model):
    model.bn1.eps = 0.5


@torch.no_grad()
def running_variance(model):
    model.layer2[1].bn2.running_var.mul_(2)


CHANGES = {
    "optimizer": optimizer_step,
    "load_state_dict": lambda m: m.load_state_dict(small(num_classes=10).state_dict() | {"fc.bias": torch.ones(10)}),
    "data": lambda m: m.layer3[0].conv2.weight.data.mul_(2),
    "data of a vector": lambda m: m.layer3[0].bn2.weight.data[3:4].mul_(-2),
    "data of a bias": lambda m: m.fc.bias.data[9:].add_(2),
    "storage": swap_storage,
    "parameter": replace_parameter,
    "module": replace_module,
    "block": replace_activation,
    "eps": change_eps,
    "running statistics": running_variance,
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change, fused, off):
    model = small(fused)
    x = images(2, 3, 32, 32)
    compiled = fastres.compile(model, x)
    before = compiled(x)
    engine = compiled._engine
    assert engine.fresh() and torch.equal(compiled(x), before)
    CHANGES[change](model)
    assert not engine.fresh()
    check(model, x, compiled)
    assert not torch.allclose(compiled(x), before) and engine.fresh()


def test_a_network_put_into_training_is_refused_until_it_is_back(off):
    model, x = small(), images(2, 3, 32, 32)
    compiled = fastres.compile(model, x)
    model.train()
    with pytest.raises(CompileError, match="training mode"):
        compiled(x)
    check(model.eval(), x, compiled)
    handle = model.layer1.register_forward_hook(lambda *_: None)
    with pytest.raises(CompileError, match="forward hooks of layer1"):
        compiled(x)
    handle.remove()
    check(model, x, compiled)
    model.bfloat16()
    with pytest.raises(CompileError, match=r"was torch\.float32 when it was compiled"):
        compiled(x)


def test_weights_without_version_counters_are_compared_whole(off):
    with torch.inference_mode():
        model = small()
    x = images(1, 3, 32, 32)
    compiled = fastres.compile(model, x)
    before = compiled(x)
    with torch.inference_mode():
        model.layer3[2].conv2.weight[63, 62, 1, 1] += 100
        assert not torch.equal(compiled(x), before)


# ---- memory and threads ----
def test_plans_share_weights_and_the_oldest_go(off):
    model = small()
    # One kernel for all: the preferred one depends on the batch, and each has its own packed weights.
    layers = [s["name"] for s in fastres.compile(model, images(2, 3, 32, 32)).steps() if "candidates" in s]
    compiled = fastres.compile(model, images(2, 3, 32, 32), kernels=dict.fromkeys(layers, "direct"))
    weights = compiled.memory()["weights"]
    for n in range(1, 13):
        compiled(images(n, 3, 32, 32))
    report = compiled.memory()
    assert report["weights"] == weights and len(report["plans"]) == 8 and (12, 3, 32, 32) in report["plans"]
    assert (2, 3, 32, 32) not in report["plans"]
    check(model, images(2, 3, 40, 24), compiled)  # another size: recorded anew
    assert compiled.memory()["weights"] <= 2 * weights
    assert "CompiledNetwork(CifarResNet, float32, plans for" in repr(compiled)


def test_image_by_image_needs_less_memory(off):
    model, x = small(), images(16, 3, 32, 32)
    arena = {}
    for depth_first_bytes in (0, 1 << 20):
        report = fastres.compile(model, x, depth_first_bytes=depth_first_bytes).memory()
        arena[depth_first_bytes] = report["plans"][16, 3, 32, 32]["arena"]
    assert arena[1 << 20] < arena[0]


def test_threads_at_once_each_have_an_arena(off):
    model = small()
    xs = [images(n, 3, 32, 32) * n for n in (2, 2, 4, 2)]
    compiled = fastres.compile(model, xs[0])
    expected = [compiled(x) for x in xs]
    wrong, barrier = [], threading.Barrier(len(xs))

    def work(i):
        barrier.wait()
        for _ in range(30):
            if not torch.equal(compiled(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not wrong
    assert 1 <= compiled.memory()["plans"][2, 3, 32, 32]["arenas"] <= 3


def test_no_memory_is_an_error_that_leaves_the_plan_usable(off):
    model, x = small(), images(2, 3, 32, 32)
    limit = fastres.compile(model, x, depth_first_bytes=0).memory()["plans"][2, 3, 32, 32]["arena"]
    compiled = fastres.compile(model, x, arena_limit=limit + 4096, depth_first_bytes=0)
    expected = compiled(x)
    for _ in range(2):
        with pytest.raises(MemoryError, match=r"needs an arena of \d+ MiB, the limit is \d+ MiB"):
            compiled(images(1, 3, 32, 32).expand(64, -1, -1, -1))
    assert torch.equal(compiled(x), expected)
    layers = nn.Sequential(nn.Conv2d(1, 64, 1), nn.Conv2d(64, 1, 1), nn.AdaptiveAvgPool2d(1)).eval()
    huge = fastres.compile(layers, images(1, 1, 8, 8), depth_first_bytes=0)
    expected = huge(images(1, 1, 8, 8))
    with pytest.raises(MemoryError, match="could not allocate"):  # more than an address can name
        huge(torch.zeros(1).expand(400_000_000, 1, 64, 64))
    assert torch.equal(huge(images(1, 1, 8, 8)), expected)


def test_nothing_keeps_memory_or_networks_alive(off):
    model = small()
    compiled = fastres.compile(model, images(2, 3, 32, 32))
    plan, found = compiled._engine.state.plans[2, 3, 32, 32].plan, weakref.ref(model)
    assert plan.arenas == 1 and plan.arenas_bytes >= plan.arena_bytes > 0
    gone = weakref.ref(compiled._engine.state)
    del compiled, model
    gc.collect()
    assert found() is None and gone() is None


def test_profile_and_steps(off):
    model, x = small(), images(4, 3, 32, 32)
    compiled = fastres.compile(model, x)
    steps, profile = compiled.steps(), compiled.profile(repeats=3)
    assert [s["name"] for s in steps] == [p["name"] for p in profile]
    assert [s["op"] for s in steps][:2] == ["input", "conv"] and steps[-1]["op"] == "linear"
    assert all(p["seconds"] > 0 for p in profile) and "seconds" not in steps[0]
    macs = sum(s["flops"] for s in steps) / 2 / 4
    assert macs == fastres.model_info("resnet20").macs
    conv = steps[1]
    assert conv["name"] == "conv1" and conv["input"] == (3, 32, 32) and conv["output"] == (16, 32, 32)
    assert conv["relu"] and not conv["residual"] and conv["activation_bytes"] == 4 * 4 * 32 * 32 * (3 + 16)


# ---- plans that networks use by themselves ----
@pytest.fixture
def runs(monkeypatch):
    """The shapes that plans computed."""
    seen = []
    execute = network_module.execute
    monkeypatch.setattr(network_module, "execute", lambda built, x: seen.append(tuple(x.shape)) or execute(built, x))
    return seen


def nets():
    torchvision = pytest.importorskip("torchvision")
    yield small()
    yield randomise(fastres.fuse(torchvision.models.resnet18(num_classes=10))).eval()


@torch.no_grad()
def test_the_second_call_makes_a_plan(runs):
    for model in nets():
        x = images(3, 3, 32, 32)
        first = model(x)
        assert runs == [] and why_not(model) is None
        second, third = model(x), model(x)
        # the second call records two images, compares the plan with them, and runs its own
        assert runs == [(2, 3, 32, 32), (3, 3, 32, 32), (3, 3, 32, 32)]
        assert torch.equal(second, third) and second.dtype == first.dtype
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)
        runs.clear()
        with torch.inference_mode():
            assert model(x).is_inference() and len(runs) == 1
        runs.clear()
        model.fc.bias.data.add_(1.0)
        torch.testing.assert_close(model(x), first + 1, rtol=1e-4, atol=1e-4)  # by the network: weights may be moving
        assert runs == []
        torch.testing.assert_close(model(x), first + 1, rtol=1e-4, atol=1e-4)
        assert runs
        runs.clear()


@torch.no_grad()
def test_where_no_plan_is_used(runs, monkeypatch):
    calls = []
    for model in nets():
        x = images(2, 3, 32, 32)
        model(x), model(x)
        assert runs
        runs.clear()
        with torch.enable_grad():
            assert model(x).requires_grad
        with fastres.use_backend("reference"):
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        fastres.explain(model, x)
        plans = []
        torch.func.vmap(lambda t, m=model, found=plans: (found.append(automatic.planned(m, t)), t)[1])(x[None])
        assert plans == [None]
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() > 0
        model(x[:0])
        model.train(), model(x), model.eval()
        monkeypatch.setenv("FASTRES_PLAN", "OFF")
        model(x)
        assert runs == [] and why_not(model) == "FASTRES_PLAN=OFF"
        monkeypatch.delenv("FASTRES_PLAN")
        calls.clear()
        handle = model.layer2.register_forward_hook(lambda *_: calls.append(1))
        model(x), model(x), model(x)
        assert runs == [] and "layer2" in why_not(model)
        if not hasattr(model, "fusion_report"):
            assert len(calls) == 3
        handle.remove()
        for _ in range(3):
            model(x)
        assert runs and why_not(model) is None
        own = model.register_forward_hook(lambda *_: calls.append(2))
        calls.clear(), model(x), own.remove()
        assert calls == [2]
        runs.clear()


@torch.no_grad()
def test_networks_without_a_plan_go_on_and_say_why(runs):
    model = small()
    model.fc = nn.Sequential(model.fc, nn.GELU())
    x = images(2, 3, 32, 32)
    results = [model(x) for _ in range(3)]
    assert runs == [] and torch.equal(results[0], results[2])
    assert "layer 'fc.1' computes aten.gelu()" in why_not(model)
    model.fc = model.fc[0]
    for _ in range(3):
        model(x)
    assert runs and why_not(model) is None


@torch.no_grad()
def test_copies_and_pickles_know_nothing_of_plans(runs):
    for model in nets():
        x = images(2, 3, 32, 32)
        keys, attributes = list(model.state_dict()), set(vars(model))
        model(x)
        expected = model(x)
        assert list(model.state_dict()) == keys and set(vars(model)) == attributes
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin not in automatic._networks
            runs.clear()
            assert torch.allclose(twin(x), expected, rtol=1e-4, atol=1e-4) and runs == []
        found = weakref.ref(model)
        del model, twin
        gc.collect()
        assert found() is None


@torch.no_grad()
def test_compiled_and_exported_graphs_hold_the_operators(runs):
    model, x = small(), images(2, 3, 32, 32)
    model(x), model(x)
    runs.clear()
    exported = torch.export.export(model, (x,))
    assert sum("conv_act" in str(n.target) for n in exported.graph.nodes) == 19
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), exported.module()(x))
    assert runs == []


def test_the_plan_that_was_only_compared_leaves_no_weights():
    model, x = fastres.resnet18().eval(), torch.randn(8, 3, 64, 64)
    compiled = fastres.compile(model, x)
    assert list(compiled.memory()["plans"]) == [(8, 3, 64, 64)]
    assert compiled.memory()["weights"] == sum(step["weight_bytes"] for step in compiled.steps())
    asked = fastres.compile(model, x[:2])
    assert list(asked.memory()["plans"]) == [(2, 3, 64, 64)]
