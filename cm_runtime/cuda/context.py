"""The CUDA driver through pycuda: which GPU it is, our kernels loaded on it, and its errors as lines."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from cm_runtime import kernels
from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import NO_DRIVER, has, has_driver, require

LEAST_CAPABILITY = 8, 0
LEAST_DRIVER = 13000  # as the driver counts versions of CUDA; what the kernels are compiled with


class Gpu(NamedTuple):
    """name: as its driver has it; capability: its compute capability, as in "8.9"."""

    name: str
    capability: str


@cache
def driver() -> Any:
    """`pycuda.driver` with the first GPU's primary context current, which torch and TensorRT share.

    Raises MissingExtraError, and EngineError where there is no driver or no GPU.
    """
    if not has_driver() and not has("pycuda"):
        raise EngineError(f"there is no NVIDIA GPU that CUDA can use: {NO_DRIVER}")
    require("pycuda", "CUDA")
    try:
        importlib.import_module("pycuda.autoprimaryctx")
        return importlib.import_module("pycuda.driver")
    except Exception as error:  # ImportError for a missing libcuda.so.1, pycuda's own for a missing GPU
        raise EngineError(f"there is no NVIDIA GPU that CUDA can use: {first_line(error)}") from error


@contextmanager
def on_this_thread() -> Iterator[None]:
    """Make the process's CUDA context current on this thread for the block; a no-op if `driver` made none."""
    if not driver.cache_info().currsize:
        yield
        return
    context = importlib.import_module("pycuda.autoprimaryctx").context
    context.push()
    try:
        yield
    finally:
        context.pop()


def gpu() -> Gpu:
    """The GPU of the context; CUDA_VISIBLE_DEVICES chooses among several. Raises as `driver` does."""
    cuda = driver()
    with wrap_errors("asking for the GPU"):
        device = cuda.Context.get_device()
        major, minor = device.compute_capability()
        return Gpu(device.name(), f"{major}.{minor}")


@cache
def module() -> Any:
    """Our kernels on the GPU. Raises EngineError for a GPU or a driver that is too old for them."""
    cuda, device = driver(), gpu()
    if tuple(map(int, device.capability.split("."))) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise EngineError(
            f"{device.name} has compute capability {device.capability}; the kernels need {least} (Ampere) or newer"
        )
    try:
        return cuda.module_from_buffer(kernels.fatbin())
    except cuda.Error as error:
        version = cuda.get_driver_version()
        if version < LEAST_DRIVER:
            raise EngineError(
                f"this NVIDIA driver is of CUDA {version // 1000}.{version % 1000 // 10}; the kernels need one of CUDA"
                f" {LEAST_DRIVER // 1000} (580 or newer)"
            ) from error
        raise EngineError(
            f"{device.name} (compute capability {device.capability}) refused the kernels: {first_line(error)}"
        ) from error


@contextmanager
def wrap_errors(action: str) -> Iterator[None]:
    """CUDA's errors as one line that says what failed; OutOfMemoryError for want of memory."""
    cuda = driver()
    try:
        yield
    except cuda.MemoryError as error:
        raise OutOfMemoryError(f"CUDA has no memory left while {action}: {first_line(error)}") from error
    except cuda.Error as error:
        raise EngineError(f"CUDA failed while {action}: {first_line(error)}") from error
