"""``fastres.explain``: which backend each layer of a network takes, and why not a preferred one."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastres import backends
from fastres.nn.statistics import BatchNorm

from .graph.report import FusionReport, table
from .graph.tracing import is_fastres_layer

PLAIN = "pytorch"  # in the place of a backend: an ordinary module ran, not an op of fastres
_SHOWN = (nn.modules.conv._ConvNd, BatchNorm, nn.Linear, nn.modules.pooling._MaxPoolNd)


@dataclass(frozen=True)
class ExplanationRow:
    """One op of one layer: what came in, who computed it, and why nobody preferred did.

    ``layer`` is the path of the module, ``op`` an op of fastres or the class of an ordinary module, ``shape`` and
    ``dtype`` those of its input, ``backend`` the one taken (``"pytorch"`` for ordinary modules).
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    reasons: tuple[str, ...] = ()


@dataclass
class Explanation:
    """One forward pass, layer by layer in the order of execution; ``str()`` is a table."""

    network: str
    training: bool
    rows: list[ExplanationRow] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def fused(self) -> list[ExplanationRow]:
        """The rows that ops of fastres computed."""
        return [row for row in self.rows if row.backend != PLAIN]

    def __str__(self) -> str:
        mode = "training" if self.training else "evaluation"
        own = len(self.fused)
        lines = [f"{self.network} in {mode} mode: {own} ops by fastres, {len(self.rows) - own} by PyTorch"]
        reasons = list(dict.fromkeys(row.reasons for row in self.rows if row.reasons))
        marks = {text: f"({i})" for i, text in enumerate(reasons, 1)}
        cells = [
            (
                row.layer or "(the network itself)", row.op, "x".join(map(str, row.shape)),
                str(row.dtype).removeprefix("torch."), row.backend, marks.get(row.reasons, ""),
            )
            for row in self.rows
        ]  # fmt: skip
        if cells:
            lines += ["", *table(("layer", "op", "input", "dtype", "backend", "why"), cells)]
        if marks:
            lines += ["", *(f"{mark} {'; '.join(text)}" for text, mark in marks.items())]
        if self.remarks:
            lines += ["", *self.remarks]
        return "\n".join(lines)


def explain(model: nn.Module, x: Any) -> Explanation:
    """Runs ``model`` once on ``x``, in the mode it is in and without gradients, and says who computed what.

    Running statistics, other buffers and random states are as before afterwards. A model wrapped for data-parallel
    training or by torch.compile is explained as the network inside.

    Args:
        model: a network of fastres, one from :func:`fastres.fuse`, or any other (which has no fused layers).
        x: input [N, C, H, W], or a tuple of arguments.

    Raises:
        TypeError: ``model`` is not a Module. Whatever the forward raises, e.g. BackendError or InputError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain() takes a torch.nn.Module, got {type(model).__name__}")
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        model = model.module if hasattr(model, "module") else model._orig_mod  # type: ignore[assignment]
    names = {id(module): name for name, module in model.named_modules()}
    report = getattr(model, "fusion_report", None)
    why = _why_plain(model, report)
    explanation = Explanation(type(model).__name__, model.training)
    with torch.no_grad(), _unchanged(model), backends.recording(names) as recorder:
        plain: list[tuple[int, ExplanationRow]] = []  # with the number of recorded ops before it
        with _watching(model, lambda name, row: plain.append((len(recorder.rows), row)), why):
            model(*(x if isinstance(x, tuple) else (x,)))
    done = 0
    for before, row in [*plain, (len(recorder.rows), None)]:
        explanation.rows += [_row(*recorded) for recorded in recorder.rows[done:before]]
        done = before
        if row is not None:
            explanation.rows.append(row)
    explanation.remarks = _remarks(model, explanation, report)
    return explanation


def _row(layer: str, problem: backends.Problem, choice: backends.Choice) -> ExplanationRow:
    reasons = tuple(reason if reason.startswith(name) else f"{name}: {reason}" for name, reason in choice.refused)
    return ExplanationRow(layer, problem.op, problem.shape, problem.dtype, choice.backend, reasons + choice.notes)


def _remarks(model: nn.Module, explanation: Explanation, report: Any) -> list[str]:
    if explanation.fused:
        return []
    name = type(model).__name__
    if any(is_fastres_layer(m) for m in model.modules()):
        return [f"No layer ran fused: this {name} was built with fused=False. fastres.fuse(model) gives it fused."]
    if isinstance(report, FusionReport):
        return ["No layer ran fused; model.fusion_report says why."]
    return [f"No layer ran fused: {name} is an ordinary PyTorch network. fastres.fuse(model) gives a fused one."]


def _why_plain(model: nn.Module, report: Any) -> dict[str, str]:
    """Why a module runs by itself, by its path."""
    own = [(name, module) for name, module in model.named_modules() if is_fastres_layer(module) and not module.fused]
    inside = (f"{name}.{child}".lstrip(".") for name, module in own for child, _ in module.named_modules())
    why = dict.fromkeys(inside, "built with fused=False")
    if isinstance(report, FusionReport):
        why.update({n: row.reason for row in report.unfused for n in row.names})
    return why


@contextmanager
def _watching(model: nn.Module, found: Callable[[str, ExplanationRow], None], why: dict[str, str]) -> Iterator[None]:
    """Calls ``found`` for every convolution, BatchNorm, max-pool and linear module that runs by itself."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = next((v for v in inputs if isinstance(v, Tensor)), None)
            if first is not None:
                reasons = (why[name],) if name in why else ()
                op = type(module).__name__
                found(name, ExplanationRow(name, op, tuple(first.shape), first.dtype, PLAIN, reasons))

        return hook

    handles = [m.register_forward_pre_hook(hook_for(n)) for n, m in model.named_modules() if isinstance(m, _SHOWN)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers and random states back as they were; buffers nobody wrote to are not touched."""
    python_modules = (m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule))
    kept = [(module, dict(module._buffers)) for module in python_modules]
    values = {id(b): (b, b.clone()) for _, buffers in kept for b in buffers.values() if b is not None}
    devices = sorted({b.device.index or 0 for b, _ in values.values() if b.device.type == "cuda"})
    python = random.getstate()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            for module, buffers in kept:
                module._buffers.update(buffers)
            for buffer, before in values.values():
                if not torch.equal(buffer, before):
                    with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                        buffer.copy_(before)
