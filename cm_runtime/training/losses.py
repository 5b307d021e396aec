"""The training objectives: each a function of (model, x, label, progress), chosen once when a phase starts.

All randomness comes from torch's default generators, which the loop seeds for every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cm_runtime.model import ConsistencyModel
from cm_runtime.training.config import EctPhase, EdmPhase

# (model, x (N,C,H,W) clean images, label (N,) or None, progress 0..1) -> the mean loss, a scalar
Loss = Callable[[ConsistencyModel, Tensor, Tensor | None, float], Tensor]


def loss_of(phase: EdmPhase | EctPhase) -> Loss:
    """The objective of a phase."""
    return edm(phase) if isinstance(phase, EdmPhase) else ect(phase)


def edm(phase: EdmPhase) -> Loss:
    """Denoising score matching with EDM's noise levels and weight (arXiv 2206.00364, table 1)."""

    def loss(model: ConsistencyModel, x: Tensor, label: Tensor | None, progress: float) -> Tensor:
        sigma = lognormal(len(x), phase.P_mean, phase.P_std, x.device)
        s = sigma[:, None, None, None]
        D: Tensor = model(x + s * torch.randn_like(x), sigma, label)
        sigma_data = model.config.sigma_data
        weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
        return (weight * (D - x) ** 2).mean()

    return loss


def ect(phase: EctPhase) -> Loss:
    """Easy consistency tuning (arXiv 2406.14548, algorithm 1): f at t is drawn to f at r < t on the same noise.

    r nears t from stage to stage; r = 0 takes the clean image. Student and target share their dropout masks.
    """

    def loss(model: ConsistencyModel, x: Tensor, label: Tensor | None, progress: float) -> Tensor:
        t = lognormal(len(x), phase.P_mean, phase.P_std, x.device)
        stage = min(int(progress * phase.stages), phase.stages - 1)
        r = ect_r(t, stage, phase.q, phase.k, phase.b)
        z = torch.randn_like(x)
        masks = int(torch.randint(1 << 62, ()))
        with torch.no_grad():
            torch.manual_seed(masks)
            noisy = (r > 0)[:, None, None, None]
            at_r = model(x + r[:, None, None, None] * z, torch.where(r > 0, r, t), label)
            target = torch.where(noisy, at_r, x)
        torch.manual_seed(masks)
        at_t = model(x + t[:, None, None, None] * z, t, label)
        return (pseudo_huber(at_t, target, phase.huber_c) / (t - r)).mean()

    return loss


def ect_r(t: Tensor, stage: int, q: float, k: float, b: float) -> Tensor:
    """r(t) = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)), at least 0 (arXiv 2406.14548, section 3)."""
    return (t * (1 - (1 + k * torch.sigmoid(-b * t)) / q ** (stage + 1))).clamp(min=0)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c over all pixels of each image: (N,) (arXiv 2310.14189, section 3.3)."""
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


def lognormal(n: int, P_mean: float, P_std: float, device: torch.device) -> Tensor:
    """n noise levels with ln sigma ~ N(P_mean, P_std^2): (n,) float32."""
    return (torch.randn(n, device=device) * P_std + P_mean).exp()
