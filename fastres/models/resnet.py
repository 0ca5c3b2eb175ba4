"""Plain and residual networks of 1512.03385: ImageNet (Table 1, Fig. 3) and CIFAR (section 4.2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.errors import ModelError
from fastres.inference.automatic import planned
from fastres.nn.blocks import BasicBlock, Bottleneck, Memory, Shortcut, watched
from fastres.nn.functional import (
    channels_last,
    fused_conv_bn_act,
    fused_pool,
    materialize,
    plain_conv_bn_act,
)

from . import registry
from .base import Network, initialise
from .registry import ModelInfo

VERSIONS = ("v1.5", "v1")
SHORTCUTS = ("A", "B", "C", "none")
MEMORY = ("default", "recompute")


def _one_of(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError(f"{option}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def _positive(option: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{option}={value!r}: expected a positive integer")


Block = type[BasicBlock] | type[Bottleneck]


class _ResidualNetwork(Network):
    """Stem, stages of blocks, global average pool, fully connected layer."""

    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    fc: nn.Linear
    stages: tuple[str, ...]
    fused: bool

    def make_stages(
        self,
        block: Block,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        **options: Any,
    ) -> int:
        """Adds layer1, layer2, …; returns the channels of the last one. The first block of later stages has stride 2."""
        channels = widths[0]
        names = []
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = nn.Sequential()
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(channels, width, stride, **options))
                channels = width * block.expansion
            names.append(f"layer{i + 1}")
            self.add_module(names[-1], stage)
        self.stages = tuple(names)
        return channels

    def stem(self, x: Tensor) -> Tensor:
        raise AssertionError("a family defines its stem")

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> logits [N, num_classes].

        Raises:
            InputError: wrong shape, dtype or device. ValueError: one value per channel in training, as PyTorch.
        """
        self.check_input(x)
        if self.fused and (result := planned(self, x)) is not None:
            return result
        x = self.stem(channels_last(x) if self.fused else x)
        for name in self.stages[:-1]:
            x = getattr(self, name)(x)
        return self.fc(_average(getattr(self, self.stages[-1]), x))


def _average(stage: Any, x: Tensor) -> Tensor:
    """The stage's result averaged over H and W, [N, C]; by its last block in training, where nobody watches."""
    blocks = list(stage.children()) if isinstance(stage, nn.Sequential) and stage.training else []
    end: Any = blocks[-1] if blocks else None
    # Exactly these classes: a user's own, or one that a wrapper made of them, may do something else when it is called.
    if type(end) not in (BasicBlock, Bottleneck) or not end.fused or watched(stage) or watched(end):
        return torch.flatten(F.adaptive_avg_pool2d(stage(x), 1), 1)
    for block in blocks[:-1]:
        x = block(x)
    return end.forward(x, average=True)


