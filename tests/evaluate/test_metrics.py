"""One pass: figures against NumPy over everything at once, memory that does not grow, real images against noise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import extractors
import numpy as np
import pytest

from cm_runtime.errors import DataError
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.evaluate.frechet import frechet_distance, moments
from cm_runtime.evaluate.metrics import Observation, compare, few_images, observe
from cm_runtime.evaluate.precision_recall import precision_recall
from cm_runtime.evaluate.sources import array_batches
from cm_runtime.evaluate.statistics import Statistics
from cm_runtime.training.data import open_data

ROOT = Path(__file__).parents[2]
EXCERPT = ROOT / "tests" / "data" / "fashion-mnist"


@pytest.fixture
def toy(tmp_path: Path) -> Extractor:
    """Features: eight fixed mixtures of 64 pixels; logits: the first three pixels, so the brightest is the class."""
    mixture = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32) / 64
    outputs = {"features": mixture, "logits": np.eye(64, 3, dtype=np.float32)}
    return Extractor(extractors.linear(tmp_path / "toy.onnx", outputs=outputs), threads=1)


def pictures(rng: np.random.Generator, count: int) -> Any:
    return rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 3, 7, 255])
def test_figures_are_those_of_all_features_at_once(toy: Extractor, rng: np.random.Generator, size: int) -> None:
    images, real, labels = pictures(rng, 300), pictures(rng, 280) // 2, rng.integers(0, 3, 300)
    seen = observe(array_batches(images, labels, size), toy, classes=3)
    figures = compare(seen, observe(array_batches(real, None, size), toy))
    a, b = (toy(x.transpose(0, 2, 3, 1)) for x in (images, real))
    assert (figures.count, figures.dimension) == (300, a.features.shape[1])
    assert figures.frechet_distance == pytest.approx(frechet_distance(moments(a.features), moments(b.features)))
    assert (figures.precision, figures.recall) == precision_recall(b.features, a.features)
    assert figures.manifold == (280, 300)
    brightest = images.reshape(300, 64)[:, :3].argmax(1)
    assert figures.class_agreement == pytest.approx((brightest == labels).mean())


@pytest.mark.parametrize(
    ("dimension", "count", "other", "words"),
    [
        (4, 2047, 60_000, "2047 images, where 4 features take 2048 or more"),
        (4, 2048, 2048, None),
        (4, 1, None, "1 image, where"),
        (1030, 2059, 2060, "2059 images, where 1030 features take 2060 or more"),
        (1030, 2060, 2059, "2059 images of the reference, where"),
        (1, 50, 40, "50 images and 40 images of the reference, where 1 feature take"),
    ],
)
def test_a_distance_of_few_images_is_warned_of(
    dimension: int, count: int, other: int | None, words: str | None
) -> None:
    def seen(number: int | None) -> Observation:
        return Observation(Statistics(np.zeros(dimension), np.eye(dimension), number, "ab"))

    warning = few_images(seen(count), seen(other))
    assert warning is None if words is None else warning is not None and words in warning
    assert few_images(seen(count), None) is None  # no distance, no bias


def test_what_cannot_be_measured_is_none(toy: Extractor, rng: np.random.Generator, tmp_path: Path) -> None:
    images, labels = pictures(rng, 20), rng.integers(0, 3, 20)
    seen = observe(array_batches(images, labels), toy, classes=10)  # ten classes are not the extractor's three
    assert seen.agreement is None
    assert observe(array_batches(images, None), toy).agreement is None
    blind = Extractor(extractors.linear(tmp_path / "blind.onnx"))
    assert observe(array_batches(images, labels), blind).agreement is None
    only_statistics = compare(seen, Observation(seen.statistics))
    assert only_statistics.frechet_distance == pytest.approx(0, abs=1e-9)
    assert only_statistics.precision is only_statistics.recall is only_statistics.manifold is None
    assert compare(seen, None).frechet_distance is None
    assert observe(array_batches(images, labels), toy, manifold=0).features is None


def test_the_manifold_is_bounded(toy: Extractor, rng: np.random.Generator) -> None:
    seen = observe(array_batches(pictures(rng, 300), None, 7), toy, manifold=50)
    assert seen.features is not None and seen.features.shape == (50, 8)
    assert compare(seen, seen).manifold == (50, 50)


def test_labels_beyond_the_extractors_are_refused(toy: Extractor, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="label 3, but the extractor knows 3 classes"):
        observe(array_batches(pictures(rng, 4), np.arange(4)), toy)


def test_one_image_has_no_covariance(toy: Extractor, rng: np.random.Generator) -> None:
    with pytest.raises(DataError, match="1 image: at least two"):
        observe(array_batches(pictures(rng, 1), None), toy)


def test_another_extractors_reference_is_refused_at_the_first_batch(toy: Extractor, rng: np.random.Generator) -> None:
    def batches() -> Any:
        yield from array_batches(pictures(rng, 3), None)
        pytest.fail("the pass went on")

    for reference in (Statistics(np.zeros(5), np.eye(5)), Statistics(np.zeros(8), np.eye(8), 9, "ab" * 32)):
        with pytest.raises(DataError, match="another extractor"):
            observe(batches(), toy, reference=reference)


@pytest.mark.process
def test_real_images_are_near_and_noise_is_far(rng: np.random.Generator) -> None:
    """Under the shipped extractor; few images lie farther off than many, so 128 real ones are not at zero."""
    extractor = Extractor(threads=1)
    train, test = open_data(EXCERPT), open_data(EXCERPT, split="test")
    reference = observe(array_batches(train.images, train.labels), extractor)
    real = compare(observe(array_batches(test.images, test.labels), extractor, classes=10), reference)
    noise = rng.integers(0, 256, test.images.shape, dtype=np.uint8)
    far = compare(observe(array_batches(noise, None), extractor), reference)
    assert real.frechet_distance is not None and far.frechet_distance is not None
    assert real.frechet_distance < 6 and far.frechet_distance > 100
    assert real.precision is not None and real.precision > 0.7 and (far.precision, far.recall) == (0, 0)
    assert real.class_agreement is not None and real.class_agreement > 0.9
    shifted = compare(observe(array_batches(255 - test.images, test.labels), extractor, classes=10), reference)
    assert shifted.class_agreement is not None and shifted.class_agreement < 0.5


STREAM = """
import resource, sys
import numpy as np
from pathlib import Path
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.evaluate.metrics import compare, observe
from cm_runtime.evaluate.sources import open_samples
from cm_runtime.evaluate.statistics import Statistics
extractor = Extractor(Path(sys.argv[1]), threads=1)
reference = Statistics(np.zeros(32), np.eye(32))
seen = observe(open_samples(Path(sys.argv[2])).batches(), extractor, manifold=1000, reference=reference)
assert compare(seen, seen).frechet_distance < 1e-3
print(seen.statistics.count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.process
def test_fifty_thousand_images_take_the_memory_of_five_thousand(tmp_path: Path) -> None:
    """39 MB of pixels go through; measured from outside, in processes of their own."""
    matrix = np.random.default_rng(0).standard_normal((784, 32)).astype(np.float32) / 784
    network = extractors.linear(tmp_path / "e.onnx", ("N", 28, 28, 1), {"features": matrix})
    peaks = []
    for count in (5_000, 50_000):
        images = np.random.default_rng(1).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
        np.savez(tmp_path / "s.npz", images)
        done = subprocess.run(
            [sys.executable, "-c", STREAM, network, tmp_path / "s.npz"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        seen, peak = map(int, done.stdout.split())
        assert seen == count
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 30
