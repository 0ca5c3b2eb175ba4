"""fastres.fuse on small networks: values, gradients, statistics, hazards, sharing and the report."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import (
    CASES,
    Net,
    Wrapped,
    assert_same_network,
    fused_pair,
    image,
    plain,
    projection,
    randomise,
    relative,
    residual,
)
from torch import nn

import fastres
from fastres.errors import FusionError, UserError


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_equal_to_the_original(function):
    patterns, words = CASES[function]
    model, fused = fused_pair(Net(function).double())
    report = fused.fusion_report
    assert sorted(row.pattern for row in report.fused) == sorted(patterns), str(report)
    for word in words:
        assert any(word in row.reason for row in report.unfused), str(report)
    assert_same_network(model, fused, image())


def test_input_changed_in_place_before_the_layer_would_run():
    def function(m, x):
        old = m.bn1(m.conv1(x := x * 1))
        x.add_(1)
        return m.relu_out(old + m.bn2(m.conv2(x)))

    model, fused = fused_pair(Net(function).double().eval())
    assert fused.fusion_report.counts == {"conv+bn": 1, "conv+bn+add+relu": 1}
    with torch.no_grad():  # PyTorch itself can't differentiate this
        assert relative(fused(image()), model(image())) < 1e-12


def test_input_that_is_changed_in_place_is_still_changed():
    model, fused = fused_pair(Net(lambda m, x: m.relu(_plus(x, m.bn1(m.conv1(x))))).double().eval())
    ours, theirs = image(), image()
    with torch.no_grad():
        assert relative(fused(ours), model(theirs)) < 1e-12
    assert relative(ours, theirs) < 1e-12 < relative(ours, image())


def _plus(a, b):
    a += b
    return a


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_lower_precision_and_layout(dtype, tolerance, memory_format):
    model, fused = fused_pair(Net(projection).to(dtype))
    x = image(dtype).contiguous(memory_format=memory_format)
    for mode in (True, False):
        model.train(mode), fused.train(mode)
        with torch.no_grad():
            out = fused(x)
            assert relative(out, model(x)) < tolerance
            assert out.dtype == dtype and out.is_contiguous(memory_format=memory_format)


def test_nested_sequential():
    model, fused = fused_pair(Wrapped().double())
    assert fused.fusion_report.counts == {"conv+bn+relu": 2} and not fused.fusion_report.unfused
    assert_same_network(model, fused, image())


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}])
def test_batchnorm_options(options):
    norm = nn.BatchNorm2d(4, affine=False, **options)
    model, fused = fused_pair(nn.Sequential(nn.Conv2d(8, 4, 3), norm, nn.ReLU()).double())
    assert_same_network(model, fused, image())


# --- what is not fused, and why ---------------------------------------------------------------------------------------
class OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def _conv_hook():
    conv = nn.Conv2d(8, 8, 1)
    conv.register_forward_hook(lambda module, inputs, out: out * 2)
    return conv


UNFUSED = {
    "padding_mode='reflect'": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3, 1, 1, padding_mode="reflect"), nn.BatchNorm2d(8)
    ),
    "padding='same' is not symmetric": lambda: nn.Sequential(nn.Conv2d(8, 8, 2, padding="same"), nn.BatchNorm2d(8)),
    "OwnBatchNorm computes in its own way": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), OwnBatchNorm(8)),
    "OwnConv computes in its own way": lambda: nn.Sequential(OwnConv(8, 8, 3), nn.BatchNorm2d(8)),
    "ConvTranspose2d is not Conv2d": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8)),
    "its result goes to GroupNorm": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)),
    "Conv2d has a forward hook": lambda: nn.Sequential(_conv_hook(), nn.BatchNorm2d(8)),
    "its weight is parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.BatchNorm2d(8)
    ),
    "BatchNorm1d": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8)),
    "Conv1d is not Conv2d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)),
    "not preceded by a convolution but by Dropout": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8)
    ),
}


@pytest.mark.parametrize("reason", UNFUSED)
def test_unfused_reason(reason):
    model, fused = fused_pair(UNFUSED[reason]().double())
    report = fused.fusion_report
    assert not report.fused
    assert any(reason in row.reason for row in report.unfused), str(report)
    assert reason in str(report)
    assert_same_network(model, fused, image())


class Gate(nn.Module):
    """Looks at its input: no graph can hold it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class RandomGate(Gate):
    def forward(self, x):
        return x + torch.rand(1) * self.bn(self.conv(x))


class NoGrad(Gate):
    def forward(self, x):
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return x + y


class Autocast(Gate):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.bn(self.conv(x.float()))


