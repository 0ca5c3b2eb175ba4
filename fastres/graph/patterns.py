"""Recognises the pieces of a fusable layer in a graph, in all their spellings, or says why a piece is not one."""

import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastres.nn.functional import conv_arguments
from fastres.nn.statistics import BatchNorm, SyncBatchNorm2d

from .tracing import hooks_of

_RELU_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
_ACTIVATION_NAMES = {
    "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "selu", "celu", "mish", "sigmoid",
    "tanh", "prelu", "softplus", "hardtanh",
}  # fmt: skip


class Modules:
    """The modules a graph's nodes refer to."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._by_path = dict(root.named_modules(remove_duplicate=False))

    def of(self, node: fx.Node) -> nn.Module | None:
        """The module a call_module node calls; None for other nodes."""
        return self._by_path[node.target] if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """How a report calls the node: a module's path, or the operation and the module whose forward contains it."""
        if node.op == "call_module":
            return str(node.target)
        if node.op == "placeholder":
            return "the network's input"
        if node.op == "output":
            return "the network's output"
        what = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        layer = node.meta.get("layer")
        return f"{what} in {layer}" if layer else str(what)

    def kind(self, node: fx.Node) -> str:
        """What the node does, without saying where: a module's class or the operation."""
        module = self.of(node)
        if module is not None:
            return type(module).__name__
        return self.name(node).split(" in ")[0] if node.op.startswith("call_") else self.name(node)

    def is_identity(self, node: fx.Node) -> bool:
        module = self.of(node)
        return type(module) is nn.Identity and not hooks_of(module) and simple_input(node) is not None


def simple_input(node: fx.Node) -> fx.Node | None:
    """The only argument of a module call; None if there are others."""
    values = [*node.args, *(node.kwargs[k] for k in ("input", "x") if k in node.kwargs)]
    if len(values) == 1 and len(node.args) + len(node.kwargs) == 1 and isinstance(values[0], fx.Node):
        return values[0]
    return None


def _untouched(module: nn.Module) -> str | None:
    """Why the module must be called itself, whatever its class: hooks and computed weights."""
    kinds = hooks_of(module)
    if kinds:
        return f"{type(module).__name__} has a {kinds[0]}, which would not fire"
    if hasattr(module, "parametrizations"):
        return f"its {', '.join(module.parametrizations)} is parametrized"  # type: ignore[arg-type]
    return None


def conv_refusal(module: nn.Module, node: fx.Node) -> str | None:
    """Why a convolution can't be part of a fused layer, or None."""
    if not isinstance(module, nn.Conv2d):
        return f"{type(module).__name__} is not Conv2d"
    kind = type(module)
    if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind.__name__} computes in its own way"
    if simple_input(node) is None:
        return "it is called with more than one argument"
    try:
        conv_arguments(module)
    except ValueError as error:
        return str(error)
    return _untouched(module)


def _timm_bn_act() -> tuple[type, ...]:
    timm = sys.modules.get("timm.layers")
    return (timm.BatchNormAct2d, timm.SyncBatchNormAct) if timm else ()


def bn_refusal(module: nn.Module, node: fx.Node) -> str | None:
    """Why a BatchNorm can't be part of a fused layer, or None."""
    kind = type(module)
    plain = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d)
    if kind not in plain and kind not in _timm_bn_act():
        if not isinstance(module, plain):
            return kind.__name__
        if kind.forward not in [p.forward for p in plain]:
            return f"{kind.__name__} computes in its own way"
    if simple_input(node) is None:
        return "it is called with more than one argument"
    if kind in _timm_bn_act():
        drop, act = getattr(module, "drop", None), getattr(module, "act", None)
        if type(drop) not in (nn.Identity, type(None)):
            return f"{type(drop).__name__} inside {kind.__name__}"
        if type(act) not in (nn.ReLU, nn.Identity, type(None)):
            return f"activation is {type(act).__name__} inside {kind.__name__}"
        inner = [reason for m in (drop, act) if m is not None and (reason := _untouched(m))]
        if inner:
            return inner[0]
    return _untouched(module)


def bn_has_relu(module: nn.Module) -> bool:
    """timm's BatchNormAct2d with a ReLU of its own."""
    return type(module) in _timm_bn_act() and type(getattr(module, "act", None)) is nn.ReLU


def is_relu(node: fx.Node, modules: Modules) -> bool:
    """A ReLU in any spelling, with nothing but one tensor going in."""
    module = modules.of(node)
    if module is not None:
        return type(module) is nn.ReLU and _untouched(module) is None and simple_input(node) is not None
    known = (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )
    return known and isinstance(value_of(node, 0, "input"), fx.Node)


def is_add(node: fx.Node) -> bool:
    """An addition in any spelling, of two results of the graph."""
    known = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not known or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return False
    return len(node.args) + len(set(node.kwargs) - {"alpha"}) == 2 and None not in operands(node)


def operands(node: fx.Node) -> list[fx.Node | None]:
    """Both terms of an addition; None for one that is not a result of the graph."""
    values = (value_of(node, 0, "input"), value_of(node, 1, "other"))
    return [v if isinstance(v, fx.Node) else None for v in values]


def value_of(node: fx.Node, index: int, name: str) -> Any:
    """An argument by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def is_pool(node: fx.Node, modules: Modules) -> bool:
    """A max-pool the fused one can replace."""
    pool = modules.of(node)
    if type(pool) is not nn.MaxPool2d or _untouched(pool) or simple_input(node) is None:
        return False
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if not all(type(v) is int for v in sizes) or pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        return False
    return 1 <= pool.kernel_size <= 15 and 0 <= pool.padding <= pool.kernel_size // 2  # type: ignore[operator]


def activation_name(node: fx.Node, modules: Modules) -> str | None:
    """The name of an activation that is not a plain ReLU, else None."""
    module = modules.of(node)
    if module is not None:
        return type(module).__name__ if type(module).__module__.startswith(_ACTIVATIONS) else None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name) if node.op.startswith("call_") and str(name).rstrip("_") in _ACTIVATION_NAMES else None


def is_bn(module: nn.Module | None) -> bool:
    return isinstance(module, BatchNorm)
