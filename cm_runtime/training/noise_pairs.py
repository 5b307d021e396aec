"""Pairs of noise levels t > r of consistency training: one function per method, picked when a phase starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cm_runtime.schedule import NoiseRange
from cm_runtime.training import schedule
from cm_runtime.training.config import CdPhase, ConsistencyPhase, CtPhase, EctPhase, IctPhase
from cm_runtime.training.noise import LEVEL, Draws

# (draws of n images, step k of the phase) -> t, r: (n,) float32 each, t > r >= 0; r = 0 means the clean image
Pairs = Callable[[Draws, int], tuple[Tensor, Tensor]]


def pairs_of(phase: ConsistencyPhase) -> Pairs:
    """Choose the pairs of a phase's method."""
    match phase:
        case CdPhase():
            return uniform(lambda k: phase.N)
        case CtPhase():
            return uniform(lambda k: schedule.N_of_k(k, phase.steps, phase.s0, phase.s1))
        case IctPhase():
            return bins(lambda k: schedule.ict_N_of_k(k, phase.steps, phase.s0, phase.s1), phase.P_mean, phase.P_std)
        case EctPhase():
            return continuous(phase)


def uniform(N_of_k: Callable[[int], int]) -> Pairs:
    """Neighbours t_{n+1}, t_n of the Karras grid of N(k) points, n uniform (arXiv 2303.01469, algorithms 2 and 3)."""

    def pairs(draws: Draws, k: int) -> tuple[Tensor, Tensor]:
        grid = _grid(N_of_k(k), draws.place.device)
        n = (draws.uniform(LEVEL) * (len(grid) - 1)).long()
        return grid[n + 1], grid[n]

    return pairs


def bins(N_of_k: Callable[[int], int], P_mean: float, P_std: float) -> Pairs:
    """Neighbours of the Karras grid of N(k) points, as often as a lognormal falls between them (arXiv 2310.14189)."""

    def pairs(draws: Draws, k: int) -> tuple[Tensor, Tensor]:
        grid = _grid(N_of_k(k), draws.place.device)
        n = torch.searchsorted(_edges(len(grid), P_mean, P_std, draws.place.device), draws.uniform(LEVEL), right=True)
        return grid[n + 1], grid[n]

    return pairs


def continuous(phase: EctPhase) -> Pairs:
    """ln t ~ N(P_mean, P_std^2), and r(t) ever nearer to t from stage to stage (arXiv 2406.14548, algorithm 1)."""

    def pairs(draws: Draws, k: int) -> tuple[Tensor, Tensor]:
        t = lognormal(draws, phase.P_mean, phase.P_std)
        return t, ect_r(t, ect_stage(phase, k), phase.q, phase.k, phase.b)

    return pairs


def lognormal(draws: Draws, P_mean: float, P_std: float) -> Tensor:
    """Noise levels with ln sigma ~ N(P_mean, P_std^2): (n,) float32."""
    return (draws.normal(LEVEL) * P_std + P_mean).exp()


def ect_stage(phase: EctPhase, k: int) -> int:
    """The stage of step ``k``: ``stages`` equal parts of the phase, counted from ``first_stage``."""
    return phase.first_stage + k * phase.stages // phase.steps


def ect_r(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """r(t) = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)), at least 0 (arXiv 2406.14548, section 3)."""
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


@lru_cache(maxsize=4)
def _grid(N: int, device: torch.device) -> Tensor:
    """The Karras grid, ascending: (N,) float32."""
    return torch.from_numpy(np.flip(NoiseRange().karras(N)).astype(np.float32)).to(device)


@lru_cache(maxsize=4)
def _edges(N: int, P_mean: float, P_std: float, device: torch.device) -> Tensor:
    """The inner edges of iCT's bins on (0, 1): (N - 2,) float64."""
    p = schedule.ict_probabilities(np.flip(NoiseRange().karras(N)), P_mean, P_std)
    return torch.from_numpy(np.cumsum(p)[:-1]).to(device)
