"""Our kernels in torch's streams. pycuda launches only in streams that it has made, so this is cuda-bindings."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from cm_runtime import kernels
from cm_runtime.cuda.context import LEAST_CAPABILITY, LEAST_DRIVER
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.extras import require
from cm_runtime.kernels.launches import Launch


def launch(work: Launch, device: torch.device) -> None:
    """Puts a kernel in torch's current stream on ``device``. Raises EngineError and MissingExtraError."""
    numbers: tuple[Any, ...] = work.arguments
    arguments = (
        tuple(each.item() for each in numbers),
        tuple(np.ctypeslib.as_ctypes_type(each.dtype) for each in numbers),
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    with _current(device.index):
        function = _function(device.index, work.kernel)
        _call("cuLaunchKernel", function, *work.grid, *work.block, work.shared, stream, arguments, 0)


@contextmanager
def _current(index: int) -> Iterator[None]:
    """The primary context of GPU ``index``, which is torch's, made this thread's: one of torch's own may have none."""
    _call("cuCtxPushCurrent", _context(index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent")


@cache
def _context(index: int) -> Any:
    return _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", index))


@cache
def _function(index: int, kernel: str) -> Any:
    return _call("cuModuleGetFunction", _module(index), kernel.encode())


@cache
def _module(index: int) -> Any:
    """Our kernels in the current context. Raises EngineError for a GPU or a driver that is too old for them."""
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        actual, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        raise EngineError(f"cuda:{index} has compute capability {actual}; the kernels need {least} (Ampere) or newer")
    try:
        return _call("cuModuleLoadData", kernels.fatbin())
    except EngineError as error:
        if _call("cuDriverGetVersion") >= LEAST_DRIVER:
            raise
        raise EngineError(f"{error}; the kernels need a driver of CUDA {LEAST_DRIVER // 1000} or newer") from error


def _call(name: str, *arguments: Any) -> Any:
    """The result of a function of CUDA's driver. Raises EngineError with the name of its error."""
    error, *results = getattr(_driver(), name)(*arguments)
    if int(error):
        kind = OutOfMemoryError if error.name == "CUDA_ERROR_OUT_OF_MEMORY" else EngineError
        raise kind(f"CUDA failed in {name}: {error.name}")
    return results[0] if results else None


@cache
def _driver() -> Any:
    require("cuda.bindings", "a kernel in torch's stream")
    return importlib.import_module("cuda.bindings.driver")
