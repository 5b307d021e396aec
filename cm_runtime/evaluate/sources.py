"""Sources of images to measure, a batch at a time: samples in an npz of any length, or a data set in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import data_error
from cm_runtime.files import streams
from cm_runtime.files.npz import Member, blocks, class_numbers, header, keys, label_header, open_npz
from cm_runtime.sampling import Batch, to_uint8

_BLOCK = 1 << 24  # bytes of pixels read at once
MAX_SIDE = 4096


@dataclass(frozen=True)
class Samples:
    """An npz of ``arr_0`` (N,H,W,C) and perhaps ``arr_1`` (N,), as `cm-runtime sample` and the field write it.

    Pixels are uint8, or float32 in [-1, 1], which are rounded as sampling does. Only headers were read so far.
    """

    path: Path
    count: int
    image_shape: tuple[int, int, int]
    has_labels: bool

    def batches(self) -> Iterator[Batch]:
        """Read all batches in order. Raises DataError if the file does not hold what its headers promise."""
        height, width, channels = self.image_shape
        rows = max(1, min(256, _BLOCK // (4 * height * width * channels)))
        with open_npz(self.path) as archive:
            pixels, labels = _members(archive, self.path)
            first = 0
            label_blocks = repeat(None) if labels is None else blocks(archive, labels, self.path, rows)
            for block, label in zip(blocks(archive, pixels, self.path, rows), label_blocks, strict=labels is not None):
                index = np.arange(first, first + len(block), dtype=np.uint64)
                yield Batch(
                    index, None if label is None else class_numbers(label, self.path), _pixels(block, self.path)
                )
                first += len(block)


def is_samples(path: Path) -> bool:
    """Return True if ``path`` is an npz with ``arr_0`` and without the ``images`` of a data set. Raises DataError."""
    return path.suffix == ".npz" and streams.exists(path) and {"arr_0", "images"} & keys(path) == {"arr_0"}


def open_samples(path: Path) -> Samples:
    """Open the samples in ``path``, headers checked. Raises DataError."""
    with open_npz(path) as archive:
        pixels, labels = _members(archive, path)
    count, height, width, channels = pixels.shape
    return Samples(path, count, (height, width, channels), labels is not None)


def array_batches(images: NDArray[Any], labels: NDArray[np.int64] | None, size: int = 256) -> Iterator[Batch]:
    """Batches of a data set in memory: (N,C,H,W) uint8, or float32 in [-1, 1], which is rounded as sampling does."""
    for first in range(0, len(images), size):
        part = images[first : first + size]
        pixels = np.ascontiguousarray(np.moveaxis(part, 1, -1)) if part.dtype == np.uint8 else to_uint8(part)
        index = np.arange(first, first + len(part), dtype=np.uint64)
        yield Batch(index, None if labels is None else labels[first : first + size], pixels)


def _members(archive: zipfile.ZipFile, path: Path) -> tuple[Member, Member | None]:
    """Read and check the headers of images and labels."""
    pixels = header(archive, archive.getinfo("arr_0.npy"), path)
    kind = pixels.dtype.newbyteorder("=")
    if len(pixels.shape) != 4 or pixels.shape[3] not in (1, 3) or kind not in (np.uint8, np.float32):
        cure = "give uint8 or float32 images (N, H, W, C) with 1 or 3 channels"
        raise data_error(path, f"arr_0 is {pixels.dtype} {pixels.shape}", cure)
    if max(pixels.shape[1:3]) > MAX_SIDE:
        raise data_error(path, f"arr_0 is {pixels.dtype} {pixels.shape}", f"sides go up to {MAX_SIDE}")
    return pixels, label_header(archive, "arr_1", pixels.shape[0], path)


def _pixels(block: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    if block.dtype == np.uint8:
        return block
    if not np.isfinite(block).all():
        raise data_error(path, "arr_0 holds NaN or infinity", "give finite values in [-1, 1] units")
    return to_uint8(np.moveaxis(block, -1, 1))
