"""Distances against the same sums in Python's floats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_runtime.errors import CheckpointError
from cm_runtime.training import lpips
from cm_runtime.training.config import EctPhase
from cm_runtime.training.distances import Distance, distance_of, l1, l2, pseudo_huber

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1, 1), (3, 1, 5, 7), (7, 3, 32, 32)]


def phase(**keys: Any) -> EctPhase:
    return EctPhase(method="ect", steps=1, batch=1, learning_rate=1.0, **keys)


def pair(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape), rng.standard_normal(shape)


def assert_each(distance: Distance, shape: tuple[int, ...], expected: Any) -> None:
    """``expected``: the list of an image's differences -> its distance."""
    a, b = pair(shape)
    found = distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found.shape == (shape[0],)
    wanted = [expected((x - y).ravel().tolist()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_l1_is_the_mean_of_absolute_differences(shape: tuple[int, ...]) -> None:
    assert_each(l1, shape, lambda d: math.fsum(map(abs, d)) / len(d))


@pytest.mark.parametrize("shape", SHAPES)
def test_l2_is_the_mean_of_squares(shape: tuple[int, ...]) -> None:
    assert_each(l2, shape, lambda d: math.fsum(v * v for v in d) / len(d))


@pytest.mark.parametrize("c", [1e-9, 0.02993, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_pseudo_huber_in_float64(c: float, shape: tuple[int, ...]) -> None:
    assert_each(pseudo_huber(c), shape, lambda d: math.sqrt(math.fsum(v * v for v in d) + c * c) - c)


def test_pseudo_hubers_own_constant_grows_with_the_image() -> None:
    """0.02993 at 3x32x32 (arXiv 2310.14189, section 3.3)."""

    def constant(shape: tuple[int, ...]) -> float:
        """What is missing of the norm, far away."""
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        return 1e6 - pseudo_huber(None)(zero + 1e6 / math.sqrt(math.prod(shape)), zero).item()

    assert constant((3, 32, 32)) == pytest.approx(0.02993, abs=6e-6)
    assert constant((1, 1, 1)) == pytest.approx(0.00054, abs=1e-8)


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_away() -> None:
    zero, c = torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0.1
    assert pseudo_huber(c)(zero + 1e-4, zero).item() == pytest.approx(1e-8 / (2 * c), rel=1e-5)
    assert pseudo_huber(c)(zero + 1e4, zero).item() == pytest.approx(1e4 - c, rel=1e-9)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"distance": "l1"}, 0.5),
        ({"distance": "l2"}, 0.25),
        ({"distance": "huber", "huber_c": 0.75}, 0.5),
        ({"distance": "huber"}, math.hypot(1, 0.00108) - 0.00108),
        ({}, math.hypot(1, 0.00108) - 0.00108),
    ],
)
def test_a_phase_has_the_distance_it_names(keys: dict[str, Any], expected: float) -> None:
    a = torch.full((2, 1, 2, 2), 0.5)  # of norm 1
    assert distance_of(phase(**keys), CPU)(a, a * 0).tolist() == pytest.approx([expected] * 2)


def test_lpips_is_made_of_the_phases_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def known(a: Tensor, b: Tensor) -> Tensor:
        return a.sum((1, 2, 3))

    def load(paths: list[Path], device: torch.device) -> Distance:
        asked.append((paths, device))
        return known

    monkeypatch.setattr(lpips, "load_lpips", load)
    assert distance_of(phase(distance="lpips", lpips=("a.pt", "b/c.pth")), CPU) is known
    assert asked == [([Path("a.pt"), Path("b/c.pth")], CPU)]


def test_lpips_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        distance_of(phase(distance="lpips", lpips=(str(tmp_path / "nowhere.pt"),)), CPU)
