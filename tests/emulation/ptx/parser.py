"""PTX text to instructions: registers, parameters, shared symbols, labels; each instruction with its place in the source."""

import re
from dataclasses import dataclass, field

from emulation.errors import Unsupported

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32,
        "u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    op: str  # the first part of the opcode
    parts: tuple[str, ...]  # all of them
    operands: tuple[str, ...]
    guard: str | None  # predicate register
    negated: bool
    text: str
    place: str  # file:line:column of the source, if the compiler says so

    def has(self, *parts: str) -> bool:
        return any(p in self.parts for p in parts)

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, str, int]]  # (name, type, bytes)
    threads: int | None  # of a block, where the text says so
    registers: dict[str, int] = field(default_factory=dict)  # bits by name
    shared: dict[str, int] = field(default_factory=dict)  # offsets by symbol
    static_shared: int = 0
    dynamic_shared: int = 0  # where dynamic shared memory begins
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.S)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]")
_LABEL = re.compile(r"^([$\w]+):(?!:)\s*")
_GUARD = re.compile(r"^@(!?)([%\w$]+)\s+")


def parse(text: str, entry: str | None = None) -> Kernel:
    """The kernel called ``entry``, or the first one."""
    found = next((m for m in _ENTRY.finditer(text) if entry in (None, m[1])), None)
    if found is None:
        raise Unsupported(f"no kernel {entry or ''} in the PTX text")
    threads = re.search(r"\.reqntid\s+(\d+)", found[3])
    kernel = Kernel(
        found[1],
        [(n, t, int(c or 1) * BITS[t] // 8) for t, n, c in _PARAMETER.findall(found[2])],
        int(threads[1]) if threads else None,
    )
    place, pending = "", ""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M))
    for line in _body(text, found.end()).splitlines():
        code, _, comment = line.partition("//")
        if (stripped := code.strip()).startswith(".loc"):
            place = comment.strip() or _place(stripped, files) or place
            continue
        pending += code + "\n"
        *complete, pending = pending.split(";")
        for statement in complete:
            _statement(kernel, " ".join(statement.split()), place)
        if _LABEL.match(pending.strip()) and not _LABEL.sub("", pending.strip()):
            kernel.labels[_LABEL.match(pending.strip())[1]] = len(kernel.code)  # type: ignore[index]
            pending = ""
    _statement(kernel, " ".join(pending.split()), place)
    for align, name in re.findall(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)\[\]", text):
        kernel.dynamic_shared = max(kernel.dynamic_shared, -(-kernel.static_shared // int(align)) * int(align))
        kernel.shared[name] = kernel.dynamic_shared
    return kernel


def _place(location: str, files: dict[str, str]) -> str:
    """What ``.loc file line column, ..., inlined_at file line column`` says: file:line, and where it was inlined."""
    places = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)", location)
    return ", in ".join(f"{files[number].rpartition('/')[2]}:{line}" for number, line in places if number in files)


def _body(text: str, start: int) -> str:
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return text[start : start + found.start()]
    raise Unsupported("the kernel's body doesn't end")


def _statement(kernel: Kernel, statement: str, place: str) -> None:
    while True:  # scopes and labels before the instruction
        stripped = re.sub(r"^[{}\s]+", "", statement)
        if label := _LABEL.match(stripped):
            kernel.labels[label[1]] = len(kernel.code)
            stripped = stripped[label.end() :]
        if stripped == statement:
            break
        statement = stripped
    if not statement:
        return
    if statement.startswith("."):
        _directive(kernel, statement)
        return
    guard = _GUARD.match(statement)
    code = statement[guard.end() :] if guard else statement
    opcode, _, rest = code.partition(" ")
    parts = tuple(opcode.split("."))
    kernel.code.append(
        Instruction(
            parts[0],
            parts,
            tuple(_split(rest)),
            guard[2] if guard else None,
            bool(guard and guard[1]),
            statement,
            place,
        )
    )


def _directive(kernel: Kernel, statement: str) -> None:
    if statement.startswith(".reg"):
        _, kind, names = statement.split(None, 2)
        bits = BITS.get(kind.lstrip("."))
        if bits is None:
            raise Unsupported(f"registers of type {kind}")
        for name in names.split(","):
            many = re.match(r"\s*([%\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                kernel.registers[one] = bits
    elif found := _SHARED.match(statement):
        align, kind, name, count = found.groups()
        if name not in kernel.shared:
            at = -(-kernel.static_shared // int(align)) * int(align)
            kernel.shared[name] = at
            kernel.static_shared = at + int(count or 0) * BITS[kind] // 8
    elif statement.startswith((".local", ".global", ".const", ".callprototype")):
        raise Unsupported(f"directive {statement}")


def _split(text: str) -> list[str]:
    """Operands, separated by commas outside of braces and brackets."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return operands + [current.strip()] if current.strip() else operands


def elements(operand: str) -> list[str]:
    """The registers of a vector operand ``{a, b}``, or the operand itself."""
    return [o.strip() for o in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]


def split_address(operand: str) -> tuple[str, int]:
    """``[base + offset]`` as (base, offset)."""
    inner = operand.strip("[] ").replace(" ", "")
    found = re.match(r"^([%\w$.]+)(?:\+?(-?(?:0x)?\w+))?$", inner)
    if not found:
        raise Unsupported(f"address {operand}")
    return found[1], int(found[2] or "0", 0)


def shared_width(kernel: Kernel) -> int:
    """The smallest access to shared memory, in bytes: accesses are aligned, so this is what can be told apart."""
    widths = [16]
    for i in kernel.code:
        if i.op in ("ld", "st", "atom", "red") and any(p.startswith("shared") for p in i.parts):
            vector = next((int(p[1:]) for p in i.parts if p in ("v2", "v4")), 1)
            widths.append(vector * BITS[i.type] // 8)
        elif i.op == "cp" and len(i.operands) > 2:
            widths.append(int(i.operands[2], 0))
    return min(widths)
