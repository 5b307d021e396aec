"""Running mean and covariance of features, and the Fréchet distance between two Gaussians."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import DataError
from cm_runtime.errors.wording import quantity

Float64 = NDArray[np.float64]
MAX_DIMENSION = 4096  # of features, whose covariance then takes 134 MB; Inception's have 2048


class RunningMoments:
    """Mean (D,) and covariance (D, D) of any number of features, in float64 and the memory of one batch.

    Batches are merged by their centred sums (Chan, Golub, LeVeque 1979, eq. 2.1), so that a mean far from zero costs
    no accuracy and how the features are cut into batches changes rounding only.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Float64 = np.zeros(0)
        self._scatter: Float64 = np.zeros((0, 0))

    def update(self, features: NDArray[Any]) -> None:
        """Add ``features`` (N, D), N >= 1. Raises DataError if they are not finite or D changes."""
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or 0 in f.shape:
            raise DataError(f"features of shape {f.shape}: rows of numbers are needed")
        if f.shape[1] > MAX_DIMENSION:
            raise DataError(f"features of {f.shape[1]} numbers; at most {MAX_DIMENSION} are compared")
        if not np.isfinite(f).all():
            raise DataError("features hold NaN or infinity; the extractor cannot take these images")
        mean = f.mean(0)
        deviations = f - mean
        scatter = deviations.T @ deviations
        if not self.count:
            self.count, self._mean, self._scatter = len(f), mean, scatter
            return
        if len(mean) != len(self._mean):
            raise DataError(f"features of {quantity(len(mean), 'number')} follow features of {len(self._mean)}")
        count = self.count + len(f)
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self.count * len(f) / count))
        self._mean = self._mean + delta * (len(f) / count)
        self.count = count

    def result(self) -> tuple[Float64, Float64]:
        """The mean (D,) and the covariance (D, D), with divisor N - 1. Raises DataError below two features."""
        if self.count < 2:
            raise DataError(f"{quantity(self.count, 'image')}: at least two are needed")
        return self._mean, self._scatter / (self.count - 1)


def moments(features: NDArray[Any]) -> tuple[Float64, Float64]:
    """Mean (D,) and covariance (D, D) float64 of ``features`` (N, D), N at least 2, with divisor N - 1."""
    accumulator = RunningMoments()
    accumulator.update(features)
    return accumulator.result()


def frechet_distance(a: tuple[Float64, Float64], b: tuple[Float64, Float64]) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two (mean (D,), covariance (D, D)), in float64.

    arXiv 1706.08500, eq. 6. With S = R R^T, tr (S_a S_b)^(1/2) is the sum of the singular values of
    R_a^T R_b: real and accurate for singular covariances too, where a square root of the product is neither.
    Raises DataError if the numbers are too large for it.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    try:
        with np.errstate(over="raise", invalid="raise"):
            overlap = np.linalg.svd(_root(cov_a).T @ _root(cov_b), compute_uv=False).sum()
            distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    except (np.linalg.LinAlgError, FloatingPointError) as error:
        raise DataError(f"no distance between these means and covariances can be computed ({error})") from error
    return max(float(distance), 0.0)


def _root(covariance: Float64) -> Float64:
    """R (D, D) with R R^T = ``covariance``; eigenvalues within rounding error of zero count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    root: Float64 = vectors * np.sqrt(np.where(values > noise, values, 0.0))
    return root
