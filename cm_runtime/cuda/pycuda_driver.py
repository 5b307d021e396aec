"""The driver through pycuda; what it lacks, graphs and events that have a handle, cuda-bindings add on its handles."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.cuda_bindings import NON_BLOCKING, CudaBindings
from cm_runtime.cuda.driver import DriverError
from cm_runtime.errors.reasons import first_line
from cm_runtime.kernels.launches import Launch


class PycudaDriver(CudaBindings):
    """`Driver` by `pycuda.driver`, whose objects live here until their numbers are given back.

    pycuda has a stack of contexts of its own for each thread, and destroys an object only where its context is on it.
    """

    name = "pycuda"
    launches_clusters = False  # it has no cuLaunchKernelEx

    def __init__(self) -> None:
        self._pycuda = importlib.import_module("pycuda.driver")
        self._objects: dict[int, Any] = {}
        super().__init__()
        with self._errors():
            self._pycuda.init()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._pycuda.Error as error:  # "cuMemAlloc failed: out of memory"
            call, _, reason = first_line(error).partition(" failed: ")
            raise DriverError(self._name(reason.removesuffix(" - ")), call) from error

    def _name(self, reason: str) -> str:
        """Of the error that the driver describes so."""
        codes = (code for code in self._cuda.CUresult if self._cuda.cuGetErrorString(code)[1] == reason.encode())
        return next((str(code.name) for code in codes), reason)

    def _keep(self, number: int, item: Any) -> int:
        self._objects[number] = item
        return number

    def retain(self, index: int) -> int:
        with self._errors():
            context = self._pycuda.Device(index).retain_primary_context()
        return self._keep(context.handle, context)

    def release(self, index: int, context: int) -> None:
        """Detached by itself: what pycuda does where it is merely dropped is not for a primary context."""
        with self._errors():
            self._objects[context].push()
            self._objects.pop(context).detach()
        self._call("cuCtxPopCurrent")

    def push(self, context: int) -> Any:
        before = self._call("cuCtxGetCurrent")
        with self._errors():
            self._objects[context].push()
        return before, self._call("cuThreadExchangeStreamCaptureMode", self._mode)

    def pop(self, state: Any) -> None:
        before, mode = state
        self._call("cuThreadExchangeStreamCaptureMode", mode)
        with self._errors():
            self._pycuda.Context.pop()
        if int(self._call("cuCtxGetCurrent")) != int(before):  # pycuda puts its own back, though another had come since
            self._call("cuCtxSetCurrent", before)

    def allocate(self, size: int) -> int:
        with self._errors():
            memory = self._pycuda.mem_alloc(size)
        return self._keep(int(memory), memory)

    def free(self, address: int) -> None:
        with self._errors():
            self._objects.pop(address).free()

    def pin(self, size: int) -> int:
        with self._errors():
            array = self._pycuda.pagelocked_empty(size, np.uint8)
        return self._keep(array.ctypes.data, array.base)

    def unpin(self, address: int) -> None:
        with self._errors():
            self._objects.pop(address).free()

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        with self._errors():
            self._pycuda.memcpy_htod_async(address, array, self._objects[stream])

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        with self._errors():
            self._pycuda.memcpy_dtoh_async(array, address, self._objects[stream])

    def copy(self, to: int, address: int, size: int, stream: int) -> None:
        with self._errors():
            self._pycuda.memcpy_dtod_async(to, address, size, self._objects[stream])

    def clear(self, address: int, words: int, stream: int) -> None:
        with self._errors():
            self._pycuda.memset_d32_async(address, 0, words, self._objects[stream])

    def create_stream(self) -> int:
        with self._errors():
            stream = self._pycuda.Stream(NON_BLOCKING)
        return self._keep(stream.handle, stream)

    def destroy_stream(self, stream: int) -> None:
        del self._objects[stream]

    def synchronize(self, stream: int) -> None:
        with self._errors():
            self._objects[stream].synchronize()

    def load(self, image: bytes) -> Any:
        with self._errors():
            module = self._pycuda.module_from_buffer(image)
        return self._keep(id(module), module)

    def unload(self, module: Any) -> None:
        del self._objects[module]

    def function(self, module: Any, name: str) -> Any:
        with self._errors():
            return self._objects[module].get_function(name)

    def allow_shared(self, function: Any, size: int) -> None:
        with self._errors():
            function.set_attribute(self._pycuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, size)

    def launch(self, function: Any, work: Launch, stream: int) -> None:
        with self._errors():
            function(
                *work.arguments, grid=work.grid, block=work.block, shared=work.shared, stream=self._objects[stream]
            )
