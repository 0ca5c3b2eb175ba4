"""BatchNorm's population statistics, computed over the training set instead of taken from running averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastres.errors import UserError


def population_statistics(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    step: Callable[[int], None] | None = None,
) -> int:
    """Replace every BatchNorm's running statistics by the means over all batches, each counting the same.

    Algorithm 2 of Ioffe and Szegedy 2015: E[x] is the mean of the batches' means, Var[x] that of their unbiased
    variances, over one pass with fixed weights. The authors' ResNets were tested with such statistics. Running averages
    (momentum 0.1) remember about twenty batches, of weights that still moved.

    Under ``torch.distributed`` every rank passes its share, and all end with the mean over all batches of all ranks.

    Args:
        model: is left in the mode it was in; nothing but running statistics changes.
        batches: ``(images [B, C, H, W], labels)``, best of the training's own batch size; an incomplete last batch counts
            as much as the others, so a training loader drops it.
        dtype: ``torch.bfloat16`` runs under autocast.
        step: called with the images done so far.

    Returns:
        The batches of this rank.

    Raises:
        UserError: there was no batch, or the network keeps no running statistics or is frozen. Whatever is raised, the
            statistics are those from before.
    """
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        raise UserError("the network has no BatchNorm with running statistics")
    if getattr(model, "_bn_frozen", False):
        raise UserError("BatchNorm is frozen and keeps its statistics; call freeze_bn(False) first")
    seen, was_training = [0, 0], model.training
    momenta = [m.momentum for m in norms]
    saved = [{name: value.clone() for name, value in m.named_buffers(recurse=False)} for m in norms]

    def images() -> Iterable[Tensor]:
        for values, _ in batches:
            yield values
            seen[0] += 1
            seen[1] += len(values)
            if step is not None:
                step(seen[1])

    try:
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            update_bn(images(), model)
        if not seen[0] and not _distributed():
            raise UserError("population statistics need at least one batch; the loader delivered none")
        _average(norms, seen[0])
    except BaseException:
        model.train(was_training)
        for norm, values, momentum in zip(norms, saved, momenta, strict=True):
            norm.momentum = momentum
            for name, value in values.items():
                getattr(norm, name).copy_(value)
        raise
    return seen[0]


def _distributed() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _average(norms: list[nn.modules.batchnorm._BatchNorm], batches: int) -> None:
    """The mean over ranks, weighted by their batches."""
    if not _distributed():
        return
    import torch.distributed as dist

    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    flat = torch.cat([b.double().flatten() * batches for b in buffers] + [buffers[0].new_tensor([batches]).double()])
    dist.all_reduce(flat)
    total = float(flat[-1])
    if not total:
        raise UserError("population statistics need at least one batch; no rank's loader delivered one")
    place = 0
    for buffer in buffers:
        buffer.copy_((flat[place : place + buffer.numel()] / total).view_as(buffer))
        place += buffer.numel()
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(round(total))
