"""Inference plans give what the networks give: parity against float64, shapes, dtypes, values, and refusals."""

import copy

import pytest
import torch
from conftest import require, run_with_isa
from fusion_cases import randomise
from parity import assert_parity
from torch import Tensor, nn

import fastres
from fastres._library import _native
from fastres.errors import CompileError, InputError, UserError

pytestmark = pytest.mark.skipif(fastres.build_info()["native_error"] is not None, reason="the native library is absent")
DTYPES = (torch.float32, torch.bfloat16)
GROUPED = pytest.mark.skipif(
    _native is None or "grouped" not in _native.conv_kernels(), reason="no kernel for grouped convolutions"
)


@pytest.fixture(autouse=True)
def _no_automatic_plans(monkeypatch):
    """Networks compute their own results here, so that a plan is never compared with a plan."""
    monkeypatch.setenv("FASTRES_PLAN", "OFF")


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@torch.no_grad()
def check(model: nn.Module, x: Tensor, compiled: fastres.CompiledNetwork | None = None) -> fastres.CompiledNetwork:
    compiled = compiled or fastres.compile(model, x)
    got, peer = compiled(x), model(x)
    truth = copy.deepcopy(model).double()(x.double())
    assert got.shape == peer.shape and got.dtype == peer.dtype and not got.requires_grad
    assert_parity(got, peer, truth, metric="l2")
    return compiled


def vision(name: str):
    return lambda: getattr(require("torchvision").models, name)(num_classes=10)


def timm(name: str):
    return lambda: require("timm").create_model(name, num_classes=10)


