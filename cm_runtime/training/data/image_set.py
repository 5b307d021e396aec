"""A data set in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import data_error
from cm_runtime.errors.wording import quantity
from cm_runtime.files.npz import MAX_CLASSES

MAX_SIDE = 4096

Pixels = NDArray[np.uint8] | NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, with or without classes.

    images: (N, C, H, W) uint8 in 0..255, or float32 in [-1, 1] units, finite and not clipped; N >= 1,
        C >= 1, 1 <= H, W <= 4096.
    labels: (N,) int64 in 0..num_classes-1, or None.
    num_classes: 0 where labels is None, else 1..65536.
    name: the name in reports.

    Raises DataError if any of this does not hold.
    """

    images: Pixels
    labels: NDArray[np.int64] | None
    num_classes: int
    name: str

    def __post_init__(self) -> None:
        """Check all that the class docstring states; raises DataError."""
        fault = _images_fault(self.images) or _labels_fault(self.labels, self.num_classes, len(self.images))
        if fault:
            raise data_error(self.name or "images", *fault)

    def __len__(self) -> int:
        """N, the number of images."""
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        _, channels, height, width = self.images.shape
        return channels, height, width


def _images_fault(images: Any) -> tuple[str, str] | None:
    """Find the first fault of ``images``, with its cure; None if sound."""
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        return f"images are {getattr(images, 'dtype', type(images).__name__)}", "give uint8 or float32 images"
    if images.ndim != 4 or 0 in images.shape or max(images.shape[2:]) > MAX_SIDE:
        return f"images have shape {images.shape}", f"give (N, C, H, W), none of them 0, sides up to {MAX_SIDE}"
    # min and max carry NaN and infinities along, and need no array of booleans
    if images.dtype == np.float32 and not (np.isfinite(images.min()) and np.isfinite(images.max())):
        return "images hold NaN or infinity", "give finite values in [-1, 1] units"
    return None


def _labels_fault(labels: Any, num_classes: int, count: int) -> tuple[str, str] | None:
    """Find the first fault of ``labels``, with its cure; None if sound."""
    if labels is None:
        fault = f"{quantity(num_classes, 'class')} without labels", "give labels, or 0 classes"
        return fault if num_classes else None
    if not 1 <= num_classes <= MAX_CLASSES:
        return quantity(num_classes, "class"), f"labels need 1 to {MAX_CLASSES} classes"
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
        return "labels are not an int64 array of shape (N,)", "give one int64 label an image"
    if len(labels) != count:
        return f"{quantity(count, 'image')} but {quantity(len(labels), 'label')}", "give one label an image"
    if labels.min() < 0 or labels.max() >= num_classes:
        return f"labels {labels.min()}..{labels.max()}", f"they must lie in 0..{num_classes - 1}"
    return None
