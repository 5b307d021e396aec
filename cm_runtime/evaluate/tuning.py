"""Search for the middle noise levels of a few-step sampler, in log sigma.

Every candidate draws the same indices of the same seed, so the same noise: the objective is a function of the levels
alone, and a few thousand images separate candidates that other noise would blur. For the same reason its last distance
flatters: measure the result with another seed.
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
    """Best levels and their objective; those of the Karras default; the number of candidates."""

    sigmas: Levels
    value: float
    default: Levels
    default_value: float
    evaluations: int


def most_candidates(steps: int) -> int:
    """Largest number of levels that `search` evaluates."""
    if steps == 2:
        return 2 + GRID + SECTIONS
    return 1 + steps + SWEEPS * (steps - 1) * SECTIONS


class _Search:
    """Cache of the objective, by levels of the six digits that a model file has."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.values: dict[Levels, float] = {}

    def __call__(self, levels: Sequence[float]) -> float:
        key = tuple(float(f"{level:.6g}") for level in levels)
        if key not in self.values:
            self.values[key] = self._objective(key)
        return self.values[key]

    @property
    def best(self) -> Levels:
        return min(self.values, key=lambda levels: self.values[levels])


def search(
    objective: Objective,
    steps: int,
    tuned: Mapping[int, Levels] | None = None,
    noise_range: NoiseRange | None = None,
) -> Tuned:
    """Minimise ``objective`` over the middle levels of a sampler of 2, 3 or 4 steps; the first is sigma_max.

    tuned: levels by number of steps; those of as many steps are a candidate too, those of one step fewer, or else the
    Karras default, are where three and four steps begin. The Karras default is a candidate, so the result is never
    worse. Two steps: a coarse grid, then golden section around its best. More: every way to add a level, then
    coordinate descent by golden section. Raises RequestError for another number of steps.
    """
    if steps not in STEPS:
        raise RequestError(f"noise levels are tuned for 2, 3 or 4 steps, not {steps}")
    tuned = tuned or {}
    evaluate = _Search(objective)
    noise_range = noise_range or NoiseRange()
    sigma_min, sigma_max = noise_range.sigma_min, noise_range.sigma_max
    default = noise_range.levels(steps)
    default_value = evaluate(default)
    if steps in tuned:
        evaluate(tuned[steps])
    if steps == 2:
        grid = np.geomspace(min(LOWEST * sigma_min, sigma_max / 4), sigma_max / 2, GRID)
        for level in grid:
            evaluate((sigma_max, float(level)))
        ratio = float(grid[1] / grid[0])
        level = evaluate.best[1]
        _refine(evaluate, evaluate.best, 1, max(level / ratio, sigma_min * 1.01), min(level * ratio, sigma_max * 0.99))
    else:
        fewer = noise_range.levels(steps - 1, tuned)
        for place, (above, below) in enumerate(pairwise((*fewer, sigma_min)), start=1):
            evaluate((*fewer[:place], math.sqrt(above * below), *fewer[place:]))
        for _ in range(SWEEPS):
            last_value = evaluate.values[evaluate.best]
            for place in range(1, steps):
                above, level, below = (*evaluate.best, sigma_min)[place - 1 : place + 2]
                _refine(evaluate, evaluate.best, place, math.sqrt(level * below), math.sqrt(level * above))
            if evaluate.values[evaluate.best] == last_value:
                break
    return Tuned(evaluate.best, evaluate.values[evaluate.best], default, default_value, len(evaluate.values))


def _refine(evaluate: _Search, levels: Levels, place: int, low: float, high: float) -> None:
    """Search by golden section in the logarithm of one level, between ``low`` and ``high``."""

    def value(x: float) -> float:
        return evaluate((*levels[:place], math.exp(x), *levels[place + 1 :]))

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
