"""Notices everything that makes a plan stale: other weights, other modules, other modes.

Looked at in every call, so it must be cheap: identities and version counters in Python, values by a native fingerprint of
all small vectors and a sample of each large weight, as :mod:`fastres.nn.folding` compares them.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .folding import native

_SAMPLES = 64  # words of a large weight that are looked at
_WHOLE_BYTES = 32768  # up to so many bytes of a tensor are looked at
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Structure:
    """The modules of a network: which they are, their modes, hooks and parameters. Holds no reference to the network."""

    def __init__(self, model: nn.Module) -> None:
        # The dictionaries of the modules, not the modules: the network itself must be free to die.
        modules = list(model.modules())
        parts = [d for m in modules for d in (m._modules, m._parameters, m._buffers) if d]
        self._parts = [
            (d, tuple(map(id, d.values())), tuple(d.values())) for d in parts
        ]  # kept, so that ids stay theirs
        self._states = [(vars(m), m.training, vars(m).get("eps")) for m in modules]
        self._hooks = [vars(m)[kind] for m in modules if m is not model for kind in _HOOKS]

    def changed(self) -> bool:
        if any(self._hooks) or any(tuple(map(id, d.values())) != ids for d, ids, _ in self._parts):
            return True
        return any(d["training"] is not training or d.get("eps") != eps for d, training, eps in self._states)


class Values:
    """The tensors a plan was made from."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(t): t for t in tensors}.values())
        # Aliases keep the memory alive, so that its address can't be given to another tensor.
        self._aliases = [t.detach() for t in self._tensors]
        self._counted = [t for t in self._tensors if not t.is_inference()]
        self._marks = self._state()
        self._fingerprint = native().Fingerprint([sample for t in self._tensors for sample in _samples(t)])
        self._value = self._fingerprint()

    def _state(self) -> tuple[list[int], list[int]]:
        return [t.data_ptr() for t in self._tensors], [t._version for t in self._counted]

    def changed(self) -> bool:
        return self._marks != self._state() or self._value != self._fingerprint()


def _samples(t: Tensor) -> list[tuple[int, int, int]]:
    """(address, bytes, step) of what is looked at. Without a version counter, or in odd layouts, that is everything."""
    if not t.numel():
        return []
    size = t.element_size()
    whole = (sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * size
    dense = whole == t.numel() * size
    if t.is_inference() or not dense or whole <= 4 * _SAMPLES or (t.dim() < 2 and whole <= _WHOLE_BYTES):
        return [(t.data_ptr(), whole, 0)]
    return [(t.data_ptr(), whole, max(whole // _SAMPLES // 4 * 4, 4))]


def hooked(model: nn.Module, own: bool) -> str | None:
    """The first module whose forward hooks a plan would not call; ``own``: also the network's own."""
    for name, module in model.named_modules():
        if (own or module is not model) and any(getattr(module, kind, None) for kind in _HOOKS):
            return name or "the network itself"
    return None


def snapshot(model: nn.Module, leaves: Iterable[Any]) -> tuple[Structure, Values]:
    return Structure(model), Values(leaf.leaf for leaf in leaves if leaf.leaf is not None)
