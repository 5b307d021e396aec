"""The step ops on the host: everything between two network evaluations, in NumPy.

They are what `sampling.run` calls: `first`, `step` after each evaluation but the last, `finish` after the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import EngineError
from cm_runtime.errors.wording import quantity
from cm_runtime.projections import Edit

Array = NDArray[np.float32]
NOT_FINITE = "the model's output is not finite; its weights or its precision cannot serve"


def not_finite(finite: NDArray[np.bool_]) -> EngineError:
    """The error of images (N,) some of which are not finite."""
    return EngineError(f"{NOT_FINITE} ({np.count_nonzero(~finite)} of {quantity(finite.size, 'image')})")


@dataclass(frozen=True)
class HostSteps:
    """First noise, clamp, projection and renoise for one micro-batch.

    noise: k -> z_k, (N,C,H,W) float32 standard normals; sigma_min: the noise that x0 is taken to hold already;
    clip: clamp each x0 to [-1, 1]; edit: of as many images, one given image each, or None.
    """

    noise: Callable[[int], Array]
    sigma_min: float
    clip: bool = True
    edit: Edit | None = None

    def first(self, sigma: float) -> Array:
        """sigma_0 z_0, with what an edit begins with."""
        if self.edit is None:
            return self.noise(0) * np.float32(sigma)
        if self.edit.is_noisy:
            return self.edit.start.copy()
        return self.edit.start + self.noise(0) * np.float32(sigma)

    def step(self, x0: Array, k: int, sigma: float) -> Array:
        """project(clamp(x0)) + sqrt(sigma_k^2 - sigma_min^2) z_k (arXiv 2303.01469, alg. 1, 4); x0 is overwritten."""
        x = self.finish(x0)
        x += self.noise(k) * np.float32(math.sqrt(sigma**2 - self.sigma_min**2))
        return x

    def finish(self, x0: Array) -> Array:
        """project(clamp(x0)), in place. Raises EngineError where x0 is not finite."""
        finite = np.isfinite(x0)
        if not finite.all():
            raise not_finite(np.array([each.all() for each in finite]))
        if self.clip:
            np.clip(x0, -1, 1, out=x0)
        return x0 if self.edit is None or self.edit.project is None else self.edit.project(x0)


def to_nhwc(x0: Array) -> Array:
    """(N,C,H,W) -> (N,H,W,C), contiguous."""
    return np.ascontiguousarray(np.moveaxis(x0, 1, -1))


def to_uint8(x0: Array) -> NDArray[np.uint8]:
    """rint((clip(x0, -1, 1) + 1) * 127.5), half to even, with (N,C,H,W) -> (N,H,W,C)."""
    grey = np.clip(to_nhwc(x0), -1, 1)
    grey += 1
    grey *= 127.5
    return np.rint(grey, out=grey).astype(np.uint8)
