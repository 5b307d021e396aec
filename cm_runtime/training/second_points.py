"""Second points of a consistency pair: where the trajectory through x_t is at the lower noise level r."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

# D(x, sigma, label) -> the mean of the clean image: a teacher
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# (x, z, x_t, t, r, label) -> x_r; images (n,C,H,W), levels (n,), label (n,) or None
Second = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def wide(sigma: Tensor) -> Tensor:
    """Noise levels (n,) as (n,1,1,1), to go with images."""
    return sigma[:, None, None, None]


def from_data(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
    """x + r z, on the same noise (arXiv 2303.01469, algorithm 3)."""
    return x + wide(r) * z


def from_teacher(D: Denoise, solver: Literal["euler", "heun"]) -> Second:
    """One step of the probability-flow ODE dx/dt = (x - D(x, t)) / t from t to r (arXiv 2303.01469, algorithm 2)."""

    def euler(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        d = (x_t - D(x_t, t, label)) / wide(t)
        return x_t + wide(r - t) * d

    def heun(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        d = (x_t - D(x_t, t, label)) / wide(t)
        x_r = x_t + wide(r - t) * d
        d_r = (x_r - D(x_r, r, label)) / wide(r)
        return x_t + wide(r - t) * (d + d_r) / 2

    return heun if solver == "heun" else euler


def gaussian(s: float) -> Denoise:
    """The exact D of data N(0, s^2 I): s^2 / (s^2 + sigma^2) x."""
    return lambda x, sigma, label: wide(s**2 / (s**2 + sigma**2)) * x
