"""SGD as in the ResNet papers, and its learning rate as a pure function of the iteration."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, object]]:
    """Split a network's parameters for weight decay.

    The ResNet paper decays the weights of convolutions and of the classifier only; fb.resnet.torch decays everything
    (``decay_all``). Returns one group for those that are decayed and one, if any, for those that are not.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if decay_all or parameter.dim() > 1 else others).append(parameter)
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": weight_decay, "name": "decayed"}]
    return groups + ([{"params": others, "weight_decay": 0.0, "name": "not decayed"}] if others else [])


def make_optimizer(
    model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4, decay_all: bool = False
) -> torch.optim.SGD:
    """SGD with momentum on :func:`parameter_groups`."""
    return torch.optim.SGD(parameter_groups(model, weight_decay, decay_all), lr=lr, momentum=momentum)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each iteration; stateless, so that resuming needs nothing but the iteration's number.

    ``step`` divides by 10 after each of ``milestones`` (fractions of the run), ``cosine`` falls to zero at the end.
    Over the first ``warmup`` iterations the rate also rises linearly from ``lr / warmup``.
    """

    kind: str
    lr: float
    iterations: int
    warmup: int = 0
    milestones: tuple[float, ...] = (0.5, 0.75)

    def __call__(self, iteration: int) -> float:
        """The rate of an iteration, counted from 0."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        if self.kind == "step":
            return self.lr * 0.1 ** bisect_right(sorted(self.milestones), iteration / self.iterations)
        if self.kind == "cosine":
            share = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self.lr
