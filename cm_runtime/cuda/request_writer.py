"""A request as the kernels and the network read it: its parameters and arrays, copied to the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.choices import GraphKind
from cm_runtime.cuda.arrays import DeviceNoise
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.layout import Layout, edit_arrays, pad_batch
from cm_runtime.kernels import launches
from cm_runtime.kernels.launches import REQUEST
from cm_runtime.manifest import Manifest
from cm_runtime.precond import precond
from cm_runtime.request import Request
from cm_runtime.sampling import Array

Noise = Array | DeviceNoise | None  # a caller's


class RequestWriter:
    """Copies what a batch is drawn from to ``addresses``, and keeps its sources until `release`."""

    def __init__(
        self, manifest: Manifest, graph: GraphKind, device: Device, layout: Layout, addresses: Mapping[str, int]
    ) -> None:
        self._manifest, self._graph = manifest, graph
        self._device, self._layout, self._addresses = device, layout, addresses
        self._pinned = device.pin(layout.parameters.size)
        self._arrays: dict[str, Array] = {}

    def write(self, request: Request, first: int, labels: NDArray[np.int64] | None, noise: Noise) -> None:
        """Put the copies in the stream. first: index of the first image; noise: (K,N,C,H,W) where the caller's."""
        for name, value in self._parameters(request, first, labels).items():
            offset, size = self._layout.parameters.places[name]
            self._pinned[offset : offset + size] = np.frombuffer(value.tobytes(), np.uint8)
        self._device.put(self._addresses["parameters"], self._pinned)
        self._arrays = edit_arrays(request.edit, self._layout.images)
        if isinstance(noise, DeviceNoise):
            noise.copy(self._device, self._addresses["noise"], self._layout.images.n)
        elif noise is not None:
            self._arrays["noise"] = np.ascontiguousarray(pad_batch(noise, self._layout.images.n, axis=1))
        for name, array in self._arrays.items():
            self._device.put(self._addresses[name], array)

    def release(self) -> None:
        """Let the sources go: the copies are done."""
        self._arrays = {}

    def _parameters(self, request: Request, first: int, labels: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
        m, n = self._manifest, self._layout.images.n
        values: dict[str, NDArray[Any]] = {"request": np.array([(request.seed, first)], REQUEST)}
        if self._graph == "sampler":
            values["levels"] = np.ones(self._layout.steps + 1, np.dtype((np.float32, 4)))  # the noise itself
        else:
            form, is_network = precond(m.precond, m.sigma_data, m.sigma_boundary), self._graph == "network"
            values["levels"] = launches.levels(request.sigmas, form, m.sigma_min, is_f=not is_network)
            if request.edit and request.edit.is_noisy:
                values["levels"]["renoise"][0] = 0
            s = np.array(request.sigmas, np.float32)
            values["sigma"] = np.repeat(form.c_noise(s) if is_network else s, self._layout.row // 4)
        if labels is not None:
            values["label"] = pad_batch(labels, n)
        return values
