"""Batches of a data set, resident on the device: which images a step sees is a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cm_runtime.training.data import ImageSet


class Stream:
    """An endless sequence of images, every epoch a new permutation of the set."""

    def __init__(self, data: ImageSet, *, seed: int, classes: bool, flip: bool, device: torch.device) -> None:
        self._images = torch.from_numpy(np.ascontiguousarray(data.images)).to(device)
        labelled = classes and data.labels is not None
        self._labels = torch.from_numpy(np.asarray(data.labels)).to(device) if labelled else None
        self._seed, self._flip = seed, flip
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Images ``first`` to ``first + count - 1`` of the sequence: x (count,C,H,W) float32 in [-1, 1], labels."""
        index = torch.from_numpy(self._index(first, count)).to(self._images.device)
        x = self._images[index].float()
        if self._images.dtype == torch.uint8:
            x = x / 127.5 - 1
        if self._flip:
            mirrored = torch.rand(count, device=x.device) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, None if self._labels is None else self._labels[index]

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
