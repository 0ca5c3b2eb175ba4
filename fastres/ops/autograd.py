"""THE table, part three: how every op differentiates. One formula per op; a backend's forward goes with its backward.

What is saved: raw convolution outputs, per-channel vectors and block ends. Activated maps are never saved; the backward
ops recompute them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastres.kernels.common.layout import times

from .recipes import saved_form
from .schemas import overload


def _save(ctx: Any, x: Tensor | None, *rest: Tensor | None) -> None:
    """Saves ``x``, or what rebuilds it, and then the rest."""
    tensors, ctx.rebuild = saved_form(x) if x is not None else ((None,), None)
    ctx.recipe_length = len(tensors)
    ctx.save_for_backward(*tensors, *rest)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    head, rest = tensors[: ctx.recipe_length], tensors[ctx.recipe_length :]
    return (head[0] if ctx.rebuild is None else ctx.rebuild(*head), *rest)


def _or_none(grad: Tensor | None, wanted: bool) -> Tensor | None:
    return grad if wanted else None


class ConvStats:
    """Inputs: x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, scale, center, shift, relu, stride, padding, dilation, groups, stats = inputs
        y, mean, _ = output
        # y and mean only enter the gradient through the statistics
        _save(ctx, x, weight, scale, center, shift, y if stats else None, mean if stats else None)
        ctx.args = (relu, stride, padding, dilation, groups)

    @staticmethod
    def backward(backend: str, ctx, grad_y, grad_mean, grad_var, addend=None, factor=None):
        if grad_y is None and grad_mean is None and grad_var is None:
            return _or_none(addend, ctx.needs_input_grad[0]), *(None,) * 10
        x, weight, scale, center, shift, y, mean = _saved(ctx)
        needs = ctx.needs_input_grad
        need_input = needs[0] or needs[2] or needs[4]
        if y is None:
            y, mean = grad_y, grad_y.new_empty(0)
        further = (_or_none(addend, needs[0]), factor) if addend is not None or factor is not None else ()
        grads = overload("conv_stats", backend, "backward")(
            grad_y,
            grad_mean,
            grad_var,
            x,
            weight,
            y,
            mean,
            scale,
            center,
            shift,
            *ctx.args,
            need_input,
            needs[1],
            *further,
        )
        grad_x, grad_weight, grad_scale, grad_shift = (
            _or_none(g, need) for g, need in zip(grads, (needs[0], needs[1], needs[2], needs[4]), strict=True)
        )
        return grad_x, grad_weight, grad_scale, None, grad_shift, None, None, None, None, None, None


class Factor:
    """What the gradient that arrives for a convolution's result is to be multiplied by: nothing, until the one reader of that
    result says in the forward pass that it will send dz and not scale·dz."""

    vector: Tensor | None = None  # [K]


class JoinedConvStats(torch.autograd.Function):
    """conv_stats as a node that takes over what its neighbours would need passes of their own for.

    With ``fork`` it hands on its input, for whoever else reads it: autograd then brings their gradient here, where the input
    gradient's kernel adds it, and not to an addition of its own. With a factor both gradients' kernels apply it.

    Inputs: those of ConvStats, backend, fork, factor. Results: those of conv_stats, and with ``fork`` a view of x.
    """

    @staticmethod
    def forward(*inputs):
        *arguments, backend, fork, _ = inputs
        x = arguments[0]
        return *overload("conv_stats", backend)(*arguments), x.view_as(x) if fork else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, ctx.backend, _, ctx.factor = inputs
        ConvStats.setup_context(ctx, arguments, output[:3])

    @staticmethod
    def backward(ctx, grad_y, grad_mean, grad_var, addend):
        factor = None if ctx.factor is None else ctx.factor.vector
        grads = ConvStats.backward(ctx.backend, ctx, grad_y, grad_mean, grad_var, addend, factor)
        return *grads, None, None, None


class ScaleShiftAct:
    """Inputs: y, scale, center, shift, residual, res_scale, res_center, res_shift, relu."""

    op = "scale_shift_act"

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, scale, center, shift, residual, res_scale, res_center, res_shift, relu = inputs
        # The mask is recomputed from y and the residual, which the block saves anyway; its result is not saved here.
        kept = residual if relu or res_scale is not None else None
        ctx.has_residual = residual is not None
        _save(ctx, kept, y, scale, center, shift, res_scale, res_center, res_shift)
        ctx.relu = relu

    @staticmethod
    def residual_gradient(grad: Tensor, y: Tensor) -> Tensor:
        """Where the residual is added as it is and no ReLU follows: backends don't compute it."""
        return grad

    @classmethod
    def backward(cls, backend: str, ctx, grad):
        if grad is None:
            return (None,) * 9
        residual, *rest = _saved(ctx)
        y, scale, center, shift, res_scale, res_center, res_shift = rest
        needs = ctx.needs_input_grad
        g_y, g_scale, g_shift, g_res, g_rscale, g_rshift = overload(cls.op, backend, "backward")(
            grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, ctx.relu, needs[4]
        )
        if ctx.has_residual and res_scale is None and not ctx.relu:
            g_res = cls.residual_gradient(grad, y)
        return (
            _or_none(g_y, needs[0]), _or_none(g_scale, needs[1]), None, _or_none(g_shift, needs[3]),
            _or_none(g_res, needs[4]), _or_none(g_rscale, needs[5]), None, _or_none(g_rshift, needs[7]), None,
        )  # fmt: skip


