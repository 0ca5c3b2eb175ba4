"""Plans that fused networks use by themselves, where nobody can tell the difference but by the time.

Imported by every network: it must stay light, and everything a plan needs is loaded when the first one is built.
"""

import os
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastres import _library, backends

_SWITCH = "FASTRES_PLAN"
_MOST_SHAPES = 64  # shapes that were seen once


class _Automatic:
    """What is known of one network."""

    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        self.engine: Any = None
        self.reason: str | None = None  # why there is no plan
        self.refused: Any = None  # the network's structure when that was found


_networks: "WeakKeyDictionary[nn.Module, _Automatic]" = WeakKeyDictionary()
_lock = threading.Lock()


def planned(model: nn.Module, x: Any) -> Tensor | None:
    """The result of ``model`` for ``x`` from a plan, or None where the network must compute it itself.

    A plan is built at the second call with one shape, so that calls that are made once don't pay for it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training or _ruled_out(x) is not None:
        return None
    known = _networks.get(model)
    if known is None:
        with _lock:
            known = _networks.setdefault(model, _Automatic())
    key = (tuple(x.shape), x.dtype)
    if known.reason is not None:
        if known.refused.changed():
            known.reason, known.seen = None, {key}
        return None
    if key not in known.seen:
        if len(known.seen) >= _MOST_SHAPES:
            known.seen.clear()
        known.seen.add(key)
        return None
    return _run(model, x, known)


def _run(model: nn.Module, x: Tensor, known: _Automatic) -> Tensor | None:
    from fastres.errors import CompileError

    from .building import Options
    from .network import Engine, check_network
    from .watching import Structure

    try:
        engine = known.engine
        if engine is None:
            engine = known.engine = Engine(model, check_network(model, own_hooks=False), Options(), own_hooks=False)
        elif not engine.fresh():
            # Weights that change between all calls would be packed in vain: this counts as the first call.
            known.engine = None
            known.seen = {(tuple(x.shape), x.dtype)}
            return None
        if x.dtype != engine.dtype:
            return None
        return engine(x, checked=True)
    except (CompileError, MemoryError) as error:
        known.engine, known.refused = None, Structure(model)
        known.reason = str(error) if isinstance(error, CompileError) else f"no memory for a plan: {error}"
    return None


def _ruled_out(x: Any) -> str | None:
    """Why this call can't use a plan, whatever the network is."""
    if type(x) is not Tensor or x.dim() != 4 or x.device.type != "cpu" or x.layout != torch.strided or not x.numel():
        return "the input is no ordinary [N, C, H, W] tensor with images on the CPU"
    if os.environ.get(_SWITCH, "").upper() == "OFF":
        return f"{_SWITCH}=OFF"
    if _library.native_error() is not None:
        return _library.native_error()
    if backends._recorder is not None or backends.requested() not in (backends.AUTO, "native"):
        return "a backend was asked for, or somebody records what the layers do"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    if modes or torch._C._functorch.peek_interpreter_stack() is not None or torch.jit.is_tracing():
        return "somebody looks at, or changes, what the operators do"
    return None


def why_not(model: nn.Module) -> str | None:
    """Why ``model`` does not use inference plans by itself, or None if it does, or would from the second call on."""
    if os.environ.get(_SWITCH, "").upper() == "OFF":
        return f"{_SWITCH}=OFF"
    if _library.native_error() is not None:
        return _library.native_error()
    known = _networks.get(model)
    if known is not None and known.reason is not None:
        return known.reason
    if model.training:
        return "the network is in training mode"
    from .watching import hooked

    where = hooked(model, own=False)
    return None if where is None else f"a plan would not call the forward hooks of {where}"
