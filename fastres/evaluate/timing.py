"""Timing alternatives against each other on a machine that others may use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], rounds: int, device: torch.device, least_s: float = 0.05
) -> tuple[list[float], list[float]]:
    """Seconds a call of two functions, measured in turns, so that a disturbance meets both.

    Each measurement repeats its call until it takes about ``least_s``; the order within a round alternates.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(function: Callable[[], object], calls: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - begin) / calls

    functions, calls = (first, second), [1, 1]
    for index, function in enumerate(functions):
        measure(function, 1)  # the first call allocates, and prepares what is cached
        calls[index] = max(1, round(least_s / measure(function, 1)))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for index in ((0, 1), (1, 0))[turn % 2]:
            times[index].append(measure(functions[index], calls[index]))
    return times
