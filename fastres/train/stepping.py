"""One step of the optimiser: parts of a batch, mixed precision, mixed images, gradients over processes, averages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.errors import UserError
from fastres.train.distributed import World
from fastres.train.settings import Settings

if TYPE_CHECKING:
    from fastres.train.run import Run


def parallel(model: nn.Module, settings: Settings, world: World, device: torch.device) -> nn.Module:
    """What a step calls: the network, wrapped for several processes and compiled as the settings ask."""
    wrapped = model
    if world.several:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        from torch.nn.parallel import DistributedDataParallel

        wrapped = ddp = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            # DDP arranges its buckets anew after the first step. With more than two processes the order of a sum
            # depends on the arrangement, and a resumed run would differ in last bits; this option keeps the first one.
            find_unused_parameters=settings.deterministic and world.size > 2,
        )  # fmt: skip
        if settings.compress:
            ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    compiled: Any = torch.compile(wrapped) if settings.compile else wrapped
    assert isinstance(compiled, nn.Module)
    return compiled


def captured(run: Run, images: Tensor) -> nn.Module:
    """The network with its forward and backward pass captured as CUDA graphs for batches like ``images``.

    Raises:
        UserError: not on a GPU, or with several processes.
    """
    if images.device.type != "cuda":
        raise UserError("cuda_graphs needs a GPU; leave it out on the CPU")
    if run.world.several:
        raise UserError("cuda_graphs is for one process: DDP's hooks can't be captured after it wraps the network")
    size = len(images) // run.settings.accumulate
    # Capturing runs the network, which would move its running statistics.
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    with torch.autocast("cuda", run.dtype, enabled=run.dtype != torch.float32, cache_enabled=False):
        made = torch.cuda.make_graphed_callables(run.model, (torch.zeros_like(images[:size]),))
    with torch.no_grad():
        for buffer, before in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    assert isinstance(made, nn.Module)
    return made


def train_step(run: Run, images: Tensor, labels: Tensor) -> None:
    """One iteration on this process's part of a batch."""
    settings = run.settings
    rate = run.schedule(run.iteration)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    targets = labels
    if run.mixing is not None:
        images, targets = run.mixing(images, labels)
    if settings.cuda_graphs and not run.captured:
        run.parallel, run.captured = captured(run, images), True
    parts = settings.accumulate
    for index, (x, wanted, truth) in enumerate(
        zip(images.chunk(parts), targets.chunk(parts), labels.chunk(parts), strict=True)
    ):
        # Gradients are summed over processes once, with those of the last part.
        wait = run.parallel.no_sync() if run.world.several and index < parts - 1 else nullcontext()
        with wait:
            with torch.autocast(
                run.device.type, run.dtype, enabled=run.dtype != torch.float32, cache_enabled=not settings.cuda_graphs
            ):
                logits = run.parallel(x)
                loss = F.cross_entropy(logits, wanted, label_smoothing=settings.label_smoothing or 0.0)
            share = loss / parts if parts > 1 else loss
            run.scaler.scale(share).backward()
        with torch.no_grad():
            run.sums[0] += loss.double() * len(truth)
            run.sums[1] += (logits.argmax(1) == truth).sum()
            run.sums[2] += len(truth)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.batch += 1
    run.iteration += 1
    if run.ema is not None and run.iteration % (settings.ema_every or 1) == 0:
        run.ema.update_parameters(run.model)
