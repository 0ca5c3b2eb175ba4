"""Networks: torchvision's keys, exact counts, outputs and gradients by the tolerance rule, architectures that travel."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from parity import assert_network_parity, assert_parity
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastres
from fastres.errors import CheckpointError, InputError, ModelError

IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def randomise_bn(model: nn.Module, x: torch.Tensor, seed: int = 0) -> nn.Module:
    """Random affine parameters, and running statistics scattered around those of ``x``, so that logits stay moderate."""
    g = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        with torch.no_grad():
            bn.weight.copy_(torch.rand(bn.weight.shape, generator=g) + 0.25)
            bn.bias.copy_(torch.randn(bn.bias.shape, generator=g) * 0.2)
        bn.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
        for bn in norms:
            bn.momentum = 0.1
            spread = bn.running_var.sqrt()
            bn.running_mean.add_(spread * torch.randn(spread.shape, generator=g) * 0.2)
            bn.running_var.mul_(torch.rand(spread.shape, generator=g) + 0.7)
    return model.eval()


@pytest.mark.parametrize("name", IMAGENET)
def test_drop_in_for_torchvision(name):
    """state_dict both ways, strictly; logits at 224 and batch 2 within 1e-4, random BN statistics included."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    theirs = randomise_bn(torchvision.models.get_model(name), x)
    fused, plain = fastres.create_model(name), fastres.create_model(name, fused=False)
    for ours in (fused, plain):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.eval()
    with torch.no_grad():
        expected = theirs(x)
        assert torch.equal(plain(x), expected)
        assert (fused(x) - expected).abs().max() <= 1e-4
    # gradients enabled: BatchNorm is folded in the graph
    assert (fused(x).detach() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("memory", ["default", "recompute"])
def test_training_step_by_the_tolerance_rule(name, memory):
    torch.manual_seed(1)
    plain = fastres.create_model(name, fused=False, num_classes=10)
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 0.5, 0.5)  # negative ones included
    fused = fastres.create_model(name, num_classes=10, memory=memory)
    fused.load_state_dict(plain.state_dict())
    truth = copy.deepcopy(plain).double()
    x, up = torch.randn(4, 3, 64, 64), torch.randn(4, 10)
    outputs, grads = [], []
    for model in (fused, plain.to(memory_format=torch.channels_last), truth):
        xs = x.detach().to(next(model.parameters()).dtype, copy=True).requires_grad_()
        out = model(xs.contiguous(memory_format=torch.channels_last))
        (out * up.to(out.dtype)).sum().backward()
        outputs.append(out)
        grads.append({"input": xs.grad} | {k: p.grad for k, p in model.named_parameters()})
    assert_parity(*outputs, what="logits")
    assert_network_parity(*grads)
    for (key, a), b, c in zip(fused.named_buffers(), plain.buffers(), truth.buffers(), strict=True):
        if a.is_floating_point():
            assert_parity(a, b, c, what=key)
        else:
            assert torch.equal(a, c), key


@pytest.mark.parametrize("name", IMAGENET)
def test_float64_is_exact(name):
    """Every gradient of all five: in float32, beyond ResNet-50, PyTorch's own two layouts differ by more than twice."""
    torch.manual_seed(0)
    plain = fastres.create_model(name, fused=False, num_classes=5).double()
    fused = fastres.create_model(name, num_classes=5).double()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    a, b = fused(x), plain(x)
    assert (a - b).abs().max() <= 1e-10 * b.abs().max()
    a.square().sum().backward()
    b.square().sum().backward()
    for (key, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-9 * q.grad.norm(), key


@pytest.mark.parametrize("name", fastres.list_models())
def test_exact_counts(name):
    info = fastres.model_info(name)
    with torch.device("meta"):
        model = fastres.create_model(name, fused=False)
        with FlopCounterMode(display=False) as counter:
            out = model.eval()(torch.empty(1, *info.input_size))
    assert out.shape == (1, info.num_classes)
    assert sum(p.numel() for p in model.parameters()) == info.params
    assert counter.get_total_flops() == 2 * info.macs


@pytest.mark.parametrize(
    ("name", "options", "params", "macs"),
    [
        ("resnet18", {"shortcut": "A"}, 11_515_688, 1_794_805_760),
        ("resnet18", {"shortcut": "C"}, 12_043_816, 1_878_298_624),
        ("resnet34", {"shortcut": "A"}, 21_623_848, 3_644_493_824),
        ("resnet34", {"shortcut": "C"}, 22_716_840, 3_830_747_136),
        ("resnet50", {"version": "v1"}, 25_557_032, 3_857_973_248),
        ("resnet50", {"version": "v1", "shortcut": "C"}, 40_128_552, 6_324_224_000),
        ("resnet101", {"version": "v1"}, 44_549_160, 7_570_194_432),
        ("resnet152", {"version": "v1"}, 60_192_808, 11_282_415_616),
        ("resnet20", {"shortcut": "B"}, 272_474, None),
        ("resnet110", {"shortcut": "B"}, 1_730_714, None),
    ],
)
def test_exact_counts_of_variants(name, options, params, macs):
    with torch.device("meta"):
        model = fastres.create_model(name, fused=False, **options).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *fastres.model_info(name).input_size))
    assert sum(p.numel() for p in model.parameters()) == params
    assert macs is None or counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"shortcut": "A"}),
        ("resnet18", {"shortcut": "C"}),
        ("resnet50", {"version": "v1"}),
        ("plain18", {}),
        ("plain20", {}),
        ("resnet20", {}),
        ("resnet20", {"in_channels": 1, "shortcut": "B"}),
    ],
)
def test_variants_fused_equal_reference(name, options):
    torch.manual_seed(0)
    fused, plain = (fastres.create_model(name, fused=f, **options).double() for f in (True, False))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, fused.in_channels, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        a, b = fused.train(mode)(x), plain.train(mode)(x)
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


