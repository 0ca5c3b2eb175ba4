"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), which keeps bfloat16 as bare bits and computes on those bits.

Upstream leaves it unsupported: sums and products of bfloat16 are silently wrong, and float32 is truncated instead of
rounded to nearest even. Here values are widened to float32, computed on, and rounded back, as a GPU does.

Two more replacements are for speed alone: a reduction with a combine function of its own runs as a tree on whole arrays
instead of element by element, and integer overflow isn't looked for (as on a GPU, it wraps).

All of it rests on private names of Triton, so tests compare it with torch bit by bit.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

_MISSING = object()
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bfloat16(values: np.ndarray, truncate: bool = False) -> np.ndarray:
    """float32 values as bfloat16 bits: to nearest, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    half = np.uint32(0) if truncate else np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + half) >> np.uint32(16)).astype(np.uint16))


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def values_of(handle: Any) -> np.ndarray:
    """What a handle stands for, bfloat16 as float32."""
    return widen_bfloat16(handle.data) if _is_bfloat16(handle) else handle.data


_binary, _unary, _cast, _dot = Builder.binary_op, Builder.unary_op, Builder.cast_impl, Builder.create_dot
_fp_to_fp, _fma = Builder.create_fp_to_fp, Builder.create_fma


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    if op in _COMPARISONS:  # upstream gives the result the type of the operands
        return Handle(op(values_of(lhs), values_of(rhs)), tl.int1)
    if _is_bfloat16(lhs):
        return Handle(round_bfloat16(op(values_of(lhs), values_of(rhs))), tl.bfloat16)
    return _binary(self, lhs, rhs, op)


def _unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
    if _is_bfloat16(arg):
        return Handle(round_bfloat16(op(values_of(arg))), tl.bfloat16)
    return _unary(self, arg, op)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    # Only bfloat16 and float32 are exchanged by rounding; other types go through float32 (semantic.cast does so too).
    to = target.scalar
    if to == tl.bfloat16 and not _is_bfloat16(source):
        return Handle(round_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
    if _is_bfloat16(source) and to != tl.bfloat16:
        return Handle(values_of(source).astype(interpreter._get_np_dtype(to)), to)
    return _cast(self, source, target)


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        truncate = rounding is not None and rounding != ir.ROUNDING_MODE.RTNE
        return Handle(round_bfloat16(source.data, truncate), tl.bfloat16)
    return _fp_to_fp(self, source, target, rounding)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    if _is_bfloat16(z):
        return Handle(round_bfloat16(values_of(x) * values_of(y) + values_of(z)), tl.bfloat16)
    return _fma(self, x, y, z)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    if _is_bfloat16(a):
        product = np.matmul(values_of(a), values_of(b), dtype=np.float32)
        return Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)
    return _dot(self, a, b, d, precision, imprecise)


def _get_bf16(self: Any, value: float) -> Any:
    return Handle(round_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)


def _generic_reduce(self: Any, tensors: tuple[Any, ...]) -> list[Any]:
    """Reduces along an axis with any associative combine function, neighbours first, whole arrays at a time."""
    axis, rank = self.axis, tensors[0].handle.data.ndim
    arrays = [t.handle.data.reshape(-1) if axis is None else np.moveaxis(t.handle.data, axis, 0) for t in tensors]
    types = [t.dtype for t in tensors]

    def wrap(array: np.ndarray, dtype: Any) -> Any:
        return tl.core.tensor(Handle(array, dtype.scalar), tl.block_type(dtype, list(array.shape)))

    while (length := len(arrays[0])) > 1:  # a power of two
        left = [wrap(a[0::2], dtype) for a, dtype in zip(arrays, types, strict=True)]
        right = [wrap(a[1::2], dtype) for a, dtype in zip(arrays, types, strict=True)]
        merged = self.combine_fn.fn(*left, *right)
        merged = merged if isinstance(merged, tuple) else (merged,)
        shape = (length // 2, *arrays[0].shape[1:])
        data = [m.handle.data if isinstance(m, tl.core.tensor) else m for m in merged]
        arrays = [
            np.broadcast_to(np.asarray(value, dtype=a.dtype), shape) for value, a in zip(data, arrays, strict=True)
        ]
    results = []
    for array, dtype in zip(arrays, types, strict=True):
        value = array[0]
        if self.keep_dims:
            value = np.reshape(value, (1,) * rank) if axis is None else np.expand_dims(value, axis)
        results.append(self.to_tensor(value, dtype))
    return results


def _replacements() -> list[tuple[Any, str, Any]]:
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    return [
        (Builder, "binary_op", _binary_op),
        (Builder, "unary_op", _unary_op),
        (Builder, "cast_impl", _cast_impl),
        (Builder, "create_fp_to_fp", _create_fp_to_fp),
        (Builder, "create_fma", _create_fma),
        (Builder, "create_dot", _create_dot),
        (Builder, "get_bf16", _get_bf16),
        (interpreter.ReduceOps, "generic_reduce", _generic_reduce),
        (interpreter.interpreter_builder, "options", options),
    ]


@contextmanager
def replaced(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes (owner, name, value) replaced inside the block and put back after it, in reverse order."""
    saved = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(saved):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def repaired() -> Any:
    """A context in which the interpreter is repaired; after it everything is as it was."""
    return replaced(_replacements())


_done = False


def repair() -> None:
    """Repairs the interpreter of this process for good; every further call does nothing."""
    global _done
    if not _done:
        for owner, name, value in _replacements():
            setattr(owner, name, value)
        _done = True
