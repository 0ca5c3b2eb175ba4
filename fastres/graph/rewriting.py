"""Finds the chains conv-BN(-add)(-ReLU)(-pool) of a graph and replaces each by one fused layer."""

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import fx, nn

from . import runtime
from .effects import Effects
from .patterns import (
    Modules,
    activation_name,
    bn_has_relu,
    bn_refusal,
    conv_refusal,
    is_add,
    is_bn,
    is_pool,
    is_relu,
    operands,
    simple_input,
)
from .report import FusionRow

_FUNCTIONAL = {
    F.conv2d: "conv2d() is a function: only nn.Conv2d modules are fused",
    F.batch_norm: "batch_norm() is a function: only nn.BatchNorm2d modules are fused",
}


@dataclass
class Chain:
    """One fused layer to be: ``nodes`` disappear, ``nodes[-1]`` is where its result is."""

    conv: fx.Node
    bn: fx.Node
    nodes: list[fx.Node]
    relu: bool = False
    add: fx.Node | None = None
    operand: int = 0  # which operand of the addition the chain is; the other is the residual
    pool: fx.Node | None = None
    parts: list[str] = field(default_factory=list)  # names of the modules, for the report

    @property
    def pattern(self) -> str:
        parts = ["conv", "bn", "add" * bool(self.add), "relu" * self.relu, "maxpool" * bool(self.pool)]
        return "+".join(p for p in parts if p)


