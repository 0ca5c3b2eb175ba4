"""Weights of a plan: BatchNorm folded in float64, then packed by the kernel that a step takes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastres import _library

from .graph import Constant, Node


def native() -> Any:
    """The native module, which a plan needs."""
    module = _library._native
    assert module is not None
    return module


@dataclass
class Layer:
    """What plans for several shapes share of one convolution or matrix product."""

    bias: Tensor  # float32 [K]
    packed: dict[str, Any] = field(default_factory=dict)  # by kernel


def norm_of(norm: tuple[Any, ...], memo: dict[Constant, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, center, shift) in float64 of a BatchNorm in evaluation mode: ``scale·(y − center) + shift``."""
    weight, bias, mean, var, eps = (c.evaluate(memo).double() if isinstance(c, Constant) else c for c in norm)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    return scale, mean, bias if bias is not None else torch.zeros_like(mean)


def folded(node: Node, flat: tuple[int, ...] | None, memo: dict[Constant, Tensor]) -> tuple[Tensor, Tensor]:
    """(weight [K, C/groups, R, S], bias [K]) in float32 of a "conv" or "linear" node.

    ``flat`` is the shape (C, H, W) of the map whose flattening a "linear" node reads: plans keep maps in the order
    H, W, C, so the weight's columns are reordered.
    """
    weight = node.facts["weight"].evaluate(memo)
    if node.op == "linear":
        weight = weight.t()
        if flat is not None:
            weight = weight.reshape(-1, *flat).permute(0, 2, 3, 1).reshape(weight.shape)
        weight = weight[:, :, None, None]
    bias = node.facts["bias"]
    bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.evaluate(memo).double()
    if node.facts["norm"] is not None:
        scale, center, shift = norm_of(node.facts["norm"], memo)
        weight = weight.double() * scale.view(-1, 1, 1, 1)
        bias = (bias - center) * scale + shift
    return weight.float().contiguous(), bias.float().contiguous()


def layer_key(node: Node, flat: tuple[int, ...] | None) -> Any:
    """Equal for nodes, also of different recordings, that have the same weights."""
    norm = node.facts["norm"] or ()
    parts = (node.facts["weight"], node.facts["bias"], *norm)
    signatures = tuple(p.signature() if isinstance(p, Constant) else p for p in parts)
    return (node.op, flat, node.facts.get("groups"), signatures)
