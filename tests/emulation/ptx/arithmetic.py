"""Integer, floating-point, logic and conversion instructions: each becomes a function of the mask of active threads."""

from collections.abc import Callable
from typing import Any

import numpy as np

from emulation.errors import Unsupported
from emulation.ptx.parser import BITS, Instruction, elements
from emulation.ptx.registers import TYPES, Mask, Registers, Values
from fastres.kernels.common.triton_interpreter import widen_bfloat16

Run = Callable[[Mask], None]
Builder = Callable[[Registers, Instruction], Run]
BUILDERS: dict[str, Builder] = {}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
DOUBLED = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def builds(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def _refuse(i: Instruction, *parts: str) -> None:
    for part in parts:
        if i.has(part):
            raise Unsupported(f"modifier .{part}")


def _ufunc(function: Any, target: Values, *sources: Values) -> Run:
    def run(mask: Mask) -> None:
        function(*sources, out=target, where=mask)

    return run


def _computed(write: Callable[[Values, Mask], None], compute: Callable[[], Values]) -> Run:
    def run(mask: Mask) -> None:
        write(compute(), mask)

    return run


_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative, "abs": np.abs,
          "min": np.fmin, "max": np.fmax, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos,
          "tanh": np.tanh, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x)}  # fmt: skip
_INTEGER = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}  # fmt: skip


@builds("add", "sub", "div", "neg", "abs", "min", "max", "and", "or", "xor", "not", "sqrt", "rsqrt", "rcp", "ex2", "lg2",
        "sin", "cos", "tanh", "rem")  # fmt: skip
def _elementwise(r: Registers, i: Instruction) -> Run:
    _refuse(i, "cc", "xorsign")
    kind, names = i.type, i.operands[1:]
    if kind[0] in "fb" and kind in ("f32", "f64", *HALVES):
        return _floating(r, i, kind)
    if i.op in ("div", "rem"):
        return _division(r, i)
    if kind not in TYPES or i.op not in _INTEGER:
        raise Unsupported("type")
    sources = [r.source(name, kind) for name in names]
    return _ufunc(_INTEGER[i.op], r.target(i.operands[0], kind), *sources)


def _floating(r: Registers, i: Instruction, kind: str) -> Run:
    if i.op not in _FLOAT:
        raise Unsupported("type")
    function = _FLOAT[i.op]
    if i.has("NaN"):
        function = {"min": np.minimum, "max": np.maximum}[i.op]
    sources = [r.reader(name, kind) for name in i.operands[1:]]
    if kind in ("f32", "f64") and isinstance(function, np.ufunc) and not i.has("sat"):
        return _ufunc(function, r.target(i.operands[0], kind), *(s() for s in sources))
    saturate = i.has("sat")

    def compute() -> Values:
        value = function(*(s() for s in sources))
        return np.nan_to_num(np.clip(value, 0, 1), nan=0.0) if saturate else value

    return _computed(r.float_writer(i.operands[0], kind), compute)


def _division(r: Registers, i: Instruction) -> Run:
    """Integers are divided toward zero; a division by zero gives all ones."""
    kind, divides = i.type, i.op == "div"
    a, b = (r.source(name, kind) for name in i.operands[1:])

    def compute() -> Values:
        divisor = np.where(b == 0, b.dtype.type(1), b)
        quotient = a // divisor
        rest = a - quotient * divisor
        if a.dtype.kind == "i":  # numpy rounds down
            fix = (rest != 0) & ((rest < 0) != (a < 0))
            quotient, rest = quotient + fix, np.where(fix, rest - divisor, rest)
        result = quotient if divides else rest
        return np.where(b == 0, ~b.dtype.type(0), result)

    return _computed(r.writer(i.operands[0], kind), compute)


@builds("mul", "mad", "fma")
def _product(r: Registers, i: Instruction) -> Run:
    _refuse(i, "cc")
    kind, target = i.type, i.operands[0]
    if kind in ("f32", "f64", *HALVES):
        a, b, *c = (r.reader(name, kind) for name in i.operands[1:])
        if not c:
            return _floating(r, i, kind)
        relu, write = i.has("relu"), r.float_writer(target, kind)
        _refuse(i, "sat")

        def fused(mask: Mask) -> None:  # a product of two floats is exact in double
            value = _added_to_product(np.multiply(a(), b(), dtype=np.float64), c[0](), kind == "f32")
            value = (
                value
                if kind == "f64"
                else value.astype(np.float32 if kind != "f16x2" and kind != "f16" else np.float16)
            )
            write(np.maximum(value, 0) if relu else value, mask)

        return fused
    if not i.has("lo", "hi", "wide"):
        raise Unsupported("product without lo, hi or wide")
    left, right = (r.source(name, kind) for name in i.operands[1:3])
    if i.has("lo"):
        if i.op == "mul":
            return _ufunc(np.multiply, r.target(target, kind), left, right)
        addend, out = r.source(i.operands[3], kind), r.target(target, kind)

        def low(mask: Mask) -> None:
            np.add(left * right, addend, out=out, where=mask)

        return low
    if kind not in DOUBLED:
        return _high_64(r, i)
    wide = DOUBLED[kind]
    result = wide if i.has("wide") else kind
    extra = r.source(i.operands[3], result) if i.op == "mad" else None

    def compute() -> Values:
        value = np.multiply(left, right, dtype=TYPES[wide])
        if result == kind:
            value = (value >> value.dtype.type(BITS[kind])).astype(TYPES[kind])
        return value if extra is None else value + extra

    return _computed(r.writer(target, result), compute)


