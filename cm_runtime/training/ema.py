"""Exponential moving averages of a model's weights, of several rates at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Averages:
    """One float32 copy of the weights per rate; early on a rate is shortened to (1 + step) / (10 + step)."""

    def __init__(self, model: nn.Module, rates: Sequence[float]) -> None:
        self._live = dict(model.state_dict(keep_vars=False))
        self._copies = {rate: [t.detach().clone() for t in self._live.values()] for rate in rates}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are after ``step`` (from 0)."""
        live = list(self._live.values())
        for rate, copies in self._copies.items():
            torch._foreach_lerp_(copies, live, 1 - min(rate, (1 + step) / (10 + step)))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{rate: state dict}; the tensors are the averages themselves, not copies."""
        return {f"{rate:g}": dict(zip(self._live, copies, strict=True)) for rate, copies in self._copies.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts back what ``state`` gave."""
        for rate, copies in self._copies.items():
            for copy, name in zip(copies, self._live, strict=True):
                copy.copy_(state[f"{rate:g}"][name])
