"""Small networks for the fusion tests, each with what should become of it, and the comparison they share."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres


class Net(nn.Module):
    """Three convolutions with BatchNorm on 8 channels, a projection, and a forward given as a function."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        for i in (1, 2, 3):
            setattr(self, f"conv{i}", nn.Conv2d(8, 8, 3, 1, 1, bias=i == 2))
            setattr(self, f"bn{i}", nn.BatchNorm2d(8))
        self.project = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.relu, self.relu_out = nn.ReLU(inplace=True), nn.ReLU()
        self.pool, self.identity = nn.MaxPool2d(3, 2, 1), nn.Identity()
        self.relu6 = nn.ReLU6(inplace=True)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _plus_equals(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


# --- plain chains -----------------------------------------------------------------------------------------------------
def plain(m, x):
    x = m.relu(m.bn1(m.conv1(x)))
    x = F.relu(m.bn2(m.conv2(x)))
    return m.bn3(m.conv3(x))


def pooled(m, x):
    return m.pool(m.relu(m.bn1(m.conv1(x)))) + 1


def pooled_without_relu(m, x):
    return m.conv2(m.pool(m.bn1(m.conv1(x))))


def relu_spellings(m, x):
    x = m.bn1(m.conv1(x)).relu_()
    x = torch.relu(m.bn2(m.conv2(x)))
    return F.relu(m.bn3(m.conv3(x)), inplace=True)


def identities(m, x):
    x = m.relu(m.identity(m.bn1(m.identity(m.conv1(x)))))
    return F.relu(m.identity(m.bn2(m.conv2(x))) + m.identity(x))


# --- residuals --------------------------------------------------------------------------------------------------------
def residual(m, x):
    x = m.relu(m.bn1(m.conv1(x)))
    y = m.relu(m.bn2(m.conv2(x)))
    y = m.bn3(m.conv3(y))
    y += x
    return m.relu(y)


def residual_left(m, x):
    return F.relu(x + m.bn1(m.conv1(x)))


def residual_torch_add(m, x):
    return torch.add(m.bn1(m.conv1(x)), other=x).relu()


def residual_method(m, x):
    return m.bn1(m.conv1(x)).add_(x)


def residual_scaled(m, x):
    return torch.add(m.bn1(m.conv1(x)), x, alpha=0.5).relu()


def projection(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    y = m.bn2(m.conv2(y))
    return m.relu(_plus_equals(y, m.project(x)))


def projection_first(m, x):
    shortcut = m.project(x)
    y = m.relu_out(m.bn1(m.conv1(x)))
    return m.relu_out(m.bn2(m.conv2(y)) + shortcut)


def relu_on_shortcut(m, x):
    return F.relu(m.bn2(m.conv2(x)) + F.relu(m.project(x)))


def same_twice(m, x):
    y = m.bn1(m.conv1(x))
    return F.relu(y + y)


def broadcast(m, x):
    y = m.bn1(m.conv1(x))
    return F.relu(y + x.mean((2, 3), keepdim=True)) + (m.bn2(m.conv2(x)) + x.size(0))


# --- in-place hazards -------------------------------------------------------------------------------------------------
def alias_reads_changed(m, x):
    y = m.bn1(m.conv1(x))
    z = y
    F.relu_(y)
    return m.bn2(m.conv2(y)) + z


def alias_before_plus(m, x):
    y = m.bn1(m.conv1(x))
    z = y * 2
    y += x
    return torch.relu(y) + z


def alias_reads_sum(m, x):
    y = m.bn1(m.conv1(x))
    z = y
    y += m.bn2(m.conv2(x))
    return torch.relu(y) * 1.5 + z


def view_reads_changed(m, x):
    y = m.bn1(m.conv1(x))
    view = y.flatten(1)
    y.relu_()
    return y * 1.5 + view.sum()


def residual_view_read(m, x):
    r = m.bn2(m.conv2(x))
    view = r.flatten(1)
    r += m.bn1(m.conv1(x))
    return torch.relu(r) + view.sum()


def slice_written(m, x):
    y = m.bn1(m.conv1(x))
    y[:, 0].zero_()
    y[:, 1] = 0
    return torch.relu(y)


def residual_changed_after(m, x):
    r = m.bn1(m.conv1(x))
    y = m.bn2(m.conv2(x)) + r
    z = r.mul_(2)
    return torch.relu(y) + z


def residual_changed_later(m, x):
    r = m.bn1(m.conv1(x))
    y = torch.relu(m.bn2(m.conv2(x)) + r)
    return y + m.relu6(r)


def input_changed(m, x):
    x = m.relu(x)
    return m.bn1(m.conv1(x)) + x


def counter(m, x):
    n = x.size(0)
    k = n
    n += 3
    return m.bn1(m.conv1(x)) * n + k


# --- shared modules and partly fused ----------------------------------------------------------------------------------
def shared_layer(m, x):
    for _ in range(2):
        x = m.relu(m.bn1(m.conv1(x)))
    return x


def shared_bn(m, x):
    a = m.bn1(m.conv1(x))
    b = m.bn1(m.conv2(x))
    return F.relu(a + b)


def bn_read_twice(m, x):
    y = m.bn1(m.conv1(x))
    return m.bn2(m.conv2(torch.relu(y))) + torch.sigmoid(y)


def conv_read_twice(m, x):
    y = m.conv1(x)
    return m.bn1(y) + y


def pending_read_twice(m, x):
    x = m.relu(m.bn1(m.conv1(x)))
    return m.bn2(m.conv2(x)) + m.bn3(m.conv3(x))


def other_activation(m, x):
    return F.silu(m.bn2(m.conv2(m.relu6(m.bn1(m.conv1(x))))))


def functional(m, x):
    y = F.conv2d(x, m.conv1.weight, padding=1)
    return F.relu(m.bn1(y)) + m.bn2(m.conv2(x))


def preactivation(m, x):
    y = m.conv1(F.relu(m.bn1(x)))
    return x + m.conv2(F.relu(m.bn2(y)))


# function -> patterns that must be fused, words that must be among the reasons
CASES: dict[Callable[[Net, Tensor], Tensor], tuple[list[str], list[str]]] = {
    plain: (["conv+bn+relu", "conv+bn+relu", "conv+bn"], []),
    pooled: (["conv+bn+relu+maxpool"], []),
    pooled_without_relu: (["conv+bn+maxpool"], ["no BatchNorm follows"]),
    relu_spellings: (["conv+bn+relu"] * 3, []),
    identities: (["conv+bn+relu", "conv+bn+add+relu"], []),
    residual: (["conv+bn+relu", "conv+bn+relu", "conv+bn+add+relu"], []),
    residual_left: (["conv+bn+add+relu"], []),
    residual_torch_add: (["conv+bn+add+relu"], []),
    residual_method: (["conv+bn+add"], []),
    residual_scaled: (["conv+bn"], []),
    projection: (["conv+bn", "conv+bn+add+relu", "conv+bn+relu"], []),
    projection_first: (["conv+bn", "conv+bn+add+relu", "conv+bn+relu"], []),
    relu_on_shortcut: (["conv+bn+add+relu", "conv+bn+relu"], []),
    same_twice: (["conv+bn"], []),
    broadcast: (["conv+bn+add", "conv+bn+add+relu"], []),
    alias_reads_changed: (["conv+bn+add", "conv+bn+relu"], []),
    alias_before_plus: (["conv+bn"], []),
    alias_reads_sum: (["conv+bn", "conv+bn+add"], []),
    view_reads_changed: (["conv+bn"], []),
    residual_view_read: (["conv+bn", "conv+bn"], []),
    slice_written: (["conv+bn"], []),
    residual_changed_after: (["conv+bn", "conv+bn+add+relu"], []),
    residual_changed_later: (["conv+bn", "conv+bn+add+relu"], []),
    input_changed: (["conv+bn+add"], []),
    counter: (["conv+bn"], []),
    shared_layer: (["conv+bn+relu"] * 2, []),
    shared_bn: (["conv+bn", "conv+bn+add+relu"], []),
    bn_read_twice: (["conv+bn", "conv+bn+add"], []),
    conv_read_twice: ([], ["goes to 2 places"]),
    pending_read_twice: (["conv+bn", "conv+bn+add", "conv+bn+relu"], []),
    other_activation: (["conv+bn", "conv+bn"], ["activation is ReLU6", "activation is silu"]),
    functional: (["conv+bn+add"], ["conv2d() is a function", "not preceded by a convolution but by conv2d"]),
    preactivation: (["conv+bn+relu"], ["leading pre-activation BatchNorm", "no BatchNorm follows"]),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random affine parameters and running statistics, so that nothing hides behind ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            c = module.num_features
            with torch.no_grad():
                module.weight.copy_(torch.rand(c, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(c, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(c, generator=generator) * 0.2)
                module.running_var.copy_(torch.rand(c, generator=generator) + 0.5)
    return model


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def step(model: nn.Module, x: Tensor, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers after one training step from the given buffers."""
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    out = model(x * 1)  # a copy: some networks change their input in place
    (out.square().mean() + out.mean()).backward()
    found = {"output": out.detach().clone(), "grad x": x.grad}
    found |= {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b.clone() for n, b in model.named_buffers()}


def assert_same_network(model: nn.Module, fused: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Evaluation and one training step give the same numbers, gradients and statistics."""
    model.eval(), fused.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x.clone())
        torch.manual_seed(0)
        assert relative(fused(x.clone()), expected) <= tolerance, "evaluation differs"
    model.train(), fused.train()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    ours, theirs = step(fused, x, buffers), step(model, x, buffers)
    assert ours.keys() == theirs.keys()
    largest = max(v.norm().item() for k, v in theirs.items() if k.startswith("grad"))
    for name, value in theirs.items():
        # A convolution's bias before a BatchNorm has a zero gradient: both sides compute noise, which means nothing.
        floor = 1e-9 * largest if name.startswith("grad") else 0.0
        difference = (ours[name].double() - value.double()).norm().item()
        assert difference <= tolerance * value.double().norm().item() + floor * 1e-3, f"{name}: {difference}"


def fused_pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    model = randomise(model)
    return model, fastres.fuse(model)


def image(dtype=torch.float64, size=9, batch=3):
    return torch.randn(batch, 8, size, size - 2, dtype=dtype, generator=torch.Generator().manual_seed(3))


class Wrapped(nn.Module):
    """The layers of a block spread over nested containers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())),
            nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1, groups=4), nn.BatchNorm2d(12, affine=False), nn.ReLU(True)),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 3))

    def forward(self, x):
        return self.head(self.body(x))
