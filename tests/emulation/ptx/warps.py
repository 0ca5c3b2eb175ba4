"""Instructions of a whole warp: shuffles, votes, reductions, and the tensor cores' matrix product."""

import re

import numpy as np

from emulation.errors import EmulationError, Unsupported
from emulation.ptx.arithmetic import Run, builds
from emulation.ptx.parser import Instruction, elements
from emulation.ptx.registers import Mask, Registers, Values
from fastres.kernels.common.triton_interpreter import widen_bfloat16


def whole_warps(r: Registers, mask: Mask, what: str) -> None:
    """Raises unless each warp takes part with all threads or none."""
    if mask is not True:
        count = mask.reshape(-1, 32).sum(axis=1)
        if ((count != 0) & (count != 32)).any():
            raise EmulationError(f"{what} with part of a warp")


@builds("shfl")
def _shuffle(r: Registers, i: Instruction) -> Run:
    mode = next(p for p in i.parts if p in ("up", "down", "bfly", "idx"))
    target, _, flag = i.operands[0].partition("|")
    a = r.source(i.operands[1], "b32")
    by, clamp = r.source(i.operands[2], "u32"), r.source(i.operands[3], "u32")
    write = r.writer(target, "b32")
    predicate = r.target(flag, "pred") if flag and flag != "_" else None
    lane = r.lane.astype(np.int64)

    def run(mask: Mask) -> None:
        segment, last = (clamp >> np.uint32(8)) & np.uint32(31), clamp & np.uint32(31)
        outer = lane & segment
        limit = outer | (last & ~segment)
        distance = by.astype(np.int64) & 31
        if mode == "up":
            source = lane - distance
            valid = source >= limit
        elif mode == "down":
            source = lane + distance
            valid = source <= limit
        else:
            source = lane ^ distance if mode == "bfly" else outer | (distance & ~segment.astype(np.int64))
            valid = source <= limit
        at = r.warp_base + np.where(valid, source, lane)
        if mask is not True and not mask[at][mask].all():
            raise EmulationError("shuffle reads from a thread that isn't active")
        value = np.broadcast_to(a, r.threads)[at]
        write(value, mask)
        if predicate is not None:
            np.copyto(predicate, valid, where=mask)

    return run


@builds("vote")
def _vote(r: Registers, i: Instruction) -> Run:
    negated = i.operands[1].startswith("!")
    a = r.source(i.operands[1].lstrip("!"), "pred")
    mode = next(p for p in i.parts if p in ("all", "any", "uni", "ballot"))
    write = r.writer(i.operands[0], "b32" if mode == "ballot" else "pred")

    def run(mask: Mask) -> None:
        active = np.broadcast_to(mask, r.threads).reshape(-1, 32)
        votes = (np.broadcast_to(a, r.threads).reshape(-1, 32) != negated) & active
        if mode == "ballot":
            value = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            every, some = votes.sum(axis=1) == active.sum(axis=1), votes.any(axis=1)
            value = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(np.repeat(value, 32), mask)

    return run


@builds("activemask")
def _active(r: Registers, i: Instruction) -> Run:
    write = r.writer(i.operands[0], "b32")

    def run(mask: Mask) -> None:
        active = np.broadcast_to(mask, r.threads).reshape(-1, 32).astype(np.uint32)
        write(np.repeat((active << np.arange(32, dtype=np.uint32)).sum(axis=1, dtype=np.uint32), 32), mask)

    return run


@builds("redux")
def _reduce(r: Registers, i: Instruction) -> Run:
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                 "xor": np.bitwise_xor}  # fmt: skip
    function, a = functions[i.parts[2]], r.source(i.operands[1], i.type)
    write = r.writer(i.operands[0], i.type)

    def run(mask: Mask) -> None:
        whole_warps(r, mask, "redux")
        write(
            np.repeat(function.reduce(np.broadcast_to(a, r.threads).reshape(-1, 32), axis=1, dtype=a.dtype), 32), mask
        )

    return run


# Fragments of mma.sync (PTX ISA, "Matrix fragments for mma.m16n8k16"): lane 4·g + q holds, of A, rows g and g + 8 and in each
# the pair of columns 2q, 2q + 1 (and + 8); of B, column g and those rows; of C and D, rows g, g + 8, columns 2q, 2q + 1.
# For TF32 (m16n8k8) a register holds one element: columns q and q + 4. m16n8k8 of 16-bit types has half the columns.


def _operand(bits: Values, kind: str) -> Values:
    """[registers, threads] uint32 as float32 [registers, warps, 8 (g), 4 (q), elements of a register]."""
    shape = (bits.shape[0], bits.shape[1] // 32, 8, 4)
    if kind == "tf32":  # the low 13 bits are ignored
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(*shape, 1)
    if kind == "f16":
        return bits.view(np.float16).reshape(*shape, 2).astype(np.float32)
    return widen_bfloat16(bits.view(np.uint16)).reshape(*shape, 2)


@builds("mma")
def _matrix_product(r: Registers, i: Instruction) -> Run:
    if not i.has("sync") or not i.has("row") or not i.has("col"):
        raise Unsupported("layout")
    shape = next(p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    types = i.parts[i.parts.index("col") + 1 :]
    if shape not in ("m16n8k16", "m16n8k8") or len(types) != 4:
        raise Unsupported(f"shape .{shape}")
    result, kind, other, addend = types
    if kind != other or kind not in ("f16", "bf16", "tf32") or result != addend or result not in ("f32", "f16"):
        raise Unsupported("types " + ".".join(types))
    d, a, b, c = (elements(o) for o in i.operands[:4])
    depth = int(shape.split("k")[1])
    columns = len(a) // 2  # registers side by side in k
    if depth != columns * 4 * (1 if kind == "tf32" else 2) or len(b) != columns:
        raise Unsupported("number of registers")
    rows_a, rows_b = ([r.source(name, "b32") for name in names] for names in (a, b))
    rows_c = [np.broadcast_to(r.source(name, "b32"), r.threads) for name in c]
    writers = [r.writer(name, "b32") for name in d]

    def run(mask: Mask) -> None:
        whole_warps(r, mask, "mma")
        left = _operand(np.stack(rows_a), kind)  # registers: (columns, 2 rows)
        left = left.reshape(columns, 2, *left.shape[1:]).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, depth)
        right = _operand(np.stack(rows_b), kind).transpose(1, 2, 0, 3, 4).reshape(-1, 8, depth)
        product = np.matmul(left, right.transpose(0, 2, 1))  # [warps, 16, 8]
        warps = len(product)
        product = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)  # [row half, column, warps, g, q]
        if result == "f32":
            total = product.reshape(4, -1) + np.stack(rows_c).view(np.float32)
            for write, row in zip(writers, total, strict=True):
                write(row.view(np.uint32), mask)
        else:  # a register holds both columns
            pairs = product.transpose(0, 2, 3, 4, 1).reshape(2, -1, 2)
            total16 = (pairs + np.stack(rows_c).view(np.float16).reshape(2, -1, 2)).astype(np.float16)
            for write, row in zip(writers, total16, strict=True):
                write(np.ascontiguousarray(row).view(np.uint32).reshape(-1), mask)

    return run
