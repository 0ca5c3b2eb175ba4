"""Runs a network once and records what it computes, as PyTorch's dispatcher sees it.

Whatever Python code the network has, in the end it calls operators on tensors. Those on tensors that depend on the input
become nodes; those on parameters and buffers only become constants, to be computed when a plan is built. In-place
operations give new values, and whoever reads an old one through a view is noticed.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fastres.errors import CompileError
from fastres.nn import folding

from .graph import Constant, Graph, Node, Value, leaves_in

Handler = Callable[["Recorder", "Call"], Value]


class Call:
    """One operator call: its arguments with values and constants in place of tensors, and its result."""

    def __init__(self, name: str, arguments: dict[str, Any], result: Tensor) -> None:
        self.name, self.arguments, self.result = name, arguments, result

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def value(self, name: str) -> Value:
        given = self.arguments.get(name)
        if not isinstance(given, Value):
            raise Unsupported(f"its {name} does not depend on the input")
        return given

    def constant(self, name: str) -> Constant | None:
        given = self.arguments.get(name)
        if given is not None and not isinstance(given, Constant):
            raise Unsupported(f"its {name} depends on the input")
        return given


class Unsupported(Exception):
    """Why an operator can't be a step of a plan."""


class Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.labels = {id(t): name for name, t in tensors}
        self.images, self.dtype = x.shape[0], x.dtype
        self.nodes: list[Node] = []
        self.input = Value(tuple(x.shape[1:]))
        self._values = WeakIdKeyDictionary()  # of tensors that depend on the input
        self._constants = WeakIdKeyDictionary()
        self._values[x] = self.input
        self._input_storage = x.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        names = [argument.name for argument in schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        depends = any(t in self._values for t in leaves_in(arguments, Tensor))
        # Before it runs: an in-place operation changes what its arguments are.
        known = {name: self._known(value) for name, value in arguments.items()}
        result = func(*args, **kwargs)
        outputs = [result] if isinstance(result, Tensor) else list(leaves_in(result, Tensor))
        changed = [
            arguments[a.name]
            for a in schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and isinstance(arguments.get(a.name), Tensor)
        ]
        if not depends:
            self._constant(func, args, kwargs, outputs, isinstance(result, Tensor), changed)
            return result
        op = str(func).removesuffix(".default")
        try:
            value = self._node(op, Call(op, known, outputs[0] if outputs else None))  # type: ignore[arg-type]
        except Unsupported as reason:
            raise CompileError(
                f"{self.where()} computes {op}(), which an inference plan can't: {reason}. Compile the part of the "
                "network before it, or call the network itself."
            ) from None
        for tensor in changed:
            self._overwritten(tensor, value)
        for i, tensor in enumerate(outputs):
            self._values[tensor] = value if i == 0 else Value((), f"the second result of {op}()")
        return result

    def _node(self, op: str, call: Call) -> Value:
        from .operators import HANDLERS, handler_of

        handler = HANDLERS.get(op) or handler_of(op)
        if handler is None:
            raise Unsupported("it knows no such step")
        if not isinstance(call.result, Tensor) or call.result.dtype != self.dtype:
            raise Unsupported("its result is not a tensor of the network's dtype")
        if call.result.dim() not in (2, 4) or call.result.shape[0] != self.images:
            raise Unsupported(
                f"its result has the shape {list(call.result.shape)}: no [N, C, H, W] or [N, F] of images"
            )
        for value in call.arguments.values():
            if isinstance(value, Value) and value.spoiled is not None:
                raise Unsupported(f"it reads {value.spoiled}")
        return handler(self, call)

    def add(self, op: str, call: Call, *inputs: Value, name: str = "", **facts: Any) -> Value:
        """A new node and its result."""
        output = Value(tuple(call.result.shape[1:]))
        self.nodes.append(Node(op, name or self.module(), list(inputs), output, facts))
        return output

    def layer_of(self, weight: Constant) -> str:
        """The layer that a parameter belongs to."""
        labels = [leaf.label for leaf in weight.leaves() if leaf.label]
        return labels[0].rpartition(".")[0] if labels else self.module()

    def module(self) -> str:
        """The innermost module whose forward is running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name in ("forward", "_call_impl"):
                owner = frame.f_locals.get("self")
                if id(owner) in self.names and isinstance(owner, nn.Module):
                    return self.names[id(owner)]
            frame = frame.f_back
        return ""

    def where(self) -> str:
        name = self.module()
        return f"layer {name!r}" if name else "the network's own forward"

    # ---- tensors ----
    def _known(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value in self._values:
                return self._values[value]
            return self._leaf(value)
        if isinstance(value, list | tuple):
            return type(value)(self._known(item) for item in value)
        return value

    def _leaf(self, tensor: Tensor) -> Constant:
        if tensor not in self._constants:
            self._constants[tensor] = Constant(self.labels.get(id(tensor), ""), leaf=tensor)
        return self._constants[tensor]

    def _constant(
        self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor], single: bool, changed: list[Tensor]
    ) -> None:
        if any(t.numel() for t in changed):
            raise CompileError(
                f"{self.where()} changes a parameter, a buffer or another constant in place ({func}); a plan would not"
            )
        random = torch.Tag.nondeterministic_seeded in func.tags
        known_args, known_kwargs = self._known(list(args)), {k: self._known(v) for k, v in kwargs.items()}
        for i, tensor in enumerate(outputs):
            if random:
                self._values[tensor] = Value((), f"random numbers ({func})")
            elif tensor not in self._constants:
                call = (func, known_args, known_kwargs, None if single else i)
                self._constants[tensor] = Constant("", call=call)

    def _overwritten(self, tensor: Tensor, value: Value) -> None:
        """``tensor`` holds ``value`` now, and so does every other name of the same memory; views of parts are lost."""
        storage = tensor.untyped_storage()._cdata
        if storage == self._input_storage:
            raise CompileError(f"{self.where()} changes the network's input in place; a plan would not")
        for other in list(self._values.keys()):
            if other is tensor or other.untyped_storage()._cdata != storage:
                continue
            same = (other.shape, other.stride(), other.storage_offset())
            if same == (tensor.shape, tensor.stride(), tensor.storage_offset()):
                self._values[other] = value
            else:
                self._values[other] = Value((), "a view of memory that was changed since")
        self._values[tensor] = value


def record(model: nn.Module, x: Tensor) -> tuple[Graph, Tensor]:
    """(what ``model`` computes of ``x``, and the result).

    Raises:
        CompileError: something that no plan can do. Whatever the forward itself raises.
    """
    for module in model.modules():
        folding._folds.pop(module, None)  # folded weights must be computed where they are seen
    with torch.inference_mode(False), torch.no_grad():
        x = x.detach().clone()
        recorder = Recorder(model, x)
        with recorder:
            result = model.forward(x)  # the network's own hooks are no part of what is recorded
    if not isinstance(result, Tensor):
        raise CompileError(f"{type(model).__name__} gives a {type(result).__name__}; a plan gives one tensor")
    output = recorder._values.get(result)
    if output is None or output.spoiled is not None:
        raise CompileError(f"the result of {type(model).__name__} is not computed from its input alone")
    return Graph(recorder.input, output, recorder.nodes), result
