"""The sampling loop of a batch over memory that stays where it is, as one CUDA graph."""

from __future__ import annotations

import threading

import numpy as np

from cm_runtime.cuda.device import Device
from cm_runtime.cuda.engine import Captured, Engine
from cm_runtime.cuda.layout import Layout, pad_projection
from cm_runtime.cuda.steps import DeviceSteps, Places
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import Arrays, Placed
from cm_runtime.request import Request
from cm_runtime.sampling import run


class CapturedBatch:
    """Everything from noise to images of a batch, by the parameters that are in memory at ``addresses``."""

    def __init__(self, engine: Engine, device: Device, layout: Layout, request: Request) -> None:
        """Take the memory, and bind the engine to its batch size. Raises EngineError, OutOfMemoryError."""
        self._kind, self._device, self._layout = engine.graph, device, layout  # not the engine, which may own this
        self._evaluate = engine.bind(device, layout.images.n)
        self._clip, self._sigmas = request.clip, request.sigmas
        project = request.edit.project if request.edit else None
        self._project = pad_projection(project, layout.images.n) if project else None
        self._memory = device.take(layout.block.size)
        self.addresses = layout.at(int(self._memory))
        self._graph: Captured | None = None
        self._runs = 0
        self._thread = threading.local()

    def put(self, engine: Engine) -> None:
        """Put the whole loop in the stream, from the second or third time on as a graph where it can be captured.

        An engine does at a thread's first run what cannot be captured: libraries' handles and searches are a thread's.
        """
        is_second, is_warm = self._runs == 1, hasattr(self._thread, "has_run")
        if is_second and is_warm:
            self._graph = engine.capture(self._device, self._body)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._body()
            self._thread.has_run = True
            if is_second and not is_warm:
                self._graph = engine.capture(self._device, self._body)
        self._runs += 1

    def evaluate(self, k: int = 0) -> None:
        """Put evaluation ``k`` alone in the stream, of whatever is in memory."""
        at = self.addresses
        if self._kind == "sampler":
            names = {"noise": at["noise"], "images": at["result"] + self._layout.front, "finite": at["result"]}
        else:
            level = at["sigma"] + k * self._layout.row
            if self._kind == "network":
                names = {"x_in": at["x_in"], "c_noise": level, "F": at["F"]}
            else:
                names = {"x": at["x"], "sigma": level, "denoised": at["F"]}
        self._evaluate({**names, "label": at.get("label", 0)})

    def _body(self) -> None:
        at = self.addresses
        self._device.clear(at["result"], self._layout.front)
        if self._kind == "sampler":  # which holds the loop, and takes all of the noise
            images = self._layout.images
            for k in range(0 if self._layout.has_noise else self._layout.steps):
                z = at["noise"] + k * images.elements * 4
                self._device.launch(launches.first_noise(images, Arrays(at["request"], at["levels"], x=z), k))
            self.evaluate()
            return
        run(_Unrolled(self), self._steps(), self._sigmas, at.get("label", 0))

    def _steps(self) -> DeviceSteps:
        at, layout = self.addresses, self._layout
        images, is_uint8 = at["result"] + layout.front, layout.result_type == np.uint8
        places = Places(
            request=at["request"],
            levels=at["levels"],
            x=at["x"],
            x_in=at.get("x_in", 0),
            bytes=images if is_uint8 else 0,
            floats=0 if is_uint8 else images,
            not_finite=at["result"],
            noise=at["noise"] if layout.has_noise else 0,
            start=at.get("start", 0),
        )
        edit = Placed(self._project, at["known"], at.get("mask", 0)) if self._project else None
        return DeviceSteps(self._device, layout.images, places, layout.steps, self._clip, edit)


class _Unrolled:
    """The denoiser that `sampling.run` sees: evaluation k reads the k-th level from memory."""

    def __init__(self, batch: CapturedBatch) -> None:
        self._batch = batch
        self._k = 0

    def denoise(self, x: int, sigma: float, label: int) -> int:
        self._batch.evaluate(self._k)
        self._k += 1
        return self._batch.addresses["F"]
