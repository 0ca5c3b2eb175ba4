"""What :func:`fastres.fuse` did, what it left alone, and why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FusionRow:
    """One layer: ``names`` of the modules it consists of, ``pattern`` such as "conv+bn+add+relu".

    ``reason`` says in words why it was not fused; empty for a fused layer.
    """

    names: tuple[str, ...]
    pattern: str
    reason: str = ""


@dataclass
class FusionReport:
    """``fused`` and ``unfused`` layers of one network; ``str()`` is a table.

    ``lost_hooks``: modules of the original with hooks that don't fire in the fused network. ``notes``: whatever else a
    user should know. ``counts``: number of fused layers by pattern.
    """

    network: str
    fused: list[FusionRow] = field(default_factory=list)
    unfused: list[FusionRow] = field(default_factory=list)
    lost_hooks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(row.pattern for row in self.fused).most_common())

    def __str__(self) -> str:
        parts = ", ".join(f"{n} x {pattern}" for pattern, n in self.counts.items())
        lines = [f"{self.network}: {len(self.fused)} layers fused{f' ({parts})' if parts else ''}, "
                 f"{len(self.unfused)} not"]  # fmt: skip
        if self.fused:
            done = [(row.pattern, " + ".join(row.names)) for row in self.fused]
            lines += ["", *table(("fused as", "layers"), done)]
        if self.unfused:
            left = [(row.pattern, " + ".join(row.names), row.reason) for row in self.unfused]
            lines += ["", *table(("not fused", "layers", "reason"), left)]
        if self.lost_hooks:
            lines += ["", "Hooks that don't fire in the fused network (the modules' own forward is not called):"]
            lines += [f"  {name}" for name in self.lost_hooks]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Plain text columns, two blanks apart, under a ruled header."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    ruled = [header, tuple("-" * w for w in widths), *rows]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in ruled]
