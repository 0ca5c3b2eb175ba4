"""Joins nodes that one step of a plan can do: BatchNorm, addition and ReLU into the convolution before them."""

from .graph import Graph, Node, Value

_TAKES_NORM = ("conv", "linear")
_TAKES_ADD = ("conv", "norm", "add")
_TAKES_RELU = ("conv", "linear", "norm", "add", "relu")


def fuse_steps(graph: Graph) -> Graph:
    """The same network in fewer nodes. The nodes of ``graph`` are used up."""
    _drop_unused(graph)
    _norms(graph)
    _additions(graph)
    _relus(graph)
    _places(graph)
    return graph


def _drop_unused(graph: Graph) -> None:
    needed, kept = {graph.output}, []
    for node in reversed(graph.nodes):
        if node.output in needed:
            kept.append(node)
            needed.update(node.reads)
    graph.nodes = kept[::-1]


def _producers(graph: Graph) -> dict[Value, Node]:
    return {node.output: node for node in graph.nodes}


def _norms(graph: Graph) -> None:
    producers, uses = _producers(graph), graph.uses()
    for node in list(graph.nodes):
        before = producers.get(node.inputs[0])
        if node.op != "norm" or before is None or before.op not in _TAKES_NORM:
            continue
        if before.facts["norm"] is None and not before.relu and before.residual is None and uses[before.output] == 1:
            before.facts["norm"] = node.facts["norm"]
            _absorb(graph, before, node, producers)


def _additions(graph: Graph) -> None:
    producers, uses = _producers(graph), graph.uses()
    for node in list(graph.nodes):
        if node.op != "add" or node.residual is not None:
            continue
        a, b = node.inputs
        # The term that is computed last takes in the other: then nothing needs to wait.
        position = {n.output: i for i, n in enumerate(graph.nodes)}
        for term, other in sorted([(a, b), (b, a)], key=lambda pair: -position.get(pair[0], -1)):
            before = producers.get(term)
            if (
                before is None
                or a is b
                or before.op not in ("conv", "norm")
                or before.relu
                or before.residual is not None
            ):
                continue
            if uses[term] != 1:
                continue
            before.residual = other
            graph.nodes.remove(before)  # to the place of the addition, where the other term is known
            graph.nodes.insert(graph.nodes.index(node), before)
            _absorb(graph, before, node, producers)
            break


def _relus(graph: Graph) -> None:
    producers, uses = _producers(graph), graph.uses()
    for node in list(graph.nodes):
        if node.op != "relu":
            continue
        before = producers.get(node.inputs[0])
        if before is not None and before.op in _TAKES_RELU and uses[before.output] == 1:
            before.relu = True
            _absorb(graph, before, node, producers)


def _places(graph: Graph) -> None:
    """Slices and paddings that follow each other as one step, where each acts on other directions."""
    producers, uses = _producers(graph), graph.uses()
    for node in list(graph.nodes):
        before = producers.get(node.inputs[0])
        if node.op != "place" or before is None or before.op != "place" or uses[before.output] != 1:
            continue
        first, stride = list(before.facts["first"]), list(before.facts["stride"])
        for i in range(3):
            untouched = node.facts["first"][i] == 0 and node.facts["stride"][i] == 1
            untouched &= node.inputs[0].shape[i] == node.output.shape[i]
            if untouched:
                continue
            if first[i] != 0 or stride[i] != 1 or before.inputs[0].shape[i] != before.output.shape[i]:
                break
            first[i], stride[i] = node.facts["first"][i], node.facts["stride"][i]
        else:
            before.facts.update(first=tuple(first), stride=tuple(stride))
            _absorb(graph, before, node, producers)


def _absorb(graph: Graph, before: Node, node: Node, producers: dict[Value, Node]) -> None:
    """``before`` now does what ``node`` did as well."""
    before.output = node.output
    producers[node.output] = before
    graph.nodes.remove(node)
