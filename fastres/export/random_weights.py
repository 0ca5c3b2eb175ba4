"""A network with random weights that a file can be compared with: for timing runtimes and for trying an export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastres
from fastres.nn.statistics import BatchNorm


def untrained(name: str, fused: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A registered network with random weights and BatchNorm statistics that are neither trivial nor harmful.

    Fresh statistics (mean 0, variance 1) would hide a BatchNorm that is left out, so they are drawn around them. In very
    deep residual networks a map then grows beyond float32, block by block; those take the statistics of a random batch.
    (In deep plain networks these would amplify every rounding error up to the size of the outputs.)
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = fastres.create_model(name, fused=fused, **options)
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        for bn in norms:
            assert bn.running_mean is not None and bn.running_var is not None
            bn.running_mean.normal_(0, 0.1)
            bn.running_var.uniform_(0.8, 1.25)
            nn.init.uniform_(bn.weight, 0.8, 1.2)
            nn.init.normal_(bn.bias, 0, 0.1)
        _, *size = fastres.model_info(name).input_size
        images = torch.randn(4, model.in_channels, *size)  # type: ignore[call-overload]
        if not bool(model.eval()(images[:1]).isfinite().all()):
            momenta = [bn.momentum for bn in norms]
            for bn in norms:
                bn.reset_running_stats()
                bn.momentum = None  # the average over one batch: the batch's own
            model.train()(images)
            for bn, momentum in zip(norms, momenta, strict=True):
                bn.momentum = momentum
    return model.eval()
