"""Contenders that take turns, so that whatever the machine does is done to all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def take_turns(work: Mapping[str, Callable[[], T]], rounds: Iterable[object]) -> dict[str, list[T]]:
    """Call every contender once a round, in an order that turns round every time; returns their results."""
    results: dict[str, list[T]] = {name: [] for name in work}
    for number, _ in enumerate(rounds):
        for name in work if number % 2 == 0 else reversed(list(work)):
            results[name].append(work[name]())
    return results


def until(seconds: float, least: int = 5, most: int = 1 << 30) -> Iterator[int]:
    """Rounds until ``seconds`` have passed, within ``least`` and ``most`` of them."""
    end = time.monotonic() + seconds
    for number in range(most):
        if number >= least and time.monotonic() >= end:
            return
        yield number


def timer(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A function that runs ``work`` and returns its seconds."""

    def run() -> float:
        began = clock()
        work()
        return clock() - began

    return run


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """The `quartiles` of the time of ``slow`` over that of ``fast``, round by round."""
    return quartiles([a / b for a, b in zip(slow, fast, strict=True)])
