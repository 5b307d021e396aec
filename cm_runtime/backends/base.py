"""What every engine shares: checked inputs, and how many images it should see at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cm_runtime.artifact import Manifest
from cm_runtime.errors import RequestError
from cm_runtime.steps import Array

MAX_THREADS = 1024


def checked_inputs(
    manifest: Manifest, x: ArrayLike, sigma: ArrayLike, label: ArrayLike | None
) -> tuple[Array, Array, NDArray[np.int64] | None]:
    """x (N,C,H,W) float32, sigma (N,) float32 and label (N,) int64 as engines take them.

    sigma may be a scalar, label too. Raises RequestError naming what does not fit the model.
    """
    shape = f"(N, {', '.join(map(str, manifest.image_shape))})"
    images = np.ascontiguousarray(_numbers(x, f"x must be {shape} numbers"))
    if images.ndim != 4 or images.shape[1:] != manifest.image_shape or len(images) == 0:
        raise RequestError(f"x must be {shape}, not {images.shape}")
    if not np.isfinite(images).all():
        raise RequestError("x must be finite")
    n = len(images)
    levels = _numbers(sigma, f"sigma must be a number or ({n},) numbers")
    if levels.shape not in ((), (1,), (n,)):
        raise RequestError(f"sigma must be a scalar or ({n},), not {levels.shape}")
    if not (np.isfinite(levels).all() and (levels > 0).all()):
        raise RequestError("sigma must be finite and above 0")
    levels = np.array(np.broadcast_to(levels, (n,)))
    if not manifest.num_classes:
        if label is not None:
            raise RequestError("this model has no classes; leave the label out")
        return images, levels, None
    if label is None:
        raise RequestError(f"this model has {manifest.num_classes} classes; give a label per image")
    try:
        labels = np.asarray(label)
    except ValueError as error:  # ragged
        raise RequestError(f"label must be an integer or ({n},) integers") from error
    if labels.dtype.kind not in "iu" or labels.shape not in ((), (1,), (n,)):
        raise RequestError(f"label must be an integer or ({n},) integers, not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= manifest.num_classes:
        raise RequestError(f"labels must be from 0 to {manifest.num_classes - 1}")
    return images, levels, np.array(np.broadcast_to(labels, (n,)), np.int64)


def checked_threads(threads: int) -> int:
    """``threads`` as engines take them: 0 for one per core, or 1 to 1024. Raises RequestError."""
    if not 0 <= threads <= MAX_THREADS:
        raise RequestError(f"threads must be from 1 to {MAX_THREADS}, or 0 for one per core, not {threads}")
    return threads


def images_at_once(manifest: Manifest, device: str) -> int:
    """As many pixels as 64 images of 32x32 on a CPU, where speed hardly depends on it; eight times those on a GPU."""
    _, height, width = manifest.image_shape
    return max(1, min(256, (64 if device == "cpu" else 512) * 32 * 32 // (height * width)))


def _numbers(value: ArrayLike, wanted: str) -> Array:
    """``value`` as float32; no copy where it is that already. Raises RequestError with ``wanted``."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged
        raise RequestError(wanted) from error
    if array.dtype.kind not in "fiu":
        raise RequestError(f"{wanted}, not {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and refused as such
        return array.astype(np.float32, copy=False)
