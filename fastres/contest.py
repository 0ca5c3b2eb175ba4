"""Who computes a problem: the decision alone. Candidates and the timer are arguments, so it is the same with a fake clock.

The first candidate is the yardstick (as a rule the library). Every other one must give its results, by the tolerance
rule, before it is timed; one that disagrees or raises is dropped with its name. The yardstick wins ties.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TIE = 0.03  # a candidate must be faster than the yardstick by this share: less is within the noise of a measurement
FACTOR = 2.0  # an implementation may be at most twice as wrong as its peer,
ULPS = 8  # and a few units in the last place of the largest value more
TF32_EPS = 2.0**-10

Results = Sequence[Tensor]
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]  # milliseconds of each, taken in turns
Judge = Callable[[Results, Results], str | None]  # (a candidate's results, the yardstick's) -> what is wrong, or None


@dataclass(frozen=True)
class Candidate:
    """``run`` computes the problem and returns all results, always in the same order."""

    name: str
    run: Callable[[], Results]


@dataclass
class Decision:
    """Who won, milliseconds by candidate, and why others were dropped."""

    choice: str
    ms: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def decide(
    candidates: Sequence[Candidate], judge: Judge, timer: Timer, *, what: str = "", tie: float = TIE
) -> Decision:
    """Checks, times and chooses. ``what`` names the problem in warnings.

    Raises whatever the yardstick raises, and ValueError without candidates. A timer that fails for a candidate alone
    (it returns NaN or nothing) drops it.
    """
    if not candidates:
        raise ValueError("nothing to choose from")
    yardstick, *others = candidates
    expected = yardstick.run()
    decision = Decision(yardstick.name)
    runs: dict[str, Callable[[], object]] = {yardstick.name: yardstick.run}
    for candidate in others:
        why = _fault(candidate, expected, judge)
        if why is None:
            runs[candidate.name] = candidate.run
        else:
            _drop(decision, candidate.name, why, what)
    if len(runs) == 1:
        return decision  # nothing to compare: no time is spent
    del expected
    times = timer(runs)
    for name in runs:
        ms = times.get(name, math.nan)
        if math.isfinite(ms):
            decision.ms[name] = ms
        elif name != yardstick.name:
            _drop(decision, name, "could not be timed", what)
    own = decision.ms.get(yardstick.name, math.inf)
    fastest = min(decision.ms, key=decision.ms.__getitem__, default=yardstick.name)
    if decision.ms.get(fastest, math.inf) < own * (1 - tie):
        decision.choice = fastest
    return decision


def _fault(candidate: Candidate, expected: Results, judge: Judge) -> str | None:
    try:
        return judge(candidate.run(), expected)
    except Exception as error:
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _drop(decision: Decision, name: str, why: str, what: str) -> None:
    decision.dropped[name] = why
    warnings.warn(f"fastres: {name} is not used for {what or 'a problem'}: it {why}", RuntimeWarning, stacklevel=4)


def rule(dtype: torch.dtype, truth: Results | None = None, tf32: bool = False) -> Judge:
    """The tolerance rule of the project: error ≤ 2 x the yardstick's error + a floor, for the largest difference and for
    the L2 norm, against ``truth`` in a wider dtype. Without one the yardstick is the truth.

    ``dtype`` is that of the maps, which also limits the vectors that are computed from them. Of the largest value the
    floor is 8 units in the last place; of the norm it is half a unit in 16 bits, which chance can't reach. With ``tf32``
    the unit is that of TF32, and of the norm the floor is two of them: it cuts off both operands, always to one side.
    """
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    wide = dtype in (torch.float32, torch.float64)
    floors = {"max": ULPS * eps, "L2": 2 * eps if tf32 else ULPS * eps if wide else eps / 2}

    def judge(mine: Results, expected: Results) -> str | None:
        exact = expected if truth is None else truth
        if not len(mine) == len(expected) == len(exact):
            return f"gave {len(mine)} results, expected {len(expected)}"
        for number, (own, peer, wide) in enumerate(zip(mine, expected, exact, strict=True)):
            if own.shape != peer.shape or own.dtype != peer.dtype:
                return (
                    f"gave {own.dtype} {list(own.shape)} as result {number}, expected {peer.dtype} {list(peer.shape)}"
                )
            if not torch.equal(own.isnan(), peer.isnan()):
                nans, known = int(own.isnan().sum()), int(peer.isnan().sum())
                return f"has {nans} NaNs in result {number}, expected {known} (or at other places)"
            if not torch.equal(own.isinf(), peer.isinf()):
                return f"has other infinities in result {number}"
            for metric, floor in floors.items():
                error, allowed = _relative(own, wide, metric), FACTOR * _relative(peer, wide, metric) + floor
                if not error <= allowed:
                    return f"differs in result {number} by {error:.1e} (relative, {metric}), allowed {allowed:.1e}"
        return None

    return judge


def _relative(value: Tensor, truth: Tensor, metric: str) -> float:
    """The size of value − truth relative to that of ``truth``, over what is finite in both; wide where that is cheap."""
    wide = torch.float64 if value.device.type == "cpu" else torch.float32
    value, truth = value.to(wide), truth.to(wide)
    both = value.isfinite() & truth.isfinite()
    if not bool(both.all()):
        value, truth = value[both], truth[both]
    if not value.numel():
        return 0.0
    size = (lambda t: float(t.abs().max())) if metric == "max" else (lambda t: float(t.norm()))
    return size(value - truth) / (size(truth) or 1.0)


def rounds_of(clock: Callable[[Callable[[], object]], float], rounds: int) -> Timer:
    """A timer from ``clock`` (milliseconds of one call): candidates take turns, the median of ``rounds`` counts. One that
    raises on the way has no time."""

    def timer(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(max(rounds, 1)):
            for name, run in runs.items():
                try:
                    found[name].append(clock(run))
                except Exception:
                    found[name].append(math.nan)
        return {name: sorted(times)[len(times) // 2] for name, times in found.items() if all(map(math.isfinite, times))}

    return timer
