"""Samplers that a race compares: each draws the same request with the same weights, in one precision and layout."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import cm_runtime as cm
from cm_runtime import backends, export, noise
from cm_runtime.bench import peers
from cm_runtime.bench.networks import STANDING, standing_checkpoint
from cm_runtime.checkpoints.load import load_checkpoint
from cm_runtime.choices import Target
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.request import Draw, sampling_request
from cm_runtime.sampling import labels_of

STEPS = 2
ROUNDS = 20
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    """One request: a checkpoint's ``batch`` images in STEPS steps, in ``precision`` on ``device``."""

    source: Path
    precision: str
    batch: int
    device: str
    work: Path
    caches: Path

    @property
    def name(self) -> str:
        """The setting in a file's name."""
        return f"{self.source.stem}-{self.precision}-{self.batch}"

    def request(self) -> Any:
        """The request, with its noise levels."""
        draw = Draw(count=self.batch, steps=STEPS, micro_batch=self.batch)
        return sampling_request(load_checkpoint(self.source).manifest(), draw)


def checkpoint(network: str, folder: Path) -> Path:
    """The checkpoint of a standing network, made in ``folder`` if it is not there; or the path of one."""
    return standing_checkpoint(network, folder) if network in STANDING else Path(network)


class Contender:
    """A loaded sampler."""

    def draw(self) -> np.ndarray:
        """The images of the setting, (N,H,W,C) uint8 in the host's memory."""
        raise NotImplementedError

    def keep(self) -> None:
        """Save what a compiler has made, for later calls."""

    def outside(self) -> float | None:
        """The share of a request's GPU time outside of evaluations; None where it cannot be told apart."""
        return None


class Plain(Contender):
    """The sampler in plain torch: weights in the race's type, channels_last, norms' statistics in float32.

    Noise is on the device beforehand and images leave as bytes, which is to its favour. compiled: f by torch.compile,
    max-autotune with its own graphs, with Inductor's caches of earlier calls.
    """

    def __init__(self, setting: Setting, is_compiled: bool = False) -> None:
        self._device, self._type = torch.device(setting.device), DTYPES[setting.precision]
        self._cache = setting.caches / f"inductor-{setting.name}.bin" if is_compiled else None
        source = load_checkpoint(setting.source)
        self._model = source.model().to(self._device).eval()
        self._model.F.to(self._type).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for module in self._model.F.modules():
            if isinstance(module, nn.GroupNorm):
                module.float()
                module.forward = partial(normalise, module)  # type: ignore[method-assign]
        self._sigma_min, request = source.config.sigma_min, setting.request()
        index = np.arange(setting.batch, dtype=np.uint64)
        z = torch.from_numpy(noise.normals(0, index, STEPS, source.config.image_shape)).to(self._device)
        self._noise = [each.contiguous(memory_format=torch.channels_last) for each in z]
        label = labels_of(request, index, source.config.network.num_classes)
        self._label = None if label is None else torch.from_numpy(label).to(self._device)
        self._sigmas = [(each, torch.full((setting.batch,), each, device=self._device)) for each in request.sigmas]
        self._f: Callable[..., Tensor] = self._denoise
        if is_compiled:
            self._load()
            mode = "max-autotune" if self._device.type == "cuda" else "default"
            self._f = torch.compile(self._denoise, fullgraph=True, dynamic=False, mode=mode)

    def draw(self) -> np.ndarray:
        """See Contender."""
        x0: Tensor | None = None
        with torch.inference_mode():
            for z, (sigma, sigmas) in zip(self._noise, self._sigmas, strict=True):
                renoise = sigma if x0 is None else (sigma**2 - self._sigma_min**2) ** 0.5
                x = renoise * z if x0 is None else x0 + renoise * z
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                x0 = self._f(x, sigmas, self._label).clamp(-1, 1)
            assert x0 is not None
            images = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
            return np.asarray(images.cpu().numpy())

    def _denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        model, s = self._model, sigma.reshape(-1, 1, 1, 1)
        F = model.F((model.precond.c_in(s) * x).to(self._type), model.precond.c_noise(sigma), label)
        x0: Tensor = model.precond.c_skip(s) * x + model.precond.c_out(s) * F.float()
        return x0

    def _load(self) -> None:
        if self._cache and self._cache.exists():
            torch.compiler.load_cache_artifacts(self._cache.read_bytes())

    def keep(self) -> None:
        """See Contender."""
        if self._cache and (artifacts := torch.compiler.save_cache_artifacts()):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            draft = self._cache.with_suffix(".draft")
            draft.write_bytes(artifacts[0])
            os.replace(draft, self._cache)


def normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group normalisation with statistics in float32, which a compiler fuses."""
    return functional.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)


class Own(Contender):
    """cm.sample on an engine: noise is drawn on the device, images leave as bytes."""

    def __init__(self, setting: Setting, load: Callable[[Setting], Any]) -> None:
        self._setting, self._model = setting, load(setting)
        if setting.device != "cpu" and getattr(self._model, "on_device", None) is None:
            raise EngineError("sampling goes through the host, and is not what this races")

    def draw(self) -> np.ndarray:
        """See Contender."""
        batch = self._setting.batch
        return np.asarray(cm.sample(self._model, batch, STEPS, micro_batch=batch))

    def outside(self) -> float | None:
        """See Contender; the evaluations alone are a graph too, if the whole request is one."""
        sampler = getattr(self._model, "on_device", None)
        if sampler is None:
            return None
        from gpu.bandwidth import Timer

        batch = sampler.prepare(self._model, self._setting.request(), self._setting.batch).batch
        return share_outside(self._model, sampler.device, batch, Timer(sampler.device).milliseconds)


def share_outside(engine: Any, device: Any, batch: Any, milliseconds: Callable[[Any], float]) -> float:
    """1 - the time of a request's evaluations over that of the whole, both as graphs; medians over rounds."""

    def evaluate() -> None:
        for k in range(STEPS if engine.graph != "sampler" else 1):
            batch.evaluate(k)

    put = partial(batch.put, engine)
    with device.use("measuring"):
        for _ in range(2):
            put()  # the first time is without a graph, and the second captures it
        graph = engine.capture(device, evaluate)
        network = graph.launch if graph else evaluate  # ONNX Runtime has a graph for each evaluation
        shares = [1 - milliseconds(network) / milliseconds(put) for _ in range(ROUNDS)]
    return round(statistics.median(shares), 4)


class PlainExport(Contender):
    """torch's own export of f on ONNX Runtime, with a loop in NumPy."""

    def __init__(self, setting: Setting) -> None:
        config = load_checkpoint(setting.source).config
        index, request = np.arange(setting.batch, dtype=np.uint64), setting.request()
        self._peer = peers.peer(
            "onnx", setting.source, setting.work, device=setting.device, precision=cast(Any, setting.precision)
        )
        z = noise.normals(0, index, STEPS, config.image_shape)
        self._inputs = z, request.sigmas, labels_of(request, index, config.network.num_classes)

    def draw(self) -> np.ndarray:
        """See Contender."""
        return np.asarray(np.rint((self._peer(*self._inputs) + 1) * 127.5), np.uint8)


def load_torch(setting: Setting, backend: Any = "torch") -> Any:
    """cm-runtime on torch."""
    return backends.load(setting.source, backend, setting.device, precision=cast(Any, setting.precision))


def load_ort(setting: Setting, target: Target) -> Any:
    """cm-runtime on ONNX Runtime, whose own operators, or the standard's, are in the graph."""
    return backends.load(graph(setting, target), "ort", setting.device, precision=cast(Any, setting.precision))


def load_tensorrt(setting: Setting, package: Any) -> Any:
    """cm-runtime on TensorRT, with an engine for this batch alone. Raises RequestError for tf32."""
    if setting.precision == "tf32":
        raise RequestError("TensorRT's engines are built without TF32")
    path = setting.work / f"{setting.name}-{package}.engine"
    if not path.exists():
        export.tensorrt(graph(setting, "tensorrt"), path, package=package, batches=[setting.batch])
    return backends.load(path)


def graph(setting: Setting, target: Target) -> Path:
    """The exported network; on the CPU, where steps are no kernels, f, in standard operators."""
    is_cpu = setting.device == "cpu"
    kind, target = ("denoiser", "cpu") if is_cpu else ("network", target)
    precision: Any = "fp32" if setting.precision == "tf32" else setting.precision
    path = setting.work / f"{setting.source.stem}-{kind}-{precision}-{target}.onnx"
    if not path.exists():
        export.onnx(load_checkpoint(setting.source), path, graph=cast(Any, kind), precision=precision, target=target)
    return path


CONTENDERS: dict[str, Callable[[Setting], Contender]] = {
    "torch": Plain,
    "torch.compile": partial(Plain, is_compiled=True),
    "onnxruntime": PlainExport,
    "cm-runtime torch": partial(Own, load=load_torch),
    "cm-runtime torch.compile": partial(Own, load=partial(load_torch, backend="torch.compile")),
    "cm-runtime onnxruntime": partial(Own, load=partial(load_ort, target="cuda")),
    "cm-runtime onnxruntime, standard operators": partial(Own, load=partial(load_ort, target="cpu")),
    "cm-runtime tensorrt": partial(Own, load=partial(load_tensorrt, package="tensorrt")),
    "cm-runtime tensorrt-rtx": partial(Own, load=partial(load_tensorrt, package="tensorrt_rtx")),
}
