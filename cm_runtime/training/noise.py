"""Addressable randomness on the device: the noise of a training image depends on (seed, its place) alone.

A place is an image's number in the endless sequence of images a run shows the network. The numbers are those of
`cm_runtime.noise` (Philox4x32-10 at (seed, place, draw)), so batch size, micro-batches and the number of workers change
nothing, and a run that was stopped needs no generator's state to go on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_runtime.noise import MULTIPLIERS, ROUNDS, WEYL

# Draw numbers, far from those that samplers use for their steps.
NOISE, LEVEL, FLIP, DROPOUT = 0xFFFF0000, 0xFFFF0001, 0xFFFF0002, 0xFFFF0003
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Draws:
    """Randomness of n images; seed: 0..2^64-1, place: (n,) int64, on the device that the numbers are for."""

    seed: int
    place: Tensor

    def words(self, draw: int, blocks: int) -> Tensor:
        """Random words of a draw: (n, blocks, 4) int64 in 0..2^32-1, equal to `cm_runtime.noise.words`."""
        place = self.place[:, None]
        zero = torch.zeros(len(place), blocks, dtype=torch.int64, device=place.device)
        block = torch.arange(blocks, device=place.device)
        c0, c1, c2, c3 = zero + block, zero + draw, zero + (place & _MASK), zero + ((place >> 32) & _MASK)
        k0, k1 = self.seed & _MASK, self.seed >> 32
        for _ in range(ROUNDS):  # int64 products wrap, and their low and high words are those of unsigned ones
            p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
            c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
            c1, c3 = p1 & _MASK, p0 & _MASK
            k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
        return torch.stack((c0, c1, c2, c3), dim=-1)

    def normal(self, draw: int, shape: Sequence[int] = ()) -> Tensor:
        """Standard normals: (n, *shape) float32, equal to `cm_runtime.noise.normal` but for the last bit."""
        size = math.prod(shape)
        four = self.words(draw, -(-size // 4)).double() * 2.0**-32 + 2.0**-33
        u, v = four[..., 0::2], four[..., 1::2] * (2 * math.pi)
        r = (-2 * u.log()).sqrt()
        z = torch.stack((r * v.sin(), r * v.cos()), dim=-1)
        return z.reshape(len(self.place), -1)[:, :size].reshape(len(self.place), *shape).float()

    def uniform(self, draw: int) -> Tensor:
        """One number in (0, 1) an image: (n,) float64."""
        return self.words(draw, 1)[:, 0, 0].double() * 2.0**-32 + 2.0**-33

    def keys(self, draw: int) -> Tensor:
        """Two random words an image, for `cm_runtime.networks.dropout.Dropout`: (n, 2) int64 in 0..2^32-1."""
        return self.words(draw, 1)[:, 0, :2]
