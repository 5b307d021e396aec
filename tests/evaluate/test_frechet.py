"""The Frechet distance against closed forms and SciPy; streamed moments against NumPy in one go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg

from cm_runtime.errors import DataError
from cm_runtime.evaluate.frechet import RunningMoments, frechet_distance, moments


def random_gaussian(rng: np.random.Generator, dimensions: int) -> tuple[Any, Any]:
    """A mean and a covariance of full rank that commutes with no other."""
    factor = rng.standard_normal((dimensions, dimensions + 3))
    return rng.standard_normal(dimensions), factor @ factor.T


# The distance


@pytest.mark.parametrize("dimensions", [1, 3, 7, 128])
def test_distance_of_equal_sets_is_zero(dimensions: int) -> None:
    """Up to rounding, and never negative."""
    features = np.random.default_rng(0).standard_normal((500, dimensions)).astype(np.float32)
    a = moments(features)
    assert 0 <= frechet_distance(a, a) <= 1e-11 * np.trace(a[1])


@pytest.mark.parametrize("dimensions", [1, 3, 7, 128])
def test_distance_of_diagonal_gaussians(dimensions: int) -> None:
    """Commuting covariances: |m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    rng = np.random.default_rng(1)
    m_a, m_b = rng.standard_normal((2, dimensions))
    a, b = rng.uniform(0, 5, (2, dimensions))
    a[0] = 0
    expected = ((m_a - m_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance((m_a, np.diag(a)), (m_b, np.diag(b))) == pytest.approx(expected, rel=1e-12)


def test_distance_of_a_shift_is_its_squared_length() -> None:
    """Equal covariances cancel."""
    rng = np.random.default_rng(2)
    features, shift = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 20)), rng.standard_normal(20)
    distance = frechet_distance(moments(features), moments(features + shift))
    assert distance == pytest.approx((shift**2).sum(), rel=1e-10)


@pytest.mark.parametrize("dimensions", [1, 3, 7, 64])
def test_distance_agrees_with_scipys_square_root(dimensions: int) -> None:
    """Covariances that do not commute, both ways round."""
    rng = np.random.default_rng(3)
    a, b = random_gaussian(rng, dimensions), random_gaussian(rng, dimensions)
    root = scipy.linalg.sqrtm(a[1] @ b[1])
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("few", "many"), [(2, 500), (20, 500), (20, 30), (2, 3)])
def test_distance_with_fewer_samples_than_dimensions(few: int, many: int) -> None:
    """SciPy takes the root of covariances made regular by 1e-10, which is worth 2 * 40 * sqrt(1e-10 * 5)."""
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((few, 40)), rng.standard_normal((many, 40)) * 1.5 + 0.3
    ridge = 1e-10 * np.eye(40)
    root = scipy.linalg.sqrtm((np.cov(x.T) + ridge) @ (np.cov(y.T) + ridge))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root.real)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, abs=2e-3)


def test_distance_of_gaussians_in_a_subspace() -> None:
    """Five dimensions embedded in 64 by an isometry: the closed form of the five stays."""
    rng = np.random.default_rng(5)
    isometry = np.linalg.qr(rng.standard_normal((64, 5)))[0]
    a, b = rng.uniform(0.5, 5, (2, 5))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    covariances = [isometry * v @ isometry.T for v in (a, b)]
    distance = frechet_distance((np.zeros(64), covariances[0]), (np.zeros(64), covariances[1]))
    assert distance == pytest.approx(expected, rel=1e-9)


# The moments


def test_moments_are_numpys_in_float64() -> None:
    """Float32 features far from zero, where float32 sums would lose the covariance."""
    features = (np.random.default_rng(6).standard_normal((1023, 5)) + 1000).astype(np.float32)
    mean, covariance = moments(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("features", [np.zeros((1, 4)), np.zeros(4), np.full((3, 4), np.nan)])
def test_moments_refuses_what_has_none(features: Any) -> None:
    """One row has no covariance; NaN must not become a distance."""
    with pytest.raises(DataError, match=r"at least two|rows of numbers|NaN"):
        moments(features)


@pytest.mark.parametrize("size", [1, 3, 7, 255, 1023])
def test_moments_in_batches_are_numpys_in_one_go(size: int) -> None:
    """A mean a million standard deviations off, which sums of squares would not survive."""
    features = np.random.default_rng(7).standard_normal((1023, 6)) @ np.diag([1, 2, 3, 4, 5, 0]) + 1e6
    running = RunningMoments()
    for first in range(0, len(features), size):
        running.update(features[first : first + size])
    mean, covariance = running.result()
    assert running.count == 1023
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-7, atol=1e-7)


def test_moments_of_batches_that_drift() -> None:
    """Batches with means of their own: what merges them is in the covariance."""
    features = np.random.default_rng(8).standard_normal((600, 3)) + np.arange(600)[:, None]
    running = RunningMoments()
    for part in np.split(features, [1, 8, 263]):
        running.update(part)
    np.testing.assert_allclose(running.result()[1], np.cov(features.T), rtol=1e-12)


def test_what_was_given_to_moments_is_not_kept() -> None:
    batch = np.random.default_rng(9).standard_normal((50, 3))
    expected = np.cov(batch.T)
    running = RunningMoments()
    running.update(batch)
    batch[:] = 0
    np.testing.assert_allclose(running.result()[1], expected)


def test_features_of_another_width_are_refused() -> None:
    running = RunningMoments()
    running.update(np.zeros((2, 3)))
    with pytest.raises(DataError, match="4 numbers follow features of 3"):
        running.update(np.zeros((2, 4)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e155, 1e308])
def test_numbers_too_large_for_a_distance_are_one_line(size: float) -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((5, 5))
    huge = np.full(5, size), root @ root.T / np.abs(root @ root.T).max() * size
    with pytest.raises(DataError, match="no distance between these means"):
        frechet_distance(huge, (np.zeros(5), np.eye(5)))


def test_features_of_very_many_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="features of 4097 numbers; at most 4096"):
        moments(np.zeros((2, 4097), np.float32))