def test_option_a_keeps_the_subsampled_input_and_pads_zeros():
    block = fastres.nn.BasicBlock(4, 6, stride=2, shortcut="A")
    x = torch.randn(2, 4, 8, 8)
    out = block.downsample(x)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2])
    assert not out[:, 4:].any()
    assert not list(block.downsample.parameters())


def test_architecture_travels_with_the_state_dict():
    v1, v15 = fastres.resnet50(version="v1"), fastres.resnet50()
    buffer = io.BytesIO()
    torch.save(v1.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    with pytest.raises(ModelError, match=r"version 'v1' \(the model has 'v1.5'\)"):
        v15.load_state_dict(state)
    fastres.resnet50(version="v1").load_state_dict(state)
    with pytest.raises(ModelError, match="name 'resnet50'"):
        fastres.resnet101().load_state_dict(state, strict=False)


def test_weights_from_files(tmp_path):
    model = fastres.create_model("resnet20")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = fastres.create_model("resnet20", weights=tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"no such file: .*missing\.pt"):
        fastres.create_model("resnet20", weights=tmp_path / "missing.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pt can't be read"):
        fastres.create_model("resnet20", weights=tmp_path / "cut.pt")
    with pytest.raises(ModelError, match=r"another architecture: name 'resnet20'"):
        fastres.create_model("resnet56", weights=tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"v1\.5, but 'resnet50' was built as v1"):
        fastres.create_model("resnet50", weights="IMAGENET1K_V1", version="v1")
    with pytest.raises(ModelError, match="torchvision has no weights 'BOGUS'"):
        fastres.create_model("resnet50", weights="BOGUS")


def test_registry_errors():
    with pytest.raises(ModelError, match=r"unknown model 'resnet5'; close to .*resnet50"):
        fastres.create_model("resnet5")
    with pytest.raises(ModelError, match=r"version='v2': expected one of 'v1\.5', 'v1'"):
        fastres.resnet50(version="v2")
    with pytest.raises(ModelError, match=r"resnet50.*unexpected keyword argument 'depth'"):
        fastres.resnet50(depth=3)
    with pytest.raises(ModelError, match=r"plain18.*fixes shortcut"):
        fastres.create_model("plain18", shortcut="A")
    with pytest.raises(ModelError, match="num_classes=0: expected a positive integer"):
        fastres.resnet18(num_classes=0)
    assert fastres.list_models("plain*") == [
        "plain18",
        "plain34",
        "plain20",
        "plain32",
        "plain44",
        "plain56",
        "plain110",
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_bad_input(fused):
    model = fastres.create_model("resnet20", fused=fused).train()
    for x, message in (
        (torch.randn(2, 1, 32, 32), "expected 3 channels, got 1"),
        (torch.randn(3, 32, 32), "expected a 4-D tensor"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.long), "floating-point"),
        (torch.empty(2, 3, 32, 32, device="meta"), "input is on meta, but the model is on cpu"),
        (torch.randn(2, 3, 32, 32).double(), "input is torch.float64, but the model is torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            model(x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model(torch.randn(1, 3, 4, 4))
    if fused:
        assert torch.equal(before["layer3.2.bn2.running_mean"], model.state_dict()["layer3.2.bn2.running_mean"])


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_empty_batch(name):
    model = fastres.create_model(name)
    size = 64
    for mode in (True, False):
        x = torch.randn(0, 3, size, size, requires_grad=True)
        before = copy.deepcopy(model.state_dict())
        out = model.train(mode)(x)
        assert out.shape == (0, model.config["num_classes"])
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_bn_changes_nothing():
    torch.manual_seed(0)
    model = fastres.create_model("resnet20").double().freeze_bn().train()
    before = copy.deepcopy(model.state_dict())
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    reference = fastres.create_model("resnet20", fused=False).double().freeze_bn().train()
    reference.load_state_dict(before)
    loss, expected = model(x).square().sum(), reference(x).square().sum()
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    expected.backward()
    for (key, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-9 * q.grad.norm(), key
    opt.step()
    for key, value in model.state_dict().items():
        changed = not torch.equal(value, before[key])
        assert changed == ((key.endswith("weight") and "bn" not in key) or key == "fc.bias"), key
    model.freeze_bn(False)
    assert all(m.training for m in model.modules())


def test_deepcopy_pickle_and_whole_module_save():
    model = fastres.create_model("resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x), expected)
            again.conv1.weight.mul_(2)
            assert not torch.equal(again(x), expected)
        torch.testing.assert_close(model(x), expected)  # by the plan from the second call on


def test_bfloat16_model_runs_and_is_close():
    torch.manual_seed(0)
    model = fastres.create_model("resnet20")
    reference = fastres.create_model("resnet20", fused=False)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 32, 32)
    truth = copy.deepcopy(reference).double()(x.double())
    low, peer = copy.deepcopy(model).bfloat16()(x.bfloat16()), copy.deepcopy(reference).bfloat16()(x.bfloat16())
    assert_parity(low, peer, truth, metric="l2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_parity(model(x).float(), reference(x).float(), truth, metric="l2")
