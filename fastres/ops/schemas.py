"""THE table, part one: what every op is called, takes and returns, and which backends implement it.

Each backend's op is registered under its own name (``conv_stats_library``) with the same schema: two backends share a
dispatch key, and a second registration on one key would silently replace the first.
"""

from typing import NamedTuple

import torch

BACKENDS = ("reference", "library", "native", "triton", "cuda")

_COEFFICIENTS = "Tensor {0}scale, Tensor {0}center, Tensor {0}shift"
_OPTIONAL = "Tensor? {0}scale, Tensor? {0}center, Tensor? {0}shift"
_POINT = f"Tensor y, {_COEFFICIENTS.format('')}, Tensor? residual, {_OPTIONAL.format('res_')}, bool relu"
_POINT_BACKWARD = (
    f"(Tensor grad, {_POINT}, bool need_residual) -> (Tensor grad_y, Tensor grad_scale, Tensor grad_shift,"
    " Tensor grad_residual, Tensor grad_res_scale, Tensor grad_res_shift)"
)
# dz alone, of which the gradients of y and of the residual are multiples
_MASKED = (
    f"(Tensor grad, {_POINT}) -> (Tensor dz, Tensor grad_scale, Tensor grad_shift, Tensor grad_res_scale,"
    " Tensor grad_res_shift)"
)
MASKED = {"scale_shift_act": ("triton", "cuda"), "scale_shift_act_mean": ("triton",)}  # op: backends
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation"
_CONV = f"{_GEOMETRY}, int groups"
_NORM = "Tensor y, Tensor weight, Tensor bias, Tensor? residual"
_POOL = "bool relu, int kernel, int stride, int padding"
_GRADIENT = (
    "Tensor grad_y, Tensor y, Tensor? mean, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor weight,"
    f" {_OPTIONAL.format('')}, bool relu, {_CONV}"
)


class OpSchema(NamedTuple):
    """Signatures (arguments -> results) of one op, and the backends that implement it."""

    forward: str
    backward: str
    backends: tuple[str, ...]
    extra: tuple[tuple[str, str], ...] = ()  # (suffix, signature): helpers without autograd


OPS: dict[str, OpSchema] = {
    "conv_stats": OpSchema(
        forward=f"(Tensor x, Tensor weight, {_OPTIONAL.format('')}, bool relu, {_CONV}, bool stats)"
        " -> (Tensor y, Tensor mean, Tensor var)",
        backward="(Tensor? grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor weight, Tensor y, Tensor mean,"
        f" {_OPTIONAL.format('')}, bool relu, {_CONV}, bool need_input, bool need_weight,"
        " Tensor? addend=None, Tensor? factor=None)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale, Tensor grad_shift)",
        backends=("reference", "library", "native", "triton", "cuda"),
    ),
    "scale_shift_act": OpSchema(
        forward=f"({_POINT}) -> Tensor",
        backward=_POINT_BACKWARD,
        backends=("reference", "library", "native", "triton", "cuda"),
    ),
    "scale_shift_act_pool": OpSchema(
        forward=f"(Tensor y, {_COEFFICIENTS.format('')}, {_POOL}) -> (Tensor out, Tensor index)",
        backward=f"(Tensor grad, Tensor index, Tensor y, {_COEFFICIENTS.format('')}, {_POOL})"
        " -> (Tensor grad_y, Tensor grad_scale, Tensor grad_shift)",
        backends=("reference", "library", "native", "triton"),
        extra=(("gather", f"(Tensor y, {_COEFFICIENTS.format('')}, Tensor index, {_POOL}) -> Tensor"),),
    ),
    "scale_shift_act_mean": OpSchema(
        forward=f"({_POINT}) -> Tensor",
        backward=_POINT_BACKWARD,
        backends=("reference", "library", "native", "triton"),
    ),
    "batch_norm_act": OpSchema(
        forward=f"({_NORM}, float eps, bool relu) -> (Tensor out, Tensor mean, Tensor var)",
        backward=f"(Tensor grad, {_NORM}, Tensor mean, Tensor var, float eps, bool relu, bool need_residual)"
        " -> (Tensor grad_y, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
        backends=("reference", "library", "cuda"),
    ),
    "conv_act": OpSchema(
        forward=f"(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu, {_CONV}) -> Tensor",
        backward=f"(Tensor grad, Tensor x, Tensor weight, Tensor out, bool relu, {_CONV},"
        " bool need_input, bool need_weight, bool need_bias, bool need_residual)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
        backends=("reference", "library", "native", "triton", "cuda"),
    ),
}

