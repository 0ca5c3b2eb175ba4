"""Times contenders in turns inside one process, so that whatever disturbs the machine meets all of them.

A round is: baseline (untimed), baseline (timed), …, ours (untimed), ours (timed). The untimed call puts caches, the
allocator and the processor's clock into the state that its own kind of work leaves, whoever ran before. The figure is a
ratio of medians; its spread comes from the ratios of each round, where both sides met the same disturbance.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fastres.evaluate.timing import Spread

Call = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """``value`` = median(baseline) / median(ours), above 1 where ours is faster; quartiles of the rounds' ratios."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Ours against one baseline. Times in seconds a call."""

    baseline: str
    ours_s: Spread
    baseline_s: Spread
    ratio: Ratio
    rounds: int

    def as_row(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return asdict(self)


def compare(ours: list[float], theirs: list[float], baseline: str) -> Comparison:
    """The comparison of two equally long series of seconds, entry i of both from round i."""
    paired = Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
    mine, other = Spread.of(ours), Spread.of(theirs)
    return Comparison(baseline, mine, other, Ratio(other.median / mine.median, paired.low, paired.high), len(ours))


def interleave(benchmark: Any, ours: Call, baselines: dict[str, Call], rounds: int) -> list[Comparison]:
    """Times ``ours`` through pytest-benchmark's fixture and, in the same rounds, each of ``baselines``.

    Args:
        benchmark: the fixture; its statistics are those of ``ours``.
        baselines: name -> call that does the same work.
        rounds: timed calls of each.

    Returns:
        One comparison a baseline; none under ``--benchmark-disable``, where each contender runs once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in baselines}

    def before_ours() -> None:
        for name, call in baselines.items():
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        ours()

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(ours, setup=before_ours, rounds=rounds, iterations=1)
    finally:
        if collecting:
            gc.enable()
    if benchmark.stats is None:
        return []
    mine = list(benchmark.stats.stats.data)
    return [compare(mine, theirs, name) for name, theirs in seconds.items()]
