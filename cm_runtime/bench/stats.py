"""Intervals for quantiles and for ratios of times, from samples that come in blocks.

On a shared machine neighbouring samples are alike, so that n of them say less than n. Everything here takes a block, a
short stretch of time, as the unit that repeats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cm_runtime.bench.results import Estimate, Latency

Times = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 4000
FEWEST_RESAMPLES = 1000  # of so many values that RESAMPLES of them would be over RESAMPLED values
RESAMPLED = 1 << 22
PART = 1 << 20  # values resampled together: memory is the same for any number of them
FEWEST_BLOCKS = 8  # of which an interval is made


def latency(blocks: Sequence[Times]) -> Latency:
    """p50 to p99 of samples in milliseconds, in their blocks."""
    return Latency(
        samples=sum(len(block) for block in blocks),
        blocks=len(blocks),
        p50=quantile(blocks, 0.5),
        **{name: _percentile(blocks, q) for name, q in (("p90", 0.9), ("p95", 0.95), ("p99", 0.99))},
    )


def quantile(blocks: Sequence[Times], q: float) -> Estimate:
    """The ``q``-quantile and its interval (Woodruff 1952): that of the share of samples below it, read off the samples.

    The share's variance is that of the blocks' (a cluster sample's), neighbours' covariance included (Newey and West
    1987), and at least a binomial's. No interval where it would reach beyond the smallest or largest sample, as it
    does with few of them.
    """
    samples = np.sort(np.concatenate(blocks))
    n, k = len(samples), len(blocks)
    value = float(np.quantile(samples, q))
    if k < 2:
        return Estimate(value=value)
    below = np.array([(block <= value).sum() - q * len(block) for block in blocks])
    lags = round(k**0.5)
    alone = float(below @ below)
    between = sum(2 * (1 - lag / (lags + 1)) * float(below[lag:] @ below[:-lag]) for lag in range(1, lags + 1))
    variance = max(k / (k - 1) * max(alone, alone + between) / n**2, q * (1 - q) / n)
    reach = student_t(max(k // 3, min(k - 1, 4))) * math.sqrt(variance)
    low, high = q - reach, q + reach
    if low < 0 or high > 1:
        return Estimate(value=value)
    return Estimate(value=value, low=float(np.quantile(samples, low)), high=float(np.quantile(samples, high)))


def _percentile(blocks: Sequence[Times], q: float) -> Estimate | None:
    estimate = quantile(blocks, q)
    return None if estimate.high is None else estimate


def typical(values: Sequence[float]) -> Estimate:
    """The interquartile mean of the logarithms of ``values``, one a block, and its bootstrap interval."""
    return _exp(*_bootstrap(np.log(np.asarray(values, np.float64)), 0))


def ratio(new: Sequence[float], base: Sequence[float], seed: int = 0) -> Estimate:
    """The time of ``new`` over that of ``base``: block medians of the same rounds, side by side.

    The interquartile mean of the rounds' log ratios, and its bootstrap interval over the rounds.
    """
    logs = np.log(np.asarray(new, np.float64)) - np.log(np.asarray(base, np.float64))
    return _exp(*_bootstrap(logs, seed))


def unpaired_ratio(new: Sequence[float], base: Sequence[float], drift: float = 0.0, seed: int = 0) -> Estimate:
    """The same of two runs, one after the other.

    Neither run tells how fast the machine was in the other. ``drift``: how far its speed, as something else measured
    it in both, went apart (a share); the interval is widened by it on both sides.
    """
    centre, low, high = _bootstrap(np.log(np.asarray(new, np.float64)), seed)
    other, other_low, other_high = _bootstrap(np.log(np.asarray(base, np.float64)), seed + 1)
    if None in (low, high, other_low, other_high):
        return _exp(centre - other, None, None)
    assert low is not None and high is not None and other_low is not None and other_high is not None
    margin = math.log1p(drift)
    below = math.hypot(centre - low, other_high - other) + margin
    above = math.hypot(high - centre, other - other_low) + margin
    return _exp(centre - other, centre - other - below, centre - other + above)


def _exp(centre: float, low: float | None, high: float | None) -> Estimate:
    return Estimate(
        value=math.exp(centre),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
    )


def interquartile_mean(values: Times) -> Times:
    """The mean of the middle half along the last axis, the values at its edges counted in part."""
    ranks = np.sort(values, axis=-1)
    n = ranks.shape[-1]
    place = np.arange(n)
    weight = np.clip(np.minimum(place + 1 - n / 4, 3 * n / 4 - place), 0, 1)
    mean: Times = ranks @ weight / weight.sum()
    return mean


def _bootstrap(values: Times, seed: int) -> tuple[float, float | None, float | None]:
    """The interquartile mean and its interval, by the circular block bootstrap (Politis and Romano 1992).

    Stretches of about the cube root of the number of values are drawn, so that neighbours may be alike. The percentiles
    are widened as Student's t is wider than the normal (Hesterberg 2015, arXiv 1411.5279, "expanded percentile").
    """
    k = len(values)
    centre = float(interquartile_mean(values))
    if k < FEWEST_BLOCKS:
        return centre, None, None
    rng = np.random.default_rng(seed)
    length = round(k ** (1 / 3))
    resamples = max(FEWEST_RESAMPLES, min(RESAMPLES, RESAMPLED // k))
    starts = rng.integers(0, k, (resamples, -(-k // length)))
    means = []
    for part in np.split(starts, range(0, resamples, max(1, PART // k))[1:]):
        index = (part[:, :, None] + np.arange(length)).reshape(len(part), -1)[:, :k] % k
        means.append(interquartile_mean(values[index]))
    tail = NormalDist().cdf(-math.sqrt(k / (k - 1)) * student_t(k - 1))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return centre, float(low), float(high)


def student_t(freedom: int) -> float:
    """The 0.975-quantile of Student's t (Abramowitz and Stegun 26.7.5; exact for one and two degrees of freedom)."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = NormalDist().inv_cdf(0.975)
    v = float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
