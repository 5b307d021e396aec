"""Exponential moving averages of a model's weights: of several rates for checkpoints, and of one as a loss's target."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cm_runtime.training import schedule
from cm_runtime.training.config import CdPhase, CtPhase, Phase


class Averages:
    """One copy of the weights per rate; early on a rate is shortened to (1 + step) / (10 + step)."""

    def __init__(self, model: nn.Module, rates: Sequence[float]) -> None:
        self._live = dict(model.state_dict(keep_vars=False))
        self._copies = {rate: [t.detach().clone() for t in self._live.values()] for rate in rates}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after ``step`` (from 0)."""
        live = list(self._live.values())
        for rate, copies in self._copies.items():
            torch._foreach_lerp_(copies, live, 1 - min(rate, (1 + step) / (10 + step)))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{rate: state dict}; the tensors are the averages themselves, not copies."""
        return {f"{rate:g}": dict(zip(self._live, copies, strict=True)) for rate, copies in self._copies.items()}

    def weights(self, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
        """{rate: state dict} for a checkpoint: in ``dtype``, contiguous."""
        return {
            rate: {name: tensor.to(dtype).contiguous() for name, tensor in average.items()}
            for rate, average in self.state().items()
        }

    def is_finite(self, dtype: torch.dtype) -> bool:
        """Return True if no weight becomes infinite or NaN in ``dtype``."""
        return all(bool(t.isfinite().all()) for average in self.weights(dtype).values() for t in average.values())

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what ``state`` returned."""
        for rate, copies in self._copies.items():
            for average, name in zip(copies, self._live, strict=True):
                average.copy_(state[f"{rate:g}"][name])


class Target:
    """theta-, the network whose f a consistency loss aims at: theta- <- mu(k) theta- + (1 - mu(k)) theta.

    arXiv 2303.01469, algorithms 2 and 3. Without mu it is the student itself, its gradient stopped (arXiv 2310.14189).
    """

    def __init__(self, student: nn.Module, mu: Callable[[int], float] | None) -> None:
        self._mu = mu
        self.network = student if mu is None else copy.deepcopy(student).requires_grad_(False)
        self._student = list(student.state_dict().values())
        self._weights = list(self.network.state_dict().values())

    @torch.no_grad()
    def update(self, k: int) -> None:
        """Move theta- towards the student's weights after step ``k``."""
        if self._mu is not None:
            torch._foreach_lerp_(self._weights, self._student, 1 - self._mu(k))

    def state(self) -> dict[str, Tensor]:
        """The weights of theta-; empty if they are the student's."""
        return {} if self._mu is None else self.network.state_dict()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        if self._mu is not None:
            self.network.load_state_dict(state)


def mu_of(phase: Phase) -> Callable[[int], float] | None:
    """Decay mu(k) of a phase's target; None if the target is the student itself."""
    match phase:
        case CdPhase(mu=mu) if mu > 0:
            return lambda k: mu
        case CtPhase(s0=s0, s1=s1, mu0=mu0, steps=K) if mu0 > 0:
            return lambda k: schedule.mu_of_k(k, K, s0, s1, mu0)
    return None
