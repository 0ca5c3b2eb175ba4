"""From a fused graph to a native plan."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastres import tuning
from fastres.errors import CompileError

from .folding import Layer, folded, layer_key, native, norm_of
from .graph import Constant, Graph, Node, Value


@dataclass(frozen=True)
class Options:
    """How plans are made; None leaves the choice to the library."""

    depth_first_bytes: int | None = None
    images_per_turn: int = 1
    arena_limit: int | None = None
    kernels: tuple[tuple[str, str], ...] = ()
    dtype: torch.dtype | None = None

    def native(self) -> dict[str, int]:
        found = {"images_per_turn": self.images_per_turn, "arena_limit": self.arena_limit or 0}
        if self.depth_first_bytes is not None:
            found["depth_first_bytes"] = self.depth_first_bytes
        return found


@dataclass
class Built:
    """A native plan, and the shape of what it gives for one image: a map, then flattened to a vector if ``flat``."""

    plan: Any
    images: int
    output: tuple[int, ...]
    flat: bool
    layers: set[Any]  # keys of the layers it uses
    dtype: torch.dtype
    problems: dict[
        str, tuple[str, tuple[str, ...]]
    ]  # of each convolution: what tuning calls it, the kernels that serve it


class Builder:
    """Adds the nodes of a graph to a native plan, one by one."""

    def __init__(
        self, graph: Graph, images: int, dtype: torch.dtype, options: Options, layers: dict[Any, Layer]
    ) -> None:
        self.graph, self.images, self.options, self.layers = graph, images, options, layers
        self.dtype, self.bfloat16 = dtype, dtype == torch.bfloat16
        channels, height, width = graph.input.shape
        self.plan = native().Plan(self.bfloat16, images, channels, height, width, **options.native())
        self.ids: dict[Value, int] = {graph.input: 0}
        self.flat: dict[Value, tuple[int, ...]] = {}  # vectors that lie in the order H, W, C: their map's shape
        self.memo: dict[Constant, Tensor] = {}
        self.used: set[Any] = set()
        self.problems: dict[str, tuple[str, tuple[str, ...]]] = {}
        self.kernels = dict(options.kernels)

    def build(self) -> Built:
        for node in self.graph.nodes:
            if node.op not in ("flat", "linear") and any(value in self.flat for value in node.reads):
                raise CompileError(
                    f"{_where(node)}: {node.op} works on a flattened map; a plan can do that in a linear layer only"
                )
            try:
                self.ids[node.output] = getattr(self, f"add_{node.op}")(node)
            except (RuntimeError, ValueError) as error:
                if isinstance(error, CompileError):
                    raise
                raise CompileError(f"{_where(node)} can't be a step of a plan: {error}") from error
            self.memo.clear()  # of the layer: weights of a whole network in float64 are large
        unknown = sorted(set(self.kernels) - {node.name for node in self.graph.nodes})
        if unknown:
            raise CompileError(f"kernels= names {unknown[0]!r}, but no convolution of the network is called so")
        output = self.graph.output
        self.plan.finish(self.ids[output])
        shape = self.flat.get(output, output.shape)
        return Built(self.plan, self.images, shape, output in self.flat, self.used, self.dtype, self.problems)

    def add_conv(self, node: Node) -> int:
        return self._convolution(node, node.inputs[0].shape, node.output.shape, None)

    def add_linear(self, node: Node) -> int:
        x = node.inputs[0]
        return self._convolution(node, (x.shape[0], 1, 1), (node.output.shape[0], 1, 1), self.flat.get(x))

    def _convolution(self, node: Node, x: Any, y: Any, flat: tuple[int, ...] | None) -> int:
        linear, facts = node.op == "linear", node.facts
        key = layer_key(node, flat)
        weight = None
        if key not in self.layers:
            weight, bias = folded(node, flat, self.memo)
            self.layers[key] = Layer(bias)
        layer = self.layers[key]
        kernel_size = (1, 1) if linear else self._kernel_size(node)
        shape = native().ConvShape(
            (x[1], x[2], x[0]), (y[1], y[2], y[0]), kernel_size, facts.get("stride", (1, 1)),
            facts.get("padding", (0, 0)), facts.get("dilation", (1, 1)), facts.get("groups", 1),
        )  # fmt: skip
        residual = -1 if node.residual is None else self.ids[node.residual]
        problem = tuning.key(
            "plan", torch.bfloat16 if self.bfloat16 else torch.float32, (self.images, *x), (y[0], *kernel_size),
            facts.get("stride", (1, 1)), facts.get("padding", (0, 0)), facts.get("dilation", (1, 1)),
            facts.get("groups", 1),
        )  # fmt: skip
        serving = self._serving(shape, linear, node.relu, residual >= 0)
        self.problems[node.name] = (problem, serving)
        measured = tuning.choice(problem)
        wanted = self.kernels.get(node.name) or (measured if measured in serving else "")
        kernel = self.plan.kernel_for(shape, linear, node.relu, residual >= 0, wanted)
        if kernel not in layer.packed:
            if weight is None:
                weight, _ = folded(node, flat, self.memo)
            layer.packed[kernel] = native().PackedWeights(kernel, shape, self.bfloat16, weight.data_ptr())
        self.used.add((key, kernel))
        return self.plan.add_conv(
            node.name, self.ids[node.inputs[0]], shape, linear, node.relu, residual, layer.packed[kernel],
            layer.bias.data_ptr(),
        )  # fmt: skip

    def _serving(self, shape: Any, linear: bool, relu: bool, residual: bool) -> tuple[str, ...]:
        """The kernels that serve a convolution."""
        found = []
        for name in native().conv_kernels():
            with contextlib.suppress(RuntimeError):  # the kernel's refusal
                found.append(self.plan.kernel_for(shape, linear, relu, residual, name))
        return tuple(found)

    def _kernel_size(self, node: Node) -> tuple[int, int]:
        shape = node.facts["weight"].evaluate(self.memo).shape
        return (shape[2], shape[3])

    def add_norm(self, node: Node) -> int:
        vectors = [v.float().contiguous() for v in norm_of(node.facts["norm"], self.memo)]
        residual = -1 if node.residual is None else self.ids[node.residual]
        addresses = [v.data_ptr() for v in vectors]
        return self.plan.add_scale_shift(node.name, self.ids[node.inputs[0]], residual, node.relu, *addresses)

    def add_add(self, node: Node) -> int:
        a, b = (self.ids[value] for value in node.inputs)
        return self.plan.add_scale_shift(_named(node, "add"), a, b, node.relu)

    def add_relu(self, node: Node) -> int:
        return self.plan.add_scale_shift(_named(node, "relu"), self.ids[node.inputs[0]], -1, True)

    def add_max_pool(self, node: Node) -> int:
        return self._pool(node, False)

    def add_mean_pool(self, node: Node) -> int:
        return self._pool(node, True)

    def _pool(self, node: Node, mean: bool) -> int:
        f = node.facts
        return self.plan.add_pool(
            _named(node, node.op), self.ids[node.inputs[0]], mean, node.output.shape[1:], f["kernel"], f["stride"],
            f["padding"], f.get("dilation", (1, 1)), f.get("divisor", 0), f.get("count_padding", True),
        )  # fmt: skip

    def add_adaptive_mean(self, node: Node) -> int:
        size = node.output.shape[1:] if len(node.output.shape) == 3 else (1, 1)
        return self.plan.add_adaptive_mean(_named(node, "mean_pool"), self.ids[node.inputs[0]], size)

    def add_place(self, node: Node) -> int:
        first, (_, *stride) = node.facts["first"], node.facts["stride"]
        return self.plan.add_place(_named(node, "place"), self.ids[node.inputs[0]], node.output.shape, first, stride)

    def add_flat(self, node: Node) -> int:
        x = node.inputs[0]
        order = self.flat.get(x, x.shape)
        if len(order) == 3 and math.prod(order[1:]) > 1:
            self.flat[node.output] = order
        return self.plan.add_flat(self.ids[x])


def _named(node: Node, kind: str) -> str:
    return node.name if node.name.rpartition(".")[2].startswith(kind) else f"{node.name}.{kind}".lstrip(".")


def _where(node: Node) -> str:
    return f"layer {node.name!r}" if node.name else "the network's own forward"
