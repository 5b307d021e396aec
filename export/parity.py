"""The proof that comes with every export: how far it is from the float32 torch model.

The torch model and the engine answer the same questions one after the other, so that one of them can go first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cm_runtime import noise
from cm_runtime.artifact import Manifest, Parity
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.errors import ParityError
from cm_runtime.model import ConsistencyModel
from cm_runtime.steps import Array

TOLERANCE = 1e-4  # largest difference of a denoised pixel, fp32
BATCHES = (1, 7)


def expected(model: ConsistencyModel, manifest: Manifest) -> list[Array]:
    """What ``model`` makes of the inputs that `measure` gives an export: one (N,C,H,W) float32 array for each batch."""
    reference = TorchBackend(model, manifest)
    return [reference.denoise(*given) for given in _inputs(manifest)]


def measure(path: Path, manifest: Manifest, expected: list[Array]) -> Parity:
    """Runs the exported file on noise levels over the whole range, in batches of 1 and 7.

    A batch of 7 holds seven levels at once. Raises ParityError when the outputs differ from those ``expected`` by
    more than 1e-4.
    """
    engine = OrtBackend(path, manifest, threads=torch.get_num_threads())
    worst = 0.0
    for given, wanted in zip(_inputs(manifest), expected, strict=True):
        difference = np.abs(wanted - engine.denoise(*given)).max()
        if not difference <= TOLERANCE:  # NaN fails too
            raise ParityError(
                f"the export differs from its checkpoint by {difference:.3g} at sigma"
                f" {float(given[1][0]):.4g} (at most {TOLERANCE:g}); nothing was written"
            )
        worst = max(worst, float(difference))
    levels = tuple(float(f"{sigma:.6g}") for sigma in _sigmas(manifest))
    return Parity(engine=engine.version, max_abs=worst, sigmas=levels, batches=BATCHES)


def _sigmas(manifest: Manifest) -> Array:
    low, high = np.log(manifest.sigma_min), np.log(manifest.sigma_max)
    return np.exp(np.linspace(low, high, max(BATCHES))).astype(np.float32)


def _inputs(manifest: Manifest) -> Iterator[tuple[Array, Array, NDArray[np.int64] | None]]:
    """x, sigma and label of each evaluation."""
    sigmas = _sigmas(manifest)
    index = np.arange(len(sigmas))
    x = noise.normal(0, index, 0, manifest.image_shape) * np.hypot(sigmas, manifest.sigma_data)[:, None, None, None]
    label = index % manifest.num_classes if manifest.num_classes else None
    for batch in BATCHES:
        for first in range(0, len(sigmas), batch):
            part = slice(first, first + batch)
            yield x[part].astype(np.float32), sigmas[part], None if label is None else label[part]
