"""The byte ledger's formulas against what the kernels load and store, counted under Triton's interpreter.

Compared are maps and weights: every address counts once for each launch that touches it. [C] vectors, counts and partial
sums are what the model leaves out.
"""

import pytest
import torch
from cases import Conv, random_map, random_vectors
from emulation.triton_interpreter import interpreter_executor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres import backends
from fastres.evaluate.bytes.recording import step_of
from fastres.kernels.common.traffic import Pass
from fastres.kernels.common.triton_launch import executing_with
from fastres.kernels.conv_act import bytes as conv_act
from fastres.kernels.conv_stats import bytes as conv_stats
from fastres.kernels.scale_shift_act import bytes as scale_shift_act
from fastres.kernels.scale_shift_act_mean import bytes as mean
from fastres.kernels.scale_shift_act_pool import bytes as pool
from fastres.nn.blocks import Bottleneck
from fastres.ops.schemas import overload

MAPS = {
    "addend",
    "x",
    "y",
    "grad",
    "grad_y",
    "grad_x",
    "residual",
    "grad_residual",
    "out",
    "index",
    "weight",
    "grad_weight",
}


def moved(record) -> tuple[int, int]:
    """(bytes read, bytes written) of maps and weights. A weight gradient goes to ``result`` where no split has to be summed."""
    read = written = 0
    for launch in record:
        names = MAPS | ({"result"} if not any("grad_weight" in r.unique_stored for r in record) else set())
        read += sum(size for name, size in launch.unique_loaded.items() if name in names)
        written += sum(size for name, size in launch.unique_stored.items() if name in names)
    return read, written


def counted(call) -> tuple[int, int]:
    with executing_with(executor := interpreter_executor(check_stores=False)), torch.no_grad():
        call()
    return moved(executor.record)


def by_formula(passes: list[Pass]) -> tuple[float, float]:
    return sum(sum(p.reads.values()) for p in passes), sum(sum(p.writes.values()) for p in passes)


def assert_same(op: str, suffix: str, formula, *arguments) -> None:
    ours = counted(lambda: overload(op, "triton", suffix)(*arguments))
    assert ours == by_formula(formula(*arguments)), (op, suffix)


CONVS = (
    Conv(2, 64, 8, 8, 48, 1),
    Conv(2, 64, 9, 8, 64, 1, 2),
    Conv(2, 32, 9, 8, 64, 3, 1, 1),
    Conv(2, 32, 10, 9, 32, 3, 2, 1),
    Conv(1, 3, 20, 20, 32, 7, 2, 3),
)


@pytest.mark.parametrize("conv, prologue", [(c, p) for c in CONVS for p in (False, True)][:-1])  # images have none
def test_conv_stats(conv, prologue):
    x = random_map((conv.n, conv.c, conv.h, conv.w), torch.bfloat16)
    weight = random_map((conv.k, conv.c, conv.r, conv.r), torch.bfloat16)
    vectors = random_vectors(conv.c, 3) if prologue else [None] * 3
    geometry = ([conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    assert_same("conv_stats", "", conv_stats.forward, x, weight, *vectors, True, *geometry, True)
    y, mean, var = overload("conv_stats", "reference")(x, weight, *vectors, True, *geometry, True)
    for grad_var, need_input in ((var, True), (None, True), (var, False)):
        arguments = (y.clone(), mean, grad_var, x, weight, y, mean, *vectors, True, *geometry, need_input, True)
        assert_same("conv_stats", "backward", conv_stats.backward, *arguments)


@pytest.mark.parametrize("conv", [CONVS[0], CONVS[3]], ids=str)
def test_conv_act(conv):
    x = random_map((conv.n, conv.c, conv.h, conv.w), torch.bfloat16)
    weight = random_map((conv.k, conv.c, conv.r, conv.r), torch.bfloat16)
    geometry = ([conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    out = overload("conv_act", "reference")(x, weight, None, None, True, *geometry)
    assert_same("conv_act", "", conv_act.forward, x, weight, None, out, True, *geometry)


@pytest.mark.parametrize("residual", ["none", "identity", "projection"])
@pytest.mark.parametrize("relu", [True, False])
def test_scale_shift_act(residual, relu):
    shape = (2, 48, 9, 8)
    y, other = random_map(shape, torch.bfloat16), random_map(shape, torch.bfloat16, seed=3)
    main, rest = random_vectors(48, 3), [None] * 4
    if residual != "none":
        rest = [other, *(random_vectors(48, 3) if residual == "projection" else [None] * 3)]
    assert_same("scale_shift_act", "", scale_shift_act.forward, y, *main, *rest, relu)
    arguments = (y.clone(), y, *main, *rest, relu, residual != "none")  # tensors of their own: addresses are counted
    assert_same("scale_shift_act", "backward", scale_shift_act.backward, *arguments)
    assert_same("scale_shift_act", "masked", scale_shift_act.masked, *arguments[:-1])


@pytest.mark.parametrize("residual", [False, True])
def test_scale_shift_act_mean(residual):
    y, main = random_map((2, 48, 7, 7), torch.bfloat16), random_vectors(48, 3)
    rest = [y.flip(0).contiguous(memory_format=torch.channels_last) if residual else None, None, None, None]
    assert_same("scale_shift_act_mean", "", mean.forward, y, *main, *rest, True)
    grad = torch.ones(2, 48, dtype=torch.bfloat16)
    assert_same("scale_shift_act_mean", "backward", mean.backward, grad, y, *main, *rest, True, residual)


def test_scale_shift_act_pool():
    y, main, window = random_map((2, 48, 12, 12), torch.bfloat16), random_vectors(48, 3), (True, 3, 2, 1)
    out, index = overload("scale_shift_act_pool", "reference")(y, *main, *window)
    assert_same("scale_shift_act_pool", "", pool.forward, y, *main, *window)
    assert_same("scale_shift_act_pool", "backward", pool.backward, out, index, y, *main, *window)
    arguments = (y, *main, index, *window)
    read, written = counted(lambda: overload("scale_shift_act_pool", "triton", "gather")(*arguments))
    most_read, exact = by_formula(pool.gather(*arguments))
    assert written == exact and most_read / 4 < read <= most_read, "maxima lie anywhere: the formula counts all of y"


def test_a_whole_bottleneck():
    """One step of the identity block through autograd: every launch, against the ledger of the same block."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(Bottleneck(64, 16)).train()
    x = random_map((2, 64, 8, 8), torch.bfloat16).requires_grad_()
    with executing_with(executor := interpreter_executor(check_stores=False)), backends.use_backend("triton"):
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        out.sum().backward()
    with FakeTensorMode():
        fake = torch.empty(2, 64, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        events = step_of(torch.nn.Sequential(Bottleneck(64, 16)).train(), fake.requires_grad_(), torch.bfloat16, True)
    own = [p for e in events if e.op.endswith("_triton") for p in e.passes["fastres"]]
    read, written = by_formula(own)
    names = MAPS | {"result"}
    ours = [r for r in executor.record if not r.name.startswith("merge")]
    assert len(ours) >= len(own)
    loaded = sum(size for r in ours for name, size in r.unique_loaded.items() if name in names)
    stored = sum(size for r in ours for name, size in r.unique_stored.items() if name in names)
    assert (loaded, stored) == (read, written)
