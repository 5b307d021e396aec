"""A GPU at work: one stream, named memory that is used again, launches of our kernels, and copies that do not wait."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.context import Owned, open_context, wrap_errors
from cm_runtime.cuda.driver import LEGACY_STREAM
from cm_runtime.cuda.graph import Graph
from cm_runtime.kernels.launches import Launch


class Device:
    """A stream of GPU ``index``, and named arrays there, kept for the next call and enlarged when one does not fit.

    Every method may be called from any thread; `use` keeps those of other threads out of the stream for a while.
    """

    def __init__(self, index: int = 0) -> None:
        self.context = open_context(index)
        self._driver = self.context.driver
        self._arrays: dict[str, tuple[Owned, int]] = {}
        self._lock, self._depth = threading.RLock(), 0
        with self.use("making a stream"):
            self._stream = Owned(self.context, self._driver.create_stream(), self._driver.destroy_stream)
        self.stream: int = self._stream.handle

    @contextmanager
    def use(self, action: str) -> Iterator[None]:
        """Make the GPU this thread's, and the stream its alone, for the block. The driver's errors name ``action``."""
        with self._lock, wrap_errors(action):
            self._depth += 1
            try:
                if self._depth > 1:
                    yield
                else:
                    with self.context.current():
                        yield
            finally:
                self._depth -= 1

    def address(self, name: str, size: int) -> int:
        """Address of the array ``name`` of at least ``size`` bytes; a call with a larger size moves it."""
        with self.use(f"enlarging {name}"):
            memory, capacity = self._arrays.get(name, (None, 0))
            if memory is None or capacity < size:
                if memory:
                    self._driver.synchronize(self.stream)  # nothing may be using what is freed
                    del self._arrays[name]
                    memory.close()
                memory = self.take(size, f" for {name}")
                self._arrays[name] = memory, size
            return int(memory)

    def send(self, name: str, array: NDArray[Any]) -> int:
        """Copies a contiguous ``array`` to the GPU, in the stream's order, and returns its address there."""
        with self.use(f"copying {name} to the GPU"):
            address = self.address(name, array.nbytes)
            self._driver.copy_in(address, array, self.stream)
        return address

    def fetch(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Copies ``name`` from the GPU when all before it in the stream is done; the array is the caller's."""
        size = math.prod(shape) * dtype.itemsize
        return self.read(self.address(name, size), shape, dtype, name)

    def read(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "images") -> NDArray[Any]:
        """Copies what is at an address when all before it in the stream is done; the array is the caller's."""
        array = np.empty(shape, dtype)
        with self.use(f"computing {name}"):  # an asynchronous kernel's failure is seen here first
            self._driver.copy_out(array, address, self.stream)
            self._driver.synchronize(self.stream)
        return array

    def take(self, size: int, purpose: str = "") -> Owned:
        """Memory of its own, freed with what is returned; int() of that is its address."""
        with self.use(f"taking {size / 1e6:.1f} MB of GPU memory{purpose}"):
            return Owned(self.context, self._driver.allocate(size), self._driver.free)

    def clear(self, address: int, size: int) -> None:
        """``size`` bytes, a multiple of 4, become 0 in the stream's order."""
        with self.use("clearing memory"):
            self._driver.clear(address, size // 4, self.stream)

    def put(self, address: int, array: NDArray[Any]) -> None:
        """Copies a contiguous array to the GPU in the stream's order, until when a pinned one must stay as it is."""
        with self.use("copying to the GPU"):
            self._driver.copy_in(address, array, self.stream)

    def move(self, to: int, address: int, size: int) -> None:
        """Copies from one place of the GPU to another in the stream's order."""
        with self.use("copying on the GPU"):
            self._driver.copy(to, address, size, self.stream)

    def follow(self, stream: int = LEGACY_STREAM, context: int = 0) -> None:
        """Put what comes next behind all that another stream has by now. By default behind that of blocking streams.

        context: the stream's, where it is not the device's own.
        """
        inside = self._driver.inside(context) if context else nullcontext()
        with self.use("waiting for another stream"), inside:
            event = self._driver.create_event()
            try:
                self._driver.record(event, stream)
                self._driver.wait(self.stream, event)
            finally:
                self._driver.destroy_event(event)

    def finish(self) -> None:
        """Waits for all there is in the stream. Raises EngineError where it failed."""
        with self.context.current(), wrap_errors("computing"):
            self._driver.synchronize(self.stream)

    def launch(self, work: Launch) -> None:
        """Puts one of our kernels in the stream. Raises EngineError."""
        with self.use(f"launching {work.kernel}"):
            self.context.launch(work, self.stream)

    def capture(self, body: Callable[[], Any]) -> Graph:
        """Capture all that ``body`` puts in the stream as a graph."""
        with self.use("capturing a graph"):
            return Graph(self.context, self.stream, body)

    def pin(self, size: int) -> NDArray[np.uint8]:
        """Bytes of the host that the GPU copies to and from by itself, until no view of them is left."""
        with self.use(f"pinning {size / 1e6:.1f} MB of memory"):
            address = self._driver.pin(size)
            memory = (ctypes.c_uint8 * size).from_address(address)
            weakref.finalize(memory, self.context.give_back, self._driver.unpin, address)
            return np.ctypeslib.as_array(memory)


class Leaving:
    """A copy to pinned memory beside the device's own stream: what comes next need not wait for it."""

    def __init__(self, device: Device, size: int) -> None:
        self._device, self._driver, context = device, device.context.driver, device.context
        self._memory = device.take(size)
        self._pinned = device.pin(size)
        with device.use("making a stream"):
            self._stream = Owned(context, self._driver.create_stream(), self._driver.destroy_stream)
            self._is_ready, self._is_done = (
                Owned(context, self._driver.create_event(), self._driver.destroy_event) for _ in range(2)
            )
        self._is_pending = False

    def start(self, address: int, size: int) -> None:
        """Takes ``size`` bytes that the device's stream has written by then; their place is free for it afterwards."""
        if self._is_pending:
            raise AssertionError("the last copy has not been waited for")
        self._device.move(int(self._memory), address, size)
        stream, ready, done = self._stream.handle, self._is_ready.handle, self._is_done.handle
        with self._device.use("copying images to the host"):
            self._driver.record(ready, self._device.stream)
            self._driver.wait(stream, ready)
            self._driver.copy_out(self._pinned[:size], int(self._memory), stream)
            self._driver.record(done, stream)
        self._is_pending = True

    def wait(self) -> NDArray[np.uint8]:
        """The bytes when they are there, to be read before the next `start`. Failures of all before are seen here."""
        with self._device.context.current(), wrap_errors("computing images"):
            self._driver.synchronize_event(self._is_done.handle)
        self._is_pending = False
        return self._pinned

    def finish(self) -> None:
        """Waits for a copy whose bytes nobody wants. Raises EngineError where it failed."""
        with self._device.context.current(), wrap_errors("copying images to the host"):
            self._driver.synchronize(self._stream.handle)
        self._is_pending = False
