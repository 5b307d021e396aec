"""How the training grid grows, against integer arithmetic, a lognormal's quadrature and published values."""

import math
from itertools import pairwise

import numpy as np
import pytest

from cm_runtime.schedule import NoiseRange
from cm_runtime.training.schedule import N_of_k, ict_N_of_k, ict_probabilities, mu_of_k


@pytest.mark.parametrize(
    ("k", "N", "mu"), [(0, 2, 0.9025), (1, 3, 0.95), (400_000, 143, 0.999278), (800_000, 201, 0.999487)]
)
def test_imagenet_training_schedule_has_its_published_values(k, N, mu):
    K, s0, s1 = 800_000, 2, 200
    assert N_of_k(k, K, s0, s1) == N
    assert mu_of_k(k, K, s0, s1, 0.95) == pytest.approx(mu, abs=5e-7)


@pytest.mark.parametrize(("K", "s0", "s1"), [(800_000, 2, 150), (7, 2, 3), (255, 1, 20), (400_000, 10, 1280)])
def test_grid_growth_is_the_smallest_square_that_reaches_the_target(K, s0, s1):
    """ceil(sqrt(q) - 1) + 1 is the least n with n^2 >= q, which integers decide exactly."""
    for k in {*range(0, K, max(K // 300, 1)), K}:
        target = k * ((s1 + 1) ** 2 - s0**2) + s0**2 * K  # K q
        n = max(math.isqrt(target // K) - 1, 0)
        while n * n * K < target:
            n += 1
        found = N_of_k(k, K, s0, s1)
        on_a_square = n * n * K == target and k not in (0, K)  # there floating point may fall on either side
        assert found in ({max(n, 2), n + 1} if on_a_square else {max(n, 2)})


def test_grid_growth_never_shrinks_and_mu_grows_with_it():
    N = [N_of_k(k, 1000, 2, 150) for k in range(1001)]
    assert sorted(N) == N and (N[0], N[-1]) == (2, 151)
    mu = [mu_of_k(k, 1000, 2, 150, 0.9) for k in range(1001)]
    assert sorted(mu) == mu and mu[-1] == pytest.approx(0.9 ** (2 / 150))


def test_mu_of_nothing_is_nothing():
    assert [mu_of_k(k, 1000, 2, 150, 0.0) for k in (0, 1, 999)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("k", "N"), [(0, 11), (49_999, 11), (50_000, 21), (349_999, 641), (350_000, 1281)])
def test_icts_grid_doubles_as_published(k, N):
    assert ict_N_of_k(k, 400_000, 10, 1280) == N
    assert ict_N_of_k(400_000, 400_000, 10, 1280) == 1281


@pytest.mark.parametrize(("K", "s0", "s1"), [(8, 1, 1), (1, 10, 1280), (1000, 3, 20), (7, 5, 9)])
def test_icts_grid_never_shrinks_nor_leaves_its_ends(K, s0, s1):
    N = [ict_N_of_k(k, K, s0, s1) for k in range(K + 1)]
    assert sorted(N) == N and N[0] == s0 + 1 and N[-1] <= s1 + 1
    assert all(b in (a, 2 * (a - 1) + 1, s1 + 1) for a, b in pairwise(N))


def test_icts_bins_are_as_likely_as_published():
    published = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980]
    found = ict_probabilities(NoiseRange().karras(11)[::-1], -1.1, 2.0)
    np.testing.assert_allclose(found, published, atol=6e-7)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_icts_bins_are_a_lognormals_quadrature():
    """The integral of the lognormal's density over a bin, over that of all bins."""
    grid = NoiseRange().karras(7)[::-1]
    masses = []
    for low, high in pairwise(np.log(grid)):
        u = np.linspace(low, high, 100_001)
        masses.append(np.trapezoid(np.exp(-((u + 0.4) ** 2) / (2 * 1.3**2)), u))
    np.testing.assert_allclose(ict_probabilities(grid, -0.4, 1.3), np.array(masses) / sum(masses), rtol=1e-7)
