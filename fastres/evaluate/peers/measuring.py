"""Parity, then times in turns, then ratios of what was measured in the same round."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastres.evaluate.timing import Spread

from .contenders import CONTENDERS, LIMITS, PEERS, PLAN, Call, Problem, Reference

SETTLE_S = 0.02
Row = dict[str, Any]
Tell = Callable[[str], None]


def _silent(_: str) -> None:
    """Nobody wants to know."""


@dataclass
class Run:
    """A contender on one problem: a call if it may be timed, else the reason why not."""

    name: str
    call: Call | None = None
    error: float | None = None
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)

    def settle(self) -> None:
        """Untimed calls: caches and clocks are then as its own work leaves them, and the threads of whoever ran before no
        longer spin."""
        assert self.call is not None
        ready = time.perf_counter() + SETTLE_S
        self.call()
        while time.perf_counter() < ready:
            self.call()

    def timed_call(self) -> None:
        """Settles, then times one call."""
        assert self.call is not None
        self.settle()
        start = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - start)


def prepare(problem: Problem, names: Iterable[str], tell: Tell = _silent) -> list[Run]:
    """Every contender, made ready and its logits compared with float64. Nothing that a contender raises stops the others."""
    runs = []
    for name in names:
        tell(f"{problem.case}: preparing {name}")
        run = Run(name)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                call = CONTENDERS[name](problem)
                run.error = problem.error(call())
        except Exception as error:
            run.reason = one_line(error)
        else:
            limit = LIMITS[problem.dtype]
            if run.error <= limit:
                run.call = call
            else:
                run.reason = f"parity failed: logits off by {run.error:.1e}, allowed {limit:.0e}"
        runs.append(run)
    return runs


def one_line(error: Exception) -> str:
    """A reason for a table's cell."""
    kind = "" if type(error).__name__ == "Unavailable" else f"{type(error).__name__}: "
    lines = str(error).strip().splitlines() or [""]
    return (kind + lines[0])[:160].rstrip(": ")


def measure(runs: Sequence[Run], rounds: int, tell: Tell = _silent) -> None:
    """``rounds`` timed calls of each run that has a call; each round begins with another of them."""
    able = [run for run in runs if run.call is not None]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds if able else 0):
            tell(f"round {turn + 1} of {rounds}")
            first = turn % len(able)
            for run in able[first:] + able[:first]:
                run.timed_call()
    finally:
        if collecting:
            gc.enable()


def paired(theirs: Run | None, ours: Run | None) -> dict[str, float] | None:
    """Median and quartiles of their time / our time, round by round: above 1 where ours is faster."""
    if theirs is None or ours is None or not theirs.seconds or not ours.seconds:
        return None
    return vars(Spread.of([a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]))


def rows_of(problem: Problem, runs: Sequence[Run]) -> list[Row]:
    """One row a contender, in values that JSON can hold; ``best_peer`` marks the fastest of the others' runtimes."""
    plan = next((run for run in runs if run.name == PLAN), None)
    peers = [run for run in runs if run.name in PEERS and run.seconds]
    best = min(peers, key=lambda run: Spread.of(run.seconds).median, default=None)
    return [
        {
            "case": problem.case, "baseline": run.name, "kind": "latency", "net": problem.net, "dtype": problem.dtype,
            "batch": problem.batch, "shape": "x".join(map(str, problem.images.shape)),
            "threads": torch.get_num_threads(), "rounds": len(run.seconds),
            "seconds": vars(Spread.of(run.seconds)) if run.seconds else None,
            "error": run.error if run.error is not None and math.isfinite(run.error) else None,
            "allowed": LIMITS[problem.dtype], "reason": run.reason,
            "over_plan": paired(run, plan), "best_peer": run is best,
        }
        for run in runs
    ]  # fmt: skip


def release(runs: Iterable[Run]) -> None:
    """Frees what was prepared; torch.compile would otherwise keep, and search, the code of every network so far."""
    for run in runs:
        run.call = None
    torch._dynamo.reset()
    gc.collect()


def run_case(problem: Problem, names: Iterable[str], rounds: int, tell: Tell = _silent) -> list[Row]:
    """Everything about one problem."""
    runs = prepare(problem, names, tell)
    try:
        measure(runs, rounds, lambda text: tell(f"{problem.case}: {text}"))
        return rows_of(problem, runs)
    finally:
        release(runs)


def scaling(reference: Reference, batch: int, dtype: str, rounds: int, threads: Sequence[int] = (1, 2)) -> list[Row]:
    """The plan by itself on different numbers of threads, in turns; ``speed_up`` is over the first of ``threads``."""
    problem, before = reference.problem(batch, dtype), torch.get_num_threads()
    runs: list[Run] = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            runs += prepare(problem, [PLAN])
        for turn in range(rounds):
            for place in range(len(runs)):
                at = (turn + place) % len(runs)
                if runs[at].call is not None:
                    torch.set_num_threads(threads[at])
                    runs[at].timed_call()
    finally:
        torch.set_num_threads(before)
    return [
        {
            "case": f"{problem.case}-scaling", "baseline": f"{count} threads", "kind": "scaling", "net": problem.net,
            "dtype": dtype, "batch": batch, "shape": "x".join(map(str, problem.images.shape)), "threads": count,
            "rounds": len(run.seconds), "seconds": vars(Spread.of(run.seconds)) if run.seconds else None,
            "error": run.error, "reason": run.reason, "speed_up": paired(runs[0], run),
        }
        for count, run in zip(threads, runs, strict=True)
    ]  # fmt: skip
