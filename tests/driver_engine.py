"""An engine for the stand-in of tests/driver: f(x, sigma) = x / (1 + sigma), in NumPy, as a function of the host."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from cm_runtime import sampling
from cm_runtime.backends import DEFAULT_MODEL
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.sampler import OnDevice
from cm_runtime.kernels.launches import Images
from cm_runtime.manifest import read_manifest

MANIFEST = read_manifest(DEFAULT_MODEL)


def nothing() -> None:
    """What hooks do that are not set."""


class HostEngine:
    """The same f by `sampling`'s own loop."""

    manifest = MANIFEST
    micro_batch = 4

    def denoise(self, x: Any, sigma: Any, label: Any = None) -> Any:
        return x / np.float32(1 + sigma)


class DriverEngine:
    """`cuda.engine.Engine` of f, which owns its sampling as backends do.

    hooks: called as evaluations go into the stream, at the end of a capture, to trim memory, to follow other streams.
    bound: batch sizes.
    """

    manifest = MANIFEST
    micro_batch = 4
    graph = "denoiser"
    outputs = ("denoised",)

    def __init__(self, index: int = 0) -> None:
        hooks = self.hooks = SimpleNamespace(evaluate=nothing, capture=nothing, trim=nothing, follow=nothing)
        self.on_device = OnDevice(Device(index), lambda: hooks.follow(), lambda: hooks.trim())
        self.bound: list[int] = []

    def images(self, count: int) -> Images:
        return Images(count, *self.manifest.image_shape, output="fp32")

    def bind(self, device: Device, count: int) -> Callable[[Mapping[str, int]], None]:
        import cuda.bindings.driver as cu

        self.bound.append(count)
        shape, hooks, calls = (count, *self.manifest.image_shape), self.hooks, []

        def evaluate(addresses: Mapping[str, int]) -> None:
            hooks.evaluate()
            x, y = (floats(addresses[name], shape) for name in ("x", "denoised"))
            sigma = floats(addresses["sigma"], (1,))
            call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: np.divide(x, 1 + sigma, out=y) is None)
            calls.append(call)
            (error,) = cu.cuLaunchHostFunc(device.stream, cu.CUhostFn(ctypes.cast(call, ctypes.c_void_p).value), 0)
            assert not error, error

        return evaluate

    def capture(self, device: Device, body: Callable[[], Any]) -> Any:
        return device.capture(lambda: (body(), self.hooks.capture()))

    def batches(self, request: Any, noise: Any = None) -> Iterator[sampling.Batch]:
        return self.on_device.batches(self, request, noise)


def floats(address: int, shape: tuple[int, ...]) -> Any:
    """The float32 numbers at an address, which is the host's."""
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)
