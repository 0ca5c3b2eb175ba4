"""ConvBNAct, BasicBlock and Bottleneck: thin modules over :mod:`fastres.nn.functional`, with torchvision's keys."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastres.ops import recipes

from .functional import (
    Activation,
    Pending,
    Updates,
    forked_conv_bn_act,
    fused_conv_bn_act,
    materialize,
    plain_conv_bn_act,
)
from .statistics import update_running

Shortcut = Literal["none", "A", "B", "C"]
Memory = Literal["default", "recompute"]


def conv3x3(channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, groups=groups, bias=False)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)


class ConvBNAct(nn.Module):
    """``relu(bn(conv(x)) + residual)`` as one module with children ``conv`` and ``bn``.

    Args:
        channels_in, channels_out, kernel_size, stride, padding, dilation, groups: of the convolution; ``padding``
            defaults to "same size" for odd kernels.
        relu: whether the ReLU follows. fused: fused kernels, or plain PyTorch modules.

    Shape: x [N, C, H, W] -> [N, K, P, Q]; residual [N, K, P, Q] or None.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        relu: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        pad = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(channels_in, channels_out, kernel_size, stride, pad, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(channels_out)
        self.relu, self.fused = relu, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        layer = fused_conv_bn_act if self.fused else plain_conv_bn_act
        return materialize(layer(x, self.conv, self.bn, self.relu, residual))


class PaddingShortcut(nn.Module):
    """Option A: ``x[:, :, ::s, ::s]`` with zero channels appended; no parameters (1512.03385, section 3.3)."""

    def __init__(self, channels_out: int, stride: int) -> None:
        super().__init__()
        self.channels_out, self.stride = channels_out, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.channels_out - x.shape[1]))


def watched(module: nn.Module) -> bool:
    """Whether hooks want to see what goes into a module or comes out of it."""
    own = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(own) or nn.modules.module._has_any_global_hook()


class ResidualBlock(nn.Module):
    """What BasicBlock and Bottleneck share: the shortcut and the two memory modes.

    ``memory="recompute"`` drops the block's last raw outputs after forward (that of the projection as well) and computes
    them again in backward from the raw output before, which is saved anyway.
    """

    expansion = 1

    def __init__(self, fused: bool, memory: Memory) -> None:
        super().__init__()
        self.fused, self.memory = fused, memory
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None

    def add_shortcut(self, shortcut: Shortcut, channels_in: int, channels_out: int, stride: int) -> None:
        """Creates the shortcut: "none" (plain nets), "A", "B" or "C" of section 3.3."""
        self.shortcut = shortcut
        same = stride == 1 and channels_in == channels_out
        if shortcut == "C" or (shortcut == "B" and not same):
            conv = conv1x1(channels_in, channels_out, stride)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels_out))
        elif shortcut == "A" and not same:
            self.downsample = PaddingShortcut(channels_out, stride)

    @property
    def layer(self) -> Callable[..., Any]:
        return fused_conv_bn_act if self.fused else plain_conv_bn_act

    def residual(self, x: Tensor, updates: Updates | None = None) -> Activation | None:
        """The shortcut's value: None, ``x``, padded ``x``, or the projection (pending in training)."""
        if self.shortcut == "none":
            return None
        if self.downsample is None:
            return x
        if isinstance(self.downsample, PaddingShortcut):
            return self.downsample(x)
        assert isinstance(self.downsample, nn.Sequential)
        options = {"once": True} if self.fused else {}
        return self.layer(x, self.downsample[0], self.downsample[1], False, updates=updates, **options)

    def begin(self, x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Activation, Tensor]:
        """(first layer of the block, the block's input as its shortcut shall take it)."""
        if self.fused and self.shortcut != "none":
            return forked_conv_bn_act(x, conv, bn, True)
        return self.layer(x, conv, bn, True), x

    def forward(self, x: Tensor, average: bool = False) -> Tensor:
        """The block's result [N, K, P, Q], or its mean over P and Q, [N, K], which in training is all that is computed."""
        raise AssertionError("a block defines its convolutions")

    def finish(self, a: Activation, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, average: bool) -> Tensor:
        """Last convolution of the block, shortcut of ``x``, addition and ReLU; with ``average`` its mean over H and W."""
        options = {"average": True} if average else {}
        if not (self.memory == "recompute" and self.fused and bn.training and isinstance(a, Pending) and len(x)):
            return materialize(self.layer(a, conv, bn, True, self.residual(x), **options))
        projection = isinstance(self.downsample, nn.Sequential)
        norms = [self.downsample[1], bn] if projection else [bn]  # type: ignore[index]

        def tail(x: Tensor, y: Tensor, scale: Tensor, center: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            updates: Updates = []
            pending = Pending(y, scale, center, shift, True)
            out = materialize(self.layer(pending, conv, bn, True, self.residual(x, updates), updates, **options))
            return (out, *(vector for stats in updates for vector in stats))

        out, *vectors = checkpoint(tail, x, *a[:4], use_reentrant=False, preserve_rng_state=False)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        for norm, stats in zip(norms, pairs, strict=True):
            update_running(norm, *stats)
        return recipes.drop(out)  # its raw tensors were just dropped


class BasicBlock(ResidualBlock):
    """conv3x3-BN-ReLU-conv3x3-BN, added to the shortcut, ReLU (1512.03385, Fig. 5 left).

    Shape: [N, channels_in, H, W] -> [N, width, H/stride, W/stride].
    """

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int = 1,
        shortcut: Shortcut = "B",
        fused: bool = True,
        memory: Memory = "default",
        version: str = "v1.5",
    ) -> None:
        super().__init__(fused, memory)
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_shortcut(shortcut, channels_in, width, stride)

    def forward(self, x: Tensor, average: bool = False) -> Tensor:
        a, x = self.begin(x, self.conv1, self.bn1)
        return self.finish(a, self.conv2, self.bn2, x, average)


class Bottleneck(ResidualBlock):
    """conv1x1-conv3x3-conv1x1 with BN and ReLU between, added to the shortcut, ReLU (1512.03385, Fig. 5 right).

    ``version`` says where the stride sits: "v1" on the first 1x1 (the paper), "v1.5" on the 3x3 (torchvision).
    Shape: [N, channels_in, H, W] -> [N, 4·width, H/stride, W/stride].
    """

    expansion = 4

    def __init__(
        self,
        channels_in: int,
        width: int,
        stride: int = 1,
        shortcut: Shortcut = "B",
        fused: bool = True,
        memory: Memory = "default",
        version: str = "v1.5",
    ) -> None:
        super().__init__(fused, memory)
        first, second = (stride, 1) if version == "v1" else (1, stride)
        out = width * self.expansion
        self.conv1 = conv1x1(channels_in, width, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, second)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out)
        self.bn3 = nn.BatchNorm2d(out)
        self.add_shortcut(shortcut, channels_in, out, stride)

    def forward(self, x: Tensor, average: bool = False) -> Tensor:
        a, x = self.begin(x, self.conv1, self.bn1)
        a = self.layer(a, self.conv2, self.bn2, True)
        return self.finish(a, self.conv3, self.bn3, x, average)
