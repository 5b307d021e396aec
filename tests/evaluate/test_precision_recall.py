"""Precision and recall against an implementation that follows the paper's sentences, and known answers."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from cm_runtime.errors import DataError
from cm_runtime.evaluate import precision_recall as module
from cm_runtime.evaluate.precision_recall import Reservoir, precision_recall

Points = NDArray[np.float64]


def brute_force(real: Points, generated: Points, k: int) -> tuple[float, float]:
    """Equations 1 and 2 of arXiv 1904.06991, a pair at a time."""

    def share(manifold: Points, points: Points) -> float:
        reach = [sorted(np.linalg.norm(a - b) for b in manifold)[k] for a in manifold]
        inside = [any(np.linalg.norm(p - a) <= r for a, r in zip(manifold, reach, strict=True)) for p in points]
        return float(np.mean(inside))

    return share(real, generated), share(generated, real)


@pytest.mark.parametrize(("n", "m", "k"), [(5, 4, 3), (37, 61, 3), (61, 37, 1), (60, 60, 5)])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_it_is_what_the_paper_says(monkeypatch: pytest.MonkeyPatch, n: int, m: int, k: int, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(n + k)
    real, generated = rng.standard_normal((n, 3)), rng.standard_normal((m, 3)) * 0.8 + 0.7
    expected = brute_force(real, generated, k)
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    assert min(expected) > 0 or n < 10


def test_a_set_covers_itself(rng: np.random.Generator) -> None:
    """Far from the origin too, where distances between equal points come out of rounding."""
    points = rng.standard_normal((300, 64)).astype(np.float32) + 1000
    assert precision_recall(points, points) == (1.0, 1.0)


def test_sets_far_apart_share_nothing(rng: np.random.Generator) -> None:
    points = rng.standard_normal((300, 8))
    assert precision_recall(points, points + 100) == (0.0, 0.0)


def test_one_mode_of_two_is_precise_and_recalls_half(rng: np.random.Generator) -> None:
    modes = np.concatenate([rng.standard_normal((200, 4)), rng.standard_normal((200, 4)) + 100])
    precision, recall = precision_recall(modes, modes[:200])
    assert (precision, recall) == (1.0, 0.5)
    assert precision_recall(modes[:200], modes) == (0.5, 1.0)


def test_points_that_repeat_are_at_distance_zero() -> None:
    """Balls of no radius hold their own centre, and nothing beside it."""
    one = np.full((20, 7), 1 / 3)
    assert precision_recall(one, one) == (1.0, 1.0)
    assert precision_recall(one, one + 1e-3) == (0.0, 0.0)


def test_too_few_points_have_no_neighbours() -> None:
    with pytest.raises(DataError, match="more than 3 images of each side"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


@pytest.mark.process
def test_memory_is_that_of_a_block(rng: np.random.Generator) -> None:
    """All distances of 4000 points would take 128 MB."""
    points = rng.standard_normal((4000, 2))
    tracemalloc.start()
    precision_recall(points, points)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("cut", [1, 3, 7, 255])
def test_a_reservoir_does_not_depend_on_the_batches(cut: int) -> None:
    stream = np.arange(1023, dtype=np.float32)[:, None]
    whole, parts = Reservoir(100), Reservoir(100)
    whole.update(stream)
    for first in range(0, len(stream), cut):
        parts.update(stream[first : first + cut])
    assert np.array_equal(whole.result(), parts.result())
    assert len(set(whole.result()[:, 0])) == 100


def test_a_reservoir_takes_from_everywhere() -> None:
    """Of a stream in order, as a folder of classes is, each tenth is kept about equally: 4 standard deviations."""
    reservoir = Reservoir(1000)
    reservoir.update(np.arange(10_000, dtype=np.float32)[:, None])
    counts = np.histogram(reservoir.result(), 10, (0, 10_000))[0]
    assert abs(counts - 100).max() < 4 * 9


def test_a_reservoir_that_is_never_full_keeps_all() -> None:
    reservoir = Reservoir(100)
    reservoir.update(np.arange(7, dtype=np.float32)[:, None])
    assert reservoir.result()[:, 0].tolist() == list(range(7))
