"""Preview images during training: always of the same noise, so that grids of different steps compare."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise, sampling
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.torch import TorchReference
from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.manifest import TrainingSummary
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.request import Draw
from cm_runtime.sampling import to_uint8


def draw(model: ConsistencyModel, method: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Draw images 0 to count - 1 of ``seed``: two steps, or Heun's ODE for a teacher. (count,H,W,C) uint8."""
    config = model.config
    summary = TrainingSummary(method=method, data="", steps=0, images=0, seconds=0)
    manifest = Checkpoint(config=config, default_ema="", ema={}, training=summary).manifest()
    denoiser = TorchReference(model, manifest, EngineOptions(device=str(next(model.parameters()).device)))
    if not manifest.is_teacher:
        return sampling.draw_images(denoiser, Draw(count=count, seed=seed))
    index = np.arange(count)
    z = noise.normal(seed, index, 0, config.image_shape)
    label = index % config.network.num_classes if config.network.num_classes else None
    return to_uint8(sampling.heun(denoiser, z * np.float32(config.sigma_max), label))