class Reused(Gate):
    """Uses a weight of a part that had to be given up in the middle."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()
        self.gate.forward_weight = self.gate.conv.weight

    def forward(self, x):
        y = self.gate(x)
        return self.bn(self.conv(F.conv2d(y, self.gate.forward_weight)))


class WeightGate(Gate):
    def forward(self, x):
        y = F.conv2d(x, self.forward_weight)
        return y if y.sum() > 0 else x


def test_weight_of_a_part_that_was_given_up():
    model = Reused()
    model.gate.__class__ = WeightGate
    model, fused = fused_pair(model.double())
    assert fused.fusion_report.counts == {"conv+bn": 1}
    assert_same_network(model, fused, image())


class TypeCheck(Gate):
    def forward(self, x):
        return self.bn(self.conv(x)) if isinstance(x, torch.Tensor) else self.conv(x)


class KnownTypes(Gate):
    """Type checks whose answer is known: what a convolution gives is a tensor and no list."""

    def forward(self, x):
        y = self.conv(x)
        if not isinstance(y, torch.Tensor) or not torch.is_tensor(y) or isinstance(y, list | tuple):
            return y
        return self.bn(y) + x


def test_known_types():
    model, fused = fused_pair(KnownTypes().double())
    assert fused.fusion_report.counts == {"conv+bn+add": 1}
    assert_same_network(model, fused, image())


@pytest.mark.parametrize("part", [Gate, RandomGate, NoGrad, Autocast])
def test_untraceable_part_is_kept_whole(part):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), part())
    model, fused = fused_pair(model.double())
    assert fused.fusion_report.counts == {"conv+bn+relu": 1}
    (row,) = fused.fusion_report.unfused
    assert row.names == ("3.bn",) and "inside 3, which is kept whole" in row.reason and "test_fusion.py" in row.reason
    if part is not Autocast:
        assert_same_network(model, fused, image())


@pytest.mark.parametrize("part", [Gate, RandomGate, NoGrad, Autocast, TypeCheck])
def test_untraceable_network_is_an_error(part):
    words = rf"{part.__name__} can't be fused as a whole.*fastres.fuse\(model.backbone\)"
    with pytest.raises(FusionError, match=words):
        fastres.fuse(part())


class Counting(Gate):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return self.bn(self.conv(x)) * Counting.calls


def test_example_finds_what_a_graph_can_not_hold():
    model = randomise(Counting().double())
    with pytest.raises(FusionError, match="other results than the original"):
        fastres.fuse(model, example=image())
    model = randomise(Net(residual).double())
    fastres.fuse(model, example=image())
    assert model.training and model.bn1.num_batches_tracked == 0


class ByMode(Net):
    """Two forwards in one, and an optional argument."""

    def __init__(self):
        super().__init__(plain)

    def forward(self, x, scale=None):
        x = F.dropout(plain(self, x), 0.5, self.training)
        if scale is not None:
            x = x * scale
        return (x, x + 1) if self.training else x


def test_mode_and_default_arguments():
    model, fused = fused_pair(ByMode().double())
    assert "differs between training and evaluation" in fused.fusion_report.notes[0]
    x = image()
    for mode in (True, False):
        model.train(mode), fused.train(mode)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(fused(x), expected)
    with pytest.raises(AssertionError, match="scale has been specialized to have value None"):
        fused(x, scale=2.0)


# --- hooks ------------------------------------------------------------------------------------------------------------
def test_hooks():
    model = Wrapped()
    calls = []
    model.register_forward_hook(lambda *a: calls.append("root"))
    model.head.register_forward_hook(lambda *a: calls.append("head"))
    model.head[3].register_forward_hook(lambda *a: calls.append("linear"))
    model.body[0].register_forward_pre_hook(lambda *a: calls.append("block"))
    model.body[1][2].register_forward_hook(lambda *a: calls.append("relu"))
    with pytest.warns(UserWarning, match="head"):
        fused = fastres.fuse(model)
    assert not calls
    assert fused.fusion_report.lost_hooks == ["body.0 (forward pre hook)", "head (forward hook)"]
    assert "body.0 (forward pre hook)" in str(fused.fusion_report)
    assert fused.fusion_report.counts == {"conv+bn+relu": 1, "conv+bn": 1}  # the hooked ReLU stays
    fused(image(torch.float32))
    assert calls == ["relu", "linear", "root"]


# --- errors and networks of fastres -----------------------------------------------------------------------------------
def test_errors():
    assert issubclass(FusionError, UserError)
    with pytest.raises(FusionError, match=r"takes a torch.nn.Module, got str"):
        fastres.fuse("resnet18")
    with pytest.raises(FusionError, match="ScriptModule"):
        fastres.fuse(torch.jit.trace(nn.Conv2d(8, 8, 1), image(torch.float32)))
    with pytest.raises(FusionError, match=r"torch.compile\(fastres.fuse\(model\)\)"):
        fastres.fuse(torch.compile(nn.Conv2d(8, 8, 1)))
    with pytest.raises(FusionError, match=r"0\.weight has no shape yet"):
        fastres.fuse(nn.Sequential(nn.LazyConv2d(8, 1), nn.BatchNorm2d(8)))
    model = Net(plain)
    model.forward = lambda x: x
    with pytest.raises(FusionError, match="replaced on the instance"):
        fastres.fuse(model)
    model = Net(plain)
    model.lock = __import__("threading").Lock()
    with pytest.raises(FusionError, match="can't be copied"):
        fastres.fuse(model)


def test_fused_again_is_returned():
    fused = fastres.fuse(Net(plain))
    assert fastres.fuse(fused) is fused


def test_own_networks():
    reference = randomise(fastres.create_model("resnet20", fused=False).double())
    fused = fastres.fuse(reference)
    assert type(fused) is type(reference) and fused.fused and not reference.fused
    assert fused.layer1[0].fused and not reference.layer1[0].fused
    assert fused.fusion_report.counts == {"conv+bn+relu": 10, "conv+bn+add+relu": 9}
    assert_same_network(reference, fused, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    fused.freeze_bn()
    assert reference.bn1.training
    already = fastres.resnet18(fused=True)
    assert fastres.fuse(already) is already
    assert "fused already" in str(already.fusion_report) and len(already.fusion_report.fused) == 20


def test_own_network_inside_another():
    backbone = fastres.create_model("resnet20", fused=False)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), backbone)
    model, fused = fused_pair(model.double())
    assert fused[3].fused and not backbone.fused and len(fused.fusion_report.fused) == 20
    assert_same_network(model, fused, torch.randn(2, 1, 16, 16, dtype=torch.float64))


def test_graph_module():
    model, fused = fused_pair(torch.fx.symbolic_trace(Net(residual)).double())
    assert len(fused.fusion_report.fused) == 3
    assert_same_network(model, fused, image())
    assert torch.equal(pickle.loads(pickle.dumps(fused)).eval()(image()), fused.eval()(image()))