def _added_to_product(product: Values, addend: Values, rounds: bool) -> Values:
    """The sum in double; with ``rounds`` never a tie of two floats by accident, so that rounding it again is right."""
    total = np.add(product, addend, dtype=np.float64)
    if rounds and (tie := (np.atleast_1d(total).view(np.int64) & 0x1FFFFFFF) == 0x10000000).any():
        total, product, addend = np.broadcast_arrays(np.atleast_1d(total), product, addend.astype(np.float64))
        back = total - product  # what the sum lost, exactly
        lost = (product - (total - back)) + (addend - back)
        total = np.where(tie & (lost != 0), np.nextafter(total, np.copysign(np.inf, lost)), total)
    return total


def _high_64(r: Registers, i: Instruction) -> Run:
    if i.op != "mul":
        raise Unsupported("type")
    a, b = (r.source(name, i.type) for name in i.operands[1:])
    dtype, threads = TYPES[i.type], r.threads

    def compute() -> Values:
        pairs = zip(np.broadcast_to(a, threads).tolist(), np.broadcast_to(b, threads).tolist(), strict=True)
        return np.array([(x * y) >> 64 for x, y in pairs], dtype)

    return _computed(r.writer(i.operands[0], i.type), compute)


@builds("shl", "shr")
def _shift(r: Registers, i: Instruction) -> Run:
    kind, bits = i.type, BITS[i.type]
    a, count = r.source(i.operands[1], kind), r.source(i.operands[2], "u32")
    function = np.left_shift if i.op == "shl" else np.right_shift
    target = r.target(i.operands[0], kind)
    if count.ndim == 0 and count < bits:
        return _ufunc(function, target, a, count.astype(a.dtype))
    arithmetic = kind[0] == "s" and i.op == "shr"

    def compute() -> Values:
        value = function(a, np.minimum(count, np.uint32(bits - 1)).astype(a.dtype))
        return value if arithmetic else np.where(count >= bits, a.dtype.type(0), value)

    return _computed(r.writer(i.operands[0], kind), compute)


@builds("shf")
def _funnel(r: Registers, i: Instruction) -> Run:
    low, high = (r.source(name, "u32") for name in i.operands[1:3])
    count, wrap, left = r.source(i.operands[3], "u32"), i.has("wrap"), i.has("l")

    def compute() -> Values:
        by = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return _computed(r.writer(i.operands[0], "b32"), compute)


_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}  # fmt: skip


@builds("setp")
def _set_predicate(r: Registers, i: Instruction) -> Run:
    kind, compare = i.type, i.parts[1]
    floating = kind in ("f32", "f64", "f16", "bf16")
    targets = [r.target(t, "pred") for t in i.operands[0].split("|")]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(i.parts[2])
    if not floating and combine is None and compare in _COMPARE and len(targets) == 1:
        return _ufunc(_COMPARE[compare], targets[0], *(r.source(o, kind) for o in i.operands[1:3]))
    a, b = (r.reader(o, kind) for o in i.operands[1:3])
    inverted = len(i.operands) > 3 and i.operands[3].startswith("!")
    other = r.source(i.operands[3].lstrip("!"), "pred") if combine else None
    unordered = floating and compare in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    base = compare[:2] if unordered else compare
    if base not in _COMPARE and base not in ("num", "nan"):
        raise Unsupported(f"comparison .{compare}")

    def run(mask: Mask) -> None:
        x, y = a(), b()
        nan = np.isnan(x) | np.isnan(y) if floating else np.False_
        if base in ("num", "nan"):
            value = nan if base == "nan" else ~nan
        else:
            value = _COMPARE[base](x, y)
            value = value | nan if unordered else value & ~nan
        for target, result in zip(targets, (value, ~value), strict=False):
            if combine is not None:
                result = combine(result, ~other if inverted else other)
            np.copyto(target, result, where=mask)

    return run


