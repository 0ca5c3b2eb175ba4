"""BatchNorm folded into convolution weights for evaluation: lazily, once, and never stale.

``conv(x, w) + b`` followed by ``gamma·(y − mean)/sqrt(var + eps) + beta`` is ``conv(x, w·k) + (b − mean)·k + beta`` with
``k = gamma/sqrt(var + eps)``. A fold is kept only while everything it was made from is provably the same:
the same storages with the same version counters (every in-place operation and load_state_dict bump them), the same
statistics and affine parameters by value, and the same sampled weights. The last two notice writes that bypass the
version counter, such as ``weight.data.mul_(2)``.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_SAMPLES = 64  # weights compared by value, spread over the tensor


class _Fold(NamedTuple):
    sources: tuple[Tensor, ...]  # aliases that keep the storages alive, so that an address can't be used again
    versions: tuple[int, ...]
    values: tuple[Tensor, ...]  # copies of the statistics, the affine parameters and the sampled weights
    settings: tuple[float, torch.dtype]
    weight: Tensor
    bias: Tensor


_folds: "WeakKeyDictionary[nn.Module, _Fold]" = WeakKeyDictionary()


def fold(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """(weight [K, C/groups, R, S], bias [K]) of the convolution with its BatchNorm folded in; differentiable."""
    assert bn.running_mean is not None and bn.running_var is not None
    wide = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    k = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        k = k * bn.weight.to(wide)
    start = -bn.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - bn.running_mean.to(wide)
    bias = start * k if bn.bias is None else start * k + bn.bias.to(wide)
    weight = (conv.weight.to(wide) * k.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    return weight, bias


def _sources(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, ...]:
    tensors = (bn.running_mean, bn.running_var, bn.weight, bn.bias, conv.bias, conv.weight)
    return tuple(t for t in tensors if t is not None)


def _compared(sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views of what is compared by value: all small vectors, and a sample of the weight (last)."""
    *small, weight = (t.detach() for t in sources)
    step = max(weight.numel() // _SAMPLES, 1)
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        sample = weight.as_strided(((weight.numel() + step - 1) // step,), (step,), weight.storage_offset())
    else:
        sample = weight
    return (*small, sample)


def folded(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """As :func:`fold`, from the cache when nothing changed. With gradients, or in a compiled graph, always anew."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return fold(conv, bn)
    sources = _sources(conv, bn)
    if any(t.is_inference() for t in sources):  # these have no version counters: nothing can be proven
        return fold(conv, bn)
    settings = (bn.eps, conv.weight.dtype)
    versions = tuple(t._version for t in sources)
    values = _compared(sources)
    known = _folds.get(conv)
    if known is not None and _still_valid(known, sources, versions, values, settings):
        return known.weight, known.bias
    weight, bias = fold(conv, bn)
    aliases = tuple(t.detach() for t in sources)
    _folds[conv] = _Fold(aliases, versions, tuple(v.clone() for v in values), settings, weight, bias)
    return weight, bias


def _still_valid(
    known: _Fold,
    sources: tuple[Tensor, ...],
    versions: tuple[int, ...],
    values: tuple[Tensor, ...],
    settings: tuple[float, torch.dtype],
) -> bool:
    return (
        known.settings == settings
        and known.versions == versions
        and all(
            a.data_ptr() == b.data_ptr() and a.device == b.device for a, b in zip(known.sources, sources, strict=True)
        )
        and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(known.values, values, strict=True))
    )