class ResNet(_ResidualNetwork):
    """ImageNet networks of Table 1: 7x7/2 stem, 3x3/2 max-pool, four stages; keys as torchvision's.

    Args:
        block: BasicBlock or Bottleneck. blocks: how many per stage.
        fused: fused kernels, or plain PyTorch modules (the reference).
        version: "v1.5" (stride of a bottleneck on the 3x3: torchvision) or "v1" (on the first 1x1: the paper).
        shortcut: "A", "B", "C" (section 3.3) or "none" for plain nets.
        memory: "default" saves raw outputs and block ends for backward; "recompute" drops each block's last raw output.
    """

    def __init__(
        self,
        block: Block,
        blocks: tuple[int, ...],
        *,
        fused: bool = True,
        version: str = "v1.5",
        shortcut: Shortcut = "B",
        num_classes: int = 1000,
        in_channels: int = 3,
        memory: Memory = "default",
        name: str = "resnet",
    ) -> None:
        super().__init__()
        _one_of("version", version, VERSIONS)
        _one_of("shortcut", shortcut, SHORTCUTS)
        _one_of("memory", memory, MEMORY)
        _positive("num_classes", num_classes)
        _positive("in_channels", in_channels)
        self.config = {
            "name": name, "version": version, "shortcut": shortcut, "num_classes": num_classes,
            "in_channels": in_channels, "memory": memory,
        }  # fmt: skip
        self.fused, self.in_channels = fused, in_channels
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        options = {"shortcut": shortcut, "fused": fused, "memory": memory, "version": version}
        channels = self.make_stages(block, blocks, (64, 128, 256, 512), **options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def stem(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.maxpool(plain_conv_bn_act(x, self.conv1, self.bn1, True))
        return fused_pool(fused_conv_bn_act(x, self.conv1, self.bn1, True), self.maxpool)


class CifarResNet(_ResidualNetwork):
    """CIFAR networks of section 4.2, depth 6n+2: 3x3 stem of 16 channels, three stages (16, 32, 64), option A.

    Args: as :class:`ResNet`; ``blocks_per_stage`` is n.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        *,
        fused: bool = True,
        shortcut: Shortcut = "A",
        num_classes: int = 10,
        in_channels: int = 3,
        memory: Memory = "default",
        name: str = "cifar_resnet",
    ) -> None:
        super().__init__()
        _one_of("shortcut", shortcut, SHORTCUTS)
        _one_of("memory", memory, MEMORY)
        _positive("num_classes", num_classes)
        _positive("in_channels", in_channels)
        self.config = {
            "name": name, "shortcut": shortcut, "num_classes": num_classes, "in_channels": in_channels, "memory": memory,
        }  # fmt: skip
        self.fused, self.in_channels = fused, in_channels
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        options = {"shortcut": shortcut, "fused": fused, "memory": memory}
        channels = self.make_stages(BasicBlock, (blocks_per_stage,) * 3, (16, 32, 64), **options)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def stem(self, x: Tensor) -> Tensor:
        layer = fused_conv_bn_act if self.fused else plain_conv_bn_act
        return materialize(layer(x, self.conv1, self.bn1, True))


Weights = str | Path | None
_IMAGENET: dict[int, tuple[Block, tuple[int, ...], int, int]] = {
    # depth: block, blocks per stage, parameters and MACs of option B, v1.5 (systems of 1512.03385, Table 1)
    18: (BasicBlock, (2, 2, 2, 2), 11_689_512, 1_814_073_344),
    34: (BasicBlock, (3, 4, 6, 3), 21_797_672, 3_663_761_408),
    50: (Bottleneck, (3, 4, 6, 3), 25_557_032, 4_089_184_256),
    101: (Bottleneck, (3, 4, 23, 3), 44_549_160, 7_801_405_440),
    152: (Bottleneck, (3, 8, 36, 3), 60_192_808, 11_513_626_624),
}
_PLAIN = {18: (11_515_688, 1_794_805_760), 34: (21_623_848, 3_644_493_824)}
_CIFAR: dict[int, tuple[int, int]] = {  # depth: parameters and MACs, plain and option A alike
    20: (269_722, 40_551_040),
    32: (464_154, 68_862_592),
    44: (658_586, 97_174_144),
    56: (853_018, 125_485_696),
    110: (1_727_962, 252_887_680),
    1202: (19_421_274, 2_829_238_912),
}

# Test errors in percent of 1512.03385: Tables 2 and 3 (ten crops, version v1), Table 6 (CIFAR-10). Its Table 2 has the
# residual networks of 18 layers with option A only. Errors of plain CIFAR networks are in a plot, not in print.
_PUBLISHED = {
    ("resnet", 18): "27.88 (10-crop, option A)",
    ("resnet", 34): "24.52 / 7.46 (10-crop)",
    ("resnet", 50): "22.85 / 6.71 (10-crop, v1)",
    ("resnet", 101): "21.75 / 6.05 (10-crop, v1)",
    ("resnet", 152): "21.43 / 5.71 (10-crop, v1)",
    ("plain", 18): "27.94 (10-crop)",
    ("plain", 34): "28.54 / 10.02 (10-crop)",
    ("cifar_resnet", 20): "8.75",
    ("cifar_resnet", 32): "7.51",
    ("cifar_resnet", 44): "7.17",
    ("cifar_resnet", 56): "6.97",
    ("cifar_resnet", 110): "6.43 (best of 5, mean 6.61)",
    ("cifar_resnet", 1202): "7.93",
}


def _info(family: str, depth: int, params: int, macs: int) -> ModelInfo:
    cifar = family.startswith("cifar")
    where, dataset, side, classes = ("section 4.2", "cifar", 32, 10) if cifar else ("Table 1", "imagenet", 224, 1000)
    name, source = f"{family.removeprefix('cifar_')}{depth}", f"1512.03385, {where}"
    published = _PUBLISHED.get((family, depth), "")
    return ModelInfo(name, family, source, dataset, (3, side, side), classes, params, macs, published)


def _builder(
    name: str, cls: Callable[..., _ResidualNetwork], *args: Any, fixed: dict[str, Any] | None = None
) -> Callable[..., _ResidualNetwork]:
    """A constructor with the family's options; ``fixed`` ones can't be changed by the caller."""
    fixed = fixed or {}

    def build(fused: bool = True, **options: Any) -> _ResidualNetwork:
        taken = sorted(set(options) & {*fixed, "name"})
        if taken:
            raise ModelError(f"model {name!r} fixes {', '.join(taken)}")
        return cls(*args, fused=fused, name=name, **fixed, **options)

    return build


def _register_all() -> None:
    for depth, (block, blocks, params, macs) in _IMAGENET.items():
        info = _info("resnet", depth, params, macs)
        registry.register(info, _builder(info.name, ResNet, block, blocks))
    for depth, (params, macs) in _PLAIN.items():
        info = _info("plain", depth, params, macs)
        fixed = {"shortcut": "none"}
        registry.register(info, _builder(info.name, ResNet, BasicBlock, _IMAGENET[depth][1], fixed=fixed))
    for depth, (params, macs) in _CIFAR.items():
        info = _info("cifar_resnet", depth, params, macs)
        registry.register(info, _builder(info.name, CifarResNet, (depth - 2) // 6))
    for depth, (params, macs) in _CIFAR.items():
        if depth <= 110:
            info = _info("cifar_plain", depth, params, macs)
            registry.register(info, _builder(info.name, CifarResNet, (depth - 2) // 6, fixed={"shortcut": "none"}))


_register_all()


def resnet18(fused: bool = True, weights: Weights = None, **options: Any) -> ResNet:
    """ResNet-18. Options: version, shortcut, num_classes, in_channels, memory; see :class:`ResNet`."""
    return registry.create_model("resnet18", fused, weights, **options)  # type: ignore[return-value]


def resnet34(fused: bool = True, weights: Weights = None, **options: Any) -> ResNet:
    """ResNet-34. Options: version, shortcut, num_classes, in_channels, memory; see :class:`ResNet`."""
    return registry.create_model("resnet34", fused, weights, **options)  # type: ignore[return-value]


def resnet50(fused: bool = True, weights: Weights = None, **options: Any) -> ResNet:
    """ResNet-50. Options: version, shortcut, num_classes, in_channels, memory; see :class:`ResNet`."""
    return registry.create_model("resnet50", fused, weights, **options)  # type: ignore[return-value]


def resnet101(fused: bool = True, weights: Weights = None, **options: Any) -> ResNet:
    """ResNet-101. Options: version, shortcut, num_classes, in_channels, memory; see :class:`ResNet`."""
    return registry.create_model("resnet101", fused, weights, **options)  # type: ignore[return-value]


def resnet152(fused: bool = True, weights: Weights = None, **options: Any) -> ResNet:
    """ResNet-152. Options: version, shortcut, num_classes, in_channels, memory; see :class:`ResNet`."""
    return registry.create_model("resnet152", fused, weights, **options)  # type: ignore[return-value]
