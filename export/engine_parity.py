"""How far an engine that was built here is from ONNX Runtime on the very file it was built from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.backends.base import Backend
from cm_runtime.errors import ParityError
from cm_runtime.manifest import Manifest, Parity

LEAST_PSNR = 40.0  # dB on [-1, 1] data, fp16 and bf16
GREATEST_PSNR = 200.0
TOLERANCE = 1e-4  # largest difference of a denoised pixel, fp32
GREY_LEVEL = 2 / 255  # and of a sampler's, which is rounded to one
BATCHES = (1, 7)


class _Question(NamedTuple):
    """One evaluation: x and sigma (N,), or the noise of a sampler, and the labels."""

    x: NDArray[np.float32]
    sigma: NDArray[np.float32] | None
    label: NDArray[np.int64] | None

    def answer(self, engine: Backend) -> NDArray[np.float32]:
        """On [-1, 1] data."""
        if self.sigma is None:
            return (engine.draw(self.x, self.label) / 127.5 - 1).astype(np.float32)
        return engine.denoise(self.x, self.sigma, self.label)


def measure(engine: Backend, reference: Backend, largest: int) -> Parity:
    """How far ``engine`` is from ``reference`` on the same graph. Raises ParityError if that is too far.

    largest: the greatest batch that both take. fp32: every pixel is within 1e-4, or a grey level after a whole sampler;
    halves: 40 dB at each noise level.
    """
    model = engine.manifest
    levels = _levels(model)
    batches = tuple(dict.fromkeys(min(batch, largest) for batch in BATCHES))
    worst, squares, counts = 0.0, np.zeros(len(levels)), np.zeros(len(levels))
    for first, question in _questions(model, levels, batches):
        difference = question.answer(engine).astype(np.float64) - question.answer(reference)
        worst = max(worst, float(np.abs(difference).max()))
        if not np.isfinite(difference).all():
            raise ParityError("the engine's images are not finite; nothing was written")
        for i, image in enumerate(difference):
            level = 0 if model.graph == "sampler" else first + i
            squares[level] += (image**2).sum()
            counts[level] += image.size
    used = counts > 0
    with np.errstate(divide="ignore"):
        decibels = np.minimum(10 * np.log10(4 * counts[used] / squares[used]), GREATEST_PSNR)
    limit = GREY_LEVEL * 1.001 if model.graph == "sampler" else TOLERANCE
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


def _levels(model: Manifest) -> NDArray[np.float32]:
    """A sampler's own, or as many over the whole range as the greatest batch has images."""
    if model.graph == "sampler":
        return np.asarray(model.sigmas[model.steps], np.float32)
    return np.geomspace(model.sigma_min, model.sigma_max, max(BATCHES)).astype(np.float32)


def _questions(
    model: Manifest, levels: NDArray[np.float32], batches: tuple[int, ...]
) -> Iterator[tuple[int, _Question]]:
    """Seven images in each of the ``batches``, with the place of the first of each batch."""
    index = np.arange(max(BATCHES))
    label = index % model.num_classes if model.num_classes else None
    if model.graph == "sampler":
        x = np.stack([noise.normal(0, index, draw, model.image_shape) for draw in range(model.steps)])
    else:
        x = noise.normal(0, index, 0, model.image_shape) * np.hypot(levels, model.sigma_data)[:, None, None, None]
        x = x.astype(np.float32)
    for batch in batches:
        for first in range(0, len(index), batch):
            part = slice(first, first + batch)
            labels = None if label is None else label[part]
            if model.graph == "sampler":
                yield first, _Question(np.ascontiguousarray(x[:, part]), None, labels)
            else:
                yield first, _Question(x[part], levels[part], labels)
