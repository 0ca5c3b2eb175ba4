"""Gradients that nodes of a block's graph leave to each other, on Triton's path: the shortcut's is added by the first
convolution's kernel, and a block's end sends dz where its convolutions scale it. Nothing is lost, counted twice or scaled
twice, whatever part of the graph runs, how often, and under whose hooks."""

import copy

import pytest
import torch
from emulation.triton_interpreter import interpreter_executor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastres
from fastres.backends import Choice
from fastres.kernels.common.triton_launch import Launch, executing_with
from fastres.nn import BasicBlock, Bottleneck
from fastres.ops import autograd, conv_stats, end_conv_stats, forked_conv_stats, functional, scale_shift_act
from fastres.ops.schemas import OPS

BLOCKS = {
    "identity": lambda: BasicBlock(8, 8),
    "projection": lambda: Bottleneck(8, 4, stride=2),
    "padding": lambda: BasicBlock(8, 12, stride=2, shortcut="A"),
    "recomputed": lambda: Bottleneck(16, 4, memory="recompute"),
}


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


class Counting:
    """An executor that counts the input gradients that added something, and the gradients that scaled dz."""

    def __init__(self) -> None:
        self.added = self.scaled = self.masked = 0
        self.run = interpreter_executor()

    def __call__(self, launch: Launch) -> None:
        self.added += bool(launch.constants.get("ADD"))
        self.scaled += bool(launch.constants.get("HAS_FACTOR"))
        self.masked += bool(launch.constants.get("MASKED"))
        self.run(launch)


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = BLOCKS[name]().train()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    x = torch.randn(3, block.conv1.in_channels, 6, 6).contiguous(memory_format=torch.channels_last)
    return block, x.requires_grad_()


def both(name: str, act, monkeypatch, added: int | None = None) -> None:
    """``act(block, x)`` -> tensors, with the fork and with plain ops."""
    found = []
    for plain in (False, True):
        block, x = make(name)
        executor = Counting()
        with monkeypatch.context() as m, executing_with(executor), fastres.use_backend("triton"):
            if plain:
                m.setattr(functional, "_joins", lambda backend: False)
            found.append([t for t in act(block, x) if t is not None])
        if added is not None:
            assert executor.added == (0 if plain else added)
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def gradients(block: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(p.grad for p in block.parameters())]


def loss(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step(name, monkeypatch):
    def act(block, x):
        loss(block(x)).backward()
        return gradients(block, x)

    both(name, act, monkeypatch, added=1)


def test_two_backward_passes_over_one_graph(monkeypatch):
    def act(block, x):
        out = loss(block(x))
        out.backward(retain_graph=True)
        out.backward()
        return gradients(block, x)

    both("identity", act, monkeypatch, added=2)


@pytest.mark.parametrize("wanted", ["x", "conv1.weight", "conv2.weight", "bn1.bias"])
def test_only_some_gradients_are_asked_for(wanted, monkeypatch):
    def act(block, x):
        target = x if wanted == "x" else block.get_parameter(wanted)
        return torch.autograd.grad(loss(block(x)), target)

    both("identity", act, monkeypatch)


def test_frozen_parameters(monkeypatch):
    def act(block, x):
        block.requires_grad_(False)
        loss(block(x)).backward()
        return [x.grad]

    both("projection", act, monkeypatch, added=1)


def test_an_input_without_gradient_is_not_forked(monkeypatch):
    def act(block, x):
        loss(block(x.detach())).backward()
        return [p.grad for p in block.parameters()]

    both("identity", act, monkeypatch, added=0)


def test_the_input_is_used_elsewhere_and_watched(monkeypatch):
    """Hooks see the whole gradient of x, also those that change it."""
    seen: list[Tensor] = []

    def act(block, leaf):
        x = leaf * 2
        x.register_hook(seen.append)
        x.register_hook(lambda g: 3 * g)
        x.retain_grad()
        (loss(block(x)) + loss(block(x)) + x.square().sum()).backward()
        return [seen.pop(), x.grad, *gradients(block, leaf)]

    both("identity", act, monkeypatch, added=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, monkeypatch):
    def act(block, x):
        loss(checkpoint(block, x, use_reentrant=reentrant)).backward()
        return gradients(block, x)

    both("projection", act, monkeypatch, added=1)


def test_an_exception_in_between(monkeypatch):
    """A backward pass that failed leaves nothing behind for the next one."""

    def act(block, x):
        out = block(x)
        broken = [True]

        def hook(grad: Tensor) -> None:
            if broken.pop() if broken else False:
                raise RuntimeError("on purpose")

        block.bn1.weight.register_hook(hook)
        with pytest.raises(RuntimeError, match="on purpose"):
            loss(out).backward(retain_graph=True)
        block.zero_grad()
        x.grad = None
        loss(out).backward()
        return gradients(block, x)

    both("identity", act, monkeypatch)


def fork(x: Tensor, weight: Tensor):
    executor = Counting()
    with executing_with(executor), fastres.use_backend("triton"):
        return forked_conv_stats(x, weight)


@pytest.mark.parametrize("used", ["through", "y", "mean", "all"])
def test_parts_of_a_fork(used):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 1, 1, requires_grad=True)
    found = []
    with executing_with(Counting()), fastres.use_backend("triton"):
        for forked in (True, False):
            y, mean, var, through = forked_conv_stats(x, weight) if forked else (*conv_stats(x, weight), x)
            assert torch.equal(through, x) and through.data_ptr() == x.data_ptr()
            parts = {"through": through.square().sum(), "y": loss(y), "mean": loss(mean) + loss(var)}
            total = sum(parts.values()) if used == "all" else parts[used]
            found.append(torch.autograd.grad(total, [x, weight], allow_unused=True))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_change_in_place_is_an_error():
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 1, 1)
    with executing_with(Counting()), fastres.use_backend("triton"):
        a = x * 1
        y, *_, through = forked_conv_stats(a, weight)
        with pytest.raises(RuntimeError, match="inplace"):
            through.add_(1)
        a.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()


