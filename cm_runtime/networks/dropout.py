"""Dropout whose masks do not depend on the batch, so that a student and its target drop the same elements."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Dropout(nn.Module):
    """Dropout whose masks are addressed: element e of an image in this layer is a hash of (key, layer, e).

    Without a key it is plain dropout. Masks then depend on neither the batch nor the worker an image is in, and two
    evaluations with one key, a student's and its target's, drop the same elements. In evaluation it does nothing.
    """

    def __init__(self, p: float, layer: int) -> None:
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, h: Tensor, key: Tensor | None = None) -> Tensor:
        """h: (N, ...), key: (N, 2) int64, words of 32 bits."""
        if key is None or not self.training or self.p == 0:
            return functional.dropout(h, self.p, self.training)
        bits = torch.arange(h[0].numel(), dtype=torch.int32, device=h.device) * _to_signed(0x9E3779B1) + self.layer
        k0, k1 = key.to(torch.int32).unbind(1)  # the low 32 bits, as they are
        is_kept = _mix(_mix(bits ^ k0[:, None]) + k1[:, None]) >= _to_signed(int(self.p * 2**32) + 2**31)
        return h * (is_kept.reshape(h.shape).to(h.dtype) * (1 / (1 - self.p)))


def _mix(h: Tensor) -> Tensor:
    """A 32-bit integer hash of full avalanche, in wrapping int32 (C. Wellons' lowbias32)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _to_signed(0x7FEB352D)
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _to_signed(0x846CA68B)
    return h ^ ((h >> 16) & 0xFFFF)


def _to_signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31