class Odd(nn.Module):
    """Whatever no residual network has: bias, dilation, leading BatchNorm, a mean with padding, additions of sums."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.a = nn.Conv2d(5, 20, 3, padding=2, dilation=2)
        self.b = nn.Conv2d(5, 20, (1, 3), (1, 1), (0, 1))
        self.c = nn.Conv2d(5, 20, 1, bias=False)
        self.late = nn.BatchNorm2d(20)
        self.pool = nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
        self.max = nn.MaxPool2d((2, 3), (1, 2), (1, 1), ceil_mode=True)
        self.head = nn.Linear(20 * 3 * 2, 7)

    def forward(self, x):
        x = torch.relu(self.norm(x))
        c = self.c(x)
        a, b = self.a(x), self.b(x)
        y = a + b + c
        z = torch.relu(y) + y  # y is read twice
        z = self.late(z).relu_()
        z = self.max(self.pool(z))[:, :, 1:, :]
        z = nn.functional.adaptive_avg_pool2d(z, (3, 2))
        return self.head(z.flatten(1)).relu()


NETWORKS = {
    "resnet18": (lambda: fastres.resnet18(num_classes=10), (2, 3, 65, 97)),
    "resnet50": (lambda: fastres.resnet50(num_classes=10), (2, 3, 64, 64)),
    "resnet50-v1": (lambda: fastres.resnet50(version="v1", fused=False, num_classes=10), (2, 3, 65, 97)),
    "resnet18-A": (lambda: fastres.resnet18(shortcut="A", num_classes=10), (2, 3, 65, 97)),
    "resnet18-C": (lambda: fastres.resnet18(shortcut="C", num_classes=10), (1, 3, 64, 64)),
    "plain18": (lambda: fastres.create_model("plain18", num_classes=10), (2, 3, 64, 64)),
    "resnet20": (lambda: fastres.create_model("resnet20"), (3, 3, 32, 32)),
    "plain20": (lambda: fastres.create_model("plain20", fused=False), (3, 3, 32, 32)),
    "one channel": (lambda: fastres.create_model("resnet20", in_channels=1), (2, 1, 29, 31)),
    "torchvision": (vision("resnet18"), (2, 3, 65, 97)),
    "fuse(torchvision)": (lambda: fastres.fuse(vision("resnet18")()), (3, 3, 64, 64)),
    "fuse(timm)": (lambda: fastres.fuse(timm("resnet18d")()), (2, 3, 64, 64)),
    "timm-d": (timm("resnet26d"), (2, 3, 96, 64)),
    "wide": (vision("wide_resnet50_2"), (1, 3, 64, 64)),
    "vgg11": (vision("vgg11"), (2, 3, 224, 224)),
    "vgg11_bn": (vision("vgg11_bn"), (1, 3, 64, 96)),
    "odd": (Odd, (3, 5, 13, 17)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_parity(name, dtype):
    build, shape = NETWORKS[name]
    check(randomise(build()).eval().to(dtype), images(*shape, dtype=dtype))


@GROUPED
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_grouped_convolutions(dtype):
    check(randomise(vision("resnext50_32x4d")()).eval().to(dtype), images(2, 3, 64, 64, dtype=dtype))


@pytest.mark.parametrize("images_per_turn", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_run_by_image_and_by_layer(batch, images_per_turn):
    model = randomise(fastres.create_model("resnet20")).eval()
    x = images(batch, 3, 33, 30)
    for depth_first_bytes in (0, 30_000, 1 << 20):  # none, some and all steps image by image
        options = {"depth_first_bytes": depth_first_bytes, "images_per_turn": images_per_turn}
        compiled = check(model, x, fastres.compile(model, x, **options))
        by_image = sum(step["by_image"] for step in compiled.steps())
        turns = -(-batch // images_per_turn)
        if depth_first_bytes == 0 or turns < 2:
            assert by_image == 0
        elif turns % 2 == 0:
            assert by_image == len(compiled.steps()) or (depth_first_bytes == 30_000 and 0 < by_image < 20)
    small = compiled(x[:1])
    torch.testing.assert_close(small, compiled(x)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    model = randomise(fastres.create_model("resnet20")).eval()
    x = images(6, 3, 32, 32)
    compiled = fastres.compile(model, x)
    torch.set_num_threads(threads)
    check(model, x, compiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_input_layouts_give_the_same_bits(dtype):
    model = randomise(fastres.create_model("resnet20", in_channels=4)).eval().to(dtype)
    x = images(3, 4, 17, 19, dtype=dtype)
    compiled = fastres.compile(model, x)
    expected = compiled(x)
    wide = torch.zeros(3, 8, 17, 40, dtype=dtype)
    wide[:, ::2, :, 1:39:2] = x
    turned = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for given in (x.contiguous(memory_format=torch.channels_last), wide[:, ::2, :, 1:39:2], turned):
        assert torch.equal(given, x) and given.stride() != x.stride()
        assert torch.equal(compiled(given), expected)
    repeated = x[:1].expand(5, -1, -1, -1)
    torch.testing.assert_close(compiled(repeated)[4], expected[0], rtol=1e-3, atol=1e-3)


def test_a_map_as_result():
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    compiled = check(model, images(2, 3, 9, 11))
    assert compiled(images(2, 3, 9, 11)).is_contiguous(memory_format=torch.channels_last)
    check(nn.Sequential(*model, nn.Flatten()).eval(), images(2, 3, 9, 11))


def test_no_images_give_no_logits():
    model = fastres.create_model("resnet20").eval()
    for example in (images(2, 3, 32, 32), images(0, 3, 32, 32)):
        compiled = fastres.compile(model, example)
        assert compiled(images(0, 3, 32, 32)).shape == (0, 10)
        assert compiled(images(0, 3, 24, 40)).shape == (0, 10)
        assert compiled(images(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(value):
    # Each image on its own: one image's NaN is nobody else's.
    model = randomise(fastres.resnet18(num_classes=10)).eval()
    x = images(4, 3, 64, 64)
    compiled = fastres.compile(model, x)
    clean = compiled(x)
    x[1, 0, 20, 20] = value
    got = compiled(x)
    with torch.no_grad():
        assert torch.equal(got.isnan(), model(x).isnan()) and not got[1].isfinite().all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


def test_max_pool_keeps_nan_and_minus_infinity():
    model = nn.MaxPool2d(3, 2, 1).eval()
    x = images(2, 19, 9, 8)
    x[0, 3, 4, 4], x[1, :, :3] = float("nan"), float("-inf")
    for dtype in DTYPES:
        compiled = fastres.compile(model if dtype == torch.float32 else _typed(model), x.to(dtype))
        assert torch.equal(compiled(x.to(dtype)).nan_to_num(7), model(x.to(dtype)).nan_to_num(7))


STEMS = (
    # channels, outputs, kernel, stride, padding of the convolution; kernel, stride, padding, dilation of the pool; H, W
    (3, 64, 7, 2, 3, 3, 2, 1, 1, 65, 50),
    (3, 64, 7, 2, 3, 3, 2, 1, 1, 224, 32),
    (4, 33, 5, 1, 2, 2, 2, 0, 1, 31, 37),
    (1, 20, 3, 2, 0, 3, 1, 1, 2, 40, 29),
    (16, 40, 3, 1, 1, 3, 3, 1, 1, 17, 70),
    (70, 65, 1, 2, 0, 3, 2, 1, 1, 30, 21),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_a_convolution_and_its_pool_are_one_step(stem, dtype):
    c, k, r, s, p, kernel, stride, padding, dilation, h, w = stem
    model = nn.Sequential(nn.Conv2d(c, k, r, s, p), nn.ReLU(), nn.MaxPool2d(kernel, stride, padding, dilation)).eval()
    x = images(3, c, h, w)
    x[1, 0, h // 2, w // 2], x[2, 0, 0, 0], x[2, 0, h - 1, w - 1] = float("nan"), float("inf"), float("-inf")
    truth = copy.deepcopy(model).double()(x.to(dtype).double()).detach()
    peer = copy.deepcopy(model).to(dtype)(x.to(dtype)).detach()
    for kernel in {"direct", "amx"}.intersection(_native.conv_kernels()):
        compiled = fastres.compile(model.to(dtype), x.to(dtype).nan_to_num(1, 1, 1), kernels={"0": kernel})
        assert len(compiled.steps()) == 2 and compiled.steps()[1]["name"].startswith("0 + ")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = compiled(x.to(dtype))
            infinite = truth.isinf()
            assert torch.equal(y.isinf(), infinite) and torch.equal(y[infinite].double(), truth[infinite])
            assert_parity(y.masked_fill(infinite, 0), peer.masked_fill(infinite, 0), truth.masked_fill(infinite, 0))


def test_a_convolution_that_others_read_keeps_its_map():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 32, 3, 2, 1), nn.MaxPool2d(3, 1, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.pool(y) + y

    model, x = Both().eval(), images(2, 3, 20, 21)
    compiled = fastres.compile(model, x)
    assert not any(" + " in step["name"] for step in compiled.steps())
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def _typed(model: nn.Module) -> nn.Module:
    """With a bf16 parameter that says which dtype the network is in."""
    return nn.Sequential(nn.BatchNorm2d(19, affine=False, eps=0.0), model).eval().to(torch.bfloat16)


class Block(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


REFUSED = {
    "sigmoid": (lambda m, x: m.conv(x).sigmoid(), r"computes aten\.sigmoid\(\).*no such step"),
    "random": (lambda m, x: m.conv(x) + torch.rand(1, 4, 8, 8), "compute|computes"),
    "dropout": (lambda m, x: nn.functional.dropout(m.conv(x), 0.5, training=True), "computes"),
    "broadcast": (lambda m, x: (lambda y: y + y.mean((2, 3), True))(m.conv(x)), "different shapes"),
    "batch": (lambda m, x: m.conv(x).flatten(0, 1), "shape"),
    "input in place": (lambda m, x: m.conv(x.relu_()), "changes the network's input in place"),
    "a view": (lambda m, x: (lambda y: (y[:, :2].relu_(), m.conv(y[:, 1:]))[1])(m.conv(x)), "view of memory"),
    "value": (lambda m, x: m.conv(x) if x.sum() > 0 else m.conv(-x), r"aten\.sum|aten\.neg"),
    "a pair": (lambda m, x: (m.conv(x), x), "gives a tuple"),
    "constant": (lambda m, x: torch.ones(2, 4), "not computed from its input"),
    "buffer": (lambda m, x: (m.conv.bias.data.add_(1), m.conv(x))[1], "in place"),
    "relu of a flattened map": (lambda m, x: m.conv(x).flatten(1).relu(), "flattened map"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plan_cannot_do_is_named(name):
    forward, text = REFUSED[name]
    with pytest.raises(CompileError, match=text):
        fastres.compile(Block(forward).eval(), images(2, 3, 8, 8))


def test_the_layer_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.GELU())).eval()
    with pytest.raises(CompileError, match=r"layer '1\.1' computes aten\.gelu\(\)"):
        fastres.compile(model, images(1, 3, 4, 4))


def test_networks_that_are_refused():
    model = fastres.create_model("resnet20")
    x = images(1, 3, 16, 16)
    with pytest.raises(CompileError, match=r"training mode.*model\.eval\(\)"):
        fastres.compile(model, x)
    model.eval()
    model.bn1.train()
    with pytest.raises(CompileError, match="layer 'bn1' is in training mode"):
        fastres.compile(model, x)
    model.eval()
    handle = model.layer1[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CompileError, match=r"forward hooks of layer1\.0"):
        fastres.compile(model, x)
    handle.remove()
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(CompileError, match=f"float32 or bfloat16, but CifarResNet is in {str(dtype)[6:]}"):
            fastres.compile(copy.deepcopy(model).to(dtype), x.to(dtype))
    with pytest.raises(CompileError, match="parameters on meta"):
        fastres.compile(copy.deepcopy(model).to("meta"), x)
    with pytest.raises(CompileError, match="wrapped in DataParallel"):
        fastres.compile(nn.DataParallel(model), x)
    assert issubclass(CompileError, UserError)


def test_inputs_that_are_refused():
    compiled = fastres.compile(fastres.create_model("resnet20").eval(), images(2, 3, 32, 32))
    wanted = r"CifarResNet's plan takes \[N, 3, H, W\] in float32 on the CPU, got "
    for x, text in (
        (images(2, 4, 32, 32), r"the shape \[2, 4, 32, 32\]"),
        (images(3, 32, 32), r"the shape \[3, 32, 32\]"),
        (images(2, 3, 0, 32), r"the shape \[2, 3, 0, 32\]"),
        (images(2, 3, 32, 32).double(), "float64"),
        (images(2, 3, 32, 32).bfloat16(), "bfloat16"),
        (images(2, 3, 32, 32).to("meta"), "float32 on meta"),
        ([1], "list"),
    ):
        with pytest.raises(InputError, match=wanted + text):
            compiled(x)


def test_kernels_by_name():
    model, x = randomise(fastres.create_model("resnet20")).eval(), images(2, 3, 32, 32)
    names = _native.conv_kernels()
    layer = "layer1.0.conv1"
    compiled = check(model, x, fastres.compile(model, x, kernels={layer: "direct"}))
    assert {s["name"]: s["kernel"] for s in compiled.steps()}[layer] == "direct"
    assert {s["kernel"] for s in compiled.steps() if s["op"] in ("conv", "linear")} <= set(names)
    with pytest.raises(CompileError, match="no convolution kernel is called 'nosuch'"):
        fastres.compile(model, x, kernels={layer: "nosuch"})
    with pytest.raises(CompileError, match="names 'nosuch'"):
        fastres.compile(model, x, kernels={"nosuch": "direct"})


@pytest.mark.parametrize("isa", fastres.build_info()["isa_supported"])
def test_instruction_sets(isa):
    code = (
        "from test_compile import *\n"
        "for dtype in DTYPES:\n"
        "    model = randomise(fastres.create_model('resnet20')).eval().to(dtype)\n"
        "    check(model, images(3, 3, 17, 20, dtype=dtype))\n"
        "    check(randomise(Odd()).eval().to(dtype), images(3, 5, 13, 17, dtype=dtype))\n"
    )
    run_with_isa(isa, code, FASTRES_PLAN="OFF")


def test_a_float32_network_in_bfloat16():
    """Weights rounded once, float32 on both sides."""
    model = fastres.create_model("resnet20", fused=False).eval()
    randomise(model)
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        halves = copy.deepcopy(model).bfloat16()(x.bfloat16()).double()
    plan = fastres.compile(model, x, dtype=torch.bfloat16)
    got = plan(x)
    assert got.dtype == torch.float32 and "bfloat16" in repr(plan)
    assert torch.equal(got, got.bfloat16().float()), "computed in bfloat16"
    assert (got - expected).norm() <= 2 * (halves - expected).norm()
    with pytest.raises(CompileError, match="not in float16"):
        fastres.compile(model, x, dtype=torch.float16)
