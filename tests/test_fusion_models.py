"""fastres.fuse on the networks of torchvision and timm: what is fused, and that nothing changes."""

import copy

import pytest
import torch
from fusion_cases import assert_same_network, fused_pair, randomise, relative
from torch import nn

import fastres

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

BASIC = {"conv+bn+relu": 8, "conv+bn+add+relu": 8, "conv+bn": 3, "conv+bn+relu+maxpool": 1}
BOTTLENECK = {"conv+bn+relu": 32, "conv+bn+add+relu": 16, "conv+bn": 4, "conv+bn+relu+maxpool": 1}


def build(name: str, **options) -> nn.Module:
    library, name = name.split(":")
    torch.manual_seed(0)
    return getattr(torchvision.models, name)(**options) if library == "tv" else timm.create_model(name, **options)


def image(dtype=torch.float32, size=64):
    return torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(5))


# name -> fused patterns, number of layers that are not
COUNTS = {
    "tv:resnet18": (BASIC, 0),
    "tv:resnet50": (BOTTLENECK, 0),
    "tv:resnet152": ({"conv+bn+relu": 100, "conv+bn+add+relu": 50, "conv+bn": 4, "conv+bn+relu+maxpool": 1}, 0),
    "tv:resnext50_32x4d": (BOTTLENECK, 0),
    "tv:wide_resnet50_2": (BOTTLENECK, 0),
    "tv:vgg16_bn": ({"conv+bn+relu": 8, "conv+bn+relu+maxpool": 5}, 0),
    "tv:densenet121": ({"conv+bn+relu": 58, "conv+bn+relu+maxpool": 1}, 123),
    "tv:mobilenet_v2": ({"conv+bn": 42, "conv+bn+add": 10}, 35),
    "timm:resnet18": (BASIC, 0),
    "timm:resnet50": (BOTTLENECK, 0),
    "timm:resnet50d": (BOTTLENECK | {"conv+bn+relu": 34}, 0),
    "timm:resnext50_32x4d": (BOTTLENECK, 0),
    "timm:seresnet50": (BOTTLENECK | {"conv+bn": 16, "conv+bn+add+relu": 4}, 0),
    "timm:resnetv2_50": ({"conv+bn+relu": 32}, 38),
    "timm:resnetblur50": (BOTTLENECK, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_fused(name):
    with torch.device("meta"):
        model = build(name)
    report = fastres.fuse(model).fusion_report
    patterns, unfused = COUNTS[name]
    assert report.counts == patterns and len(report.unfused) == unfused, str(report)
    listed = [n for row in (*report.fused, *report.unfused) for n in row.names]
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(listed.count(n) == 1 for n in norms), "every BatchNorm is in exactly one row"


@pytest.mark.parametrize("name, words", [
    ("tv:mobilenet_v2", "activation is ReLU6"),
    ("tv:densenet121", "leading pre-activation BatchNorm: not preceded by a convolution but by cat"),
    ("timm:resnetv2_50", "leading pre-activation BatchNorm: not preceded by a convolution but by add"),
    ("timm:efficientnet_b0", "activation is SiLU inside BatchNormAct2d"),
    ("tv:convnext_tiny", "no BatchNorm follows"),
])  # fmt: skip
def test_reasons(name, words):
    with torch.device("meta"):
        model = build(name)
    report = fastres.fuse(model).fusion_report
    assert any(words in row.reason for row in report.unfused), str(report)
    assert words in str(report)


@pytest.mark.parametrize("name", ["tv:resnet18", "timm:resnet18", "timm:resnet18d"])
def test_equal_in_float64(name):
    model, fused = fused_pair(build(name, num_classes=10).double())
    assert isinstance(fused, type(model))
    assert_same_network(model, fused, image(torch.float64, 40))


LARGE = ["tv:resnet50", "tv:resnext50_32x4d", "timm:seresnet50", "timm:resnetv2_50", "tv:densenet121"]


@pytest.mark.parametrize("name", LARGE)
def test_equal_in_float32(name):
    model, fused = fused_pair(build(name, num_classes=10))
    x, truth = image(), copy.deepcopy(model).double()
    for mode in (False, True):
        model.train(mode), fused.train(mode), truth.train(mode)
        with torch.no_grad():
            right = truth(x.double())
            assert relative(fused(x), right) <= 2 * relative(model(x), right) + 1e-6


@pytest.mark.parametrize("name", ["tv:resnet18", "timm:resnet18"])
def test_train_and_evaluate_after_loading(name):
    model, fused = build(name, num_classes=10), fastres.fuse(build(name, num_classes=10))
    fused.load_state_dict(randomise(model).state_dict(), strict=True)
    model.load_state_dict(fused.state_dict(), strict=True)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    model.eval(), fused.eval()
    assert relative(fused(image()), model(image())) < 1e-5


def test_equals_our_own_network():
    """A fused torchvision network and fastres's own run the same ops in the same order."""
    own = randomise(fastres.resnet18(num_classes=10)).eval()
    theirs = fastres.fuse(build("tv:resnet18", num_classes=10)).eval()
    theirs.load_state_dict(own.state_dict())
    x = image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(theirs(x), own(x))


def test_compile_export_and_ddp(tmp_path):
    import torch.distributed as dist

    fused = fused_pair(build("tv:resnet18", num_classes=10))[1].eval()
    x = image(size=32)
    with torch.no_grad():
        expected = fused(x)
        assert relative(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), expected) < 1e-5
        assert relative(torch.export.export(fused, (x,)).module()(x), expected) < 1e-5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(fused.train())(x).sum().backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in fused.parameters())


def test_methods_of_the_original_class_work():
    fused = fastres.fuse(build("timm:resnet18", num_classes=10))
    fused.reset_classifier(3)
    assert fused(image(size=32)).shape == (2, 3)
    assert fused.get_classifier() is fused.fc
