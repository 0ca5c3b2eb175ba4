"""Where BatchNorm's statistics come from and go to: the batch, all ranks, running averages."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastres.ops import bn_coefficients

BatchNorm = nn.modules.batchnorm._BatchNorm


class BatchStatistics(NamedTuple):
    """Statistics of one batch: mean [C], biased variance [C], and the number of values per channel."""

    mean: Tensor
    var: Tensor
    values: int | Tensor


def uses_batch_statistics(bn: BatchNorm) -> bool:
    """Whether ``bn`` normalises by the batch (training, or no running statistics are kept)."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def check_batch(y: Tensor, bn: BatchNorm) -> None:
    """PyTorch's own error for one value per channel in training, raised before any statistic is touched."""
    if bn.training and y.numel() == y.shape[1] and not _synchronised(bn):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are merged over the ranks of a process group, on CPU and GPU alike.

    (nn.SyncBatchNorm is for CUDA only, and DDP refuses it on the CPU.) Same parameters, buffers and keys as BatchNorm2d.
    """

    process_group: Any = None

    @classmethod
    def of(cls, bn: nn.BatchNorm2d, process_group: Any) -> "SyncBatchNorm2d":
        """A synchronised twin that holds the very parameters and buffers of ``bn``."""
        twin = cls.__new__(cls)
        twin.__dict__ = dict(bn.__dict__)
        twin.process_group = process_group
        return twin

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same; for networks in plain form. Fused layers never call it."""
        if not _synchronised(self):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.mean((0, 2, 3))
        var = (wide - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        stats = merged(BatchStatistics(mean, var, x.numel() // x.shape[1]), self)
        update_running(self, *for_running(stats))
        scale, center, shift = bn_coefficients(stats.mean, stats.var, self.weight, self.bias, self.eps)
        scale, center, shift = (v.view(1, -1, 1, 1) for v in (scale, center, shift))
        return (scale * (wide - center) + shift).to(x.dtype)


def _synchronised(bn: BatchNorm) -> bool:
    return (
        isinstance(bn, (SyncBatchNorm2d, nn.SyncBatchNorm))
        and bn.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(bn.process_group) > 1
    )


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum over ranks is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def merged(local: BatchStatistics, bn: BatchNorm) -> BatchStatistics:
    """Statistics over all ranks of ``bn``'s process group, for a synchronised BatchNorm in training; else ``local`` as it is.

    Merged by (count, mean, M2), Chan's formula: the mean first, then the sum of squares about it. Both sums are [C]
    all-reduces that autograd follows. Ranks may hold different counts, also none.
    """
    if not _synchronised(bn):
        return local
    assert isinstance(bn, (SyncBatchNorm2d, nn.SyncBatchNorm))
    group = bn.process_group or dist.group.WORLD
    n = float(local.values)
    mean, var = (local.mean, local.var) if n else (torch.zeros_like(local.mean), torch.zeros_like(local.var))
    count = mean.new_tensor([n])
    sums = _AllReduceSum.apply(torch.cat([mean * n, count]), group)
    total = sums[-1].detach()
    joint = sums[:-1] / total
    m2 = _AllReduceSum.apply(n * (var + (mean - joint).square()), group)
    return BatchStatistics(joint, m2 / total, total)


def for_running(stats: BatchStatistics) -> tuple[Tensor, Tensor]:
    """(mean [C], unbiased variance [C]), detached: what running statistics are updated with."""
    return stats.mean.detach(), stats.var.detach() * (stats.values / (stats.values - 1))


@torch.no_grad()
def update_running(bn: BatchNorm, mean: Tensor, unbiased_var: Tensor) -> None:
    """running ← (1 − momentum)·running + momentum·batch, as nn.BatchNorm2d; momentum None: cumulative average."""
    if not bn.training or bn.running_mean is None or bn.running_var is None:
        return
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if bn.momentum is None:
        assert bn.num_batches_tracked is not None
        weight: float | Tensor = 1.0 / bn.num_batches_tracked.to(bn.running_mean.dtype)
    else:
        weight = bn.momentum
    dtype = bn.running_mean.dtype
    bn.running_mean.lerp_(mean.to(dtype), weight)
    bn.running_var.lerp_(unbiased_var.to(dtype), weight)
