"""Layers: folds that are never stale, memory saved for backward, SyncBatchNorm, DDP, compile, export."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.nn.folding import _folds, folded


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes saved for backward: every storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes():
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum()
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize(
    ("name", "limit"),
    [("resnet18", 0.62), ("resnet34", 0.66), ("resnet50", 0.74), ("resnet101", 0.77), ("resnet152", 0.79)],
)
def test_bytes_saved_for_backward(name, limit):
    x = torch.randn(1, 3, 224, 224)
    base = saved_bytes(torchvision.models.get_model(name).train(), x)
    assert saved_bytes(fastres.create_model(name).train(), x) <= limit * base
    assert saved_bytes(fastres.create_model(name, memory="recompute").train(), x) <= 0.50 * base


class TestFold:
    """Evaluation never uses a stale fold."""

    def setup_method(self):
        torch.manual_seed(0)
        self.layer = fastres.nn.ConvBNAct(4, 6).eval()
        self.x = torch.randn(2, 4, 6, 6)
        nn.init.normal_(self.layer.bn.weight)

    def check(self):
        plain = copy.deepcopy(self.layer)
        plain.fused = False
        with torch.no_grad():
            assert torch.allclose(self.layer(self.x), plain(self.x), rtol=1e-4, atol=1e-5)

    def test_it_is_cached(self):
        with torch.no_grad():
            first = folded(self.layer.conv, self.layer.bn)[0]
            assert folded(self.layer.conv, self.layer.bn)[0] is first
        assert self.layer.conv in _folds

    @pytest.mark.parametrize("where", ["weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"])
    @pytest.mark.parametrize("how", ["in_place", "data", "load_state_dict", "set_data", "numpy"])
    def test_every_change_is_noticed(self, where, how):
        self.check()
        owner, name = (self.layer.bn, where[3:]) if where.startswith("bn.") else (self.layer.conv, where)
        tensor = getattr(owner, name)
        with torch.no_grad():
            if how == "in_place":
                tensor.mul_(1.5).add_(0.1)
            elif how == "data":
                tensor.data.mul_(1.5).add_(0.1)
            elif how == "numpy":
                tensor.detach().numpy()[...] *= 1.5
            elif how == "set_data":
                tensor.data = tensor.data * 1.5 + 0.1
            else:
                owner.load_state_dict({k: v * 1.5 + 0.1 for k, v in owner.state_dict().items()})
        self.check()

    def test_one_weight_that_is_not_sampled(self):
        """Only the version counter sees this one: 216 weights, every third is compared by value."""
        self.check()
        with torch.no_grad():
            self.layer.conv.weight.view(-1)[1] += 5.0
        self.check()

    def test_eps_dtype_and_training_steps_are_noticed(self):
        self.check()
        self.layer.bn.eps = 0.1
        self.check()
        self.layer.train()(torch.randn(8, 4, 6, 6) + 3)
        self.layer.eval()
        self.check()
        self.layer.double()
        self.x = self.x.double()
        self.check()

    def test_inference_mode_and_inference_tensors(self):
        with torch.inference_mode():
            self.layer(self.x)
        self.check()
        with torch.inference_mode():
            made_inside = fastres.nn.ConvBNAct(4, 6).eval()
            a = made_inside(self.x)
            made_inside.conv.weight.mul_(2)
            assert not torch.equal(made_inside(self.x), a)

    def test_cache_goes_with_its_layer(self):
        self.check()
        before = len(_folds)
        del self.layer
        assert len(_folds) < before

    def test_two_threads(self):
        with torch.no_grad():
            expected = self.layer(self.x)
        results = []

        def run():
            with torch.no_grad():
                results.append(all(torch.equal(self.layer(self.x), expected) for _ in range(50)))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert results == [True, True]


def test_conv_bias_momentum_none_no_affine_no_running_statistics():
    for bn_options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        torch.manual_seed(0)
        layer = fastres.nn.ConvBNAct(4, 6).double()
        layer.conv = nn.Conv2d(4, 6, 3, padding=1, bias=True).double()
        layer.bn = nn.BatchNorm2d(6, **bn_options).double()
        plain = copy.deepcopy(layer)
        plain.fused = False
        for mode in (True, True, False):
            x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
            a, b = layer.train(mode)(x), plain.train(mode)(x)
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
            if mode:
                a.square().sum().backward()
                b.square().sum().backward()
        for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-9)
        for p, q in zip(layer.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(p, q, rtol=1e-10)


def test_recipes_do_not_survive_an_in_place_change():
    """A block end that the user changes in place is saved as it is, not rebuilt."""
    torch.manual_seed(0)
    block = fastres.nn.BasicBlock(4, 8, stride=2).double()
    after = nn.Conv2d(8, 3, 1, bias=False).double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    grads = []
    for fused in (True, False):
        block.fused = fused
        out = block(x).add_(1.0) if fused else block(x) + 1.0
        y, _, _ = fastres.conv_stats(out, after.weight)
        grads.append(torch.autograd.grad(y.square().sum(), [after.weight, block.conv1.weight]))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


def test_training_twice_over_one_graph():
    model = fastres.create_model("resnet20")
    out = model(torch.randn(2, 3, 32, 32)).sum()
    first = torch.autograd.grad(out, model.conv1.weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, model.conv1.weight)[0])


@pytest.mark.parametrize(("mode", "memory"), [(True, "default"), (True, "recompute"), (False, "default")])
def test_compile_fullgraph(mode, memory):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = fastres.create_model("resnet20", num_classes=5, memory=memory).train(mode)
    model.layer1, model.layer3 = model.layer1[:1], model.layer3[:1]
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 16, 16)
    with torch.set_grad_enabled(mode):
        a, b = compiled(x), eager(x)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    if mode:
        a.square().sum().backward()
        b.square().sum().backward()
        for (key, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, key
        for (key, p), q in zip(model.named_buffers(), eager.buffers(), strict=True):
            assert torch.allclose(p.double(), q.double(), rtol=1e-4, atol=1e-6), key


def test_compile_with_inductor():
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = fastres.nn.BasicBlock(8, 16, stride=2)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 8, 10, 10).contiguous(memory_format=torch.channels_last)
    a, b = compiled(x), eager(x)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.allclose(layer.conv1.weight.grad, eager.conv1.weight.grad, rtol=1e-3, atol=1e-4)


def test_export():
    model = fastres.create_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert "fastres.conv_act" in exported.graph_module.code
    with torch.no_grad():
        y = torch.randn(5, 3, 32, 32)
        assert torch.allclose(exported.module()(y), model(y), rtol=1e-4, atol=1e-5)


def _small():
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", num_classes=5).double()
    model.layer1, model.layer2, model.layer3 = model.layer1[:1], model.layer2[:1], model.layer3[:1]
    return model


def _sync_worker(rank: int, store: str, counts: list[int], queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(fastres.convert_sync_bn(_small()))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 3, 16, 16, dtype=torch.float64, generator=g)
    mine = x[: counts[0]] if rank == 0 else x[counts[0] :]
    # DDP averages over ranks: 2 x the local sum makes it the sum over the joint batch
    (2 * model(mine).square().sum()).backward()
    state = {k: v.detach().numpy() for k, v in model.module.state_dict().items()}
    grads = {k: p.grad.numpy() for k, p in model.module.named_parameters()}
    queue.put((rank, state, grads))
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [[3, 3], [1, 4]], ids=str)
def test_sync_bn_equals_one_process_on_the_joint_batch(tmp_path, counts):
    model = _small()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 3, 16, 16, dtype=torch.float64, generator=g)
    model(x).square().sum().backward()
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_sync_worker, args=(r, str(tmp_path / "store"), counts, queue)) for r in range(2)]
    for w in workers:
        w.start()
    results = [queue.get(timeout=120) for _ in workers]
    for w in workers:
        w.join()
        assert w.exitcode == 0
    for _, state, grads in results:
        for key, value in model.state_dict().items():
            assert torch.allclose(torch.from_numpy(state[key]), value, rtol=1e-9, atol=1e-12), key
        for key, p in model.named_parameters():
            assert (torch.from_numpy(grads[key]) - p.grad).norm() <= 1e-9 * p.grad.norm(), key


def test_use_backend_reaches_the_layers():
    model = fastres.create_model("resnet20").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for backend in ("reference", "library", "native"):
            with fastres.use_backend(backend):
                assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-4)
        for train in (False, True):
            with fastres.use_backend("cuda"), pytest.raises(RuntimeError, match="runs on cuda tensors"):
                model.train(train)(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("memory", ["default", "recompute"])
@pytest.mark.parametrize("name", ["resnet20", "plain20"])
def test_the_last_block_averages_unless_it_is_watched(name, memory):
    """The result is the same, bit for bit on the CPU, and hooks still see the map that they are there for."""
    x = torch.randn(3, 3, 16, 16)
    outcomes, shapes = [], []
    torch.manual_seed(1)
    model = fastres.create_model(name, memory=memory).train()
    ran = [row.op for row in fastres.explain(model, x).rows]
    assert ran[-1] == "Linear" and ran[-2] == "scale_shift_act_mean" and ran.count("scale_shift_act_mean") == 1
    for hooked in (False, True):
        if hooked:
            model.layer3[-1].register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        outcomes.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert shapes == [(3, 64, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_the_average_is_left_to_a_block_of_another_kind():
    class Doubling(type(fastres.create_model("resnet20").layer3[-1])):
        def forward(self, x, average=False):
            return 2 * super().forward(x)

    torch.manual_seed(1)
    model = fastres.create_model("resnet20").train()
    x = torch.randn(2, 3, 16, 16)
    plain = model(x) - model.fc.bias
    model.layer3[-1].__class__ = Doubling
    assert torch.allclose(model(x) - model.fc.bias, 2 * plain, rtol=1e-5, atol=1e-6)
