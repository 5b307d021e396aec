"""The proof that comes with every export: how far it is from the float32 torch model.

The torch model and the engine answer the same questions one after the other, so that one of them can go first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper

from cm_runtime import noise, sampling
from cm_runtime.backends.base import Backend
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.choices import Precision
from cm_runtime.errors import ParityError
from cm_runtime.export.graphs import KINDS
from cm_runtime.extras import require
from cm_runtime.manifest import Manifest, Parity
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph import Verdict
from cm_runtime.precond import precond
from cm_runtime.request import Draw

TOLERANCE = 1e-4  # largest difference of a denoised pixel in fp32; of images, one grey level
GREY = 2 / 255
LEAST_PSNR = 40.0  # dB on [-1, 1] data at any noise level, in fp16 and bf16
MOST_PSNR = 200.0  # what equal answers have
BATCHES = (1, 7)

Feed = dict[str, NDArray[Any]]


def check_engine(precision: Precision) -> None:
    """Raises MissingExtraError where nothing installed can check a file of that precision.

    ONNX Runtime's CPU has no bf16 convolution; OpenVINO computes it where the processor does, as the check must.
    """
    require("openvino" if precision == "bf16" else "onnxruntime", f"the proof of an export in {precision}")


def expected(model: ConsistencyModel, manifest: Manifest) -> list[NDArray[Any]]:
    """What ``model`` makes of the inputs that `measure` gives an export, in the same order."""
    if manifest.graph == "network":
        with torch.inference_mode():
            return [_network(model, given) for given in _inputs(manifest)]
    denoiser = TorchBackend(model, manifest.model_copy(update={"graph": "denoiser", "precision": "fp32"}))
    if manifest.graph == "denoiser":
        return [denoiser.evaluate(given) for given in _inputs(manifest)]
    (levels,) = manifest.sigmas.values()
    return [
        sampling.draw_images(
            denoiser,
            Draw(
                sigmas=levels,
                labels=given["label"].tolist() if "label" in given else None,
                micro_batch=given["noise"].shape[1],
            ),
            given["noise"],
        )
        for given in _inputs(manifest)
    ]


def _network(model: ConsistencyModel, given: Feed) -> NDArray[Any]:
    given = given | {"x_in": given["x_in"].astype(np.float32)}
    made: NDArray[Any] = model.F(*map(torch.from_numpy, given.values())).numpy()
    return made


def measure(path: Path, manifest: Manifest, expected: list[NDArray[Any]]) -> Parity:
    """Runs the exported file on noise levels over the whole range, in batches of 1 and 7; a sampler on its own.

    A batch of 7 holds seven levels at once. Raises ParityError when the outputs differ from those ``expected`` by more
    than 1e-4 (images: one grey level) in fp32, or have less than 40 dB at any noise level in fp16 and bf16.
    """
    engine = _engine(path, manifest)
    (own,) = manifest.sigmas.values() if manifest.graph == "sampler" else ((),)
    levels = own or tuple(float(sigma) for sigma in _sigmas(manifest))
    worst, psnr = 0.0, [MOST_PSNR] * (1 if own else len(levels))
    place = 0
    for given, wanted in zip(_inputs(manifest), expected, strict=True):
        difference = _scaled(wanted) - _scaled(engine.evaluate(given))
        for error in difference:
            i = 0 if own else place % len(levels)
            place += 1
            largest = float(np.abs(error).max())
            found = _psnr(error)
            if not _passes(manifest, largest, found):  # NaN fails too
                raise ParityError(
                    f"the {manifest.precision} export differs from its checkpoint by {largest:.3g} ({found:.1f} dB) at"
                    f" sigma {levels[i]:.4g} ({_asked(manifest)}); nothing was written"
                )
            worst, psnr[i] = max(worst, largest), min(psnr[i], found)
    shown = tuple(float(f"{sigma:.6g}") for sigma in levels)
    rounded = tuple(round(each, 1) for each in psnr)
    return Parity(engine=engine.version, max_abs=worst, sigmas=shown, batches=BATCHES, psnr=rounded)


def _engine(path: Path, manifest: Manifest) -> Backend:
    threads = torch.get_num_threads()
    if manifest.precision == "bf16":
        return OpenVinoBackend(path, manifest, threads=threads, precision="bf16", verdict=Verdict(""))
    return OrtBackend(path, manifest, threads=threads, verdict=Verdict(""))


def _passes(manifest: Manifest, largest: float, psnr: float) -> bool:
    if manifest.precision != "fp32":
        return psnr >= LEAST_PSNR
    return largest <= (GREY * 1.001 if manifest.graph == "sampler" else TOLERANCE)


def _asked(manifest: Manifest) -> str:
    if manifest.precision != "fp32":
        return f"at least {LEAST_PSNR:g} dB"
    return "at most one grey level" if manifest.graph == "sampler" else f"at most {TOLERANCE:g}"


def _psnr(error: NDArray[np.float64]) -> float:
    """dB on [-1, 1] data; of errors that are not finite, minus infinity."""
    mean = float(np.mean(error**2))
    if not np.isfinite(mean):
        return -np.inf
    return min(MOST_PSNR, 10 * float(np.log10(4 / mean))) if mean else MOST_PSNR


def _scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    """In [-1, 1] units."""
    full = values.astype(np.float64)
    return full / 127.5 - 1 if values.dtype == np.uint8 else full


def _sigmas(manifest: Manifest) -> NDArray[np.float32]:
    low, high = np.log(manifest.sigma_min), np.log(manifest.sigma_max)
    return np.exp(np.linspace(low, high, max(BATCHES))).astype(np.float32)


def _inputs(manifest: Manifest) -> Iterator[Feed]:
    """What each evaluation is given."""
    sigmas = _sigmas(manifest)
    index = np.arange(len(sigmas))
    z = noise.normal(0, index, 0, manifest.image_shape)
    x = (z * np.hypot(sigmas, manifest.sigma_data)[:, None, None, None]).astype(np.float32)
    feed: Feed
    if manifest.graph == "sampler":
        feed = {"noise": np.stack([noise.normal(0, index, k, manifest.image_shape) for k in range(manifest.steps)], 1)}
    elif manifest.graph == "network":
        form = precond(manifest.precond, manifest.sigma_data, manifest.sigma_boundary)
        kind = helper.tensor_dtype_to_np_dtype(KINDS[manifest.precision])
        feed = {"x_in": z.astype(kind), "c_noise": form.c_noise(sigmas)}
    else:
        feed = {"x": x, "sigma": sigmas}
    if manifest.num_classes:
        feed["label"] = index % manifest.num_classes
    for batch in BATCHES:
        for first in range(0, len(sigmas), batch):
            yield {name: _part(name, value, slice(first, first + batch)) for name, value in feed.items()}


def _part(name: str, value: NDArray[Any], part: slice) -> NDArray[Any]:
    """Some of the images; noise is (K,N,...) for a graph."""
    return np.ascontiguousarray(value[part].swapaxes(0, 1)) if name == "noise" else value[part]
