"""Bytes that a training step saves for backward at batch 1 and 224 pixels, against torchvision's network."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from benchmarks import memory
from benchmarks.checks import require
from benchmarks.conftest import Bench

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MODES = ("default", "recompute")


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 224, 224).contiguous(memory_format=torch.channels_last)


def build(name: str, mode: str | None, count: int = 1) -> tuple[nn.Module, Tensor]:
    """A network in training (``mode`` None: torchvision's), and a batch."""
    torch.manual_seed(0)
    if mode is None:
        from torchvision import models

        model = getattr(models, name)()
    else:
        model = fastres.create_model(name, memory=mode)
    return model.to(memory_format=torch.channels_last).train(), images(count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_saved_for_backward(bench: Bench, name: str, mode: str) -> None:
    pytest.importorskip("torchvision", reason="the baseline is torchvision's network")
    theirs, x = build(name, None)
    ours, _ = build(name, mode)
    ours.load_state_dict(theirs.state_dict())
    case = f"{name}-{mode}"
    with torch.no_grad():
        exact = theirs.double()(x.double())
        theirs.float()
        require([ours(x)], [theirs(x)], [exact], case, "l2")
    baseline = memory.saved_bytes(theirs, x)
    saved: int = bench.fixture.pedantic(memory.saved_bytes, args=(ours, x), rounds=1, iterations=1)
    held = memory.held_bytes(ours, x) + x.untyped_storage().nbytes()
    # Were maps kept where autograd's hooks do not see them, the figure would be worth nothing.
    assert held <= 1.01 * saved, f"{case}: {held:,} bytes are alive after forward, but only {saved:,} were saved openly"
    values: dict[str, Any] = {
        "baseline": "torchvision", "shape": "1x3x224x224", "saved_bytes": saved, "baseline_bytes": baseline,
        "held_bytes": held, "share": saved / baseline,
    }  # fmt: skip
    if bench.full and name == "resnet50":
        values["step_rss_bytes"] = memory.step_rss_bytes(partial(build, name, mode, 8))
        values["baseline_step_rss_bytes"] = memory.step_rss_bytes(partial(build, name, None, 8))
    bench.note("memory", case, **values)
