"""A GPU at work: one stream, named memory that is used again, launches of our kernels, and copies that do not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.context import driver, module, wrap_errors
from cm_runtime.cuda.graph import Graph
from cm_runtime.kernels.launches import Launch

STATIC_SHARED = 48 << 10  # bytes of shared memory that a kernel may have without asking


class Device:
    """A stream, and named arrays on the GPU, kept for the next call and enlarged when one does not fit."""

    def __init__(self) -> None:
        self._cuda = driver()
        self._arrays: dict[str, tuple[Any, int]] = {}
        self._functions: dict[str, Any] = {}
        with wrap_errors("making a stream"):
            self._stream = self._cuda.Stream()

    @property
    def stream(self) -> int:
        """The CUDA stream's handle."""
        return int(self._stream.handle)

    @property
    def queue(self) -> Any:
        """The stream itself, pycuda's."""
        return self._stream

    def address(self, name: str, size: int) -> int:
        """Address of the array ``name`` of at least ``size`` bytes; a call with a larger size moves it."""
        memory, capacity = self._arrays.get(name, (None, 0))
        if memory is None or capacity < size:
            with wrap_errors(f"taking {size / 1e6:.1f} MB of GPU memory for {name}"):
                self._stream.synchronize()  # nothing may be using what is freed
                self._arrays.pop(name, None)
                del memory
                memory = self._cuda.mem_alloc(size)
            self._arrays[name] = memory, size
        return int(memory)

    def send(self, name: str, array: NDArray[Any]) -> int:
        """Copies a contiguous ``array`` to the GPU, in the stream's order, and returns its address there."""
        address = self.address(name, array.nbytes)
        with wrap_errors(f"copying {name} to the GPU"):
            self._cuda.memcpy_htod_async(address, array, self._stream)
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Copies ``name`` from the GPU when all before it in the stream is done; the array is the caller's."""
        array = np.empty(shape, dtype)
        address = self.address(name, array.nbytes)
        with wrap_errors(f"computing {name}"):  # an asynchronous kernel's failure is seen here first
            self._cuda.memcpy_dtoh_async(array, address, self._stream)
            self._stream.synchronize()
        return array

    def take(self, size: int) -> Any:
        """Memory of its own, freed with what is returned; int() of that is its address."""
        with wrap_errors(f"taking {size / 1e6:.1f} MB of GPU memory"):
            return self._cuda.mem_alloc(size)

    def clear(self, address: int, size: int) -> None:
        """``size`` bytes, a multiple of 4, become 0 in the stream's order."""
        with wrap_errors("clearing memory"):
            self._cuda.memset_d32_async(address, 0, size // 4, self._stream)

    def put(self, address: int, array: NDArray[Any]) -> None:
        """Copies a contiguous array to the GPU in the stream's order, until when a pinned one must stay as it is."""
        with wrap_errors("copying to the GPU"):
            self._cuda.memcpy_htod_async(address, array, self._stream)

    def move(self, to: int, address: int, size: int) -> None:
        """Copies from one place of the GPU to another in the stream's order."""
        with wrap_errors("copying on the GPU"):
            self._cuda.memcpy_dtod_async(to, address, size, self._stream)

    def finish(self) -> None:
        """Waits for all there is on the GPU, copies that leave included. Raises EngineError where it failed."""
        with wrap_errors("computing"):
            self._cuda.Context.synchronize()

    def launch(self, work: Launch) -> None:
        """Puts one of our kernels in the stream. Raises EngineError."""
        with wrap_errors(f"launching {work.kernel}"):
            function = self._functions.get(work.kernel)
            if function is None:
                function = self._functions[work.kernel] = module().get_function(work.kernel)
            if work.shared > STATIC_SHARED:
                function.set_attribute(self._cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, work.shared)
            function(*work.arguments, grid=work.grid, block=work.block, shared=work.shared, stream=self._stream)

    def capture(self, body: Callable[[], Any]) -> Graph:
        """Capture all that ``body`` puts in the stream as a graph."""
        return Graph(self.stream, body)

    def pin(self, size: int) -> NDArray[np.uint8]:
        """Bytes of the host that the GPU copies to and from by itself."""
        with wrap_errors(f"pinning {size / 1e6:.1f} MB of memory"):
            return self._cuda.pagelocked_empty(size, np.uint8)  # type: ignore[no-any-return]


class Leaving:
    """A copy to pinned memory beside the device's own stream: what comes next need not wait for it."""

    def __init__(self, device: Device, size: int) -> None:
        self._cuda = driver()
        self._device = device
        self._size = size
        self._memory = device.take(size)
        self._pinned = device.pin(size)
        with wrap_errors("making a stream"):
            self._stream = self._cuda.Stream()
            self._is_ready, self._is_done = self._cuda.Event(), self._cuda.Event()
        self._is_pending = False

    def start(self, address: int) -> None:
        """Takes what the device's stream has written at ``address`` by then; the place is free for it afterwards."""
        if self._is_pending:
            raise AssertionError("the last copy has not been waited for")
        self._device.move(int(self._memory), address, self._size)
        with wrap_errors("copying images to the host"):
            self._is_ready.record(self._device.queue)
            self._stream.wait_for_event(self._is_ready)
            self._cuda.memcpy_dtoh_async(self._pinned, int(self._memory), self._stream)
            self._is_done.record(self._stream)
        self._is_pending = True

    def wait(self) -> NDArray[np.uint8]:
        """The bytes when they are there, to be read before the next `start`. Failures of all before are seen here."""
        with wrap_errors("computing images"):
            self._is_done.synchronize()
        self._is_pending = False
        return self._pinned
