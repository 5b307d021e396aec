"""Second points of a consistency pair: x_r at the lower noise level r of the trajectory through x_t."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

# D(x, sigma, label) -> the mean of the clean image: a teacher
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# (x, z, x_t, t, r, label) -> x_r; images (n,C,H,W), levels (n,), label (n,) or None
Second = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def expand(sigma: Tensor) -> Tensor:
    """Reshape noise levels (n,) to (n,1,1,1), to broadcast over images."""
    return sigma[:, None, None, None]


def from_data(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
    """x + r z, on the same noise (arXiv 2303.01469, algorithm 3)."""
    return x + expand(r) * z


def from_teacher(D: Denoise, solver: Literal["euler", "heun"]) -> Second:
    """One step of the probability-flow ODE dx/dt = (x - D(x, t)) / t from t to r (arXiv 2303.01469, algorithm 2)."""

    def euler(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        d = (x_t - D(x_t, t, label)) / expand(t)
        return x_t + expand(r - t) * d

    def heun(x: Tensor, z: Tensor, x_t: Tensor, t: Tensor, r: Tensor, label: Tensor | None) -> Tensor:
        d = (x_t - D(x_t, t, label)) / expand(t)
        x_r = x_t + expand(r - t) * d
        d_r = (x_r - D(x_r, r, label)) / expand(r)
        return x_t + expand(r - t) * (d + d_r) / 2

    return heun if solver == "heun" else euler


def gaussian(s: float) -> Denoise:
    """The exact D of data N(0, s^2 I): s^2 / (s^2 + sigma^2) x."""
    return lambda x, sigma, label: expand(s**2 / (s**2 + sigma**2)) * x
