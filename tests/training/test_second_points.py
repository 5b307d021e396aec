"""Second points against hand formulas in float64 and the exact flow of Gaussian data."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_runtime.training.second_points import from_data, from_teacher, gaussian

SHAPE = (5, 2, 3, 3)
SOLVERS: list[Literal["euler", "heun"]] = ["euler", "heun"]


def some(seed: int = 0) -> tuple[Tensor, ...]:
    """x, z, x_t, t, r, label in float64."""
    rng = np.random.default_rng(seed)
    x, z = (torch.from_numpy(rng.standard_normal(SHAPE)) for _ in range(2))
    t = torch.tensor([0.01, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)
    r = t * torch.tensor([0.2, 0.5, 0.9, 0.99, 0.7], dtype=torch.float64)
    return x, z, x + t[:, None, None, None] * z, t, r, torch.arange(5)


def test_from_data_is_the_image_with_less_of_the_same_noise() -> None:
    x, z, x_t, t, r, label = some()
    found = from_data(x, z, x_t, t, r, label)
    for i in range(5):
        np.testing.assert_allclose(found[i].numpy(), x[i].numpy() + r[i].item() * z[i].numpy(), rtol=1e-14)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_of_a_nonlinear_denoiser_by_hand(solver: Literal["euler", "heun"]) -> None:
    def D(x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        assert label is not None
        return torch.tanh(x / (1 + sigma[:, None, None, None])) + 0.1 * label.double()[:, None, None, None]

    x, z, x_t, t, r, label = some()
    found = from_teacher(D, solver)(x, z, x_t, t, r, label).numpy()
    for index in np.ndindex(*SHAPE):
        i = index[0]
        a, s, low = x_t[index].item(), t[i].item(), r[i].item()

        def slope(value: float, level: float, i: int = i) -> float:
            return (value - math.tanh(value / (1 + level)) - 0.1 * i) / level

        d = slope(a, s)
        end = a + (low - s) * d
        if solver == "heun":
            end = a + (low - s) * (d + slope(end, low)) / 2
        assert found[index] == pytest.approx(end, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("solver", "order"), [("euler", 2), ("heun", 3)])
def test_one_steps_error_falls_with_its_order(solver: Literal["euler", "heun"], order: int) -> None:
    """The exact flow of N(0, s^2) is x sqrt((s^2 + r^2) / (s^2 + t^2))."""
    s, t = 0.5, 0.8
    x = torch.full((1, 1, 1, 1), 1.7, dtype=torch.float64)
    level = torch.tensor([t], dtype=torch.float64)
    steps, errors = [2.0**-i for i in range(4, 10)], []
    for h in steps:
        r = level - h
        found = from_teacher(gaussian(s), solver)(x, x, x, level, r, None).item()
        errors.append(abs(found - 1.7 * math.sqrt((s**2 + (t - h) ** 2) / (s**2 + t**2))))
    found_order = np.polyfit(np.log(steps[2:]), np.log(errors[2:]), 1)[0]
    assert found_order == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("s", [0.1, 0.5, 2.0])
def test_the_gaussians_denoiser_is_its_posterior_mean(s: float) -> None:
    # by quadrature over the clean value: E[x | x + t z = y]
    y, t = 0.9, 0.7
    x = np.linspace(-12 * s, 12 * s, 20_001)
    weight = np.exp(-(x**2) / (2 * s**2) - (y - x) ** 2 / (2 * t**2))
    image, level = torch.full((1, 1, 1, 1), y, dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    assert gaussian(s)(image, level, None).item() == pytest.approx((x * weight).sum() / weight.sum(), rel=1e-9)
