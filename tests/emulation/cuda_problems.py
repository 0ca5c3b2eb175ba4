"""Mirrors of the structs that CUDA launches take: kernels/common/cuda_types.h, kernels/*/cuda_problem.h."""

import ctypes
from ctypes import c_bool, c_int, c_int64, c_void_p
from typing import Any

import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PRECISIONS = {"tf32": 0, "float32": 1}
RESIDUALS = {"none": 0, "plain": 1, "affine": 2}


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Affine(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("scale", "center", "shift")]

    @classmethod
    def of(cls, tensors: Any) -> "Affine":
        """Of three tensors, or of None: no such map."""
        return cls() if tensors is None else cls(*map(pointer, tensors))


class PointProblem(ctypes.Structure):
    """PointProblem in kernels/scale_shift_act/cuda_problem.h."""

    _fields_ = [
        ("type", c_int),
        ("planes", c_bool),
        ("relu", c_bool),
        ("residual_kind", c_int),
        ("images", c_int64),
        ("channels", c_int64),
        ("plane", c_int64),
        ("main", Affine),
        ("res", Affine),
        *((name, c_void_p) for name in ("y", "residual", "out", "grad", "grad_y", "grad_residual", "partial")),
        ("sum_out", c_void_p * 3),
    ]


class Chip(ctypes.Structure):
    """kernels/batch_norm_act/cuda_problem.h."""

    _fields_ = [("multiprocessors", c_int), ("shared_per_multiprocessor", c_int64), ("shared_per_block", c_int64)]


class NormPlan(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("vector", "across", "groups", "parts")),
        ("part_rows", c_int64),
        ("shared_items", c_int),
        ("shared_bytes", c_int64),
    ]


class Norm(ctypes.Structure):
    """NormProblem in kernels/batch_norm_act/cuda_problem.h."""

    _fields_ = [
        ("type", c_int),
        ("relu", c_bool),
        ("eps", ctypes.c_float),
        ("rows", c_int64),
        ("channels", c_int),
        ("plan", NormPlan),
        *((name, c_void_p) for name in ("y", "residual", "weight", "bias", "mean", "var", "out", "grad", "grad_y")),
        *((name, c_void_p) for name in ("grad_residual", "grad_weight", "grad_bias", "partial", "arrived")),
    ]


class Geometry(ctypes.Structure):
    _fields_ = [
        ("images", c_int64),
        *((name, c_int) for name in ("channels", "height", "width", "filters", "out_height", "out_width")),
        *((name, c_int) for name in ("filter_height", "filter_width", "stride_h", "stride_w", "pad_h", "pad_w")),
        *((name, c_int) for name in ("dilation_h", "dilation_w")),
    ]

    @classmethod
    def of(
        cls, x: torch.Tensor, weight: torch.Tensor, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> "Geometry":
        """Of x [N, H, W, C] and weight [K, R, S, C]."""
        n, h, w, c = x.shape
        k, r, s = weight.shape[:3]
        p, q = ((size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for size, taps in ((h, r), (w, s)))
        return cls(n, c, h, w, k, p, q, r, s, stride, stride, padding, padding, dilation, dilation)


class ConvForward(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("precision", c_int),
        ("shape", Geometry),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("prologue", Affine),
        ("prologue_relu", c_bool),
        ("bias_type", c_int),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("relu", c_bool),
        *((name, c_void_p) for name in ("y", "partial", "mean", "var")),
    ]


class ConvBackward(ctypes.Structure):
    _fields_ = [
        ("type", c_int),
        ("precision", c_int),
        ("shape", Geometry),
        *((name, c_void_p) for name in ("grad_y", "y", "mean", "grad_mean", "grad_var", "factor", "x", "weight")),
        ("prologue", Affine),
        ("prologue_relu", c_bool),
        *((name, c_void_p) for name in ("addend", "grad_x", "grad_scale", "grad_shift", "grad_weight", "workspace")),
    ]


def check(library: Any, function: str, mirror: type[ctypes.Structure]) -> None:
    """The C function returns the size of the struct that ``mirror`` repeats."""
    size = library.call(function, result=ctypes.c_uint64)
    assert size == ctypes.sizeof(mirror), f"{function}() is {size}, {mirror.__name__} has {ctypes.sizeof(mirror)} bytes"
