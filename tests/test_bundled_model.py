"""The model that ships: what its file says, and that it draws the classes it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import cm_runtime as cm
from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.manifest import read_manifest
from cm_runtime.training.data import open_data

EXCERPT = Path(__file__).parent / "data" / "fashion-mnist"


@pytest.fixture(scope="module")
def drawn() -> NDArray[np.uint8]:
    """200 images in two steps, classes 0 to 9 in turn."""
    images: NDArray[np.uint8] = cm.sample(cm.load(), count=200, steps=2, seed=3)
    return images


def test_it_is_small_and_proved() -> None:
    manifest = read_manifest(DEFAULT_MODEL)
    assert DEFAULT_MODEL.stat().st_size <= 10_000_000
    assert (manifest.image_shape, manifest.num_classes, manifest.precond) == ((1, 28, 28), 10, "edm")
    assert manifest.parity is not None
    assert manifest.parity.max_abs <= 1e-4
    assert (min(manifest.parity.sigmas), max(manifest.parity.sigmas)) == (0.002, 80.0)
    assert manifest.training is not None
    assert manifest.training.method == "ect"


@pytest.mark.process
def test_the_mean_of_each_class_is_nearest_to_that_of_real_images(drawn: NDArray[np.uint8]) -> None:
    real = open_data(EXCERPT)
    means = np.stack([real.images[real.labels == c].astype(float).mean(0).ravel() for c in range(10)])
    for c in range(10):
        ours = drawn[c::10].astype(float).mean(0).ravel()
        assert np.argmin(((means - ours) ** 2).sum(1)) == c


def test_images_of_a_class_vary_as_real_ones_do(drawn: NDArray[np.uint8]) -> None:
    real = open_data(EXCERPT)
    for c in range(10):
        variance = [images.astype(float).var(0).mean() for images in (drawn[c::10], real.images[real.labels == c][:20])]
        assert 0.4 < variance[0] / variance[1] < 2.5


@pytest.mark.quick("1")
@pytest.mark.process
@pytest.mark.parametrize("batch", [1, 7, 255])
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(drawn: NDArray[np.uint8], batch: int) -> None:
    again = cm.sample(cm.load(), count=9, steps=2, seed=3, start=100, micro_batch=batch)
    assert np.abs(again.astype(int) - drawn[100:109]).max() <= 1
