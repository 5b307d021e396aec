"""Noise levels: Karras grids, the steps of a sampler, and how a training grid grows."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import RequestError

SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7.0
SMALLEST, LARGEST = 1e-15, 1e15  # any noise level's bounds: their squares are normal numbers in float32
GRID_LIMIT = 1_000_000


def karras_sigmas(
    N: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> NDArray[np.float64]:
    """The Karras grid, descending from ``sigma_max`` to ``sigma_min``: (N,) float64, N >= 2.

    arXiv 2206.00364, eq. 5; the consistency-model paper counts the same grid upwards (arXiv 2303.01469,
    section 2).
    """
    if N < 2:
        raise RequestError(f"a grid of noise levels needs at least 2 points, not {N}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise RequestError(f"a grid needs 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    ramp = np.arange(N, dtype=np.float64) / (N - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: NDArray[np.float64] = (high + ramp * (low - high)) ** rho
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas


def sampler_sigmas(
    steps: int,
    tuned: Mapping[int, Sequence[float]] | None = None,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> tuple[float, ...]:
    """The noise levels of a ``steps``-step sampler, descending from ``sigma_max``.

    The model's tuned levels for that many steps where it carries some; else the Karras grid of steps + 1
    points without its last. Raises RequestError unless steps is from 1 to 1000.
    """
    if not 1 <= steps <= 1000:
        raise RequestError(f"steps must be from 1 to 1000, not {steps}")
    if tuned and steps in tuned:
        return tuple(tuned[steps])
    return tuple(float(s) for s in karras_sigmas(steps + 1, sigma_min, sigma_max, rho)[:-1])


def level_text(sigmas: Sequence[float]) -> str:
    """Noise levels as every command prints them and --sigmas takes them, with six digits: 80, 2.51522."""
    return ", ".join(f"{sigma:g}" for sigma in sigmas)


def same_levels(one: Sequence[float], other: Sequence[float]) -> bool:
    """True if two lists of noise levels are equal as `level_text` prints them. Raises RequestError."""
    return level_text(_numbers(one)) == level_text(_numbers(other))


def _numbers(sigmas: Sequence[float]) -> tuple[float, ...]:
    """Noise levels as floats. Raises RequestError for what is no list of numbers."""
    try:
        return tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"sigmas must be numbers, not {sigmas!r}") from error


def checked_sigmas(
    sigmas: Sequence[float],
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
) -> tuple[float, ...]:
    """``sigmas`` as floats if a sampler can take them: strictly descending from sigma_max, above sigma_min.

    Raises RequestError naming the first that does not fit.
    """
    levels = _numbers(sigmas)
    if not levels:
        raise RequestError("sigmas is empty; give at least one noise level, the first one sigma_max")
    if not same_levels(levels[:1], [sigma_max]):
        raise RequestError(f"the first sigma must be the model's sigma_max {sigma_max:g}, not {levels[0]:g}")
    for before, after in pairwise(levels):
        if not after < before:
            raise RequestError(f"sigmas must descend strictly; {after!r} follows {before!r}")
    if not levels[-1] > sigma_min:
        raise RequestError(f"every sigma must lie above the model's sigma_min {sigma_min!r}, not {levels[-1]!r}")
    return (float(sigma_max), *levels[1:])


def sigmas_of_ts(
    ts: Sequence[int],
    N: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> tuple[float, ...]:
    """The noise levels of OpenAI's ``ts``, descending from sigma_max: len(ts) - 1 of them.

    ts: ascending indices into the descending Karras grid of N points, 0 and the terminal N - 1 included. The
    authors' sampler evaluates f at all but the last and renoises to the next, so that one which stops earlier leaves
    noise behind (openai/consistency_models, cm/karras_diffusion.py, stochastic_iterative_sampler). Raises RequestError.
    """
    indices = _indices("ts", ts, N)
    if len(indices) < 2:
        raise RequestError(f"ts takes at least two indices, 0 and the grid's last, {N - 1}; not {len(indices)}")
    if _descends(indices):
        raise RequestError("ts must ascend; descending indices, without the grid's last, are what --timesteps takes")
    for before, after in pairwise(indices):
        if not before < after:
            raise RequestError(f"ts must ascend strictly; {after} follows {before}")
    if indices[0] != 0:
        raise RequestError(f"ts must start at 0, the first noise level being sigma_max {sigma_max:g}; not {indices[0]}")
    if indices[-1] != N - 1:
        raise RequestError(
            f"ts must end at {N - 1}, the grid's last; ending at {indices[-1]} would leave noise in the images"
        )
    return _levels(indices[:-1], N, sigma_min, sigma_max, rho)


def sigmas_of_timesteps(
    timesteps: Sequence[int],
    N: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> tuple[float, ...]:
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
            f"timesteps must leave out {N - 1}, the grid's last: it is sigma_min {sigma_min:g}, where f is the identity"
        )
    if indices[-1] != 0:
        raise RequestError(
            f"timesteps must end at 0, the first noise level being sigma_max {sigma_max:g}; not {indices[-1]}"
        )
    return _levels(indices[::-1], N, sigma_min, sigma_max, rho)


def _indices(name: str, given: Sequence[int], N: int) -> list[int]:
    """``given`` as indices into a grid of N points. Raises RequestError."""
    if not 2 <= N <= GRID_LIMIT:
        raise RequestError(f"grid must be from 2 to {GRID_LIMIT} points, not {N}")
    try:
        indices = [operator.index(i) for i in given]
    except TypeError as error:
        raise RequestError(f"{name} takes whole numbers, not {list(given)}") from error
    for i in indices:
        if not 0 <= i < N:
            raise RequestError(f"{name} on a grid of {N} points must be from 0 to {N - 1}, not {i}")
    return indices


def _descends(indices: Sequence[int]) -> bool:
    return len(indices) > 1 and all(before > after for before, after in pairwise(indices))


def _levels(indices: Sequence[int], N: int, sigma_min: float, sigma_max: float, rho: float) -> tuple[float, ...]:
    grid = karras_sigmas(N, sigma_min, sigma_max, rho)
    return tuple(float(grid[i]) for i in indices)


def N_of_k(k: int, K: int, s0: int, s1: int) -> int:
    """N(k), the size of the training grid at step ``k`` of ``K``, growing from s0 to s1 + 1 (arXiv 2303.01469, C).

    As in the authors' code: ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1, and the first value is at least 2.
    """
    N = math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
    return max(N, 2)


def mu_of_k(k: int, K: int, s0: int, s1: int, mu0: float) -> float:
    """mu(k), the decay of the EMA target at step ``k``: exp(s0 ln mu0 / (N(k) - 1)) (arXiv 2303.01469, C).

    That is mu0^(s0 / (N(k) - 1)), where mu0 may be 0. The paper prints N(k) in the denominator; the authors' code,
    which made the published models, divides by N(k) - 1.
    """
    return math.pow(mu0, s0 / max(N_of_k(k, K, s0, s1) - 1, 1))


def ict_N_of_k(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, which doubles every K' of K steps (arXiv 2310.14189, section 3.4).

    K' = floor(K / (log2 floor(s1/s0) + 1)).
    """
    doubling = max(math.floor(K / (math.log2(s1 // s0) + 1)), 1)
    return min(s0 << (k // doubling), s1) + 1


def ict_probabilities(grid: Sequence[float] | NDArray[np.float64], P_mean: float, P_std: float) -> NDArray[np.float64]:
    """How often iCT takes each pair of neighbours of an ascending ``grid``: (len(grid) - 1,), of sum 1.

    p_i ~ erf((ln s_{i+1} - P_mean)/(sqrt2 P_std)) - erf((ln s_i - P_mean)/(sqrt2 P_std)) (arXiv 2310.14189, eq. 10).
    """
    scaled = (np.log(np.asarray(grid, np.float64)) - P_mean) / (math.sqrt(2) * P_std)
    p: NDArray[np.float64] = np.diff([math.erf(s) for s in scaled])
    return p / float(p.sum())
