"""A network in the form that is written: plain PyTorch modules, BatchNorm folded into the convolutions, float32."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import ExportError
from fastres.models import Network
from fastres.nn.folding import fold
from fastres.nn.statistics import BatchNorm

INPUT, OUTPUT = "images", "logits"
TRACED_BATCH = 2  # what is traced with one image holds for one image only


def plain(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU, in float32, whose fused layers and blocks run as plain PyTorch modules."""
    made = _copied(model)
    for module in made.modules():
        # Every fused layer, block and network of fastres has its plain form behind this switch.
        if isinstance(getattr(module, "fused", None), bool) and type(module).__module__.startswith("fastres."):
            module.fused = False  # type: ignore[assignment]
    return made


def own_form(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the CPU, in float32, that computes as ``model`` does: fused if it is fused."""
    return _copied(model)


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    except Exception as error:  # whatever a user's own modules raise when they are copied
        raise ExportError(f"this {type(model).__name__} can't be copied: {error}") from error


def fold_batch_norms(model: nn.Module, images: Tensor) -> int:
    """Folds each BatchNorm of a plain network of fastres into the convolution before it, in float64; returns how many.

    Which belongs to which is seen in a forward pass on ``images``: a layer of these networks gives its convolution's
    output to its BatchNorm and to nobody else. Other networks are left as they are.
    """
    if not isinstance(model, Network):
        return 0
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by the output's id; the tensor keeps the id from being used again
    pairs: dict[nn.Module, nn.Conv2d] = {}

    def after_conv(conv: nn.Module, _: Any, out: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        made[id(out)] = (conv, out)

    def before_norm(bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made and bn not in pairs:
            pairs[bn] = made.pop(id(inputs[0]))[0]

    handles = [m.register_forward_hook(after_conv) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(before_norm) for m in model.modules() if isinstance(m, BatchNorm)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    for bn, conv in pairs.items():
        assert isinstance(bn, BatchNorm)
        if bn.running_mean is None or bn.running_var is None:
            continue
        weight, bias = fold(copy.deepcopy(conv).double(), copy.deepcopy(bn).double())
        conv.weight = nn.Parameter(weight.float(), requires_grad=False)
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)
        model.set_submodule(names[bn], nn.Identity())
    return len(pairs)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' own talk (warnings about their internals, progress on standard output)."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def trace(model: nn.Module, images: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    """``model`` as a torch.export program for images like ``images``; ``any_batch``: for every number of them.

    Raises:
        ExportError: the network can't be traced, or a layer is an operator that only fastres has.
    """
    shapes = {0: torch.export.Dim("batch", min=1)} if any_batch else None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # the tracer reports what it can't do by many types
        raise ExportError(f"{type(model).__name__} can't be traced by torch.export: {error}") from error
    own = sorted({str(n.target) for n in program.graph.nodes if str(n.target).startswith("fastres")})
    if own:
        raise ExportError(
            f"{type(model).__name__} holds operators that only fastres has ({', '.join(own)}); export the network that was "
            "given to fastres.fuse: they share their parameters"
        )
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it would carry this machine's folders into the file
    return program
