"""Whole networks, inference and training step, against plain PyTorch in channels_last: eager; --full: compiled too."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastres
from benchmarks.checks import parameter_dtype, require_network
from benchmarks.conftest import Bench
from fastres.cli.bench import forward_of, step_of

EAGER, COMPILED = "eager channels_last", "torch.compile, channels_last"


def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """(fused, plain) with the same weights; fresh statistics would hide a BatchNorm that was left out."""
    plain = fastres.create_model(name, fused=False)
    for key, buffer in plain.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.8, 1.25)
    fused = fastres.create_model(name, fused=True)
    fused.load_state_dict(plain.state_dict())
    return fused.to(memory_format=torch.channels_last), plain.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["inference", "step"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_model(bench: Bench, dtype: torch.dtype, name: str, mode: str) -> None:
    batch, side = bench.size(4, 16), bench.size(96, 224)
    fused, plain = (model.train(mode == "step") for model in make_pair(name))
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))
    case = f"{name}-{mode}-{'bf16' if dtype is torch.bfloat16 else 'fp32'}"

    def on_images(model: nn.Module) -> Tensor:
        return model(images[:4].to(parameter_dtype(model)))

    require_network(fused, plain, on_images, dtype, case)
    make = step_of if mode == "step" else forward_of
    baselines = {EAGER: make(copy.deepcopy(plain), images, labels, dtype)}
    if bench.full:
        compiled = torch.compile(copy.deepcopy(plain))
        baselines[COMPILED] = make(compiled, images, labels, dtype)
    bench.compare("models", case, f"{batch}x3x{side}x{side}", make(fused, images, labels, dtype), baselines)
