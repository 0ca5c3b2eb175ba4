"""Whole networks against the runtimes that people would use instead: one process, in turns, parity first."""

from __future__ import annotations

from .contenders import CONTENDERS, LIMITS, PEERS, PLAN, Problem, Reference, Unavailable
from .measuring import Run, measure, prepare, rows_of, run_case, scaling

__all__ = [
    "CONTENDERS", "LIMITS", "PEERS", "PLAN", "Problem", "Reference", "Run", "Unavailable", "measure", "prepare",
    "rows_of", "run_case", "scaling",
]  # fmt: skip
