"""Parity before speed: a contender that computes something else has no figure.

The rule is that of the tests (tests/parity.py): with everything measured against float64, the error may be at most
twice the baseline's error in the same dtype plus a floor of a few units in the last place.
"""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from parity import SLACK, check, error_of
from torch import Tensor, nn

Tensors = Sequence[Tensor]
# Two right programs now and then disagree about the sign of a pre-activation that is zero but for rounding; each such
# element moves a gradient by about its share of the norm. 5e-3 lets one in 40,000 flip; a wrong gradient is off by 0.1.
FLIPS = 5e-3


def require(ours: Tensors, peer: Tensors, truth: Tensors, what: str, metric: str = "max") -> None:
    """Fails the benchmark, before anything is timed, unless every result passes the rule."""
    assert len(ours) == len(peer) == len(truth) and ours, f"{what}: {len(ours)}, {len(peer)}, {len(truth)} results"
    triples = zip(ours, peer, truth, strict=True)
    problems = [
        f"result {i}: {p}"
        for i, (a, b, t) in enumerate(triples)
        if (p := check(a.detach(), b.detach(), t.detach(), metric))
    ]
    if problems:
        pytest.fail(f"no figure for {what}, parity failed: {'; '.join(problems)}", pytrace=False)


def outcome(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Tensors, backward: bool) -> list[Tensor]:
    """Results of ``function``, and with ``backward`` the gradients of its inputs for a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_(backward) for t in inputs]
    with torch.set_grad_enabled(backward):
        found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else list(found)
    if backward:
        torch.autograd.backward(results, [cotangent(r) for r in results])
    return [r.detach() for r in results] + [t.grad for t in leaves if t.grad is not None]


def cotangent(result: Tensor) -> Tensor:
    """A fixed gradient in the layout of ``result``, small integers, so that every dtype has the same one."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-3, 4, result.shape, generator=generator).to(result.dtype)
    return torch.empty_like(result).copy_(values)


def require_network(
    ours: nn.Module, peer: nn.Module, forward: Callable[[nn.Module], Tensor], dtype: torch.dtype, what: str
) -> None:
    """As :func:`require` for two networks, in their mode: the output and, in training, all gradients, each by its norm.

    Args:
        forward: gives the output of a network on an input of its parameters' dtype.
        dtype: of autocast, or float32.
    """
    mine, theirs = network_outcome(ours, forward, dtype), network_outcome(peer, forward, dtype)
    exact = network_outcome(copy.deepcopy(peer).double(), forward, torch.float64)
    require(mine[:1], theirs[:1], exact[:1], what, "l2")
    for a, b, t in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        own, other = error_of(a, t, "l2"), error_of(b, t, "l2")
        if not own <= SLACK * other + FLIPS:
            pytest.fail(
                f"no figure for {what}, gradients off by {own:.3g}, allowed {SLACK:g} x {other:.3g} + {FLIPS:g}",
                pytrace=False,
            )


def network_outcome(model: nn.Module, forward: Callable[[nn.Module], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output of ``forward(model)``, and in training its gradients as one vector; the model itself is not changed."""
    model = copy.deepcopy(model)
    narrow = dtype not in (torch.float32, torch.float64)
    with torch.set_grad_enabled(model.training), torch.autocast("cpu", dtype if narrow else None, enabled=narrow):
        out = forward(model)
    if not model.training:
        return [out]
    out.backward(cotangent(out))
    return [out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])]


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the parameters."""
    return next(model.parameters()).dtype
