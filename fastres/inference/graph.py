"""What a recorded network is made of: values that depend on the input, nodes between them, and constants."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Leaf = TypeVar("Leaf")


@dataclass(eq=False)
class Value:
    """A result for one image: a map (C, H, W) or a vector (F,). ``spoiled`` says why it can't be read any more."""

    shape: tuple[int, ...]
    spoiled: str | None = None


@dataclass(eq=False)
class Node:
    """One operation; ``inputs[0]`` is what it works on, ``residual`` what is added to its result before the ReLU."""

    op: str
    name: str
    inputs: list[Value]
    output: Value
    facts: dict[str, Any] = field(default_factory=dict)
    relu: bool = False
    residual: Value | None = None

    @property
    def reads(self) -> list[Value]:
        return [*self.inputs, *([self.residual] if self.residual is not None else [])]


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run."""

    input: Value
    output: Value
    nodes: list[Node]

    def uses(self) -> dict[Value, int]:
        count = {self.output: 1}
        for node in self.nodes:
            for value in node.reads:
                count[value] = count.get(value, 0) + 1
        return count


class Constant:
    """A tensor that does not depend on the input: a parameter, a buffer, or what an operation makes of such.

    Leaves are read when they are needed, so ``evaluate`` gives the value that the network would compute now.
    """

    def __init__(self, label: str, leaf: Tensor | None = None, call: tuple[Any, ...] | None = None) -> None:
        self.label, self.leaf, self.call = label, leaf, call

    def leaves(self) -> Iterator["Constant"]:
        if self.call is None:
            yield self
        else:
            for argument in leaves_in((self.call[1], self.call[2]), Constant):
                yield from argument.leaves()

    def evaluate(self, memo: dict["Constant", Tensor]) -> Tensor:
        if self.call is None:
            assert self.leaf is not None
            return self.leaf.detach()
        if self not in memo:
            function, args, kwargs, index = self.call
            args, kwargs = (replaced(a, lambda c: c.evaluate(memo)) for a in (args, kwargs))
            with torch.no_grad():
                result = function(*args, **kwargs)
            memo[self] = result if index is None else result[index]
        return memo[self]

    def signature(self) -> Any:
        """Equal for constants that are computed in the same way from the same leaves."""
        if self.call is None:
            return id(self.leaf)
        function, args, kwargs, index = self.call
        rest = replaced((args, sorted(kwargs.items())), lambda c: c.signature())
        return (str(function), repr(rest), index)


def leaves_in(value: Any, kind: type[Leaf]) -> Iterator[Leaf]:
    """Everything of a type in nested lists, tuples and dicts."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves_in(item, kind)
    elif isinstance(value, dict):
        yield from leaves_in(list(value.values()), kind)


def replaced(value: Any, change: Any) -> Any:
    """``value`` with every constant in its lists, tuples and dicts changed."""
    if isinstance(value, Constant):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(replaced(item, change) for item in value)
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    return value
