"""The parity of an engine that was built here with ONNX Runtime on the very file it was built from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cm_runtime.backends.base import Backend
from cm_runtime.errors import ParityError
from cm_runtime.export.parity_inputs import (
    BATCHES,
    GREY,
    LEAST_PSNR,
    MOST_PSNR,
    TOLERANCE,
    Feed,
    images_feed,
    range_levels,
    scaled,
    split,
)
from cm_runtime.manifest import Parity


def measure(engine: Backend, reference: Backend, largest: int) -> Parity:
    """Compare ``engine`` with ``reference`` on the same graph. Raises ParityError if they are too far from each other.

    largest: the greatest batch that both take. fp32: every pixel is within 1e-4, or a grey level after a whole sampler;
    halves: 40 dB at each noise level.
    """
    model = engine.manifest
    is_sampler = model.graph == "sampler"
    levels = np.asarray(model.sigmas[model.steps], np.float32) if is_sampler else range_levels(model)
    batches = tuple(dict.fromkeys(min(batch, largest) for batch in BATCHES))
    worst, squares, counts, index = 0.0, np.zeros(len(levels)), np.zeros(len(levels)), 0
    for feed in split(images_feed(model), batches):
        difference = scaled(_answer(engine, feed)) - scaled(_answer(reference, feed))
        worst = max(worst, float(np.abs(difference).max()))
        if not np.isfinite(difference).all():
            raise ParityError("the engine's images are not finite; nothing was written")
        for image in difference:
            level = 0 if is_sampler else index % len(levels)
            squares[level] += (image**2).sum()
            counts[level] += image.size
            index += 1
    compared = counts > 0
    with np.errstate(divide="ignore"):
        decibels = np.minimum(10 * np.log10(4 * counts[compared] / squares[compared]), MOST_PSNR)
    limit = GREY * 1.001 if is_sampler else TOLERANCE
    if model.precision == "fp32" and worst > limit:
        raise ParityError(
            f"the engine differs from {reference.version} by {worst:.3g} (at most {limit:.2g}); nothing was written"
        )
    if model.precision != "fp32" and decibels.min() < LEAST_PSNR:
        raise ParityError(
            f"the engine is {decibels.min():.1f} dB from {reference.version} (at least {LEAST_PSNR:g} dB);"
            " nothing was written"
        )
    return Parity(
        engine=engine.version,
        max_abs=worst,
        sigmas=tuple(float(f"{level:.6g}") for level in levels),
        batches=batches,
        psnr=tuple(round(float(value), 2) for value in decibels),
    )


def _answer(engine: Backend, feed: Feed) -> NDArray[np.generic]:
    """Images of a sampler, or what f makes of the feed."""
    if "noise" in feed:
        return engine.draw(feed["noise"], feed.get("label"))
    return engine.denoise(feed["x"], feed["sigma"], feed.get("label"))
