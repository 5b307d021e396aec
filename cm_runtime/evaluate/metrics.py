"""Metrics of images beside a reference, from one pass over any number of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cm_runtime.errors import DataError
from cm_runtime.errors.wording import join_words, quantity
from cm_runtime.evaluate.extractor import Extractor
from cm_runtime.evaluate.frechet import RunningMoments, frechet_distance
from cm_runtime.evaluate.precision_recall import K, Reservoir, precision_recall
from cm_runtime.evaluate.statistics import Statistics
from cm_runtime.files.records import Record
from cm_runtime.sampling import Batch

MANIFOLD = 10_000
FEWEST = 2048  # images: the dimension of Inception's features, below which their covariance is singular


@dataclass(frozen=True, eq=False)
class Observation:
    """Result of one pass: statistics, some features (M, D) float32, and the class agreement.

    features: None if not wanted; agreement: None without labels or logits; image_shape: (H, W, C), None if unknown.
    """

    statistics: Statistics
    features: NDArray[np.float32] | None = None
    agreement: float | None = None
    image_shape: tuple[int, int, int] | None = None


class Figures(Record):
    """Metrics of images beside a reference; None is one that could not be measured."""

    count: int = Field(description="images measured")
    dimension: int = Field(description="numbers in the features of an image")
    frechet_distance: float | None = Field(ge=0)
    precision: float | None = Field(ge=0, le=1)
    recall: float | None = Field(ge=0, le=1)
    neighbours: int = K
    manifold: tuple[int, int] | None = Field(description="features of the reference and of the images behind them")
    class_agreement: float | None = Field(ge=0, le=1)


class Report(Record):
    """Figures and everything it takes to reproduce them."""

    cm_runtime: str = Field(description="the version")
    images: dict[str, Any]
    reference: dict[str, Any] | None
    extractor: dict[str, Any]
    figures: Figures
    warnings: tuple[str, ...] = Field((), description="what to know before the figures are used")


def observe(
    batches: Iterable[Batch],
    extractor: Extractor,
    *,
    manifold: int = MANIFOLD,
    classes: int | None = None,
    reference: Statistics | None = None,
) -> Observation:
    """Measure batches of uint8 images in one pass; memory does not grow with their number.

    manifold: features to keep for precision and recall, 0 for none. classes: of the labels, None if unknown; agreement
    is measured if the extractor's logits are for as many. reference: another extractor's is refused at the first batch,
    not at the last. Raises DataError, RequestError, EngineError.
    """
    moments = RunningMoments()
    reservoir = Reservoir(manifold) if manifold else None
    labels = matches = 0
    shape = None
    for batch in batches:
        extraction = extractor(batch.images)
        features, logits = extraction.features, extraction.logits
        if shape is None:
            shape = tuple(batch.images.shape[1:])
            if reference is not None:
                reference.check(features.shape[1], extractor.sha256, "the reference")
        moments.update(features)
        if reservoir is not None:
            reservoir.update(features)
        if batch.labels is not None and logits is not None and classes in (None, logits.shape[1]):
            if batch.labels.max() >= logits.shape[1]:
                count = quantity(logits.shape[1], "class")
                raise DataError(f"label {batch.labels.max()}, but the extractor knows {count}")
            labels += len(batch.labels)
            matches += int((logits.argmax(1) == batch.labels).sum())
    statistics = Statistics(*moments.result(), moments.count, extractor.sha256)
    sample = None if reservoir is None else reservoir.result()
    return Observation(statistics, sample, matches / labels if labels else None, shape)


def compare(images: Observation, reference: Observation | None) -> Figures:
    """Compute Fréchet distance, precision and recall of ``images``, as far as the reference allows."""
    values: dict[str, Any] = {"frechet_distance": None, "precision": None, "recall": None, "manifold": None}
    if reference is not None:
        a, b = images.statistics, reference.statistics
        values["frechet_distance"] = frechet_distance((a.mean, a.covariance), (b.mean, b.covariance))
        if reference.features is not None and images.features is not None:
            values["precision"], values["recall"] = precision_recall(reference.features, images.features)
            values["manifold"] = len(reference.features), len(images.features)
    count = images.statistics.count
    assert count is not None  # `observe` counts
    return Figures(count=count, dimension=len(images.statistics.mean), class_agreement=images.agreement, **values)


def few_images(images: Observation, reference: Observation | None) -> str | None:
    """Word a warning if either side has too few images for a Fréchet distance; None if there is no distance.

    The covariances of few images bias the distance upwards (arXiv 1911.07023): below 2048 images, or twice as many as
    the features have dimensions, it is no property of the model alone.
    """
    if reference is None:
        return None
    dimension = len(images.statistics.mean)
    least = max(FEWEST, 2 * dimension)
    sides = {"images": images.statistics.count, "the reference": reference.statistics.count}
    few = [
        quantity(count, "image") + ("" if name == "images" else f" of {name}")
        for name, count in sides.items()
        if count is not None and count < least
    ]
    if not few:
        return None
    return (
        f"the Frechet distance is biased upwards: {join_words(few)}, where {quantity(dimension, 'feature')} take"
        f" {least} or more; compare it with distances of as many images only"
    )