class ScaleShiftActMean(ScaleShiftAct):
    """Inputs as ScaleShiftAct; the result is [N, C]."""

    op = "scale_shift_act_mean"

    @staticmethod
    def residual_gradient(grad: Tensor, y: Tensor) -> Tensor:
        return (grad / max(y.shape[2] * y.shape[3], 1))[:, :, None, None].expand(y.shape)


class JoinedPoint(torch.autograd.Function):
    """scale_shift_act or scale_shift_act_mean with a ReLU, whose backward writes one map, dz, where y and the residual take
    multiples of it. The convolutions that made them apply the factors: see :class:`Factor`.

    Inputs: those of ScaleShiftAct, the op, the backend, the factors of y and of the residual (None where its maker takes none).
    """

    @staticmethod
    def forward(*inputs):
        *arguments, op, backend, _, _ = inputs
        return overload(op, backend)(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, ctx.op, ctx.backend, _, res_factor = inputs
        ctx.res_is_factored = res_factor is not None
        ScaleShiftAct.setup_context(ctx, arguments, output)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 13
        residual, y, scale, center, shift, res_scale, res_center, res_shift = _saved(ctx)
        needs = ctx.needs_input_grad
        dz, g_scale, g_shift, g_rscale, g_rshift = overload(ctx.op, ctx.backend, "masked")(
            grad, y, scale, center, shift, residual, res_scale, res_center, res_shift, ctx.relu
        )
        g_res = times(dz, None if ctx.res_is_factored else res_scale) if needs[4] else None
        return (
            _or_none(dz, needs[0]), _or_none(g_scale, needs[1]), None, _or_none(g_shift, needs[3]),
            g_res, _or_none(g_rscale, needs[5]), None, _or_none(g_rshift, needs[7]), None, None, None, None, None,
        )  # fmt: skip


class BatchNormAct:
    """Inputs: y, weight, bias, residual, eps, relu. mean and var are for running statistics: constants to autograd."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, weight, bias, residual, *ctx.args = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        relu = ctx.args[1]
        ctx.has_residual = residual is not None
        # a residual matters to the mask only
        _save(ctx, residual if relu else None, y, weight, bias, mean, var)

    @staticmethod
    def backward(backend: str, ctx, grad, _grad_mean, _grad_var):
        if grad is None:
            return (None,) * 6
        residual, y, weight, bias, mean, var = _saved(ctx)
        needs = ctx.needs_input_grad
        grads = overload("batch_norm_act", backend, "backward")(
            grad, y, weight, bias, residual, mean, var, *ctx.args, needs[3]
        )
        g_y, g_weight, g_bias, g_res = (_or_none(g, need) for g, need in zip(grads, needs[:4], strict=True))
        if ctx.has_residual and not ctx.args[1]:
            g_res = _or_none(grad, needs[3])  # added as it is, and no ReLU follows: backends don't compute it
        return g_y, g_weight, g_bias, g_res, None, None


class ScaleShiftActPool:
    """Inputs: y, scale, center, shift, relu, kernel, stride, padding."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, scale, center, shift, *ctx.args = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(y, scale, center, shift, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(backend: str, ctx, grad, _grad_index):
        if grad is None:
            return (None,) * 8
        y, scale, center, shift, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        g_y, g_scale, g_shift = overload("scale_shift_act_pool", backend, "backward")(
            grad, index, y, scale, center, shift, *ctx.args
        )
        return (
            _or_none(g_y, needs[0]), _or_none(g_scale, needs[1]), None, _or_none(g_shift, needs[3]),
            None, None, None, None,
        )  # fmt: skip


class ConvAct:
    """Inputs: x, weight, bias, residual, relu, stride, padding, dilation, groups."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _residual, *ctx.args = inputs
        relu = ctx.args[0]
        ctx.bias_dtype = None if bias is None else bias.dtype
        _save(ctx, x, weight, output if relu else None)

    @staticmethod
    def backward(backend: str, ctx, grad):
        if grad is None:
            return (None,) * 9
        x, weight, out = _saved(ctx)
        needs = ctx.needs_input_grad
        grads = overload("conv_act", backend, "backward")(
            grad, x, weight, grad if out is None else out, *ctx.args, *needs[:4]
        )
        g_x, g_weight, g_bias, g_res = (_or_none(g, need) for g, need in zip(grads, needs[:4], strict=True))
        if g_bias is not None:
            g_bias = g_bias.to(ctx.bias_dtype)
        return g_x, g_weight, g_bias, g_res, None, None, None, None, None


FORMULAS: dict[str, Any] = {
    "conv_stats": ConvStats,
    "scale_shift_act": ScaleShiftAct,
    "scale_shift_act_mean": ScaleShiftActMean,
    "scale_shift_act_pool": ScaleShiftActPool,
    "batch_norm_act": BatchNormAct,
    "conv_act": ConvAct,
}


def no_double_backward(op: str) -> Callable[..., Any]:
    """The backward of a backward op: an explicit error instead of silence."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"fastres: double backward of {op} is not supported (its backward was differentiated, probably with "
            "create_graph=True). Use the reference model (fused=False) where second derivatives are needed."
        )

    return backward
