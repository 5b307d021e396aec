"""Reference statistics on disk: an npz of ``mu`` and ``sigma``, as of pytorch-fid and ADM.

cm-runtime adds ``count`` and ``extractor_sha256``, by which statistics of another extractor are refused. Files of
other tools lack them, and are taken as they are.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import DataError, data_error
from cm_runtime.errors.wording import quantity
from cm_runtime.evaluate.frechet import MAX_DIMENSION, Float64
from cm_runtime.files import atomic, streams
from cm_runtime.files.npz import array, header, keys, open_npz

SHIPPED = Path(__file__).parent.parent / "models" / "fashion-mnist-statistics.npz"
LARGEST = 1e100  # a number of statistics; its square is finite


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (D,) and covariance (D, D) float64 of features; ``count`` and ``extractor_sha256`` if known."""

    mean: Float64
    covariance: Float64
    count: int | None = None
    extractor_sha256: str | None = None

    def check(self, dimension: int, extractor_sha256: str, where: object) -> None:
        """Raise DataError naming ``where`` unless these are statistics of that extractor, as far as the file says."""
        if self.extractor_sha256 not in (None, extractor_sha256):
            raise DataError(
                f"{where}: statistics of another extractor ({str(self.extractor_sha256)[:12]}, not"
                f" {extractor_sha256[:12]}); give that one with --extractor, or a data set"
            )
        if len(self.mean) != dimension:
            raise DataError(
                f"{where}: statistics of {quantity(len(self.mean), 'feature')}, but the extractor gives {dimension};"
                " they are another extractor's"
            )


def is_statistics(path: Path) -> bool:
    """Return True if ``path`` is an npz with ``mu`` and ``sigma``. Raises DataError for one that cannot be read."""
    return path.suffix == ".npz" and streams.exists(path) and {"mu", "sigma"} <= keys(path)


def read_statistics(path: Path) -> Statistics:
    """Read statistics of `write_statistics`, pytorch-fid or ADM.

    Raises DataError unless mu is (D,), sigma (D, D), symmetric with no negative variance, and all of it finite.
    """
    with open_npz(path) as archive:
        mean, covariance = _numbers(archive, "mu", path), _numbers(archive, "sigma", path)
        names = archive.namelist()
        count = _scalar(archive, "count", path) if "count.npy" in names else None
        digest = _digest(archive, path) if "extractor_sha256.npy" in names else None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise data_error(path, f"mu is {mean.shape} and sigma {covariance.shape}", "they must be (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise data_error(path, "holds NaN or infinity", "measure the data again")
    if max(np.abs(mean).max(), np.abs(covariance).max()) > LARGEST:
        raise data_error(path, f"holds numbers above {LARGEST:g}, which no features have", "measure the data again")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-5 * scale or covariance.diagonal().min() < 0:
        raise data_error(path, "sigma is not a covariance", "it must be symmetric, its diagonal not negative")
    return Statistics(mean, (covariance + covariance.T) / 2, count, digest)


def write_statistics(path: str | os.PathLike[str], statistics: Statistics, dtype: Any = np.float64) -> None:
    """Write an npz, whole or not at all. Raises OutputError."""
    content = {"mu": statistics.mean.astype(dtype), "sigma": statistics.covariance.astype(dtype)}
    if statistics.count is not None:
        content["count"] = np.array(statistics.count, np.int64)
    if statistics.extractor_sha256 is not None:
        content["extractor_sha256"] = np.frombuffer(bytes.fromhex(statistics.extractor_sha256), np.uint8)
    with atomic.write(path) as temporary:
        np.savez(temporary, allow_pickle=False, **content)


def _numbers(archive: zipfile.ZipFile, key: str, path: Path) -> Float64:
    """Read mu or sigma as float64, its size checked before memory is allocated."""
    member = header(archive, archive.getinfo(f"{key}.npy"), path)
    if member.dtype.kind != "f" or len(member.shape) not in (1, 2) or max(member.shape) > MAX_DIMENSION:
        cure = f"floats, (D,) or (D, D) with D up to {MAX_DIMENSION}, are needed"
        raise data_error(path, f"{key} is {member.dtype} {member.shape}", cure)
    return array(archive, member, path).astype(np.float64)


def _scalar(archive: zipfile.ZipFile, key: str, path: Path) -> int:
    member = header(archive, archive.getinfo(f"{key}.npy"), path)
    if member.shape != () or member.dtype.kind not in "iu":
        raise data_error(path, f"{key} is {member.dtype} {member.shape}", "it must be one whole number")
    return int(array(archive, member, path))


def _digest(archive: zipfile.ZipFile, path: Path) -> str:
    member = header(archive, archive.getinfo("extractor_sha256.npy"), path)
    if member.shape != (32,) or member.dtype != np.uint8:
        raise data_error(path, f"extractor_sha256 is {member.dtype} {member.shape}", "it must be 32 bytes")
    digest: NDArray[np.uint8] = array(archive, member, path)
    return digest.tobytes().hex()
