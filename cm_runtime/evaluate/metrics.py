"""One pass over images, whatever their number, and what it says beside a reference."""

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
    """What one pass kept: statistics, some features (M, D) float32, and the class agreement.

    features: None where none were kept; agreement: None without labels or logits;
    image_shape: (H, W, C), None where no image was seen.
    """

    statistics: Statistics
    features: NDArray[np.float32] | None = None
    agreement: float | None = None
    image_shape: tuple[int, int, int] | None = None


class Figures(Record):
    """How far images are from a reference; None is what could not be measured."""

    count: int = Field(description="images measured")
    dimension: int = Field(description="numbers in the features of an image")
    frechet_distance: float | None = Field(ge=0)
    precision: float | None = Field(ge=0, le=1)
    recall: float | None = Field(ge=0, le=1)
    neighbours: int = K
    manifold: tuple[int, int] | None = Field(description="features of the reference and of the images behind them")
    class_agreement: float | None = Field(ge=0, le=1)


class Report(Record):
    """Figures and everything it takes to have them again."""

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
    """Takes in every batch of uint8 images once; memory does not grow with their number.

    manifold: features to keep for precision and recall, 0 for none. classes: of the labels, None where only the
    labels tell; agreement is measured where the extractor's logits are for that many. reference: refused at the
    first batch, not at the last, where it is another extractor's.
    Raises DataError, RequestError, EngineError.
    """
    running = RunningMoments()
    kept = Reservoir(manifold) if manifold else None
    labelled = agreed = 0
    shape = None
    for batch in batches:
        made = extractor(batch.images)
        if shape is None:
            shape = tuple(batch.images.shape[1:])
            if reference is not None:
                reference.check(made.features.shape[1], extractor.sha256, "the reference")
        running.update(made.features)
        if kept is not None:
            kept.update(made.features)
        if batch.labels is not None and made.logits is not None and classes in (None, made.logits.shape[1]):
            if batch.labels.max() >= made.logits.shape[1]:
                raise DataError(
                    f"label {batch.labels.max()}, but the extractor knows {quantity(made.logits.shape[1], 'class')}"
                )
            labelled += len(batch.labels)
            agreed += int((made.logits.argmax(1) == batch.labels).sum())
    mean, covariance = running.result()
    statistics = Statistics(mean, covariance, running.count, extractor.sha256)
    features = None if kept is None else kept.result()
    return Observation(statistics, features, agreed / labelled if labelled else None, shape)


def compare(images: Observation, reference: Observation | None) -> Figures:
    """Fréchet distance, precision and recall of ``images``, as far as the reference has what they need."""
    values: dict[str, Any] = {"frechet_distance": None, "precision": None, "recall": None, "manifold": None}
    if reference is not None:
        a, b = images.statistics, reference.statistics
        values["frechet_distance"] = frechet_distance((a.mean, a.covariance), (b.mean, b.covariance))
        if reference.features is not None and images.features is not None:
            values["precision"], values["recall"] = precision_recall(reference.features, images.features)
            values["manifold"] = len(reference.features), len(images.features)
    count = images.statistics.count
    assert count is not None  # it was observed
    return Figures(count=count, dimension=len(images.statistics.mean), class_agreement=images.agreement, **values)


def few_images(images: Observation, reference: Observation | None) -> str | None:
    """A warning where either side has too few images for its Fréchet distance, None where not or where there is none.

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
