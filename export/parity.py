"""The proof that comes with every export: how far it is from the float32 torch model."""

from __future__ import annotations

import numpy as np
import torch

from cm_runtime import noise
from cm_runtime.artifact import Manifest, Parity
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.errors import ParityError
from cm_runtime.model import ConsistencyModel

TOLERANCE = 1e-4  # largest difference of a denoised pixel, fp32
BATCHES = (1, 7)


def measure(graph: bytes, model: ConsistencyModel, manifest: Manifest) -> Parity:
    """Runs the exported ``graph`` and ``model`` on the same inputs: noise levels over the whole range, batches 1 and 7.

    A batch of 7 holds seven levels at once. Raises ParityError when the outputs differ by more than 1e-4.
    """
    engine = OrtBackend(graph, manifest, threads=torch.get_num_threads())
    reference = TorchBackend(model, manifest)
    low, high = np.log(manifest.sigma_min), np.log(manifest.sigma_max)
    sigmas = np.exp(np.linspace(low, high, max(BATCHES))).astype(np.float32)
    index = np.arange(len(sigmas))
    x = noise.normal(0, index, 0, manifest.image_shape) * np.hypot(sigmas, manifest.sigma_data)[:, None, None, None]
    label = index % manifest.num_classes if manifest.num_classes else None
    worst = 0.0
    for batch in BATCHES:
        for first in range(0, len(sigmas), batch):
            part = slice(first, first + batch)
            given = x[part].astype(np.float32), sigmas[part], None if label is None else label[part]
            expected, found = reference.denoise(*given), engine.denoise(*given)
            difference = np.abs(expected - found).max()
            if not difference <= TOLERANCE:  # NaN fails too
                raise ParityError(
                    f"the export differs from its checkpoint by {difference:.3g} at sigma"
                    f" {float(sigmas[part][0]):.4g} (at most {TOLERANCE:g}); nothing was written"
                )
            worst = max(worst, float(difference))
    return Parity(
        engine=engine.version, max_abs=worst, sigmas=tuple(float(f"{s:.6g}") for s in sigmas), batches=BATCHES
    )
