"""Which in-place operations of a graph may be moved, replaced or absorbed, and which may not.

An in-place operation is *free* when nobody reads what it overwrites afterwards: then it equals its out-of-place form.
Reads of the very same tensor are first redirected to the operation's result. What remains (views read later, the
caller's input, writes to slices, unknown functions) is *fixed*: it stays where it is, and no layer is fused across it.
"""

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .patterns import Modules, is_bn
from .tracing import IN_PLACE_OPERATORS, is_fastres_layer

_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu, F.relu_: torch.relu,
}  # fmt: skip
_IN_PLACE_NAMES = {"setitem", *IN_PLACE_OPERATORS}
_METHODS = ("relu_", "add_", "sub_", "mul_", "div_", "clamp_", "clamp_min_", "sigmoid_", "tanh_")
# Results that never share memory with an argument; anything else might.
_FRESH_FUNCTIONS = {
    *_OPERATORS.values(), torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.matmul,
    F.conv2d, F.linear, F.batch_norm, F.max_pool2d, F.avg_pool2d, F.silu, F.gelu, F.relu6, torch.sigmoid,
}  # fmt: skip
_FRESH_METHODS = {m.rstrip("_") for m in _METHODS} | {"clone", "mean", "sum", "size", "dim"}
_FRESH_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.ReLU, nn.ReLU6,
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid,
)  # fmt: skip
_PURE_ORIGINS = ("torch", "_operator", "operator", "math", "builtins")


class Effects:
    """The in-place operations of ``graph``; redirects reads on construction."""

    def __init__(self, graph: fx.Graph, modules: Modules) -> None:
        self.modules = modules
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[fx.Node, fx.Node] = {}
        for node in self._find_numbers(
            graph
        ):  # numbers can't be changed in place, but the generated code would rename them
            name = getattr(node.target, "__name__", "")
            if node.op == "call_function" and name in IN_PLACE_OPERATORS:
                node.target = getattr(operator, f"__{name[1:]}__")
        self.targets = {node: t for node in graph.nodes if (t := self._target(node)) is not None}
        for node in graph.nodes:
            if not self._is_fresh(node):
                sources = [self.targets[node]] if node in self.targets else node.all_input_nodes
                for source in sources:
                    self._parent[self._class(node)] = self._class(source)
        self._fixed: set[fx.Node] = set()
        for node in self.targets:
            if not self._is_free(node):
                self._fixed.add(node)
        # A module is in place everywhere or nowhere.
        shared = {self.modules.of(node) for node in self._fixed} - {None}
        self._fixed |= {node for node in self.targets if self.modules.of(node) in shared}

    @staticmethod
    def _find_numbers(graph: fx.Graph) -> set[fx.Node]:
        """Sizes and what is computed from them: ``n += 1`` changes no tensor."""
        numbers: set[fx.Node] = set()
        attributes = ("shape", "ndim", "dtype", "device")
        for node in graph.nodes:
            is_size = (node.op == "call_method" and node.target in ("size", "dim", "numel", "item")) or (
                node.op == "call_function" and node.target is getattr and node.args[1] in attributes
            )
            inputs = node.all_input_nodes
            computed = node.op == "call_function" and bool(inputs) and all(n in numbers for n in inputs)
            if is_size or (computed and getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")):
                numbers.add(node)
        return numbers

    def _class(self, node: fx.Node) -> fx.Node:
        """Representative of the nodes that may share memory with ``node``."""
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node

    def _target(self, node: fx.Node) -> fx.Node | None:
        """The value an in-place operation overwrites; None for other nodes."""
        first = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(first, fx.Node) or not self._writes(node):
            return None
        return first

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return getattr(self.modules.of(node), "inplace", False) is True
        if node.op == "call_method":
            name = str(node.target)
            return name in ("__iadd__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if node.op != "call_function":
            return False
        name = getattr(node.target, "__name__", "")
        if node.target in _OPERATORS or name in _IN_PLACE_NAMES or (name.endswith("_") and not name.endswith("__")):
            return True
        return _inplace_argument(node)

    def _is_fresh(self, node: fx.Node) -> bool:
        if node in self.targets:
            return False
        if node.op == "call_module":
            return isinstance(self.modules.of(node), _FRESH_MODULES)
        if node.op == "call_function":
            return node.target in _FRESH_FUNCTIONS or node.target in (torch.relu, F.relu)
        return node.op != "call_method" or node.target in _FRESH_METHODS

    def _is_free(self, node: fx.Node) -> bool:
        """Redirects later reads of the very tensor, then looks for other ways to see the change."""
        if node.target in (operator.setitem, "__setitem__"):
            return False  # and returns nothing that reads could be redirected to
        here, target = self.position[node], self.targets[node]
        same = {target}
        while target in self.targets or self.modules.is_identity(target):
            target = self.targets.get(target, target.all_input_nodes[0])
            same.add(target)
        for alias in same:
            for user in list(alias.users):
                if self.position[user] > here:
                    user.replace_input_with(alias, node)
        if self._replacement(node) is None:
            return False
        for other, position in self.position.items():
            if position >= here or self._class(other) is not self._class(node):
                continue
            if other.op in ("placeholder", "get_attr"):
                return False
            if any(self.position[user] > here for user in other.users):
                return False
        return True

    def _replacement(self, node: fx.Node) -> Any:
        """What :meth:`make_pure` changes the node to; None if it has no out-of-place form."""
        if node.op == "call_module":
            module = self.modules.of(node)
            return module if type(module).__module__.startswith("torch.nn.") else None
        if node.op == "call_method":
            if node.target == "__iadd__":
                return "add"
            return str(node.target)[:-1] if node.target in _METHODS else None
        if node.target in _OPERATORS:
            return _OPERATORS[node.target]
        of_torch = getattr(node.target, "__module__", "").startswith("torch")
        return node.target if of_torch and _inplace_argument(node) else None

    def is_free(self, node: fx.Node) -> bool:
        return node in self.targets and node not in self._fixed

    def is_barrier(self, node: fx.Node) -> bool:
        """Whether reads must not be moved across the node: it may overwrite something."""
        if node in self.targets:
            return node in self._fixed
        if node.op == "call_module":
            module = self.modules.of(node)
            assert module is not None
            if is_fastres_layer(module) or is_bn(module):
                return False
            own = type(module).__module__.startswith("torch.nn.")
            return isinstance(module, torch.jit.ScriptModule) or (
                not own and any(getattr(m, "inplace", False) for m in module.modules())
            )
        if node.op == "call_function":
            origin = getattr(node.target, "__module__", None) or "torch"
            return "out" in node.kwargs or origin.split(".")[0] not in _PURE_ORIGINS
        return False

    def may_share(self, a: fx.Node, b: fx.Node) -> bool:
        return self._class(a) is self._class(b)

    def make_pure(self, node: fx.Node) -> None:
        """Turns a free in-place operation into its out-of-place form."""
        replacement = self._replacement(node)
        if node.op == "call_module":
            replacement.inplace = False
        elif node.op == "call_function" and _inplace_argument(node):
            _clear_inplace(node)
        else:
            node.target = replacement


def _bound(node: fx.Node) -> inspect.BoundArguments | None:
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # builtins have no signature
        return None


def _inplace_argument(node: fx.Node) -> bool:
    bound = _bound(node)
    return bound is not None and bound.arguments.get("inplace") is True


def _clear_inplace(node: fx.Node) -> None:
    bound = _bound(node)
    assert bound is not None
    bound.arguments["inplace"] = False
    node.args, node.kwargs = bound.args, bound.kwargs
