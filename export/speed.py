"""An export beside what one call of torch.onnx.export makes of the same model: how large both are, and how fast."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package

from cm_runtime import noise, sampling
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.checkpoints.native import Checkpoint
from cm_runtime.export.torch_exporter import plain
from cm_runtime.extras import require
from cm_runtime.manifest import Manifest
from cm_runtime.request import Draw
from cm_runtime.sampling import Array

LARGEST = 1 << 30  # bytes of weights: of larger ones three copies would lie in memory
SECONDS, LEAST = 3.0, 5
NOISY = 1.5  # times the lower quartile: where the upper one is above it, the machine was measured
PAUSE = 0.03  # seconds: threads of the other session that still look for work stop doing so


@dataclass(frozen=True)
class Comparison:
    """nodes, bytes: of the plain export; times: how many times as long it takes, a request of ``batch`` images."""

    nodes: int
    bytes: int
    batch: int
    times: float
    low: float
    high: float
    engine: str

    @property
    def text(self) -> str:
        """The time of a plain export; a warning where the quartiles are too far apart."""
        if self.high > NOISY * self.low:
            return f"from {self.low:.2f}x to {self.high:.2f}x as long: the machine is too noisy to tell"
        return f"{self.times:.2f}x [{self.low:.2f}, {self.high:.2f}] as long"


def with_plain(checkpoint: Checkpoint, path: Path, manifest: Manifest, batch: int = 1) -> Comparison | None:
    """The exported file at ``path`` against a plain export in ONNX Runtime, both drawing, alternating; quartiles.

    The plain one is sampled by `sampling.run`. None where a plain export has no match: a network graph, half precision,
    a teacher; and for weights above 1 GiB.
    """
    weights = checkpoint.ema[checkpoint.default_ema].values()
    if manifest.precision != "fp32" or manifest.graph == "network" or manifest.is_teacher:
        return None
    if sum(4 * tensor.numel() for tensor in weights) > LARGEST:
        return None
    require("onnxscript", "the comparison with a plain torch.onnx.export")
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "plain.onnx"
        plain(checkpoint, other)
        size = sum(each.stat().st_size for each in Path(folder).iterdir())
        nodes = len(onnx_package.load(str(other), load_external_data=False).graph.node)
        denoiser = manifest.model_copy(update={"graph": "denoiser", "data_file": ""})
        levels = manifest.sigmas[manifest.steps] if manifest.graph == "sampler" else (manifest.sigma_max,)
        z = noise.normals(0, np.arange(batch, dtype=np.uint64), len(levels), manifest.image_shape)
        draw = _sampler(OrtBackend(path, manifest), z, levels)
        draw_plain = _sampler(OrtBackend(other, denoiser), z, levels)
        ratios: list[float] = []
        end = time.monotonic() + SECONDS
        while time.monotonic() < end or len(ratios) < LEAST:
            ratios.append(_time(draw_plain) / _time(draw))
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Comparison(
        nodes, size, batch, middle, low, high, f"onnxruntime {require('onnxruntime', 'this').__version__}"
    )


def _sampler(engine: OrtBackend, z: Array, levels: tuple[float, ...]) -> Callable[[], Any]:
    sigmas = levels if engine.manifest.graph == "denoiser" else None

    def draw() -> Any:
        return sampling.draw_images(engine, Draw(sigmas=sigmas, micro_batch=z.shape[1]), z)

    draw()
    return draw


def _time(draw: Callable[[], Any]) -> float:
    time.sleep(PAUSE)
    draw()
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start
