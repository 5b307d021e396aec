"""Projections of x0, and `Edit`, which begins with a caller's images and projects onto what is known of them.

Zero-shot editing (arXiv 2303.01469, algorithm 4) is the sampling loop with a projection behind each clamp,
A^-1[(A y)(1 - Omega) + (A x0) Omega] for an orthogonal A and what Omega leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import RequestError

Array = NDArray[np.float32]
LUMA = (0.2989, 0.5870, 0.1140)  # of red, green and blue


@dataclass(frozen=True)
class Mask:
    """Inpainting's projection, m y + (1 - m) x0 (arXiv 2303.01469, algorithm 4 with A = I).

    known: y (N or 1, C, H, W); mask: m (N or 1, C or 1, H, W), 1 where y is known and 0 in the hole; float32.
    """

    known: Array
    mask: Array

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises RequestError unless images of ``shape`` (N,C,H,W) can be projected."""
        n, c, *size = shape
        _check("the known image", self.known, (n, 1), (c,), size)
        _check("the mask", self.mask, (n, 1), (c, 1), size)

    def __call__(self, x0: Array) -> Array:
        """x0 (N,C,H,W), in place; what is known is y to the bit."""
        self.check(x0.shape)
        x0 *= 1 - self.mask
        x0 += self.mask * self.known
        return x0


@dataclass(frozen=True)
class Luma:
    """Colorization's projection, x0 + w (w.y - w.x0) / |w|^2: w / |w| is the first row of an orthogonal A.

    known: w.y (N or 1, 1, H, W) float32, the luminance; w: of red, green and blue.
    """

    known: Array
    w: tuple[float, float, float] = LUMA

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises RequestError unless images of ``shape`` (N,C,H,W) can be projected."""
        n, c, *size = shape
        if c != 3:
            raise RequestError(f"colorization is of images with 3 channels, not {c}")
        if not any(self.w):
            raise RequestError("the luminance's weights are all 0")
        _check("the luminance", self.known, (n, 1), (1,), size)

    def __call__(self, x0: Array) -> Array:
        """x0 (N,3,H,W), in place."""
        self.check(x0.shape)
        w = np.array(self.w, np.float32)[:, None, None]
        x0 += w / np.float32((w * w).sum()) * (self.known - (w * x0).sum(axis=1, keepdims=True))
        return x0


@dataclass(frozen=True)
class PatchMean:
    """Super-resolution's projection, x0 + up(mean_p y - mean_p x0): A's first row takes the mean of a p x p patch.

    known: mean_p y (N or 1, C, H / p, W / p) float32, the small image; p: the factor.
    """

    known: Array
    p: int

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises RequestError unless images of ``shape`` (N,C,H,W) can be projected."""
        n, c, *size = shape
        if self.p < 1 or any(length % self.p for length in size):
            raise RequestError(f"images of {size[0]}x{size[1]} are not made of {self.p}x{self.p} patches")
        _check("the small image", self.known, (n, 1), (c,), [length // self.p for length in size])

    def __call__(self, x0: Array) -> Array:
        """x0 (N,C,H,W), in place."""
        self.check(x0.shape)
        n, c, h, w = x0.shape
        patches = x0.reshape(n, c, h // self.p, self.p, w // self.p, self.p)
        patches += (self.known - patches.mean(axis=(3, 5)))[:, :, :, None, :, None]
        return x0


Projection = Mask | Luma | PatchMean


def map_arrays(projection: Projection, body: Callable[[Array], Any]) -> Projection:
    """The projection with ``body`` of its arrays in place of them."""
    arrays = {name: body(value) for name, value in vars(projection).items() if isinstance(value, np.ndarray)}
    return replace(projection, **arrays)


@dataclass(frozen=True)
class Edit:
    """M given images, each of which is answered ``answers`` times: image n of the request answers n // answers.

    start: (M,C,H,W) float32, which sigma_0 z_0 is added to, unless it is noisy as it is; project: what each x0 is put
    through behind the clamp, or None; label: (M,) int64, where there are classes.
    """

    start: Array
    project: Projection | None = None
    label: NDArray[np.int64] | None = None
    answers: int = 1
    is_noisy: bool = False

    @property
    def count(self) -> int:
        """The number of images it makes."""
        return len(self.start) * self.answers

    def part(self, first: int, size: int) -> Edit:
        """Images ``first`` to ``first + size - 1`` as an edit of their own, with one given image each."""
        inputs = self._inputs(first, size)

        def of(array: Array) -> Array:
            return array if len(array) == 1 else array[inputs]

        project = self.project and map_arrays(self.project, of)
        return replace(self, start=self.start[inputs], project=project, label=self.labels(first, size), answers=1)

    def labels(self, first: int, size: int) -> NDArray[np.int64] | None:
        """The labels of those images, (size,)."""
        return None if self.label is None else self.label[self._inputs(first, size)]

    def _inputs(self, first: int, size: int) -> NDArray[np.intp]:
        return np.arange(first, first + size) // self.answers


def _check(name: str, array: Array, images: tuple[int, ...], channels: tuple[int, ...], size: list[int]) -> None:
    shape = array.shape
    fits = len(shape) == 4 and shape[0] in images and shape[1] in channels and list(shape[2:]) == size
    if not fits or array.dtype != np.float32:
        fitting = f"{' or '.join(map(str, images))}, {' or '.join(map(str, channels))}, {size[0]}, {size[1]}"
        raise RequestError(f"{name} must be ({fitting}) float32, not {shape} {array.dtype}")
