"""Resizing images for an extractor, as clean-fid does.

Parmar, Zhang, Zhu 2022, arXiv 2104.11222: bicubic with an antialiasing filter, on float channels that are not rounded
afterwards. Resizers without the filter, or with rounding, move a Fréchet distance by whole points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resized(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """(N,H,W,C) uint8 -> (N,height,width,C) float32 in 0..255 for a ``size`` of (height, width)."""
    height, width = size
    made = np.empty((len(images), height, width, images.shape[3]), np.float32)
    for image, target in zip(images, made, strict=True):
        for channel in range(images.shape[3]):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            target[..., channel] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(made, 0, 255, out=made)
