"""Whole residual blocks and a whole network by the Triton kernels, training, forward and backward, against the reference."""

import copy

import pytest
import torch
from conftest import run_python
from emulation.triton_interpreter import interpreter_executor
from parity import assert_network_parity
from torch import Tensor, nn

import fastres
from fastres.kernels.common.triton_launch import executing_with
from fastres.nn import BasicBlock, Bottleneck

BLOCKS = {
    "bottleneck": lambda: Bottleneck(32, 8),
    "bottleneck-projection": lambda: Bottleneck(16, 12, stride=2),
    "basic": lambda: BasicBlock(16, 16),
    "basic-projection": lambda: BasicBlock(16, 20, stride=2),
    "basic-padding": lambda: BasicBlock(8, 16, stride=2, shortcut="A"),
}
# What a training step of any of them must launch; which others there are depends on the block.
KERNELS = {"conv_forward", "merge_statistics", "input_gradient_kernel", "weight_gradient_kernel"}


def randomise(module: nn.Module) -> None:
    """Normalisations with weights of both signs, and biases."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A forward and a backward pass: the output, all gradients and all running statistics by name."""
    x = x.clone().requires_grad_()
    out = module(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def as_reference(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same network in plain PyTorch modules."""
    plain = copy.deepcopy(module).to(dtype)
    for m in plain.modules():
        if hasattr(m, "fused"):
            m.fused = False
    return plain


@pytest.fixture(autouse=True)
def exact_products():
    """Products of float32 in float32: torch's default for convolutions on a GPU is tf32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_as_the_reference_does(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    block = BLOCKS[name]().train()
    randomise(block)
    for m in block.modules():  # maps and convolutions in 16 bits, BatchNorm in float32: what autocast would do
        if isinstance(m, nn.Conv2d):
            m.to(dtype)
    x = torch.randn(4, block.conv1.in_channels, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    truth = step(as_reference(block, torch.float64), x.double())
    with fastres.use_backend("reference"):
        peer = step(copy.deepcopy(block), x)
    executor = interpreter_executor()
    with executing_with(executor), fastres.use_backend("triton"):
        ours = step(block, x)
    assert {record.name for record in executor.record} >= KERNELS
    assert_network_parity(ours, peer, truth)


def test_a_network_trains_in_a_process_that_interprets():
    """A CIFAR network of one block a stage, with the backend asked for by name and nothing else."""
    code = """if True:
        import copy
        import torch
        import fastres
        from fastres.models.resnet import CifarResNet
        from parity import assert_network_parity
        from test_triton_blocks import as_reference, randomise, step

        torch.manual_seed(0)
        net = CifarResNet(1).train()
        randomise(net)
        x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        truth = step(as_reference(net, torch.float64), x.double())
        with fastres.use_backend("reference"):
            peer = step(copy.deepcopy(net), x)
        with fastres.use_backend("triton"):
            ours = step(net, x)
        assert len(ours) == len(truth) > 30
        assert_network_parity(ours, peer, truth)
    """
    run_python(code, TRITON_INTERPRET="1")
