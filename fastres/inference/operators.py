"""Which operators a plan knows, and what they become."""

import math
from typing import Any

from .graph import Constant, Value
from .recording import Call, Handler, Recorder, Unsupported

HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Any:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def handler_of(op: str) -> Handler | None:
    """For operators that several backends have."""
    return _conv_act if op.startswith("fastres.conv_act_") and "backward" not in op else None


def _pair(value: Any, default: Any = None) -> tuple[int, int]:
    given = list(value) if isinstance(value, list | tuple) else [value]
    if not given or given[0] is None:
        return default
    return (given[0], given[-1])


def _map(value: Value) -> Value:
    if len(value.shape) != 3:
        raise Unsupported("it works on vectors, not on maps")
    return value


@handles("aten.convolution")
def _convolution(r: Recorder, c: Call) -> Value:
    if c["transposed"]:
        raise Unsupported("it is transposed")
    return _conv(r, c, c.value("input"), None)


def _conv_act(r: Recorder, c: Call) -> Value:
    residual = c.arguments.get("residual")
    if isinstance(residual, Constant):
        raise Unsupported("its residual does not depend on the input")
    return _conv(r, c, c.value("x"), residual, bool(c["relu"]))


def _conv(r: Recorder, c: Call, x: Value, residual: Value | None, relu: bool = False) -> Value:
    weight, bias = c.constant("weight"), c.constant("bias")
    assert weight is not None
    facts = {key: _pair(c[key]) for key in ("stride", "padding", "dilation")}
    out = r.add(
        "conv", c, _map(x), name=r.layer_of(weight), weight=weight, bias=bias, groups=c["groups"], norm=None, **facts
    )
    r.nodes[-1].relu, r.nodes[-1].residual = relu, residual
    return out


@handles("aten.native_batch_norm", "aten._native_batch_norm_legit_no_training")
def _batch_norm(r: Recorder, c: Call) -> Value:
    if c["training"]:
        raise Unsupported("it normalises by the statistics of the batch (put it in evaluation mode)")
    norm = {key: c.constant(key) for key in ("weight", "bias", "running_mean", "running_var")}
    if norm["running_mean"] is None or norm["running_var"] is None:
        raise Unsupported("it has no running statistics")
    mean = norm["running_mean"]
    return r.add("norm", c, _map(c.value("input")), name=r.layer_of(mean), norm=(*norm.values(), c["eps"]))


@handles("aten.relu", "aten.relu_")
def _relu(r: Recorder, c: Call) -> Value:
    return r.add("relu", c, c.value("self"))


@handles("aten.add.Tensor", "aten.add_.Tensor")
def _add(r: Recorder, c: Call) -> Value:
    a, b = c.value("self"), c.value("other")
    if a.shape != b.shape:
        raise Unsupported(f"its terms have different shapes, {list(a.shape)} and {list(b.shape)}")
    if c["alpha"] not in (None, 1):
        raise Unsupported(f"alpha is {c['alpha']}")
    return r.add("add", c, a, b)


@handles("aten.max_pool2d_with_indices")
def _max_pool(r: Recorder, c: Call) -> Value:
    kernel = _pair(c["kernel_size"])
    return r.add(
        "max_pool", c, _map(c.value("self")), kernel=kernel, stride=_pair(c["stride"], kernel),
        padding=_pair(c["padding"], (0, 0)), dilation=_pair(c["dilation"], (1, 1)),
    )  # fmt: skip


@handles("aten.avg_pool2d")
def _avg_pool(r: Recorder, c: Call) -> Value:
    kernel = _pair(c["kernel_size"])
    counted = c["count_include_pad"]
    return r.add(
        "mean_pool", c, _map(c.value("self")), kernel=kernel, stride=_pair(c["stride"], kernel),
        padding=_pair(c["padding"], (0, 0)), count_padding=counted is None or counted, divisor=c["divisor_override"] or 0,
    )  # fmt: skip


@handles("aten._adaptive_avg_pool2d")
def _adaptive(r: Recorder, c: Call) -> Value:
    x = _map(c.value("self"))
    return x if tuple(c.result.shape[1:]) == x.shape else r.add("adaptive_mean", c, x)


@handles("aten.mean.dim")
def _mean(r: Recorder, c: Call) -> Value:
    x = _map(c.value("self"))
    if {d % 4 for d in c["dim"] or ()} != {2, 3}:
        raise Unsupported("it is not the mean over height and width")
    return r.add("adaptive_mean", c, x)


@handles(
    "aten.view", "aten._unsafe_view", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze", "aten.reshape",
    "aten._reshape_alias", "aten.clone", "aten._to_copy", "aten.detach", "aten.alias", "aten.contiguous",
    "aten.lift_fresh",
)  # fmt: skip
def _same_elements(r: Recorder, c: Call) -> Value:
    x, shape = c.value("self"), tuple(c.result.shape[1:])
    if shape == x.shape:
        return x
    if math.prod(shape) != math.prod(x.shape):
        raise Unsupported("it moves elements from one image to another")
    flattens = len(shape) == 1 or (shape[1:] == (1, 1) and x.shape[0] == shape[0])
    if not flattens:
        raise Unsupported(f"it turns {list(x.shape)} into {list(shape)}; only flattening is known")
    return r.add("flat", c, x)


@handles("aten.as_strided_")
def _as_strided(r: Recorder, c: Call) -> Value:
    x = c.value("self")
    if tuple(c.result.shape[1:]) != x.shape or math.prod(x.shape) != x.shape[0]:
        raise Unsupported("it rearranges memory")
    return x


@handles("aten.slice.Tensor")
def _slice(r: Recorder, c: Call) -> Value:
    x, dim, step = c.value("self"), (c["dim"] or 0) % 4, c["step"] or 1
    start = c["start"] or 0
    if tuple(c.result.shape[1:]) == x.shape:
        return x
    _map(x)
    size = x.shape[dim - 1] if dim else r.images
    start = min(max(start + size if start < 0 else start, 0), size)
    if dim == 0 or (dim == 1 and step != 1):
        raise Unsupported("it takes some of the images, or some of the channels with a step")
    first, stride = [0, 0, 0], [1, 1, 1]
    first[dim - 1], stride[dim - 1] = start, step
    return r.add("place", c, x, first=tuple(first), stride=tuple(stride))


@handles("aten.constant_pad_nd")
def _pad(r: Recorder, c: Call) -> Value:
    x, pads = _map(c.value("self")), [*c["pad"], *[0] * 8]
    if c["value"] not in (None, 0) or any(pads[6:]):
        raise Unsupported("it pads with something else than zeros, or pads the batch")
    return r.add("place", c, x, first=(-pads[4], -pads[2], -pads[0]), stride=(1, 1, 1))


@handles("aten.addmm")
def _addmm(r: Recorder, c: Call) -> Value:
    if c["beta"] not in (None, 1) or c["alpha"] not in (None, 1):
        raise Unsupported("beta or alpha is not 1")
    return _linear(r, c, c.value("mat1"), c.constant("mat2"), c.constant("self"))


@handles("aten.mm")
def _mm(r: Recorder, c: Call) -> Value:
    return _linear(r, c, c.value("self"), c.constant("mat2"), None)


def _linear(r: Recorder, c: Call, x: Value, weight: Constant | None, bias: Constant | None) -> Value:
    """``weight`` is [in, out]."""
    assert weight is not None
    if len(x.shape) != 1:
        raise Unsupported("it works on maps, not on vectors")
    return r.add("linear", c, x, name=r.layer_of(weight), weight=weight, bias=bias, norm=None)
