"""Growth of the training grid, decay of the EMA target, and iCT's probabilities of the grid's neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def N_of_k(k: int, K: int, s0: int, s1: int) -> int:
    """N(k), the size of the training grid at step ``k`` of ``K``, growing from s0 to s1 + 1 (arXiv 2303.01469, C).

    As in the authors' code: ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1, and the first value is at least 2.
    """
    N = math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
    return max(N, 2)


def mu_of_k(k: int, K: int, s0: int, s1: int, mu0: float) -> float:
    """mu(k), the decay of the EMA target at step ``k``: exp(s0 ln mu0 / (N(k) - 1)) (arXiv 2303.01469, C).

    That is mu0^(s0 / (N(k) - 1)), where mu0 may be 0. The paper prints N(k) in the denominator; the authors' code,
    which made the published models, divides by N(k) - 1.
    """
    return math.pow(mu0, s0 / max(N_of_k(k, K, s0, s1) - 1, 1))


def ict_N_of_k(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, which doubles every K' of K steps (arXiv 2310.14189, section 3.4).

    K' = floor(K / (log2 floor(s1/s0) + 1)).
    """
    doubling = max(math.floor(K / (math.log2(s1 // s0) + 1)), 1)
    return min(s0 << (k // doubling), s1) + 1


def ict_probabilities(grid: Sequence[float] | NDArray[np.float64], P_mean: float, P_std: float) -> NDArray[np.float64]:
    """Probability with which iCT draws each pair of neighbours of an ascending ``grid``: (len(grid) - 1,), of sum 1.

    p_i ~ erf((ln s_{i+1} - P_mean)/(sqrt2 P_std)) - erf((ln s_i - P_mean)/(sqrt2 P_std)) (arXiv 2310.14189, eq. 10).
    """
    z = (np.log(np.asarray(grid, np.float64)) - P_mean) / (math.sqrt(2) * P_std)
    p: NDArray[np.float64] = np.diff([math.erf(s) for s in z])
    return p / float(p.sum())
