"""The byte ledger: formulas, levels of fusion, the whole step of a network, the table and the plot."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastres.cli import main
from fastres.errors import InputError
from fastres.evaluate import gpus
from fastres.evaluate.bytes import LEVELS, Ledger, ledger, table
from fastres.evaluate.bytes.recording import split, step_of
from fastres.kernels.common.traffic import Pass, named, touched_positions
from fastres.kernels.conv_stats import bytes as conv_stats
from fastres.nn.blocks import BasicBlock, Bottleneck

KEYS = [level.key for level in LEVELS]


@pytest.fixture(scope="module")
def resnet50() -> Ledger:
    return ledger("resnet50")


def block_step(block: type, channels: int, width: int, stride: int = 1, side: int = 8) -> Ledger:
    found = Ledger("block", 2, "bf16", (side, side))
    with FakeTensorMode():
        for fused in (False, True):
            images = torch.empty(2, channels, side, side, dtype=torch.bfloat16)
            images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
            network = torch.nn.Sequential(block(channels, width, stride, fused=fused)).train()
            found.events += step_of(network, images, torch.bfloat16, fused)
    return found


def test_an_identity_bottleneck_by_hand():
    """Passes over a middle map of n elements; the convolutions' results are n, n and 4n, the input is 4n."""
    found = block_step(Bottleneck, 64, 16)
    n = 16 * 8 * 8 * 2  # bytes of one image
    bits = n / 16  # of a mask
    expected = {
        "L0": (54 * n, 84 * n),
        "L1": (34 * n + 6 * bits, 70 * n + 8 * bits),
        "L2": (28 * n + 6 * bits, 70 * n + 8 * bits),
        "L3": (24 * n + 4 * bits, 60 * n + 4 * bits),
        "L4": (24 * n + 4 * bits, 50 * n + 16 * bits),
        "fastres": (24 * n, 58 * n),
    }
    loss = 4 * n  # the sum that makes a loss of this test's output
    for level, directions in expected.items():
        forward, backward = (found.per_image(level, direction, weights=False) for direction in (False, True))
        assert (forward - loss, backward) == pytest.approx(directions), level


@pytest.mark.parametrize("block, channels", [(Bottleneck, 64), (Bottleneck, 32), (BasicBlock, 16), (BasicBlock, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_level_moves_less_than_the_one_before(block, channels, stride):
    found = block_step(block, channels, 16, stride)
    moved = [found.per_image(key) for key in KEYS]
    assert moved[:5] == sorted(moved[:5], reverse=True) and len(set(moved[:5])) == 5
    assert moved[5] < moved[1]


def test_resnet50_against_published_and_promised_figures(resnet50):
    eager = resnet50.per_image("L0") / 1e6
    assert abs(eager - 469.9) < 0.03 * 469.9
    assert resnet50.per_image("L4") / 1e6 <= 270 and resnet50.per_image("fastres") / 1e6 <= 270
    macs = 4_089_184_256
    stem = 112 * 112 * 64 * 7 * 7 * 3  # has no input gradient
    assert resnet50.flops() == 6 * macs - 2 * stem


def test_the_weights_share(resnet50):
    """Every convolution's weights are read twice and written once as a gradient, in 2 bytes, for 256 images."""
    convolutions = sum(e.passes["fastres"][0].reads["weight"] for e in resnet50.events if e.op == "conv_stats_triton")
    stem = 64 * 3 * 49 * 2
    share = resnet50.per_image("fastres") - resnet50.per_image("fastres", weights=False)
    assert share * 256 == pytest.approx(3 * convolutions - stem)


def test_layers_of_the_backward_pass_are_those_of_the_forward_pass(resnet50):
    for fused in (True, False):
        events = [e for e in resnet50.events if (KEYS[0] not in e.passes) == fused]
        convolution = "conv_stats_triton" if fused else "convolution"
        forward = [e.layer for e in events if e.op == convolution]
        backward = [e.layer for e in events if e.backward and e.op.startswith(("conv_stats_b", "convolution_b"))]
        assert len(forward) == 53 and sorted(forward) == sorted(backward)
    rows = dict(table.rows(resnet50, "stage"))
    assert list(rows)[-1] == "total" and {"conv1", "layer1", "layer4", "fc"} <= set(rows)
    for by in table.GROUPS:
        *parts, forward, backward, total = table.rows(resnet50, by)
        for key in KEYS:
            assert sum(row.get(key, 0) for _, row in parts) == pytest.approx(total[1][key])
            assert forward[1][key] + backward[1][key] == pytest.approx(total[1][key])


def test_triton_keeps_what_the_library_rebuilds():
    """A projection block's result and the stem's pooled map: a pass over maps that would save memory."""
    made_anew = {}
    for backend in ("triton", "library"):
        found = ledger("resnet18", 2, image=32, backend=backend)
        rows = dict(table.rows(found, "op"))
        made_anew[backend] = {
            "scale_shift_act, backward pass",
            "scale_shift_act_pool_gather, backward pass",
        } & rows.keys()
    assert not made_anew["triton"] and len(made_anew["library"]) == 2


def test_passes():
    x, weight = torch.empty(2, 4, 9, 9), torch.empty(8, 4, 1, 1)
    (strided,) = conv_stats.forward(x, weight, None, None, None, False, [2, 2], [0, 0], [1, 1], 1, True)
    assert strided.reads == {"x": 2 * 4 * 25 * 4, "weight": 8 * 4 * 4} and strided.writes == {"y": 2 * 8 * 25 * 4}
    assert strided.weights == 8 * 4 * 4 and strided.maps == strided.total - strided.weights
    assert strided.flops == 2 * 2 * 25 * 8 * 4
    assert [touched_positions(7, 7, 3, 1, 1, 1), touched_positions(7, 2, 3, 3, 0, 2)] == [7, 5]
    assert named(a=None, b=3.0) == {"b": 3.0} and Pass("nothing").total == 0
    assert split("conv_stats_backward_library") == ("conv_stats", "backward")
    assert split("scale_shift_act_pool_gather_reference") == ("scale_shift_act_pool", "gather")


def test_gpus():
    assert gpus.find("H100").key == gpus.find("h100_sxm").key == "h100" and gpus.find("RTX 4090").key == "rtx4090"
    with pytest.raises(InputError, match="did you mean 'h100'"):
        gpus.find("h10")
    assert all(gpu.source and gpu.flops > gpu.bandwidth > 0 for gpu in gpus.GPUS.values())


def test_the_command(tmp_path, capsys):
    plot = tmp_path / "plot.svg"
    assert main(["explain", "--bytes", "resnet18", "--gpu", "a100", "--by", "stage", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert (
        "resnet18, batch 256, 224x224, bf16" in out and "predicted" in out and "A100 Tensor Core GPU datasheet" in out
    )
    assert "</svg>" in plot.read_text()
    assert main(["explain", "--bytes", "resnet18", "--gpu", "z80"]) == 2
    assert "unknown GPU" in capsys.readouterr().err
