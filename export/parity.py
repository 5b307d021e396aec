"""The parity that comes with every export: its distance from the float32 torch model.

The torch model and the engine evaluate the same inputs one after the other, so that one of them can go first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import helper

from cm_runtime import noise, sampling
from cm_runtime.backends.base import Backend, EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.torch import TorchBackend
from cm_runtime.choices import Precision
from cm_runtime.errors import ParityError
from cm_runtime.export.contrib import defined_copy
from cm_runtime.export.graphs import KINDS
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
from cm_runtime.extras import require
from cm_runtime.manifest import Manifest, Parity
from cm_runtime.networks.consistency import ConsistencyModel
from cm_runtime.onnx_graph import Verdict
from cm_runtime.precond import precond
from cm_runtime.request import Draw


def check_engine(precision: Precision) -> None:
    """Raise MissingExtraError where nothing installed can check a file of that precision.

    ONNX Runtime's CPU has no bf16 convolution; OpenVINO computes it where the processor does, as the check must.
    """
    require("openvino" if precision == "bf16" else "onnxruntime", f"the proof of an export in {precision}")


def answers(model: ConsistencyModel, manifest: Manifest) -> list[NDArray[Any]]:
    """The outputs of ``model`` for the inputs that `measure` evaluates an export on, in the same order."""
    if manifest.graph == "network":
        with torch.inference_mode():
            return [_network(model, feed) for feed in inputs(manifest)]
    denoiser = TorchBackend(model, manifest.model_copy(update={"graph": "denoiser", "precision": "fp32"}))
    if manifest.graph == "denoiser":
        return [denoiser.evaluate(feed) for feed in inputs(manifest)]
    (levels,) = manifest.sigmas.values()
    return [
        sampling.draw_images(
            denoiser,
            Draw(
                sigmas=levels,
                labels=feed["label"].tolist() if "label" in feed else None,
                micro_batch=feed["noise"].shape[1],
            ),
            feed["noise"],
        )
        for feed in inputs(manifest)
    ]


def _network(model: ConsistencyModel, feed: Feed) -> NDArray[Any]:
    rest = [torch.from_numpy(feed[name]) for name in ("c_noise", "label") if name in feed]
    F: NDArray[Any] = model.F(torch.from_numpy(feed["x_in"].astype(np.float32)), *rest).numpy()
    return F


def measure(path: Path, manifest: Manifest, answers: list[NDArray[Any]]) -> Parity:
    """Run the exported file on noise levels over the whole range, in batches of 1 and 7; a sampler on its own.

    A batch of 7 holds seven levels. Of a graph for a GPU a copy runs, whose operators are standard ones. Raises
    ParityError when the outputs differ from ``answers`` by more than 1e-4 (images: one grey level) in fp32, or have
    less than 40 dB at any noise level in fp16 and bf16.
    """
    engine = _engine(path, manifest)
    (own_levels,) = manifest.sigmas.values() if manifest.graph == "sampler" else ((),)
    levels = own_levels or tuple(float(sigma) for sigma in range_levels(manifest))
    worst, psnr = 0.0, [MOST_PSNR] * (1 if own_levels else len(levels))
    index = 0
    for feed, answer in zip(inputs(manifest), answers, strict=True):
        for error in scaled(answer) - scaled(engine.evaluate(feed)):
            i = 0 if own_levels else index % len(levels)
            index += 1
            largest = float(np.abs(error).max())
            decibels = _psnr(error)
            if not _passes(manifest, largest, decibels):  # NaN fails too
                raise ParityError(
                    f"the {manifest.precision} export differs from its checkpoint by {largest:.3g} ({decibels:.1f} dB)"
                    f" at sigma {levels[i]:.4g} ({_limit(manifest)}); nothing was written"
                )
            worst, psnr[i] = max(worst, largest), min(psnr[i], decibels)
    return Parity(
        engine=engine.version
        if manifest.target != "cuda"
        else f"{engine.version}, operators of {manifest.target} defined",
        max_abs=worst,
        sigmas=tuple(float(f"{sigma:.6g}") for sigma in levels),
        batches=BATCHES,
        psnr=tuple(round(each, 1) for each in psnr),
    )


def inputs(manifest: Manifest) -> Iterator[Feed]:
    """The feed of each evaluation, by the names of the graph's inputs."""
    feed = images_feed(manifest)
    if manifest.graph == "network":
        kind = helper.tensor_dtype_to_np_dtype(KINDS[manifest.precision])
        form = precond(manifest.precond, manifest.sigma_data, manifest.sigma_boundary)
        z = noise.normal(0, np.arange(max(BATCHES)), 0, manifest.image_shape)
        feed |= {"x_in": z.astype(kind), "c_noise": form.c_noise(feed.pop("sigma"))}
        feed.pop("x")
    return split(feed)


def _engine(path: Path, manifest: Manifest) -> Backend:
    threads = torch.get_num_threads()
    if manifest.precision == "bf16":
        return OpenVinoBackend(
            path, manifest, EngineOptions(device="cpu", threads=threads, precision="bf16"), verdict=Verdict("")
        )
    with ExitStack() as stack:
        if manifest.target == "cuda":
            path = stack.enter_context(defined_copy(path))
            manifest = manifest.model_copy(update={"target": "cpu"})
        return OrtBackend(path, manifest, EngineOptions(device="cpu", threads=threads), verdict=Verdict(""))


def _passes(manifest: Manifest, largest: float, psnr: float) -> bool:
    if manifest.precision != "fp32":
        return psnr >= LEAST_PSNR
    return largest <= (GREY * 1.001 if manifest.graph == "sampler" else TOLERANCE)


def _limit(manifest: Manifest) -> str:
    if manifest.precision != "fp32":
        return f"at least {LEAST_PSNR:g} dB"
    return "at most one grey level" if manifest.graph == "sampler" else f"at most {TOLERANCE:g}"


def _psnr(error: NDArray[np.float64]) -> float:
    """dB on [-1, 1] data; of errors that are not finite, minus infinity."""
    mean = float(np.mean(error**2))
    if not np.isfinite(mean):
        return -np.inf
    return min(MOST_PSNR, 10 * float(np.log10(4 / mean))) if mean else MOST_PSNR
