"""The tolerance rule, in one place: an implementation may be at most twice as wrong as its peer.

``truth`` is computed in float64, ``peer`` by the reference (or PyTorch's own modules) in the working dtype:

    error(ours) <= 2 x error(peer) + floor,   floor = a few units in the last place of the largest true value.

The error is the largest absolute difference ("max"), or for whole networks the relative L2 norm ("l2"): near a ReLU's
edge two correct programs differ in the sign of a pre-activation now and then, which moves single elements but not norms.
"""

import torch
from torch import Tensor

ULPS = 8
SLACK = 2.0


def floor_of(truth: Tensor, dtype: torch.dtype) -> float:
    """A few units in the last place of ``dtype`` at the largest magnitude of ``truth``."""
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return ULPS * torch.finfo(dtype).eps * max(largest, torch.finfo(torch.float32).tiny)


def error_of(value: Tensor, truth: Tensor, metric: str) -> float:
    difference = value.double() - truth.double()
    if not difference.numel():
        return 0.0
    if metric == "max":
        return difference.abs().max().item()
    return (difference.norm() / truth.double().norm().clamp_min(1e-300)).item()


def check(ours: Tensor, peer: Tensor, truth: Tensor, metric: str = "max") -> str | None:
    """None if ``ours`` passes the rule, else what is wrong, in words."""
    if ours.shape != truth.shape:
        return f"shape {list(ours.shape)}, expected {list(truth.shape)}"
    if not torch.equal(ours.isnan(), truth.isnan()):
        return f"{int(ours.isnan().sum())} NaNs, expected {int(truth.isnan().sum())} (or at other places)"
    valid = ~truth.isnan()
    ours, peer, truth = ours[valid], peer[valid], truth[valid]
    own, other = error_of(ours, truth, metric), error_of(peer, truth, metric)
    floor = floor_of(truth, ours.dtype) if metric == "max" else ULPS * torch.finfo(ours.dtype).eps
    if own <= SLACK * other + floor:
        return None
    return f"error {own:.3g} ({metric}), allowed {SLACK:g} x {other:.3g} + {floor:.3g}"


def assert_parity(ours: Tensor, peer: Tensor, truth: Tensor, what: str = "result", metric: str = "max") -> None:
    """Fails with the figures unless ``ours`` passes the rule."""
    problem = check(ours.detach(), peer.detach(), truth.detach(), metric)
    assert problem is None, f"{what}: {problem}"


def assert_network_parity(ours: dict[str, Tensor], peer: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The rule for all gradients of a network, relative L2: a tensor's peer error counts as at least the peer's median.

    Which parameters a flipped ReLU meets is chance: PyTorch's own two layouts break the rule tensor by tensor against
    each other. What the peer's median says of the size of such errors is not.
    """
    errors = {k: error_of(peer[k], truth[k], "l2") for k in truth}
    typical = sorted(errors.values())[len(errors) // 2]
    for key, value in truth.items():
        assert ours[key].shape == value.shape and ours[key].isfinite().all(), key
        own, other = error_of(ours[key], value, "l2"), max(errors[key], typical)
        floor = ULPS * torch.finfo(ours[key].dtype).eps
        assert own <= SLACK * other + floor, (
            f"{key}: error {own:.3g} (l2), allowed {SLACK:g} x {other:.3g} + {floor:.3g}"
        )
