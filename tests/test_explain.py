"""fastres.explain: who computes each layer, why, and that looking changes nothing."""

import random

import pytest
import torch
from fusion_cases import Net, fused_pair, other_activation, randomise, residual
from torch import nn

import fastres
from fastres import _library, backends
from fastres.errors import BackendError

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))


def test_rows_of_a_training_pass():
    fused = fused_pair(Net(residual))[1]
    explanation = fastres.explain(fused, X)
    # The first block's result is read twice, so it is made an ordinary tensor.
    assert [(row.layer, row.op) for row in explanation.rows] == [
        ("conv1", "conv_stats"), ("conv1", "scale_shift_act"), ("conv2", "conv_stats"), ("conv3", "conv_stats"),
        ("bn3", "scale_shift_act"),
    ]  # fmt: skip
    assert all(row.shape == (2, 8, 9, 7) and row.dtype == torch.float32 for row in explanation.rows)
    assert explanation.fused == explanation.rows and explanation.training


def test_reasons_of_refused_backends():
    with fastres.use_backend("auto"):
        rows = fastres.explain(fused_pair(Net(residual))[1].double(), X.double()).rows
        for row in rows:
            assert row.backend == "library"
            # the library is preferred for training few channels: nothing was refused there
            assert row.op == "conv_stats" or any(reason.startswith("native") for reason in row.reasons)
    with fastres.use_backend("reference"):
        rows = fastres.explain(fused_pair(Net(residual))[1], X).rows
        assert {row.backend for row in rows} == {"reference"}
    with fastres.use_backend("cuda"), pytest.raises(BackendError, match="cuda"):
        fastres.explain(fused_pair(Net(residual))[1], X)


def test_table(monkeypatch):
    monkeypatch.setattr(backends, "_ENGINE_FIRST", (_library.isa(),))  # native is asked first on every machine
    fused = fused_pair(Net(other_activation))[1].eval().double()  # no native kernel takes float64
    text = str(fastres.explain(fused, X.double()))
    lines = text.splitlines()
    assert lines[0] == "FusedNet in evaluation mode: 2 ops by fastres, 0 by PyTorch"
    assert lines[2].split() == ["layer", "op", "input", "dtype", "backend", "why"]
    assert "conv1" in text and "2x8x9x7" in text and "native takes float32, bfloat16, not float64" in text
    assert len({line.index("2x8x9x7") for line in lines if "2x8x9x7" in line}) == 1, "columns are aligned"


def test_a_layer_that_ran_unfused_says_why():
    reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), reflect, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
    )
    explanation = fastres.explain(fastres.fuse(model), X)
    rows = explanation.rows
    assert [row.layer for row in rows] == ["0", "0", "2", "3", "4", "4"], "in the order of execution"
    assert rows[2].backend == rows[3].backend == "pytorch" and rows[4].op == "conv_stats"
    assert "padding_mode='reflect'" in rows[2].reasons[0]


@pytest.mark.parametrize("model, words", [
    (lambda: Net(residual), "Net is an ordinary PyTorch network. fastres.fuse(model) gives a fused one"),
    (lambda: fastres.fuse(nn.Sequential(nn.Conv2d(8, 8, 1))), "model.fusion_report says why"),
])  # fmt: skip
def test_no_fused_layer(model, words):
    explanation = fastres.explain(model(), X)
    assert not explanation.fused and explanation.rows
    assert words in str(explanation)


def test_networks_of_fastres():
    x = torch.randn(2, 3, 16, 16)
    explanation = fastres.explain(fastres.create_model("resnet20"), x)
    assert {row.layer for row in explanation.rows} >= {"conv1", "layer1.0.conv1", "layer3.2.bn2", "fc"}
    explanation = fastres.explain(fastres.create_model("resnet20", fused=False), x)
    assert not explanation.fused and "built with fused=False" in str(explanation)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model = nn.Sequential(Net(residual), nn.Dropout(0.5))
    fused = fastres.fuse(randomise(model)).train(training)
    before = {k: v.clone() for k, v in fused.state_dict().items()}
    identities = {k: v.data_ptr() for k, v in fused.named_buffers()}
    states = torch.get_rng_state(), random.getstate()
    fastres.explain(fused, X)
    assert all(torch.equal(v, before[k]) for k, v in fused.state_dict().items())
    assert identities == {k: v.data_ptr() for k, v in fused.named_buffers()}
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert all(not m._forward_pre_hooks for m in fused.modules())
    assert all(p.grad is None for p in fused.parameters()) and fused.training is training


def test_restored_after_an_error():
    fused = fused_pair(Net(residual))[1]
    before = {k: v.clone() for k, v in fused.named_buffers()}
    with pytest.raises(ValueError, match="channels"):
        fastres.explain(fused, X[:, :5])
    assert all(torch.equal(v, before[k]) for k, v in fused.named_buffers())
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module"):
        fastres.explain("resnet18", X)


def test_compiled_network():
    fused = fused_pair(Net(residual))[1]
    assert fastres.explain(torch.compile(fused, backend="eager"), X).rows == fastres.explain(fused, X).rows
