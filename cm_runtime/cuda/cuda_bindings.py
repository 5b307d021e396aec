"""The driver through NVIDIA's cuda-bindings, which come as wheels."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.driver import DriverError, Gpu
from cm_runtime.kernels.launches import Launch

CAPABILITY = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class CudaBindings:
    """`Driver` by `cuda.bindings.driver`."""

    name = "cuda-bindings"
    launches_clusters = True

    def __init__(self) -> None:
        self._cuda = importlib.import_module("cuda.bindings.driver")
        self._mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        if error:
            raise DriverError(error.name, name)
        return results[0] if results else None

    def version(self) -> int:
        return int(self._call("cuDriverGetVersion"))

    def count(self) -> int:
        return int(self._call("cuDeviceGetCount"))

    def describe(self, index: int) -> Gpu:
        name = self._call("cuDeviceGetName", 256, self._call("cuDeviceGet", index))
        major, minor = (self.attribute(index, number) for number in CAPABILITY)
        return Gpu(name.split(b"\0")[0].decode(), f"{major}.{minor}")

    def attribute(self, index: int, number: int) -> int:
        kind = self._cuda.CUdevice_attribute(number)
        return int(self._call("cuDeviceGetAttribute", kind, self._call("cuDeviceGet", index)))

    def retain(self, index: int) -> int:
        return int(self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", index)))

    def release(self, index: int, context: int) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._call("cuDeviceGet", index))

    def push(self, context: int) -> Any:
        """Captures of other threads, torch's are global, do not forbid this one to allocate until `pop`."""
        self._call("cuCtxPushCurrent", context)
        return self._call("cuThreadExchangeStreamCaptureMode", self._mode)

    def pop(self, state: Any) -> None:
        self._call("cuThreadExchangeStreamCaptureMode", state)
        self._call("cuCtxPopCurrent")

    @contextmanager
    def inside(self, context: int) -> Iterator[None]:
        """Make a caller's context this thread's for the block: it has a legacy stream and events of its own."""
        self._call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        return int(self._call("cuMemAlloc", size))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def owner(self, address: int) -> tuple[int, int]:
        """The GPU's number and the context of an allocation; 0 for memory of a pool, which has no context."""
        kinds = self._cuda.CUpointer_attribute
        attributes = kinds.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, kinds.CU_POINTER_ATTRIBUTE_CONTEXT
        index, context = (int(self._call("cuPointerGetAttribute", each, address)) for each in attributes)
        return index, context

    def pin(self, size: int) -> int:
        return int(self._call("cuMemHostAlloc", size, 0))

    def unpin(self, address: int) -> None:
        self._call("cuMemFreeHost", address)

    def copy_in(self, address: int, array: NDArray[Any], stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, stream)

    def copy(self, to: int, address: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoDAsync", to, address, size, stream)

    def clear(self, address: int, words: int, stream: int) -> None:
        self._call("cuMemsetD32Async", address, 0, words, stream)

    def create_stream(self) -> int:
        return int(self._call("cuStreamCreate", NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def create_event(self) -> int:
        return int(self._call("cuEventCreate", 0))

    def destroy_event(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def milliseconds(self, begin: int, end: int) -> float:
        return float(self._call("cuEventElapsedTime", begin, end))

    def load(self, image: bytes) -> Any:
        return self._call("cuModuleLoadData", image)

    def unload(self, module: Any) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: Any, name: str) -> Any:
        return self._call("cuModuleGetFunction", module, name.encode())

    def allow_shared(self, function: Any, size: int) -> None:
        self._call("cuFuncSetAttribute", function, self._cuda.CUfunction_attribute(MAX_SHARED), size)

    def launch(self, function: Any, work: Launch, stream: int) -> None:
        numbers: tuple[Any, ...] = work.arguments
        values = tuple(each.item() for each in numbers)
        types = tuple(np.ctypeslib.as_ctypes_type(each.dtype) for each in numbers)
        if work.cluster == 1:
            self._call("cuLaunchKernel", function, *work.grid, *work.block, work.shared, stream, (values, types), 0)
        else:
            self._call("cuLaunchKernelEx", self._clusters(work, stream), function, (values, types), 0)

    def _clusters(self, work: Launch, stream: int) -> Any:
        """The shape of a launch in clusters, as cuLaunchKernelEx takes it."""
        attribute = self._cuda.CUlaunchAttribute()
        attribute.id = self._cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        shape = attribute.value.clusterDim
        shape.x, shape.y, shape.z = work.cluster, 1, 1
        config = self._cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = work.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = work.block
        config.sharedMemBytes, config.hStream = work.shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def begin_capture(self, stream: int) -> None:
        self._call("cuStreamBeginCapture", stream, self._mode)

    def end_capture(self, stream: int) -> int:
        return int(self._call("cuStreamEndCapture", stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphDestroy", graph)

    def instantiate(self, graph: int) -> int:
        return int(self._call("cuGraphInstantiate", graph, 0))

    def launch_graph(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", executable)