# What has no autograd of its own: native passes that serve the library backend around its convolutions, the engines of
# convolutions, the passes of MASKED.
HELPERS: dict[str, str] = {
    # writes grad_y over grad
    "scale_shift_act_backward_native_": f"(Tensor(a!) grad, Tensor y, {_COEFFICIENTS.format('')}, bool relu)"
    " -> (Tensor grad_scale, Tensor grad_shift)",
    # the convolution engine: forward with prologue and statistics, and the two gradients with the statistics' share
    "conv_forward_native": f"(Tensor x, Tensor weight, {_OPTIONAL.format('')}, bool relu, {_CONV}, bool stats)"
    " -> (Tensor y, Tensor mean, Tensor var)",
    "conv_input_gradient_native": f"({_GRADIENT}) -> (Tensor grad_x, Tensor grad_scale, Tensor grad_shift)",
    "conv_weight_gradient_native": f"({_GRADIENT}) -> Tensor",
    # conv_act_native by the kernel of that name, for tests and tuning
    "conv_kernel_native": "(str kernel, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool relu,"
    f" {_CONV}) -> Tensor",
    # the CUDA convolutions of one group: why a shape isn't served ("" if it is), forward, both gradients
    "conv_refusal_cuda": f"(Tensor x, Tensor weight, {_GEOMETRY}) -> str",
    "conv_forward_cuda": f"(Tensor x, Tensor weight, {_OPTIONAL.format('')}, bool prologue_relu, Tensor? bias,"
    f" Tensor? residual, bool relu, {_GEOMETRY}, bool stats, bool tf32) -> (Tensor y, Tensor mean, Tensor var)",
    "conv_backward_cuda": "(Tensor? grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor weight, Tensor? y,"
    f" Tensor? mean, {_OPTIONAL.format('')}, bool relu, {_GEOMETRY}, bool need_input, bool need_weight, Tensor? addend,"
    " Tensor? factor, bool tf32) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale, Tensor grad_shift)",
    **{f"{op}_masked_{backend}": _MASKED for op, backends in MASKED.items() for backend in backends},
    "channel_stats_native": "(Tensor y) -> (Tensor mean, Tensor var)",
    "channel_stats_backward_native": "(Tensor? grad_y, Tensor y, Tensor mean, Tensor? grad_mean, Tensor? grad_var)"
    " -> Tensor",
}

LIBRARY = torch.library.Library("fastres", "DEF")


def op_name(op: str, backend: str, suffix: str = "") -> str:
    """``("conv_stats", "library", "backward")`` -> ``"conv_stats_backward_library"``."""
    return "_".join(part for part in (op, suffix, backend) if part)


def overload(op: str, backend: str, suffix: str = "") -> torch._ops.OpOverload:
    """The dispatcher entry of one op, e.g. ``torch.ops.fastres.conv_stats_library.default``."""
    return getattr(torch.ops.fastres, op_name(op, backend, suffix)).default


def define_all() -> None:
    """Defines every schema; the native and CUDA libraries only implement them, so the table is complete on any machine."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for op, schema in OPS.items():
        for backend in schema.backends:
            LIBRARY.define(op_name(op, backend) + schema.forward, tags=tags)
            LIBRARY.define(op_name(op, backend, "backward") + schema.backward, tags=tags)
            for suffix, signature in schema.extra:
                LIBRARY.define(op_name(op, backend, suffix) + signature, tags=tags)
    for name, signature in HELPERS.items():
        LIBRARY.define(name + signature, tags=tags)
