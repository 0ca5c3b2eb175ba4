"""Optimisers of the papers and of large batches, and the learning rate as a pure function of the iteration."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastres.errors import UserError

OptimizerName = Literal["sgd", "lars", "lamb", "adamw"]


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool = False) -> list[dict[str, Any]]:
    """Split a network's parameters for weight decay.

    The ResNet paper decays the weights of convolutions and of the classifier only; fb.resnet.torch decays everything
    (``decay_all``). Returns one group for those that are decayed and one, if any, for those that are not.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if decay_all or parameter.dim() > 1 else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay, "name": "decayed"}]
    return groups + ([{"params": others, "weight_decay": 0.0, "name": "not decayed"}] if others else [])


def make_optimizer(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    decay_all: bool = False,
    nesterov: bool = False,
    kind: OptimizerName = "sgd",
    zero: bool = False,
) -> torch.optim.Optimizer:
    """An optimiser on :func:`parameter_groups`, without dampening.

    Args:
        kind: ``sgd``; ``lars`` and ``lamb`` are timm's; ``adamw`` is torch's.
        zero: each process of the default group keeps the state of a part of the parameters only.

    Raises:
        UserError: Nesterov without momentum or of another kind than SGD and LARS, or timm is not installed.
    """
    groups = parameter_groups(model, weight_decay, decay_all)
    if nesterov and (kind not in ("sgd", "lars") or momentum <= 0):
        raise UserError(f"nesterov needs sgd or lars with a momentum above 0, got {kind} with momentum {momentum:g}")
    options: dict[str, Any] = {"lr": lr}
    if kind in ("sgd", "lars"):
        options |= {"momentum": momentum, "nesterov": nesterov}
    maker: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}.get(kind)
    if maker is None:
        try:
            from timm.optim import Lamb, Lars
        except ImportError as error:
            raise UserError(f"the optimizer {kind} is timm's: pip install 'fastres[train]' ({error})") from error
        maker = {"lars": Lars, "lamb": Lamb}[kind]
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class=maker, parameters_as_bucket_view=False, **options)
    made: torch.optim.Optimizer = maker(groups, **options)
    return made


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each iteration; stateless, so that resuming needs nothing but the iteration's number.

    ``step`` multiplies by ``gamma`` after each of ``milestones`` (fractions of the run where they are below 1, else
    iterations), ``cosine`` falls to zero at the end. Over the first ``warmup`` iterations the rate rises linearly from
    ``lr / warmup``, or from ``lr * warmup_factor`` where that is given; with ``warmup_constant`` it stays there, as in
    the ResNet paper's start of 110 layers on CIFAR (section 4.2).
    """

    kind: str
    lr: float
    iterations: int
    warmup: int = 0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup_factor: float | None = None
    warmup_constant: bool = False

    def __call__(self, iteration: int) -> float:
        """The rate of an iteration, counted from 0."""
        if iteration < self.warmup:
            if self.warmup_factor is None:
                return self.lr * (iteration + 1) / self.warmup
            if self.warmup_constant:
                return self.lr * self.warmup_factor
            return self.lr * (self.warmup_factor + (1 - self.warmup_factor) * iteration / self.warmup)
        if self.kind == "step":
            # Shares are compared as quotients: a third of 90 epochs is exactly the float 1/3.
            shares = sorted(m for m in self.milestones if m < 1)
            counts = sorted(m for m in self.milestones if m >= 1)
            passed = bisect_right(shares, iteration / self.iterations) + bisect_right(counts, iteration)
            return self.lr * self.gamma**passed
        if self.kind == "cosine":
            share = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self.lr
