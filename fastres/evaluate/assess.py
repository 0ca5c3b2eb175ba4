"""Evaluation by any protocol, of one network or an ensemble, on one process or several."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastres.errors import UserError
from fastres.evaluate.measures import Measures, Summary
from fastres.evaluate.protocols import Protocol, make_protocol
from fastres.evaluate.sources import Item, Source

Combine = Literal["softmax", "scores"]


@dataclass(frozen=True)
class Assessment:
    """What :func:`assess` found: the figures, and what they are of.

    ``images_per_s`` counts all ranks' images over the slowest rank's ``seconds``; ``data_wait`` is the share of its
    time in which this rank waited for views.
    """

    summary: Summary
    protocol: Protocol
    combine: Combine
    networks: int
    world: int
    seconds: float
    images_per_s: float
    data_wait: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the figures first."""
        about = {
            "protocol": self.protocol.name, "views": self.protocol.count, "scales": list(self.protocol.scales),
            "crop": self.protocol.crop, "combine": self.combine, "networks": self.networks, "processes": self.world,
            "seconds": self.seconds, "images_per_s": self.images_per_s, "data_wait": self.data_wait,
        }  # fmt: skip
        figures = self.summary.as_dict()
        parts = {name: figures.pop(name) for name in ("classes", "calibration", "confusion")}
        return {**figures, **about, **parts}


@torch.no_grad()
def assess(
    models: nn.Module | Sequence[nn.Module],
    source: Source,
    protocol: Protocol | str = "loader",
    *,
    combine: Combine = "softmax",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    step: Callable[[int], None] | None = None,
) -> Assessment:
    """Evaluate on every image of ``source`` exactly once.

    Where ``torch.distributed`` is initialised, ranks share the images and all return the same counts; shares may be
    uneven or empty, nothing is repeated or padded.

    Args:
        models: give logits ``[B, K]``; several form an ensemble, the mean of their probabilities. They are on the
            device that the source delivers to, and are left in the mode they were in.
        source: see :mod:`fastres.evaluate.sources`.
        protocol: the views of an image, or their name (:func:`fastres.evaluate.protocols.make_protocol`).
        combine: over the views of an image, ``"softmax"`` averages probabilities (the authors' note on ResNet's 10-crop),
            ``"scores"`` raw outputs (fb.resnet.torch sums them; the order is the same).
        dtype: ``torch.bfloat16`` runs under autocast.
        batch_size: at most this many views go through the network at once, more only where a loader's batch is larger.
        step: called with this rank's images done so far.

    Raises:
        UserError: no model, no image, or fewer outputs than classes.
    """
    networks = [models] if isinstance(models, nn.Module) else list(models)
    if not networks:
        raise UserError("there is no network to evaluate")
    if combine not in ("softmax", "scores"):
        raise UserError(f"combine must be 'softmax' or 'scores', got {combine!r}")
    protocol = make_protocol(protocol) if isinstance(protocol, str) else protocol
    rank, world = _place()
    measures: Measures | None = None
    done, waited, begin = 0, 0.0, time.perf_counter()
    with _evaluating(networks):
        groups = _groups(source.items(protocol, rank, world), batch_size)
        while True:
            asked = time.perf_counter()
            group = next(groups, None)
            waited += time.perf_counter() - asked
            if group is None:
                break
            labels = torch.cat([item.labels for item in group])
            scores = _predict(networks, group, combine, dtype, batch_size)
            if measures is None:
                if scores.shape[1] < source.num_classes:
                    raise UserError(
                        f"the network has {scores.shape[1]} outputs, the data have {source.num_classes} classes"
                    )
                measures = Measures(scores.shape[1], scores.device)
            measures.add(scores, labels)
            done += len(labels)
            if step is not None:
                step(done)
    seconds = time.perf_counter() - begin
    if world > 1:
        measures, seconds = _merged(measures, networks[0], seconds)
    if measures is None:
        raise UserError("there is nothing to evaluate: the loader delivered no image")
    summary = measures.summary(source.classes)
    share = waited / (time.perf_counter() - begin)
    return Assessment(summary, protocol, combine, len(networks), world, seconds, summary.samples / seconds, share)


def _groups(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Items that together fill a batch with their views."""
    group: list[Item] = []
    views = 0
    for item in items:
        group.append(item)
        views += sum(len(view) for view in item.views)
        if views >= batch_size:
            yield group
            group, views = [], 0
    if group:
        yield group


def _predict(
    networks: list[nn.Module], group: list[Item], combine: Combine, dtype: torch.dtype, batch_size: int
) -> Tensor:
    """Logarithms of probabilities ``[images, K]``, of float32."""
    # Views of one shape go through the network together, whichever image they are of. Larger loader batches stay whole:
    # cutting them would only be slower.
    shapes: dict[tuple[int, ...], list[tuple[Tensor, int]]] = defaultdict(list)
    start = 0
    for item in group:
        for view in item.views:
            shapes[tuple(view.shape[1:])].append((view, start))
        start += len(item.labels)
    images, count = start, len(group[0].views)
    totals: list[Tensor | None] = [None] * len(networks)
    for parts in shapes.values():
        for chunk in _chunks(parts, batch_size):
            batch = torch.cat([view for view, _ in chunk]) if len(chunk) > 1 else chunk[0][0]
            batch = batch.contiguous(memory_format=torch.channels_last)
            for number, network in enumerate(networks):
                with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32):
                    logits = network(batch)
                scores = logits.float() if combine == "scores" else F.log_softmax(logits.float(), 1)
                total = totals[number]
                if total is None:
                    empty = 0.0 if combine == "scores" else -math.inf
                    total = totals[number] = scores.new_full((images, scores.shape[1]), empty)
                place = 0
                for view, first in chunk:
                    rows = slice(first, first + len(view))
                    mine = scores[place : place + len(view)]
                    total[rows] = total[rows] + mine if combine == "scores" else torch.logaddexp(total[rows], mine)
                    place += len(view)
    each = []
    for total in totals:
        assert total is not None
        each.append(F.log_softmax(total / count, 1) if combine == "scores" else total - math.log(count))
    if len({scores.shape[1] for scores in each}) > 1:
        raise UserError(f"the networks of an ensemble differ in outputs: {[scores.shape[1] for scores in each]}")
    return each[0] if len(each) == 1 else torch.stack(each).logsumexp(0) - math.log(len(each))


def _chunks(parts: list[tuple[Tensor, int]], batch_size: int) -> Iterator[list[tuple[Tensor, int]]]:
    chunk: list[tuple[Tensor, int]] = []
    size = 0
    for part in parts:
        if chunk and size + len(part[0]) > batch_size:
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += len(part[0])
    if chunk:
        yield chunk


@contextmanager
def _evaluating(networks: list[nn.Module]) -> Iterator[None]:
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, training in zip(networks, modes, strict=True):
            network.train(training)


def _place() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) outside of torch.distributed."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _merged(measures: Measures | None, network: nn.Module, seconds: float) -> tuple[Measures | None, float]:
    """The sums of all ranks and the time of the slowest; a rank without images learns the number of outputs."""
    import torch.distributed as dist

    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    about = torch.tensor([float(measures.num_classes if measures else 0), seconds], dtype=torch.float64, device=device)
    dist.all_reduce(about, dist.ReduceOp.MAX)
    outputs = int(about[0])
    if not outputs:
        return None, seconds
    measures = measures if measures is not None else Measures(outputs, device)
    measures.merge_ranks()
    return measures, float(about[1])
