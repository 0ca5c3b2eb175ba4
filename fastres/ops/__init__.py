"""The ops: schemas, fake kernels, autograd and implementations in one table, and the public functions over them."""

from functools import partial
from importlib import import_module

import torch

from fastres import _library

from . import autograd, deferred, fakes
from .schemas import HELPERS, LIBRARY, MASKED, OPS, define_all, op_name

# Put together in Python from helpers that a library implements: (dispatch key, module in the op's folder, ops).
COMPOSED = {
    "native": ("CPU", "native", ("conv_stats", "conv_act", "scale_shift_act_mean")),
    "cuda": ("CUDA", "cuda_backend", ("conv_stats", "conv_act")),
}


def _register() -> None:
    define_all()
    for op, schema in OPS.items():
        for backend in schema.backends:
            if backend in ("reference", "library"):  # plain Python over ATen, any device
                module = import_module(f"fastres.kernels.{op}.{backend}")
                LIBRARY.impl(op_name(op, backend), module.forward, "CompositeExplicitAutograd")
                LIBRARY.impl(op_name(op, backend, "backward"), module.backward, "CompositeExplicitAutograd")
                for suffix, _ in schema.extra:
                    name = op_name(op, backend, suffix)
                    LIBRARY.impl(name, getattr(module, suffix), "CompositeExplicitAutograd")
            elif backend == "triton":  # on any device: one that can't run it is refused at the call, with the reason
                for suffix in ("", "backward", *(suffix for suffix, _ in schema.extra)):
                    implementation = deferred.triton(op, suffix or "forward")
                    LIBRARY.impl(op_name(op, backend, suffix), implementation, "CompositeExplicitAutograd")
            elif op in COMPOSED[backend][2]:
                key, file, _ = COMPOSED[backend]
                module = import_module(f"fastres.kernels.{op}.{file}")
                for suffix in ("forward", "backward"):
                    if hasattr(module, suffix):
                        name = op_name(op, backend, "" if suffix == "forward" else suffix)
                        LIBRARY.impl(name, getattr(module, suffix), key)
            _register_rules(op, backend, tuple(suffix for suffix, _ in schema.extra))
    for name in HELPERS:
        torch.library.register_fake(f"fastres::{name}", getattr(fakes, name), lib=LIBRARY)
    for op, backends in MASKED.items():
        for backend in backends:
            name = op_name(op, backend, "masked")
            if backend == "triton":
                LIBRARY.impl(name, deferred.triton(op, "masked"), "CompositeExplicitAutograd")
            torch.library.register_autograd(f"fastres::{name}", autograd.no_double_backward(op), lib=LIBRARY)


def _register_rules(op: str, backend: str, extra: tuple[str, ...]) -> None:
    forward, backward = f"fastres::{op_name(op, backend)}", f"fastres::{op_name(op, backend, 'backward')}"
    formula = autograd.FORMULAS[op]
    torch.library.register_fake(forward, getattr(fakes, op), lib=LIBRARY)
    torch.library.register_fake(backward, getattr(fakes, f"{op}_backward"), lib=LIBRARY)
    for suffix in extra:
        fake = getattr(fakes, f"{op}_{suffix}")
        torch.library.register_fake(f"fastres::{op_name(op, backend, suffix)}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        forward, partial(formula.backward, backend), setup_context=formula.setup_context, lib=LIBRARY
    )
    torch.library.register_autograd(backward, autograd.no_double_backward(op), lib=LIBRARY)


_register()
_library.load()

from .functional import (  # noqa: E402  (the functions need the registered table)
    batch_norm_act,
    bn_coefficients,
    conv_act,
    conv_stats,
    end_conv_stats,
    forked_conv_stats,
    scale_shift_act,
    scale_shift_act_mean,
    scale_shift_act_pool,
)

__all__ = [
    "batch_norm_act",
    "bn_coefficients",
    "conv_act",
    "conv_stats",
    "end_conv_stats",
    "forked_conv_stats",
    "scale_shift_act",
    "scale_shift_act_mean",
    "scale_shift_act_pool",
]
