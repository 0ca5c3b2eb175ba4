"""One view of each image: top-1, top-5 and loss, exact over the set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastres.data.loader import Loader


@dataclass(frozen=True)
class Evaluation:
    """Shares are of 1; ``loss`` is the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, dtype: torch.dtype = torch.float32, step: Callable[[int], None] | None = None
) -> Evaluation:
    """Evaluate a network on every image of ``loader`` once, whatever the batch size.

    Args:
        model: gives logits ``[B, classes]``; is left in the mode it was in.
        loader: delivers to the device that the model is on.
        dtype: ``torch.bfloat16`` runs under autocast.
        step: called with the images done so far.

    Raises:
        UserError: the loader delivered no image.
    """
    from fastres.errors import UserError

    was_training = model.training
    model.eval()
    totals: torch.Tensor | None = None
    samples = 0
    try:
        for images, labels in loader:
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            logits = logits.float()
            losses = F.cross_entropy(logits, labels, reduction="none").double().sum()
            best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
            part = torch.stack([best[:, 0].sum().double(), best.sum().double(), losses])
            totals = part if totals is None else totals + part
            samples += len(labels)
            if step is not None:
                step(samples)
    finally:
        model.train(was_training)
    if totals is None:
        raise UserError("there is nothing to evaluate: the loader delivered no image")
    top1, top5, loss = (totals / samples).tolist()
    return Evaluation(top1, top5, loss, samples)
