"""CUDA through pycuda, which nothing else touches: which GPU it is, memory used again, a stream, copies."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import EngineError
from cm_runtime.extras import require


class Gpu(NamedTuple):
    """name: as its driver has it; capability: its compute capability, as in "8.9"."""

    name: str
    capability: str


@cache
def driver() -> Any:
    """`pycuda.driver` with the first GPU's primary context current, which torch and TensorRT share.

    Raises MissingExtraError, and EngineError where there is no driver or no GPU.
    """
    require("pycuda", "TensorRT")
    try:
        importlib.import_module("pycuda.autoprimaryctx")
        return importlib.import_module("pycuda.driver")
    except Exception as error:  # ImportError for a missing libcuda.so.1, pycuda's own for a missing GPU
        raise EngineError(f"there is no NVIDIA GPU that CUDA can use: {_line(error)}") from error


def gpu() -> Gpu:
    """The GPU of the context; CUDA_VISIBLE_DEVICES chooses among several. Raises as `driver` does."""
    cuda = driver()
    with failing("asking for the GPU"):
        device = cuda.Context.get_device()
        major, minor = device.compute_capability()
        return Gpu(device.name(), f"{major}.{minor}")


class Memory:
    """Named arrays on the GPU, kept for the next call and enlarged when one does not fit; and the stream they use."""

    def __init__(self) -> None:
        self._cuda = driver()
        self._held: dict[str, tuple[Any, int]] = {}
        with failing("making a stream"):
            self._stream = self._cuda.Stream()

    @property
    def stream(self) -> int:
        """The CUDA stream's handle."""
        return int(self._stream.handle)

    def address(self, name: str, size: int) -> int:
        """Where ``name`` has at least ``size`` bytes, until it is asked to have more."""
        held, capacity = self._held.get(name, (None, 0))
        if held is None or capacity < size:
            with failing(f"taking {size / 1e6:.1f} MB of GPU memory for {name}"):
                self._stream.synchronize()  # nothing may be using what is freed
                self._held.pop(name, None)
                del held
                held = self._cuda.mem_alloc(size)
            self._held[name] = held, size
        return int(held)

    def send(self, name: str, array: NDArray[Any]) -> int:
        """Copies a contiguous ``array`` to the GPU, in the stream's order, and returns its address there."""
        address = self.address(name, array.nbytes)
        with failing(f"copying {name} to the GPU"):
            self._cuda.memcpy_htod_async(address, array, self._stream)
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Copies ``name`` from the GPU when all before it in the stream is done; the array is the caller's."""
        array = np.empty(shape, dtype)
        address = self.address(name, array.nbytes)
        with failing(f"computing {name}"):  # an asynchronous kernel's failure is seen here first
            self._cuda.memcpy_dtoh_async(array, address, self._stream)
            self._stream.synchronize()
        return array


@contextmanager
def failing(doing: str) -> Iterator[None]:
    """CUDA's errors as one line that says what failed."""
    try:
        yield
    except driver().Error as error:
        raise EngineError(f"CUDA failed while {doing}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
