"""Training objectives, each composed of plain functions when a phase starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm_runtime.training.config import CdPhase, ConsistencyPhase, EdmPhase, Phase
from cm_runtime.training.distances import Distance, distance_of
from cm_runtime.training.noise import DROPOUT, NOISE, Draws
from cm_runtime.training.noise_pairs import Pairs, lognormal, pairs_of
from cm_runtime.training.second_points import Denoise, Second, expand, from_data, from_teacher

# lambda(t, r): (n,) each
Weighting = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Images of a step: x (n,C,H,W) clean, label (n,) int64 or None, and their randomness."""

    x: Tensor
    label: Tensor | None
    draws: Draws


# (student, target, batch, step k of the phase) -> the loss of each image: (n,). The target is the network whose f the
# student's is drawn to: the student itself, or an average of it.
Loss = Callable[[nn.Module, nn.Module, Batch, int], Tensor]


def loss_of(phase: Phase, sigma_data: float, teacher: Denoise | None, device: torch.device) -> Loss:
    """Compose the objective of a phase; teacher: for cd."""
    if isinstance(phase, EdmPhase):
        return edm(phase.P_mean, phase.P_std, sigma_data)
    second: Second = from_data
    if isinstance(phase, CdPhase):
        assert teacher is not None
        second = from_teacher(teacher, phase.solver)
    return consistency(pairs_of(phase), second, distance_of(phase, device), weighting_of(phase))


def edm(P_mean: float, P_std: float, sigma_data: float) -> Loss:
    """Denoising score matching with EDM's noise levels and weight (arXiv 2206.00364, table 1)."""

    def loss(student: nn.Module, target: nn.Module, batch: Batch, k: int) -> Tensor:
        x = batch.x
        sigma = lognormal(batch.draws, P_mean, P_std).to(x.dtype)
        z = batch.draws.normal(NOISE, x.shape[1:]).to(x.dtype)
        D = student(x + expand(sigma) * z, sigma, batch.label, batch.draws.keys(DROPOUT))
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        error: Tensor = (D - x).square().flatten(1).mean(1)
        return weight * error

    return loss


def consistency(pairs: Pairs, second: Second, distance: Distance, weighting: Weighting) -> Loss:
    """lambda(t, r) d(f(x_t, t), stopgrad f-(x_r, r)), x_r the second point (arXiv 2303.01469, eqs. 7 and 10).

    Where r = 0, f-(x_r, r) is the clean image. Student and target drop the same elements.
    """

    def loss(student: nn.Module, target: nn.Module, batch: Batch, k: int) -> Tensor:
        x, label = batch.x, batch.label
        t, r = (level.to(x.dtype) for level in pairs(batch.draws, k))
        z = batch.draws.normal(NOISE, x.shape[1:]).to(x.dtype)
        key = batch.draws.keys(DROPOUT)
        x_t = x + expand(t) * z
        with torch.no_grad():
            x_r = second(x, z, x_t, t, r, label)
            f_r = target(x_r, torch.where(r > 0, r, t), label, key)
            f_r = torch.where(expand(r) > 0, f_r, x)
        return weighting(t, r) * distance(student(x_t, t, label, key), f_r)

    return loss


def weighting_of(phase: ConsistencyPhase) -> Weighting:
    """Choose lambda(t, r) of a phase."""
    if phase.weighting == "gap":
        return lambda t, r: 1 / (t - r)
    return lambda t, r: torch.ones_like(t)
