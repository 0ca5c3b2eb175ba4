"""Modules: ConvBNAct, BasicBlock, Bottleneck, and SyncBatchNorm conversion."""

from typing import Any

from torch import nn

from .blocks import BasicBlock, Bottleneck, ConvBNAct, PaddingShortcut, ResidualBlock
from .statistics import SyncBatchNorm2d

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "PaddingShortcut",
    "ResidualBlock",
    "SyncBatchNorm2d",
    "convert_sync_bn",
]


def convert_sync_bn(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Synchronises every BatchNorm of ``model`` over the ranks of ``process_group`` (None: all) in training.

    Each nn.BatchNorm2d becomes a :class:`SyncBatchNorm2d` with the same parameters, buffers and keys. Statistics are merged
    by count, mean and sum of squares in two [C] all-reduces, on CPU and GPU alike. Convert before wrapping in DDP. Returns
    the model, changed in place.

    Raises:
        TypeError: the model is already wrapped in DistributedDataParallel.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("convert_sync_bn: convert the model before wrapping it in DistributedDataParallel")
    if type(model) is nn.BatchNorm2d:
        return SyncBatchNorm2d.of(model, process_group)
    for name, child in model.named_children():
        setattr(model, name, convert_sync_bn(child, process_group))
    return model
