"""Intervals against scipy, against exact quantiles, and counted over many made-up runs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cm_runtime.bench import stats


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 255])
def test_student_t(freedom: int) -> None:
    assert stats.student_t(freedom) == pytest.approx(scipy_stats.t.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 255])
def test_interquartile_mean(n: int) -> None:
    """Against scipy's trimmed mean where a quarter is a whole number of values, and by hand elsewhere."""
    values = np.random.default_rng(n).standard_normal(n)
    found = float(stats.interquartile_mean(values))
    if n % 4 == 0:
        assert found == pytest.approx(scipy_stats.trim_mean(values, 0.25))
    fine = np.repeat(np.sort(values), 4)  # every value four times: a quarter of them is whole
    assert found == pytest.approx(fine[n : 3 * n].mean())


def series(rng: np.random.Generator, blocks: int, size: int, alike: float) -> list[np.ndarray]:
    """Times in blocks: a skewed part for each sample, and one for each block that the next block half inherits."""
    common = np.zeros(blocks)
    for i in range(1, blocks):
        common[i] = alike * common[i - 1] + rng.normal() * 0.02
    return [np.exp(each + 0.05 * np.abs(rng.standard_t(3, size))) for each in common]


@pytest.mark.process
@pytest.mark.parametrize("q", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_quantile_intervals_hold_the_quantile_as_often_as_they_say(q: float, alike: float) -> None:
    rng = np.random.default_rng(0)
    true = np.quantile(np.concatenate(series(rng, 20000, 20, alike)), q)
    hits = missing = 0
    for _ in range(300):
        found = stats.quantile(series(rng, 20, 20, alike), q)
        if found.low is None or found.high is None:
            missing += 1
            continue
        assert found.low <= found.value <= found.high
        hits += found.low <= true <= found.high
    assert missing <= 15
    assert hits / (300 - missing) >= 0.88  # of 0.95: blocks that are alike tell less than they seem to
    assert alike or hits < 300 - missing  # nor are they so wide that they cannot miss


def test_samples_of_one_block_are_not_taken_for_many() -> None:
    """Blocks that differ more than their samples do: an interval for independent samples would hardly ever hold."""
    rng = np.random.default_rng(1)
    hits = wrong = 0
    for _ in range(200):
        levels = rng.normal(10, 1, 16)
        blocks = [level + 0.01 * rng.standard_normal(50) for level in levels]
        found = stats.quantile(blocks, 0.5)
        assert found.low is not None and found.high is not None
        hits += found.low <= 10 <= found.high
        pooled = np.sort(np.concatenate(blocks))
        low, high = scipy_stats.binom.ppf([0.025, 0.975], 800, 0.5).astype(int)
        wrong += pooled[low] <= 10 <= pooled[high]
    assert hits >= 180
    assert wrong < 120


@pytest.mark.parametrize(("q", "least"), [(0.9, 36), (0.95, 73), (0.99, 381)])
def test_a_percentile_takes_enough_samples(q: float, least: int) -> None:
    """About as many as the largest of them lies above the percentile's interval with: n (1 - q) > 1.96^2 q."""
    rng = np.random.default_rng(0)
    few = stats.latency([rng.random(least // 10) for _ in range(8)])
    assert getattr(few, f"p{round(q * 100)}") is None
    many = stats.latency([rng.random(least // 2) for _ in range(12)])
    found = getattr(many, f"p{round(q * 100)}")
    assert found.low < found.value < found.high


def test_one_block_has_no_interval() -> None:
    assert stats.quantile([np.arange(100.0)], 0.5).low is None
    found = stats.latency([np.array([3.0])])
    assert (found.samples, found.blocks, found.p50.value, found.p50.low, found.p99) == (1, 1, 3.0, None, None)


@pytest.mark.process
@pytest.mark.parametrize("k", [8, 12, 20, 40])
def test_ratio_intervals_hold_the_ratio_as_often_as_they_say(k: int) -> None:
    rng = np.random.default_rng(k)
    hits = 0
    for _ in range(300):
        common = rng.normal(0, 0.2, k)  # what the machine does to both
        one, other = np.exp(common + 0.03 * rng.standard_t(3, (2, k)))
        found = stats.ratio(1.1 * one, other)
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.1 <= found.high
    assert 0.9 <= hits / 300 <= 0.985


def test_turns_cancel_what_the_machine_does() -> None:
    """Paired by round, a machine that turns half as quick midway changes nothing; unpaired, it is in the interval."""
    rng = np.random.default_rng(0)
    drift = np.where(np.arange(20) < 10, 1.0, 2.0)
    base, new = drift * np.exp(0.01 * rng.standard_normal((2, 20)))
    paired, apart = stats.ratio(new, base), stats.unpaired_ratio(new, base)
    assert paired.low is not None and paired.high is not None and apart.low is not None and apart.high is not None
    assert paired.high / paired.low < 1.03
    assert apart.high / apart.low > 1.3


def test_drift_widens_what_two_runs_tell() -> None:
    rng = np.random.default_rng(0)
    one, other = np.exp(0.01 * rng.standard_normal((2, 20)))
    still, moved = stats.unpaired_ratio(one, other), stats.unpaired_ratio(one, other, drift=0.1)
    assert still.low is not None and still.high is not None and moved.low is not None and moved.high is not None
    assert moved.high == pytest.approx(still.high * 1.1) and moved.low == pytest.approx(still.low / 1.1)


def test_few_rounds_have_no_interval() -> None:
    assert stats.ratio([1.0] * 7, [1.0] * 7).low is None
    assert stats.unpaired_ratio([1.0] * 7, [1.0] * 20).low is None
    assert stats.ratio([2.0] * 8, [1.0] * 8).low == pytest.approx(2.0)


def test_the_same_samples_give_the_same_interval() -> None:
    values = np.exp(0.1 * np.random.default_rng(0).standard_normal((2, 17)))
    assert stats.ratio(*values) == stats.ratio(*values)
