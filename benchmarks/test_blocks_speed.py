"""Residual blocks, forward and backward in training, against the same block of plain PyTorch modules."""

import copy

import pytest
import torch
from torch import Tensor, nn

from benchmarks.checks import cotangent, parameter_dtype, require_network
from benchmarks.conftest import Bench
from fastres.nn import BasicBlock, Bottleneck

EAGER = "eager channels_last"
# name: (block, channels in, width, stride, side of the input)
BLOCKS: dict[str, tuple[type[nn.Module], int, int, int, int]] = {
    "basic": (BasicBlock, 64, 64, 1, 56),
    "basic-projection": (BasicBlock, 64, 128, 2, 56),
    "bottleneck": (Bottleneck, 256, 64, 1, 56),
    "bottleneck-projection": (Bottleneck, 256, 128, 2, 56),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(bench: Bench, dtype: torch.dtype, name: str) -> None:
    kind, channels, width, stride, side = BLOCKS[name]
    side, batch = bench.size(side // 2, side), bench.size(4, 16)
    plain = kind(channels, width, stride, fused=False).to(memory_format=torch.channels_last).train()
    fused = kind(channels, width, stride, fused=True).to(memory_format=torch.channels_last).train()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(batch, channels, side, side).relu_().contiguous(memory_format=torch.channels_last)
    case = f"{name}-{'bf16' if dtype is torch.bfloat16 else 'fp32'}-forward+backward"

    def on_input(model: nn.Module) -> Tensor:
        return model(x[:4].to(parameter_dtype(model)))

    require_network(fused, plain, on_input, dtype, case)
    calls = [training_call(copy.deepcopy(model), x, dtype) for model in (fused, plain)]
    bench.compare("blocks", case, "x".join(map(str, x.shape)), calls[0], {EAGER: calls[1]})


def training_call(model: nn.Module, x: Tensor, dtype: torch.dtype):
    """Forward and backward, gradients of the input included."""
    x = x.clone().requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        gradient = cotangent(model(x))

    def call() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            out = model(x)
        out.backward(gradient)

    return call