@builds("selp")
def _select(r: Registers, i: Instruction) -> Run:
    kind = i.type if i.type not in HALVES else f"b{BITS[i.type]}"
    a, b, p = r.source(i.operands[1], kind), r.source(i.operands[2], kind), r.source(i.operands[3], "pred")
    return _computed(r.writer(i.operands[0], kind), lambda: np.where(p, a, b))


@builds("mov")
def _move(r: Registers, i: Instruction) -> Run:
    kind, (target, source) = i.type, i.operands
    if target.startswith("{"):
        parts = elements(target)
        piece = f"b{BITS[kind] // len(parts)}"
        writers = [r.writer(p, piece) for p in parts]
        whole = r.source(source, kind)

        def unpack(mask: Mask) -> None:
            pieces = np.ascontiguousarray(np.broadcast_to(whole, r.threads)).view(TYPES[piece]).reshape(-1, len(parts))
            for number, write in enumerate(writers):
                write(np.ascontiguousarray(pieces[:, number]), mask)

        return unpack
    if source.startswith("{"):
        parts = elements(source)
        pieces = [r.source(p, f"b{BITS[kind] // len(parts)}") for p in parts]

        def pack() -> Values:
            stacked = np.stack([np.broadcast_to(p, r.threads) for p in pieces], axis=1)
            return np.ascontiguousarray(stacked).view(TYPES[kind]).reshape(-1)

        return _computed(r.writer(target, kind), pack)
    row, write = r.source(source, kind), r.writer(target, kind)
    return lambda mask: write(row, mask)


@builds("cvta")
def _generic(r: Registers, i: Instruction) -> Run:
    row, write = r.source(i.operands[1], i.type), r.writer(i.operands[0], i.type)
    return lambda mask: write(row, mask)


@builds("cvt")
def _convert(r: Registers, i: Instruction) -> Run:
    to, kind = i.parts[-2], i.parts[-1]
    if to == "tf32":
        row = r.source(i.operands[1], "u32")
        if not i.has("rna"):
            raise Unsupported("rounding to tf32")
        return _computed(r.writer(i.operands[0], "b32"), lambda: (row + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if to in ("f16x2", "bf16x2"):
        high, low = (r.source(o, "f32") for o in i.operands[1:3])
        relu, both = i.has("relu"), r.float_writer(i.operands[0], to)

        def pack() -> Values:
            pair = np.stack(np.broadcast_arrays(low, high), axis=1)
            return np.maximum(pair, np.float32(0)) if relu else pair

        return _computed(both, pack)
    if to not in TYPES or kind not in TYPES:
        raise Unsupported("conversion")
    floating_in, floating_out = kind in ("f16", "bf16", "f32", "f64"), to in ("f16", "bf16", "f32", "f64")
    value = r.reader(i.operands[1], kind)
    if floating_out:
        if not (i.has("rn") or i.has("rz") or BITS[to] > BITS[kind] or to == kind):
            raise Unsupported("rounding")
        if i.has("rz") or (to == kind and i.has("rni", "rzi", "rmi", "rpi")):
            return _computed(r.float_writer(i.operands[0], to), _rounded(i, to, value))
        saturate, write = i.has("sat"), r.float_writer(i.operands[0], to)
        return _computed(write, (lambda: np.clip(value(), 0, 1)) if saturate else value)
    write_integer, dtype = r.writer(i.operands[0], to), np.dtype(TYPES[to])
    limits = np.iinfo(dtype)
    if floating_in:
        step = _rounding(i)

        def to_integer() -> Values:  # saturates; NaN gives zero
            rounded = np.nan_to_num(step(value().astype(np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
            inside = np.clip(rounded, float(limits.min), float(limits.max))
            whole = np.where(rounded >= float(limits.max), 0, inside).astype(dtype)
            return np.where(rounded >= float(limits.max), dtype.type(limits.max), whole)

        return _computed(write_integer, to_integer)
    if i.has("sat"):
        return _computed(write_integer, lambda: np.clip(value(), limits.min, limits.max).astype(dtype))
    return _computed(write_integer, lambda: value().astype(dtype))


def _rounding(i: Instruction) -> Any:
    for name, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        if i.has(name):
            return function
    raise Unsupported("rounding to an integer")


def _rounded(i: Instruction, to: str, value: Callable[[], Values]) -> Callable[[], Values]:
    if to == "bf16" and i.has("rz"):
        return lambda: widen_bfloat16((value().astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16))
    if i.has("rz"):
        raise Unsupported("rounding")
    step = _rounding(i)
    return lambda: step(value())
