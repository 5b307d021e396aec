"""Endless sequence of training images, resident on the device.

The image at a place and its noise are functions of (seed, place).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from cm_runtime.training.data.image_set import ImageSet
from cm_runtime.training.losses import Batch
from cm_runtime.training.noise import FLIP, Draws


class Stream:
    """The images of a data set, in a new permutation every epoch."""

    def __init__(self, data: ImageSet, *, seed: int, classes: bool, flip: bool, device: torch.device) -> None:
        self._images = torch.from_numpy(np.ascontiguousarray(data.images)).to(device)
        labels = data.labels if classes else None
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)
        self._seed, self._flip = seed, flip
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def batch(
        self,
        first: int,
        count: int,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> Batch:
        """Images ``first`` to ``first + count - 1``: x (count,C,H,W) in [-1, 1], half of them mirrored under flip."""
        device = self._images.device
        index = torch.from_numpy(self._index(first, count)).to(device)
        draws = Draws(self._seed, torch.arange(first, first + count, device=device))
        x = self._images[index].to(dtype)
        if self._images.dtype == torch.uint8:
            x = x / 127.5 - 1
        if self._flip:
            x = torch.where((draws.uniform(FLIP) < 0.5)[:, None, None, None], x.flip(-1), x)
        label = None if self._labels is None else self._labels[index]
        return Batch(x.contiguous(memory_format=layout), label, draws)

    def rms(self) -> float:
        """Root mean square of all pixels in [-1, 1] units: s of the Gaussian N(0, s^2 I) that fits the data."""
        total = 0.0
        for part in torch.split(self._images, 1024):
            x = part.double() / 127.5 - 1 if part.dtype == torch.uint8 else part.double()
            total += x.square().sum().item()
        return math.sqrt(total / self._images.numel())

    def _index(self, first: int, count: int) -> NDArray[np.int64]:
        size = len(self._images)
        parts = []
        while count:
            epoch, at = divmod(first, size)
            if self._order is None or self._order[0] != epoch:
                generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
                self._order = epoch, generator.permutation(size)
            part = self._order[1][at : at + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)
