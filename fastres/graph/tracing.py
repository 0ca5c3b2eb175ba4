"""Records a network's forward as a torch.fx graph, and refuses what such a graph would get wrong.

Python control flow on tensors, random numbers drawn in Python, tensors computed without the input and changed autograd
or autocast modes would all be frozen into the graph. A submodule that does any of this is called as a whole instead (a
leaf), with the reason in ``leaves``; only when the network's own forward does it can nothing be done.
"""

import inspect
import operator
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from fastres.errors import FusionError
from fastres.nn.statistics import BatchNorm

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
IN_PLACE_OPERATORS = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul",
)  # fmt: skip
_TORCH_LEAVES = ("torch.nn.", "torch.ao.nn.", "torch._dynamo.")
_LIBRARIES = ("torchvision.", "timm.")
# Allowed on tensors that don't depend on the input: they compute nothing.
_HARMLESS = {"__get__", "size", "dim", "ndimension", "numel", "__len__", "is_floating_point", "is_complex", "_assert"}
_HARMLESS |= {"_set_grad_enabled"}  # create_node sees what it changes


class Untraceable(Exception):
    """Why a forward can't be a graph."""


def hooks_of(module: nn.Module) -> list[str]:
    """Kinds of the forward and backward hooks of ``module``, such as "forward hook"."""
    return [name.strip("_").removesuffix("s").replace("_", " ") for name in HOOKS if getattr(module, name, None)]


def is_fastres_layer(module: nn.Module) -> bool:
    """A module of this package that fuses itself when its ``fused`` is set."""
    return type(module).__module__.startswith("fastres.") and isinstance(getattr(module, "fused", None), bool)


class _NoConstants(TorchFunctionMode):
    """Refuses tensor operations that the graph would not contain, because no argument is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        traced = any(isinstance(value, fx.Proxy) for value in _leaves_of((args, kwargs)))
        if not traced and name not in _HARMLESS:
            raise Untraceable(f"it computes {name}() from nothing that depends on the input")
        return func(*args, **kwargs)


def _leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves_of(item)
    elif isinstance(value, dict):
        yield from _leaves_of(list(value.values()))
    else:
        yield value


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
    )  # fmt: skip


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state(legacy=False)["state"] if numpy else {}
    return (random.getstate(), state.get("pos"), bytes(state.get("key", b"")))


# Modules and functions that give one tensor, whatever else a module might return.
_ONE_TENSOR = (
    nn.modules.conv._ConvNd, BatchNorm, nn.Linear, nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.GroupNorm,
)  # fmt: skip
_ONE_TENSOR_FUNCTIONS = (torch.cat, torch.relu, torch.flatten, nn.functional.relu)
_ARITHMETIC = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul)


class _Proxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y`` as the in-place operations they are; torch.fx alone would record ``x + y``.

    Answers type checks in the network's code as the tensor would, or refuses them where it may not be a tensor.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance() asks for it when the type itself does not match
        code = sys._getframe(1).f_code
        if _internal(code.co_filename) and code.co_name != "is_tensor":
            return _Proxy
        if _is_tensor(self.node, self.tracer.root):  # type: ignore[attr-defined]
            return torch.Tensor
        raise Untraceable("it checks the type of a value")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


def _is_tensor(node: fx.Node, root: nn.Module) -> bool:
    """Whether the value is known to be one tensor."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _ONE_TENSOR)
    if node.op != "call_function":
        return False
    arithmetic = node.target in _ARITHMETIC and any(_is_tensor(n, root) for n in node.all_input_nodes)
    return arithmetic or node.target in _ONE_TENSOR_FUNCTIONS


class Tracer(fx.Tracer):
    """``leaves`` maps the path of each module that had to be kept whole to the reason."""

    def __init__(self) -> None:
        timm = sys.modules.get("timm.layers")
        functions = tuple(f for f in timm.get_notrace_functions() if callable(f)) if timm else ()
        super().__init__(autowrap_functions=functions)
        self.proxy_buffer_attributes = True
        self.leaves: dict[str, str] = {}
        self._no_trace = tuple(timm.get_notrace_modules()) if timm else ()
        self._layers = [""]
        self._modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """PyTorch's layers, our own, and library modules that hide nothing to fuse."""
        origin = f"{type(m).__module__}."
        # Also the user's own subclasses of convolution and BatchNorm: the report names them.
        units = (nn.modules.conv._ConvNd, BatchNorm, torch.jit.ScriptModule)
        if isinstance(m, units) or is_fastres_layer(m) or type(m) in self._no_trace:
            return True
        if origin.startswith(_TORCH_LEAVES):
            return not isinstance(m, nn.Sequential | fx.GraphModule)
        if not origin.startswith(_LIBRARIES) or isinstance(m, nn.Sequential):
            return False
        inside_timm = origin.startswith("timm.layers.") and not any(isinstance(c, BatchNorm) for c in m.modules())
        return inside_timm or not any(m.children())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # Without PyTorch's cache: a proxy made in a part that is given up must not be used again.
        return super().getattr(attr, attr_val, {})

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise Untraceable("it switches autograd or autocast inside its forward")
        node = super().create_node(*args, **kwargs)
        node.meta["layer"] = self._layers[-1]
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if path in self.leaves or self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        state = _random_state()
        self._layers.append(path)
        try:
            result = forward(*args, **kwargs)
            if _random_state() != state:
                raise Untraceable("it draws random numbers in Python")
            return result
        except Exception as error:
            self.leaves[path] = explain(error)
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
        finally:
            self._layers.pop()
        return self.create_proxy("call_module", path, args, kwargs)


def explain(error: BaseException) -> str:
    """What went wrong and in which line of the network's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _internal(f.filename)]
    text = str(error).strip().split("\n")[0]
    if isinstance(error, fx.proxy.TraceError):
        text = "Python control flow that depends on a tensor"
    if not frames:
        return text
    return f"{text}, at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


def _internal(filename: str) -> bool:
    torch_folder = str(Path(torch.__file__).parent)
    return filename.startswith((torch_folder, str(Path(__file__).parent), "<"))


@contextmanager
def _bare(root: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode and without hooks, which tracing would call with proxies."""
    kept = []
    for module in root.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        kept.append((module, {k: vars(module)[k] for k in ("training", *HOOKS, *_HOOK_OPTIONS) if k in vars(module)}))
        for name in HOOKS:
            vars(module)[name] = type(vars(module)[name])()
        module.training = training
    try:
        yield
    finally:
        for module, state in kept:
            vars(module).update(state)


def trace(root: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, str]]:
    """(graph of ``root``'s forward in the given mode, modules that had to be kept whole with the reason).

    Arguments with a default value are taken to have that value; the fused network checks that.

    Raises:
        FusionError: the network's own forward can't be a graph.
    """
    name = type(root).__name__
    forward = type(root).forward
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    tracer, state = Tracer(), _random_state()
    try:
        with _bare(root, training), _NoConstants():
            graph = tracer.trace(root, concrete_args=defaults or None)
        if _random_state() != state:
            raise Untraceable("it draws random numbers in Python")
    except Exception as error:
        raise FusionError(
            f"{name} can't be fused as a whole: its forward can't be traced ({explain(error)}). Fuse the parts without "
            "such code, e.g. model.backbone = fastres.fuse(model.backbone), or move that code into a submodule."
        ) from error
    for node, parameter in zip((n for n in graph.nodes if n.op == "placeholder"), parameters, strict=False):
        if parameter.name in defaults:
            node.target = parameter.name
    return graph, tracer.leaves
