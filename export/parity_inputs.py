"""The inputs that parity is measured on: seven images over the whole range of noise levels, in batches of 1 and 7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.manifest import Manifest

BATCHES = (1, 7)
TOLERANCE = 1e-4  # largest difference of a denoised pixel in fp32
GREY = 2 / 255  # and of a sampler's, which is rounded to a grey level
LEAST_PSNR = 40.0  # dB on [-1, 1] data, in fp16 and bf16
MOST_PSNR = 200.0  # of equal answers

Feed = dict[str, NDArray[Any]]


def range_levels(manifest: Manifest) -> NDArray[np.float32]:
    """A noise level for each of the seven images, over the whole range."""
    low, high = np.log(manifest.sigma_min), np.log(manifest.sigma_max)
    return np.exp(np.linspace(low, high, max(BATCHES))).astype(np.float32)


def images_feed(manifest: Manifest) -> Feed:
    """Seven images: the noise (N,K,C,H,W) of a sampler, x and sigma of any other graph, and label with classes."""
    sigmas = range_levels(manifest)
    index = np.arange(len(sigmas))
    if manifest.graph == "sampler":
        feed = {"noise": np.stack([noise.normal(0, index, k, manifest.image_shape) for k in range(manifest.steps)], 1)}
    else:
        scale = np.hypot(sigmas, manifest.sigma_data)[:, None, None, None]
        feed = {"x": (noise.normal(0, index, 0, manifest.image_shape) * scale).astype(np.float32), "sigma": sigmas}
    return feed | ({"label": index % manifest.num_classes} if manifest.num_classes else {})


def split(feed: Feed, batches: tuple[int, ...] = BATCHES) -> Iterator[Feed]:
    """The feed of each evaluation, all images in ``batches`` of each size in turn; noise becomes (K,N,C,H,W)."""
    for batch in batches:
        for first in range(0, max(BATCHES), batch):
            part = {name: value[first : first + batch] for name, value in feed.items()}
            if "noise" in part:
                part["noise"] = np.ascontiguousarray(part["noise"].swapaxes(0, 1))
            yield part


def scaled(images: NDArray[Any]) -> NDArray[np.float64]:
    """Images or answers of a denoiser, on [-1, 1] data."""
    full = images.astype(np.float64)
    return full / 127.5 - 1 if images.dtype == np.uint8 else full
