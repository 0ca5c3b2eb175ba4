"""Instructions that take words apart: bit fields, byte permutation, three-input logic, counting."""

import numpy as np

from emulation.errors import Unsupported
from emulation.ptx.arithmetic import Run, _computed, builds
from emulation.ptx.parser import BITS, Instruction
from emulation.ptx.registers import TYPES, Registers, Values


@builds("bfe")
def _extract(r: Registers, i: Instruction) -> Run:
    kind, bits = i.type, BITS[i.type]
    if bits != 32:
        raise Unsupported("type")
    a = r.source(i.operands[1], "u32")
    position, length = (r.source(o, "u32") for o in i.operands[2:4])

    def compute() -> Values:
        at = (position & np.uint32(255)).astype(np.int64)
        count = np.minimum(length & np.uint32(255), np.uint32(32)).astype(np.int64)
        wide = a.view(np.int32).astype(np.int64) if kind == "s32" else a.astype(np.int64)
        field = (wide >> np.minimum(at, 63)) & ((np.int64(1) << count) - 1)
        if kind == "s32":
            sign = (count > 0) & ((field >> np.maximum(count - 1, 0)) & 1 == 1)
            field = np.where(sign, field - (np.int64(1) << count), field)
        return field.astype(TYPES[kind])

    return _computed(r.writer(i.operands[0], kind), compute)


@builds("bfi")
def _insert(r: Registers, i: Instruction) -> Run:
    if i.type != "b32":
        raise Unsupported("type")
    a, b, position, length = (r.source(o, "u32") for o in i.operands[1:5])

    def compute() -> Values:
        at = np.minimum(position & np.uint32(255), np.uint32(32)).astype(np.uint64)
        count = np.minimum(length & np.uint32(255), np.uint32(32)).astype(np.uint64)
        field = (((np.uint64(1) << count) - np.uint64(1)) << at) & np.uint64(0xFFFFFFFF)
        return ((b & ~field) | ((a.astype(np.uint64) << at) & field)).astype(np.uint32)

    return _computed(r.writer(i.operands[0], "b32"), compute)


@builds("prmt")
def _permute(r: Registers, i: Instruction) -> Run:
    if i.parts[1] != "b32" or len(i.parts) > 2:
        raise Unsupported("mode")
    a, b, selector = (r.source(o, "u32") for o in i.operands[1:4])

    def compute() -> Values:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint64(0)
        for byte in range(4):
            pick = (selector >> np.uint32(4 * byte)).astype(np.uint64)
            value = (both >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | (np.where(pick & np.uint64(8), sign, value) << np.uint64(8 * byte))
        return result.astype(np.uint32)

    return _computed(r.writer(i.operands[0], "b32"), compute)


@builds("lop3")
def _logic(r: Registers, i: Instruction) -> Run:
    if i.type != "b32" or len(i.parts) > 2:
        raise Unsupported("type")
    sources, table = [r.source(o, "u32") for o in i.operands[1:4]], int(i.operands[4], 0)

    def compute() -> Values:
        result = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                term = [s if row >> 2 - n & 1 else ~s for n, s in enumerate(sources)]
                result = result | (term[0] & term[1] & term[2])
        return np.broadcast_to(result, r.threads)

    return _computed(r.writer(i.operands[0], "b32"), compute)


@builds("clz", "bfind", "brev", "popc")
def _count(r: Registers, i: Instruction) -> Run:
    bits, op = BITS[i.type], i.op
    if bits != 32 or i.has("s32", "shiftamt"):
        raise Unsupported("type")
    a = r.source(i.operands[1], "u32")

    def compute() -> Values:
        if op == "brev":
            pairs = np.unpackbits(np.ascontiguousarray(a).view(np.uint8), bitorder="little").reshape(-1, 32)
            return np.packbits(pairs[:, ::-1], axis=1, bitorder="little").view(np.uint32).reshape(a.shape)
        if op == "popc":
            return np.bitwise_count(a).astype(np.uint32)
        length = np.frexp(a.astype(np.float64))[1].astype(np.int64)  # position of the highest bit, plus one
        return (32 - length if op == "clz" else length - 1).astype(np.uint32)

    return _computed(r.writer(i.operands[0], "b32"), compute)
