"""Noise levels: the Karras grid of a model's range, and the steps of a sampler on it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import RequestError

SMALLEST, LARGEST = 1e-15, 1e15  # any noise level's bounds: their squares are normal numbers in float32
GRID_LIMIT = 1_000_000


@dataclass(frozen=True)
class NoiseRange:
    """Noise levels of a model, from ``sigma_min`` to ``sigma_max``, spaced by ``rho`` (arXiv 2206.00364, eq. 5).

    Args:
        sigma_min: the least, above 0.
        sigma_max: the greatest, where samplers begin.
        rho: 1 is even spacing; the greater, the closer levels lie at sigma_min.

    Example:
        >>> NoiseRange().levels(2)
        (80.0, 2.515218976147159)
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def karras(self, N: int) -> NDArray[np.float64]:
        """The Karras grid, descending from ``sigma_max`` to ``sigma_min``: (N,) float64, N >= 2.

        The consistency-model paper counts the same grid upwards (arXiv 2303.01469, section 2). Raises RequestError.
        """
        if N < 2:
            raise RequestError(f"a grid of noise levels needs at least 2 points, not {N}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise RequestError(f"a grid needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")
        ramp = np.arange(N, dtype=np.float64) / (N - 1)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigmas: NDArray[np.float64] = (high + ramp * (low - high)) ** self.rho
        sigmas[0], sigmas[-1] = self.sigma_max, self.sigma_min
        return sigmas

    def levels(self, steps: int, tuned: Mapping[int, Sequence[float]] | None = None) -> tuple[float, ...]:
        """The noise levels of a ``steps``-step sampler, descending from ``sigma_max``.

        The model's tuned levels for that many steps where it carries some; else the Karras grid of steps + 1
        points without its last. Raises RequestError unless steps is from 1 to 1000.
        """
        if not 1 <= steps <= 1000:
            raise RequestError(f"steps must be from 1 to 1000, not {steps}")
        if tuned and steps in tuned:
            return tuple(tuned[steps])
        return tuple(float(s) for s in self.karras(steps + 1)[:-1])

    def check(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """``sigmas`` as floats if a sampler can take them: strictly descending from sigma_max, above sigma_min.

        Raises RequestError naming the first that does not fit.
        """
        levels = as_numbers(sigmas)
        if not levels:
            raise RequestError("sigmas is empty; give at least one noise level, the first one sigma_max")
        if not same_levels(levels[:1], [self.sigma_max]):
            raise RequestError(f"the first sigma must be the model's sigma_max {self.sigma_max:g}, not {levels[0]:g}")
        for before, after in pairwise(levels):
            if not after < before:
                raise RequestError(f"sigmas must descend strictly; {after!r} follows {before!r}")
        if not levels[-1] > self.sigma_min:
            raise RequestError(
                f"every sigma must lie above the model's sigma_min {self.sigma_min!r}, not {levels[-1]!r}"
            )
        return (float(self.sigma_max), *levels[1:])

    def from_ts(self, ts: Sequence[int], N: int) -> tuple[float, ...]:
        """The noise levels of OpenAI's ``ts``, descending from sigma_max: len(ts) - 1 of them.

        ts: ascending indices into the descending Karras grid of N points, 0 and the terminal N - 1 included. The
        authors' sampler evaluates f at all but the last and renoises to the next, so that one which stops earlier
        leaves noise behind (openai/consistency_models, cm/karras_diffusion.py, stochastic_iterative_sampler).
        Raises RequestError.
        """
        indices = _indices("ts", ts, N)
        if len(indices) < 2:
            raise RequestError(f"ts takes at least two indices, 0 and the grid's last, {N - 1}; not {len(indices)}")
        if _descends(indices):
            raise RequestError(
                "ts must ascend; descending indices, without the grid's last, are what --timesteps takes"
            )
        for before, after in pairwise(indices):
            if not before < after:
                raise RequestError(f"ts must ascend strictly; {after} follows {before}")
        if indices[0] != 0:
            raise RequestError(
                f"ts must start at 0, the first noise level being sigma_max {self.sigma_max:g}; not {indices[0]}"
            )
        if indices[-1] != N - 1:
            raise RequestError(
                f"ts must end at {N - 1}, the grid's last; ending at {indices[-1]} would leave noise in the images"
            )
        return self._at(indices[:-1], N)

    def from_timesteps(self, timesteps: Sequence[int], N: int) -> tuple[float, ...]:
        """The noise levels of diffusers' ``timesteps``, descending from sigma_max: as many as there are timesteps.

        timesteps: descending indices into the descending Karras grid of N points, down to 0 and without the terminal
        N - 1; the last of them is the first level (CMStochasticIterativeScheduler.set_timesteps). Raises RequestError.
        """
        indices = _indices("timesteps", timesteps, N)
        if not indices:
            raise RequestError("timesteps is empty; give at least 0, the first noise level")
        if _descends(indices[::-1]):
            raise RequestError(f"timesteps must descend; ascending indices, up to {N - 1}, are what --ts takes")
        for before, after in pairwise(indices):
            if not before > after:
                raise RequestError(f"timesteps must descend strictly; {after} follows {before}")
        if indices[0] == N - 1:
            raise RequestError(
                f"timesteps must leave out {N - 1}, the grid's last: it is sigma_min {self.sigma_min:g}, where f is the"
                " identity"
            )
        if indices[-1] != 0:
            raise RequestError(
                f"timesteps must end at 0, the first noise level being sigma_max {self.sigma_max:g}; not {indices[-1]}"
            )
        return self._at(indices[::-1], N)

    def _at(self, indices: Sequence[int], N: int) -> tuple[float, ...]:
        grid = self.karras(N)
        return tuple(float(grid[i]) for i in indices)


def level_text(sigmas: Sequence[float]) -> str:
    """Noise levels as every command prints them and --sigmas takes them, with six digits: 80, 2.51522."""
    return ", ".join(f"{sigma:g}" for sigma in sigmas)


def same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    """True if two lists of noise levels are equal as `level_text` prints them. Raises RequestError."""
    return level_text(as_numbers(one)) == level_text(as_numbers(other))


def as_numbers(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Noise levels as floats. Raises RequestError for what is no list of numbers."""
    try:
        if isinstance(sigmas, str | bytes | Mapping):
            raise TypeError("no list")
        return tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"sigmas must be numbers, not {sigmas!r}") from error


def _indices(name: str, values: Sequence[int], N: int) -> list[int]:
    """``values`` as indices into a grid of N points. Raises RequestError."""
    if not 2 <= N <= GRID_LIMIT:
        raise RequestError(f"grid must be from 2 to {GRID_LIMIT} points, not {N}")
    try:
        indices = [operator.index(i) for i in values]
    except TypeError as error:
        raise RequestError(f"{name} takes whole numbers, not {list(values)}") from error
    for i in indices:
        if not 0 <= i < N:
            raise RequestError(f"{name} on a grid of {N} points must be from 0 to {N - 1}, not {i}")
    return indices


def _descends(indices: Sequence[int]) -> bool:
    return len(indices) > 1 and all(before > after for before, after in pairwise(indices))