class Rewriter:
    """Fuses ``graph`` in place; ``fused`` and ``unfused`` are the rows of the report."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.modules = graph, Modules(root)
        self.effects = Effects(graph, self.modules)
        self.fused: list[FusionRow] = []
        self.unfused: list[FusionRow] = []
        self._taken: set[fx.Node] = set()
        self._handled: set[fx.Node] = set()  # BatchNorm nodes that have a row
        chains = [chain for node in graph.nodes if (chain := self._chain(node))]
        self._report_rest()
        self._separate(chains)
        made = {chain.nodes[-1]: self._replace(chain) for chain in sorted(chains, key=self._end)}
        for chain in chains:
            self._finish(chain, made[chain.nodes[-1]])
        graph.lint()

    def _end(self, chain: Chain) -> int:
        return self.effects.position[chain.nodes[-1]]

    def _next(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """(the only reader of a value, the identities on the way to it); None if there are several or none."""
        skipped: list[fx.Node] = []
        while len(node.users) == 1:
            reader = next(iter(node.users))
            if not self.modules.is_identity(reader):
                return reader, skipped
            skipped.append(reader)
            node = reader
        return None, skipped

    def _readers(self, node: fx.Node) -> str:
        kinds = dict.fromkeys(self.modules.kind(user) for user in node.users)
        return " and ".join(kinds) if kinds else "nobody"

    def _row(self, nodes: list[fx.Node], pattern: str, reason: str) -> None:
        self.unfused.append(FusionRow(tuple(self.modules.name(n) for n in nodes), pattern, reason))

    def _chain(self, node: fx.Node) -> Chain | None:
        module = self.modules.of(node)
        if node.op == "call_function" and node.target in _FUNCTIONAL:
            self._row([node], str(node.target.__name__), _FUNCTIONAL[node.target])
        if not isinstance(module, nn.modules.conv._ConvNd):
            return None
        bn, skipped = self._next(node)
        norm = None if bn is None else self.modules.of(bn)
        if bn is None or norm is None or not is_bn(norm):
            if any(is_bn(self.modules.of(user)) for user in node.users):
                return None  # the BatchNorm's own row says why
            what = self._readers(node) if bn is None else self.modules.kind(bn)
            self._row([node], "conv", conv_refusal(module, node) or f"no BatchNorm follows, its result goes to {what}")
            return None
        self._handled.add(bn)
        reason = conv_refusal(module, node) or bn_refusal(norm, bn) or self._obstacle(node, bn, bn)
        if reason:
            self._row([node, bn], "conv+bn", reason)
            return None
        chain = Chain(node, bn, [node, *skipped, bn], relu=bn_has_relu(norm), parts=[str(node.target), str(bn.target)])
        self._extend(chain)
        self._taken.update(chain.nodes)
        self.fused.append(FusionRow(tuple(chain.parts), chain.pattern))
        return chain

    def _obstacle(self, conv: fx.Node, bn: fx.Node, end: fx.Node) -> str | None:
        """Why the convolution can't be computed only at ``end``: what lies between may change what it reads."""
        position = self.effects.position
        between = list(position)[position[conv] + 1 : position[end] + 1]
        for node in between:
            if self.effects.is_barrier(node):
                return f"{self.modules.name(node)} may change a tensor in place in between"
            if node is not bn and node.op == "call_module" and node.target == bn.target:
                return f"{bn.target} is called again in between"
        return None

    def _take(self, chain: Chain, skipped: list[fx.Node], node: fx.Node) -> None:
        chain.nodes += [*skipped, node]
        if node.op == "call_module":
            chain.parts.append(str(node.target))

    def _extend(self, chain: Chain) -> None:
        """Adds the addition, the ReLU and the pool that follow."""
        end, skipped = self._next(chain.bn)
        if end is not None and not chain.relu and is_add(end) and self._can_add(chain, skipped, end):
            chain.add = end
            chain.operand = operands(end).index(skipped[-1] if skipped else chain.bn)
            self._take(chain, skipped, end)
            end, skipped = self._next(end)
        if end is not None and not chain.relu and is_relu(end, self.modules) and self._free(chain, end):
            chain.relu = True
            self._take(chain, skipped, end)
            end, skipped = self._next(end)
        if end is None:
            return
        if is_pool(end, self.modules) and chain.add is None:
            chain.pool = end
            chain.parts.append(str(end.target))
        name = None if chain.relu else activation_name(end, self.modules)
        if name:
            self._row([end], name, f"activation is {name}: stays behind {chain.pattern} of {chain.bn.target}")

    def _free(self, chain: Chain, node: fx.Node) -> bool:
        fixed = node in self.effects.targets and not self.effects.is_free(node)
        return not fixed and self._obstacle(chain.conv, chain.bn, node) is None

    def _can_add(self, chain: Chain, skipped: list[fx.Node], node: fx.Node) -> bool:
        terms = operands(node)
        return node not in self._taken and terms[0] is not terms[1] and self._free(chain, node)

    def _report_rest(self) -> None:
        """A row for every BatchNorm that follows no convolution."""
        for node in self.graph.nodes:
            module = self.modules.of(node)
            if module is None or not is_bn(module) or node in self._handled:
                continue
            source = simple_input(node)
            origin = None if source is None else self.modules.of(source)
            reason = bn_refusal(module, node)
            if source is not None and isinstance(origin, nn.modules.conv._ConvNd):
                text = f"the convolution's result goes to {len(source.users)} places: {self._readers(source)}"
                self._row([source, node], "conv+bn", conv_refusal(origin, source) or reason or text)
                continue
            came = "several values" if source is None else self.modules.kind(source)
            text = f"leading pre-activation BatchNorm: not preceded by a convolution but by {came}"
            self._row([node], "bn", reason or text)

    def _separate(self, chains: list[Chain]) -> None:
        """Makes in-place operations pure where a fused layer reads, later than the original, what they overwrite."""
        for node in self.effects.targets:
            if node in self._taken or not self.effects.is_free(node):
                continue
            for chain in chains:
                inside = self.effects.position[chain.conv] < self.effects.position[node] < self._end(chain)
                residual = None if chain.add is None else operands(chain.add)[1 - chain.operand]
                if inside or (residual is not None and self.effects.may_share(residual, node)):
                    self.effects.make_pure(node)
                    break

    def _replace(self, chain: Chain) -> fx.Node:
        end = chain.nodes[-1]
        source = simple_input(chain.conv)
        residual = None if chain.add is None else operands(chain.add)[1 - chain.operand]
        with self.graph.inserting_before(end):
            conv, bn = self.graph.get_attr(str(chain.conv.target)), self.graph.get_attr(str(chain.bn.target))
            if chain.add is None:
                new = self.graph.call_function(runtime.conv_bn_act, (source, conv, bn, chain.relu))
            else:
                new = self.graph.call_function(runtime.conv_bn_add_act, (source, conv, bn, chain.relu, residual))
        new.meta["layer"] = chain.bn.meta.get("layer")
        end.replace_all_uses_with(new)
        for node in reversed(chain.nodes):
            self.graph.erase_node(node)
        return new

    def _finish(self, chain: Chain, new: fx.Node) -> None:
        """Puts the fused pool in place, and an ordinary tensor where the reader can't take a pending activation."""
        if chain.pool is not None:
            with self.graph.inserting_before(chain.pool):
                pool = self.graph.call_function(runtime.fused_pool, (new, self.graph.get_attr(str(chain.pool.target))))
            chain.pool.replace_all_uses_with(pool)
            self.graph.erase_node(chain.pool)
        readers = list(new.users)
        fused = (runtime.conv_bn_act, runtime.conv_bn_add_act, runtime.fused_pool)
        once = len(readers) == 1 and readers[0].target in fused and [*readers[0].args].count(new) == 1
        if chain.add is None and not once and readers:
            with self.graph.inserting_after(new):
                whole = self.graph.call_function(runtime.materialize, (new,))
            new.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
