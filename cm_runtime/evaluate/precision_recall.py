"""Improved precision and recall: how much of one set of images lies on the manifold of the other.

Kynkäänniemi et al. 2019, arXiv 1904.06991, algorithm 1: a set's manifold is the union of balls around its features,
each reaching to its k-th nearest neighbour in the set.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import DataError
from cm_runtime.errors.wording import quantity
from cm_runtime.evaluate.frechet import Float64

K = 3
_BLOCK = 1 << 20  # distances in memory


class Reservoir:
    """At most ``size`` features of a stream, every one of them as likely to be kept (Vitter 1985, algorithm R).

    The draw has a fixed seed: the same stream gives the same features, however it is cut into batches.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._random = np.random.Generator(np.random.PCG64(0))
        self._features: NDArray[np.float32] | None = None
        self._count = 0

    def update(self, features: NDArray[np.float32]) -> None:
        """Add ``features`` (N, D)."""
        if self._features is None:
            self._features = np.empty((self.size, features.shape[1]), np.float32)
        room = features[: max(self.size - self._count, 0)]
        self._features[self._count : self._count + len(room)] = room
        self._count += len(room)
        for feature in features[len(room) :]:
            self._count += 1
            place = int(self._random.integers(self._count))
            if place < self.size:
                self._features[place] = feature

    def result(self) -> NDArray[np.float32]:
        """Features (min(size, N), D) float32."""
        return np.empty((0, 0), np.float32) if self._features is None else self._features[: self._count]


def precision_recall(real: NDArray[Any], generated: NDArray[Any], k: int = K) -> tuple[float, float]:
    """Shares of ``generated`` (M, D) on the manifold of ``real`` (N, D), and of ``real`` on that of ``generated``.

    Memory grows with N + M, not with N M. Raises DataError if either set has no k neighbours.
    """
    if min(len(real), len(generated)) <= k:
        raise DataError(f"precision and recall need more than {quantity(k, 'image')} of each side")
    a, b = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    centre = a.mean(0)  # distances stay, and lose fewer digits
    a, b = a - centre, b - centre
    reach_a, reach_b = _reach(a, k), _reach(b, k)
    on_manifold = np.zeros(len(b), bool)
    recalls = 0
    for first, distance in _distances(a, b):
        on_manifold |= (distance <= reach_a[first : first + len(distance), None]).any(0)
        recalls += int((distance <= reach_b).any(1).sum())
    return float(on_manifold.mean()), recalls / len(a)


def _reach(points: Float64, k: int) -> Float64:
    """Squared distance of each point to its k-th neighbour: the k-th after itself, at distance zero."""
    reach = np.empty(len(points))
    for first, distance in _distances(points, points):
        distance.partition(k, axis=1)
        reach[first : first + len(distance)] = distance[:, k]
    return reach


def _distances(a: Float64, b: Float64) -> Iterator[tuple[int, Float64]]:
    """Yield (first row, squared distances (n, M)) of a few rows of ``a`` (N, D) at a time to all of ``b`` (M, D).

    A distance within rounding error of zero is zero, so that equal points are equal in every block.
    """
    squares_a, squares_b = (a**2).sum(1), (b**2).sum(1)
    rows = max(1, _BLOCK // len(b))
    tiny = 4 * np.finfo(np.float64).eps * a.shape[1]
    for first in range(0, len(a), rows):
        lengths = squares_a[first : first + rows, None] + squares_b
        distance = lengths - 2 * (a[first : first + rows] @ b.T)
        distance[distance <= tiny * lengths] = 0
        yield first, distance
