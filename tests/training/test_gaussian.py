"""cd on Gaussian data against values worked out by hand: one step of Euler and of Heun, alone and inside the loss."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from cm_runtime.training import second_points
from cm_runtime.training.config import CdPhase
from cm_runtime.training.losses import Batch, loss_of
from cm_runtime.training.noise import Draws

# s = 0.5, from x = 3 at t = 2 to r = 1. D(x, t) = 0.25 / (0.25 + t^2) x, dx/dt = (x - D) / t.
#   at t = 2: D = 3 / 17 = 0.17647059, dx/dt = 24 / 17 = 1.41176471
#   Euler: 3 - 24 / 17 = 27 / 17 = 1.58823529
#   at r = 1, in 27 / 17: D = 27 / 85 = 0.31764706, dx/dt = 108 / 85 = 1.27058824
#   Heun: 3 - (24 / 17 + 108 / 85) / 2 = 141 / 85 = 1.65882353
BY_HAND = {"euler": 27 / 17, "heun": 141 / 85}


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_one_step_with_the_exact_teacher_is_the_value_worked_out_by_hand(solver: Literal["euler", "heun"]) -> None:
    x_t = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    unused = torch.full_like(x_t, torch.nan)  # neither the clean image nor its noise has a say
    x_r = second_points.from_teacher(second_points.gaussian(0.5), solver)(unused, unused, x_t, one(2.0), one(1.0), None)
    assert x_r.item() == pytest.approx(BY_HAND[solver], rel=1e-14)


class Remembers(nn.Module):
    """f(x, t) = a x; keeps what it was called with."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        self.seen.append((x, sigma))
        return self.a * x


# s = 0.5, from t = 80 to r = 0.002, the one step of a grid of two points, as multiples of x_t.
#   at t: dx/dt = 80 / 6400.25 = 0.01249951173782274 x_t
#   Euler: 1 - 79.998 * 0.01249951173782274 = (0.25 + 0.16) / 6400.25 = 6.405999765634155e-05
#   at r: dx/dt = 0.002 / 0.250004 = 0.007999872002047967 of x_r, so 5.124717817022e-07 x_t
#   Heun: 1 - 39.999 * (0.01249951173782274 + 0.0000005124717817) = 0.5000115316400318
WHOLE_STEP = {"euler": 6.405999765634155e-05, "heun": 0.5000115316400318}


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_loss_of_cd_compares_f_before_and_after_that_step(solver: Literal["euler", "heun"]) -> None:
    phase = CdPhase(method="cd", steps=1, batch=3, learning_rate=1e-3, N=2, solver=solver, teacher="gaussian", mu=0.0)
    loss = loss_of(phase, 0.5, second_points.gaussian(0.5), torch.device("cpu"))
    x = torch.linspace(-1, 1, 3 * 4, dtype=torch.float64).reshape(3, 1, 2, 2)
    student, target = Remembers(0.7), Remembers(0.4)
    found = loss(student, target, Batch(x, None, Draws(5, torch.arange(3))), 0)
    ((x_t, t),), ((x_r, r),) = student.seen, target.seen
    assert t.tolist() == [80.0] * 3
    assert r.tolist() == pytest.approx([0.002] * 3, rel=1e-7)
    assert 40 < (x_t - x).std().item() < 160  # 80 z
    # the levels come in float32, so r is off by up to 6e-8 of itself, and Euler's 0.16 = t r with it
    torch.testing.assert_close(x_r, WHOLE_STEP[solver] * x_t, rtol=1e-6, atol=0)
    expected = (0.7 * x_t - 0.4 * WHOLE_STEP[solver] * x_t).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
