"""Pairs of noise levels: known answers, and how often each pair is drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cm_runtime.schedule import NoiseRange
from cm_runtime.training.config import CdPhase, CtPhase, EctPhase, IctPhase
from cm_runtime.training.noise import Draws
from cm_runtime.training.noise_pairs import Pairs, ect_r, ect_stage, lognormal, pairs_of

SHARED: dict[str, Any] = {"steps": 400_000, "batch": 4, "learning_rate": 1e-3}
ICT_11 = [0.062633, 0.181737, 0.245501, 0.213494, 0.142446, 0.080605, 0.041080, 0.019580, 0.008944, 0.003980]


def ect_phase(**keys: Any) -> EctPhase:
    return EctPhase(method="ect", **{**SHARED, **keys})


def drawn(pairs: Pairs, k: int, N: int, count: int = 50_000) -> np.ndarray:
    """How often each of N - 1 pairs of neighbours is drawn; anything else fails."""
    t, r = pairs(Draws(0, torch.arange(count)), k)
    assert t.dtype == r.dtype == torch.float32 and t.shape == r.shape == (count,)
    grid = NoiseRange().karras(N)[::-1].astype(np.float32)
    n = np.searchsorted(grid, r.numpy())
    assert (grid[n] == r.numpy()).all() and (grid[n + 1] == t.numpy()).all()
    return np.bincount(n, minlength=N - 1)


def assert_as_often(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square, refused once in ten thousand (Wilson and Hilferty's approximation of its quantile)."""
    expected = counts.sum() * p
    df = len(p) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    assert ((counts - expected) ** 2 / expected).sum() < limit


@pytest.mark.parametrize("N", [2, 3, 18, 40])
def test_cd_draws_neighbours_of_its_grid_uniformly(N: int) -> None:
    counts = drawn(pairs_of(CdPhase(method="cd", N=N, **SHARED)), 123, N)
    if N == 2:
        assert counts.tolist() == [50_000]
    else:
        assert_as_often(counts, np.full(N - 1, 1 / (N - 1)))


@pytest.mark.parametrize(("k", "N"), [(0, 2), (100_000, 76), (399_999, 151)])
def test_ct_draws_neighbours_of_a_growing_grid_uniformly(k: int, N: int) -> None:
    # ceil(sqrt(1/4 (151^2 - 2^2) + 2^2) - 1) + 1 = ceil(75.52 - 1) + 1 = 76
    counts = drawn(pairs_of(CtPhase(method="ct", **SHARED)), k, N)
    if N > 2:
        assert_as_often(counts, np.full(N - 1, 1 / (N - 1)))


@pytest.mark.parametrize(("k", "N"), [(0, 11), (49_999, 11), (50_000, 21), (399_999, 1281)])
def test_icts_grid_doubles_as_published(k: int, N: int) -> None:
    t, r = pairs_of(IctPhase(method="ict", **SHARED))(Draws(0, torch.arange(2000)), k)
    grid = NoiseRange().karras(N)[::-1].astype(np.float32)
    assert np.isin(t.numpy(), grid).all() and np.isin(r.numpy(), grid).all()
    assert (np.searchsorted(grid, t.numpy()) - np.searchsorted(grid, r.numpy()) == 1).all()


def test_ict_draws_its_bins_as_often_as_published() -> None:
    counts = drawn(pairs_of(IctPhase(method="ict", **SHARED)), 0, 11, 200_000)
    assert_as_often(counts, np.array(ICT_11) / sum(ICT_11))


def test_ict_of_one_bin_draws_it() -> None:
    assert drawn(pairs_of(IctPhase(method="ict", s0=1, s1=1, **SHARED)), 0, 2, 100).tolist() == [100]


@pytest.mark.parametrize(
    ("t", "stage", "r"),
    [
        (1.0, 0, 0.0),
        (1.0, 2, 0.606059),
        (1.0, 3, 0.803029),
        (10.0, 0, 4.998184),
        (10.0, 2, 8.749546),
        (10.0, 3, 9.374773),
    ],
)
def test_ect_r_known_answers(t: float, stage: int, r: float) -> None:
    assert ect_r(torch.tensor([t]), stage, 2.0, 8.0, 1.0).item() == pytest.approx(r, abs=2e-6)


@pytest.mark.parametrize(("q", "k", "b"), [(2.0, 8.0, 1.0), (4.0, 8.0, 1.0), (1.5, 3.0, 2.5)])
def test_ect_r_is_the_printed_formula_and_stays_between_zero_and_t(q: float, k: float, b: float) -> None:
    t = np.exp(np.linspace(-9, 4.4, 257))
    for stage in range(8):
        r = ect_r(torch.from_numpy(t), stage, q, k, b).numpy()
        n = 1 + k / (1 + np.exp(b * t))
        np.testing.assert_allclose(r, np.maximum(0.0, t - t * n / q ** (stage + 1)), rtol=1e-12)
        assert ((r >= 0) & (r < t)).all()


@pytest.mark.parametrize(
    ("steps", "stages", "first", "wanted"),
    [
        (8, 8, 0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, 0, [0, 0, 1, 1, 2, 2, 3, 3]),
        (8, 2, 3, [3, 3, 3, 3, 4, 4, 4, 4]),
        (7, 3, 0, [0, 0, 0, 1, 1, 2, 2]),
        (3, 8, 1, [1, 3, 6]),
    ],
)
def test_stages_are_equal_parts_of_the_phase_from_the_first_on(
    steps: int, stages: int, first: int, wanted: list[int]
) -> None:
    phase = ect_phase(steps=steps, stages=stages, first_stage=first)
    assert [ect_stage(phase, k) for k in range(steps)] == wanted


def test_ect_pairs_are_lognormal_and_follow_the_stages() -> None:
    pairs = pairs_of(ect_phase(steps=4, stages=4, P_mean=-0.7, P_std=1.3))
    draws = Draws(1, torch.arange(20_000))
    for k in range(4):
        t, r = pairs(draws, k)
        log = t.double().log()
        assert log.mean().item() == pytest.approx(-0.7, abs=5 * 1.3 / math.sqrt(20_000))
        assert log.std().item() == pytest.approx(1.3, rel=0.03)
        wanted = t.double() * (1 - (1 + 8 / (1 + t.double().exp())) / 2 ** (k + 1))
        np.testing.assert_allclose(r.numpy(), wanted.clamp(min=0).numpy(), rtol=1e-4, atol=1e-6)
        assert (r < t).all()


def test_levels_depend_on_seed_and_place_alone() -> None:
    whole = lognormal(Draws(0, torch.arange(100)), -1.2, 1.2)
    assert torch.equal(whole[30:37], lognormal(Draws(0, torch.arange(30, 37)), -1.2, 1.2))
    assert not torch.equal(whole, lognormal(Draws(1, torch.arange(100)), -1.2, 1.2))
