"""The middle noise levels of a few-step sampler, searched for in log sigma.

Every candidate draws the same indices of the same seed, so the same noise: the objective is a function of the levels
alone, and a few thousand images tell candidates apart that other noise would blur. For the same reason the distance
it ends at flatters: measure the result with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cm_runtime.errors import RequestError
from cm_runtime.schedule import NoiseRange

STEPS = (2, 3, 4)
GRID = 10  # coarse candidates of a two-step sampler
LOWEST = 10  # sigma_min, the lowest of them
SECTIONS = 7  # evaluations of a golden-section search: it ends within 4% of its bracket
SWEEPS = 2  # over the levels of a sampler of more than two steps
_GOLDEN = (math.sqrt(5) - 1) / 2

Levels = tuple[float, ...]
Objective = Callable[[Levels], float]


@dataclass(frozen=True)
class Tuned:
    """The best levels found and their objective; those of the Karras default; how many candidates were evaluated."""

    sigmas: Levels
    value: float
    default: Levels
    default_value: float
    evaluations: int


def most_candidates(steps: int) -> int:
    """How many levels `search` asks for, at most."""
    if steps == 2:
        return 2 + GRID + SECTIONS
    return 1 + steps + SWEEPS * (steps - 1) * SECTIONS


class _Search:
    """Asks the objective once for the same levels, rounded to the six digits that are stored."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.known: dict[Levels, float] = {}

    def __call__(self, levels: Sequence[float]) -> float:
        rounded = tuple(float(f"{level:.6g}") for level in levels)
        if rounded not in self.known:
            self.known[rounded] = self._objective(rounded)
        return self.known[rounded]

    @property
    def best(self) -> Levels:
        return min(self.known, key=lambda levels: self.known[levels])


def search(
    objective: Objective,
    steps: int,
    known: Mapping[int, Levels] | None = None,
    noise_range: NoiseRange | None = None,
) -> Tuned:
    """Minimises ``objective`` over the middle levels of a sampler of 2, 3 or 4 steps; the first is sigma_max.

    known: levels tuned already; those of as many steps are a candidate too, those of one step fewer, or else the
    Karras default, are where three and four steps begin. The Karras default is a candidate, so the result is never
    worse. Two steps: a coarse grid, then golden section around its best. More: every way to add a level, then
    coordinate descent by golden section. Raises RequestError for another number of steps.
    """
    if steps not in STEPS:
        raise RequestError(f"noise levels are tuned for 2, 3 or 4 steps, not {steps}")
    known = known or {}
    ask = _Search(objective)
    noise_range = noise_range or NoiseRange()
    sigma_min, sigma_max = noise_range.sigma_min, noise_range.sigma_max
    default = noise_range.levels(steps)
    default_value = ask(default)
    if steps in known:
        ask(known[steps])
    if steps == 2:
        grid = np.geomspace(min(LOWEST * sigma_min, sigma_max / 4), sigma_max / 2, GRID)
        for level in grid:
            ask((sigma_max, float(level)))
        spacing = float(grid[1] / grid[0])
        level = ask.best[1]
        _refine(ask, ask.best, 1, max(level / spacing, sigma_min * 1.01), min(level * spacing, sigma_max * 0.99))
    else:
        fewer = noise_range.levels(steps - 1, known)
        for place, (above, below) in enumerate(pairwise((*fewer, sigma_min)), start=1):
            ask((*fewer[:place], math.sqrt(above * below), *fewer[place:]))
        for _ in range(SWEEPS):
            before = ask.known[ask.best]
            for place in range(1, steps):
                above, level, below = (*ask.best, sigma_min)[place - 1 : place + 2]
                _refine(ask, ask.best, place, math.sqrt(level * below), math.sqrt(level * above))
            if ask.known[ask.best] == before:
                break
    return Tuned(ask.best, ask.known[ask.best], default, default_value, len(ask.known))


def _refine(ask: _Search, levels: Levels, place: int, low: float, high: float) -> None:
    """Golden-section search in the logarithm of one level, between ``low`` and ``high``."""

    def value(x: float) -> float:
        return ask((*levels[:place], math.exp(x), *levels[place + 1 :]))

    a, b = math.log(low), math.log(high)
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = value(c), value(d)
    for _ in range(SECTIONS - 2):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = value(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = value(d)