def test_a_second_derivative_is_an_error():
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 1, 1, requires_grad=True)
    with executing_with(Counting()), fastres.use_backend("triton"):
        y, *_, through = forked_conv_stats(x, weight)
        (grad,) = torch.autograd.grad(loss(y) + loss(through), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()


def test_where_plain_ops_are_used():
    """Other backends, no gradients, transforms of functions, a cast on the way in: the fourth result is x itself."""
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 1, 1, requires_grad=True)
    for backend in ("reference", "library"):
        with fastres.use_backend(backend):
            assert forked_conv_stats(x, weight)[3] is x
    with executing_with(Counting()), fastres.use_backend("triton"):
        assert forked_conv_stats(x, weight)[3] is not x
        with torch.no_grad():
            assert forked_conv_stats(x, weight)[3] is x
        with torch.autocast("cpu", torch.bfloat16):
            assert forked_conv_stats(x, weight)[3] is x
        inner = []
        torch.func.grad(lambda w: (inner.append(functional._joins("triton")), w.square().sum())[1])(weight)
        assert functional._joins("triton") and inner == [False]


@pytest.mark.parametrize("name, convolutions", [("identity", 1), ("projection", 2), ("padding", 1), ("recomputed", 1)])
@pytest.mark.parametrize("average", [False, True])
def test_one_map_for_all_that_scale_it(name, convolutions, average):
    """Both gradients of every convolution that ends in the block's addition apply its factor, and no other."""
    block, x = make(name)
    with executing_with(executor := Counting()), fastres.use_backend("triton"):
        loss(block(x, average=average)).backward()
    assert (executor.masked, executor.scaled) == (1, 2 * convolutions)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_step_that_averages(name, monkeypatch):
    def act(block, x):
        loss(block(x, average=True)).backward()
        return gradients(block, x)

    both(name, act, monkeypatch, added=1)


def test_a_residual_whose_convolution_takes_no_factor(monkeypatch):
    """Its own backend may be another one: then dz is scaled here."""
    found = []
    for plain in (False, True):
        block, x = make("projection")
        with monkeypatch.context() as m, executing_with(executor := Counting()), fastres.use_backend("triton"):
            if plain:
                m.setattr(functional, "_joins", lambda backend: False)
            else:
                m.setattr(block, "residual", lambda x, b=block: Bottleneck.residual(b, x)._replace(factor=None))
            loss(block(x)).backward()
        assert (executor.masked, executor.scaled) == ((0, 0) if plain else (1, 2))
        found.append(gradients(block, x))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_an_end_by_another_backend_sends_what_it_always_sent():
    """A factor holds only once the end has said so."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(5, 4, 1, 1, requires_grad=True)
    vectors = [torch.rand(5) + 0.5 for _ in range(3)]
    found = []
    with executing_with(Counting()):
        for forced, relu in (("reference", True), ("triton", False), ("triton", True)):
            for joined in (True, False):
                with fastres.use_backend("triton"):
                    y, _, _, factor = end_conv_stats(x, weight) if joined else (*conv_stats(x, weight), None)
                with fastres.use_backend(forced):
                    out = scale_shift_act(y, *vectors, relu=relu, factors=(factor, None))
                found.append(torch.autograd.grad(loss(out), [x, weight]))
                assert factor is None or (factor.vector is not None) == (forced == "triton" and relu)
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_copies_of_a_block_are_independent(monkeypatch):
    def act(block, x):
        twin = copy.deepcopy(block)
        loss(twin(block(x))).backward()
        return [*gradients(block, x), *(p.grad for p in twin.parameters())]

    both("identity", act, monkeypatch, added=2)


@pytest.mark.parametrize("average", [False, True])
def test_cuda_leaves_the_same_to_its_neighbours(average, monkeypatch):
    """The nodes ask the backend that they were given. Its kernels stand in as Triton's; who averages is the library."""
    asked, real = set(), autograd.overload

    def overload(op, backend, suffix=""):
        asked.add((op, suffix, backend))
        return real(op, "triton" if backend == "cuda" else backend, suffix)

    def select(op, x, conv=None):
        return Choice("cuda" if "cuda" in OPS[op].backends or op == "conv_stats" else "library")

    expected = []
    for faked in (False, True):
        block, x = make("projection")
        with monkeypatch.context() as m, executing_with(executor := Counting()), fastres.use_backend("triton"):
            if faked:
                m.setattr(autograd, "overload", overload)
                m.setattr(functional, "overload", overload)
                m.setattr(functional.backends, "select", select)
            loss(block(x, average=average)).backward()
        counts = (executor.added, executor.masked, executor.scaled)
        assert counts == ((1, 0, 0) if faked and average else (1, 1, 4))
        expected.append(gradients(block, x))
    assert ("conv_stats", "backward", "cuda") in asked
    assert (("scale_shift_act", "masked", "cuda") in asked) != average
    assert (("scale_shift_act_mean", "", "library") in asked) == average
    for ours, theirs in zip(*expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
