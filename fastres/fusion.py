"""``fastres.fuse``: any conv-BatchNorm network, torchvision's, timm's or the user's own, as a fused one."""

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastres.errors import FusionError
from fastres.models.base import Network
from fastres.nn.blocks import ConvBNAct, ResidualBlock

from .graph.patterns import is_bn
from .graph.program import FusedNetwork, Program, fused_class
from .graph.report import FusionReport, FusionRow
from .graph.rewriting import Rewriter
from .graph.sharing import twin
from .graph.tracing import hooks_of, is_fastres_layer, trace

__all__ = ["FusedNetwork", "FusionReport", "FusionRow", "fuse"]

_WRAPPERS = {
    "DistributedDataParallel": "fuse first, then wrap: DistributedDataParallel(fastres.fuse(model))",
    "DataParallel": "fuse first, then wrap: DataParallel(fastres.fuse(model))",
    "FullyShardedDataParallel": "fuse first, then wrap",
    "OptimizedModule": "fuse first, then compile: torch.compile(fastres.fuse(model))",
}


def fuse(model: nn.Module, example: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """A fused network that shares the parameters and buffers of ``model``, which keeps working as it is.

    Every Conv2d-BatchNorm2d, also with ReLU, an addition and ReLU, or a max-pool behind it, becomes one fused layer
    where nobody else reads the values in between. Everything else runs as before. ``fused.fusion_report`` says what was
    fused, what was not, and why. Keys, order and identity of parameters and buffers are the original's; modes, hooks
    and ordinary attributes are separate.

    The forward is recorded once: replacing a submodule (``fused.fc = nn.Linear(…)``) takes effect, a changed forward or
    a hook set later on a fused layer or on a block does not. Where the forward itself asks for ``self.training``, the
    mode of the whole network decides.

    Args:
        model: of torchvision, timm, fastres (``fused=False``) or your own.
        example: an input, or a tuple of arguments, on which both networks are compared in evaluation mode.

    Raises:
        FusionError: not a network, wrapped or compiled, a forward that can't be traced, other results on ``example``.
    """
    _check(model)
    if isinstance(model, FusedNetwork):
        return model
    if isinstance(model, Network) and is_fastres_layer(model):
        return _own(model)
    fused = _trace_and_rewrite(model)
    if example is not None:
        _compare(model, fused, example if isinstance(example, tuple) else (example,))
    report = fused.fusion_report
    assert isinstance(report, FusionReport)
    lost = report.lost_hooks
    if lost:
        warnings.warn(
            f"fastres.fuse: the hooks of {', '.join(lost)} don't fire in the fused network; see fused.fusion_report",
            stacklevel=2,
        )
    return fused


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise FusionError(f"fuse() takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise FusionError("fuse() can't look into a ScriptModule; fuse the Python network it was made from")
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _WRAPPERS and type(module).__module__.startswith("torch."):
            raise FusionError(f"{name or 'the network'} is wrapped in {kind}: {_WRAPPERS[kind]}")
    lazy = [n for n, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise FusionError(f"{lazy[0]} has no shape yet: run the network once before fusing it")
    if "forward" in vars(model):
        name = type(model).__name__
        raise FusionError(f"the forward of this {name} was replaced on the instance; fuse it before that")


def _trace_and_rewrite(model: nn.Module) -> nn.Module:
    network = twin(model)
    if isinstance(network, fx.GraphModule):  # its class belongs to one instance and can't be imported
        base: type[nn.Module] = nn.Module
    else:
        base = type(model)
    for module in network.modules():
        if is_fastres_layer(module):
            module.fused = True  # type: ignore[assignment]
    graphs = [trace(network, training) for training in (True, False)]
    if Program.of(graphs[0][0]) == Program.of(graphs[1][0]):
        del graphs[1]
    report = FusionReport(type(model).__name__)
    for i, (graph, leaves) in enumerate(graphs):
        called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
        rewriter = Rewriter(graph, network)
        if i == 0:
            report.fused, report.unfused = rewriter.fused, rewriter.unfused
            _report_leaves(report, network, leaves, called)
            report.lost_hooks = _lost_hooks(network, called)
    if len(graphs) == 2:
        report.notes.append(
            "The forward differs between training and evaluation; the mode of the whole network decides. Layers are "
            "listed as in training."
        )
    programs = tuple(Program.of(graph) for graph, _ in graphs)
    cls = fused_class(base, programs)
    if base is nn.Module and type(network) is not nn.Module:
        blank = cls.__new__(cls)
        blank.__dict__ = {k: v for k, v in vars(network).items() if k in vars(nn.Module())}
        network = blank
    else:
        network.__class__ = cls
    network.fusion_report = report  # type: ignore[assignment]
    return network


def _inside(path: str, parents: set[str]) -> str | None:
    """The first of ``parents`` that contains the module ``path``."""
    parts = path.split(".")
    heads = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((head for head in heads if head in parents), None)


def _report_leaves(report: FusionReport, network: nn.Module, leaves: dict[str, str], called: set[str]) -> None:
    """Rows for fastres layers (which fuse themselves) and for BatchNorms the graph does not show."""
    for name, module in network.named_modules():
        parent = _inside(name, called)
        if name in called and is_fastres_layer(module):
            report.fused += own_rows(module, name)
        elif is_bn(module) and name not in called:
            if parent is None:
                report.unfused.append(FusionRow((name,), "bn", "not called in this forward"))
            elif not is_fastres_layer(network.get_submodule(parent)):
                kind = type(network.get_submodule(parent)).__name__
                reason = leaves.get(parent, f"{kind} is one of its library's units")
                report.unfused.append(FusionRow((name,), "bn", f"inside {parent}, which is kept whole: {reason}"))


def _lost_hooks(network: nn.Module, called: set[str]) -> list[str]:
    return [
        f"{name} ({', '.join(hooks_of(module))})"
        for name, module in network.named_modules()
        if name and hooks_of(module) and name not in called and _inside(name, called) is None
    ]


def own_rows(module: nn.Module, name: str = "") -> list[FusionRow]:
    """What a network, block or layer of fastres fuses by itself."""
    prefix = f"{name}." if name else ""
    rows = []
    if isinstance(module, ConvBNAct):
        rows.append(FusionRow((f"{prefix}conv", f"{prefix}bn"), "conv+bn+relu" if module.relu else "conv+bn"))
    elif isinstance(module, ResidualBlock):
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
        last = "conv+bn+relu" if module.shortcut == "none" else "conv+bn+add+relu"
        if isinstance(module.downsample, nn.Sequential):
            rows.append(FusionRow((f"{prefix}downsample.0", f"{prefix}downsample.1"), "conv+bn"))
        for conv, bn in pairs:
            rows.append(FusionRow((prefix + conv, prefix + bn), last if (conv, bn) == pairs[-1] else "conv+bn+relu"))
    elif isinstance(module, Network):
        pool = hasattr(module, "maxpool")
        stem = (f"{prefix}conv1", f"{prefix}bn1", *([f"{prefix}maxpool"] if pool else []))
        rows.append(FusionRow(stem, "conv+bn+relu+maxpool" if pool else "conv+bn+relu"))
        for child, block in module.named_modules():
            if isinstance(block, ResidualBlock):
                rows += own_rows(block, prefix + child)
    return rows


def _own(model: Network) -> nn.Module:
    """A fastres network fuses itself: a twin with ``fused`` set, or the network as it is when it is fused already."""
    report = FusionReport(type(model).__name__, own_rows(model))
    if all(m.fused for m in model.modules() if is_fastres_layer(m)):
        report.notes.append("This network of fastres was fused already: fuse() returned it as it is.")
        model.fusion_report = report  # type: ignore[assignment]
        return model
    fused = twin(model)
    for module in fused.modules():
        if is_fastres_layer(module):
            module.fused = True  # type: ignore[assignment]
    fused.fusion_report = report  # type: ignore[assignment]
    return fused


def _compare(model: nn.Module, fused: nn.Module, example: tuple[Any, ...]) -> None:
    """Raises FusionError unless both networks agree on ``example`` in evaluation mode."""
    theirs = twin(model).eval()
    modes = {m: m.training for m in fused.modules()}
    try:
        fused.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = theirs(*example)
            torch.manual_seed(0)
            got = fused(*example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    try:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    except (AssertionError, TypeError) as error:
        raise FusionError(
            f"the fused {type(model).__name__} gives other results than the original on the example, so its forward "
            f"does something a graph can't hold (a global that changes, a side effect …): {error}"
        ) from error
