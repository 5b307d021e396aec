"""A GPU made of host memory, for code that no GPU runs here: pycuda, and what of TensorRT needs a driver.

Copies and runs are queued and happen when the stream is synchronised, as on a GPU, and each is checked: that an address
is in memory that is held, with room for what is copied; that every tensor has a shape in the profile and an address.
What the engine computes is ONNX Runtime's answer on the file it was built from. That our calls are in the right order
and fit each other is proved so; that a real GPU and a real TensorRT do what their manuals say is not.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import host_gpu
import numpy as np
import onnxruntime
import pytest

from cm_runtime.backends.engine_file import EngineManifest
from cm_runtime.cuda import context
from cm_runtime.errors import EngineError
from cm_runtime.extras import EXTRAS
from cm_runtime.kernels.launches import Launch

VERSION = "1.7.1.116"
ALIGNED = 256  # as cudaMalloc's addresses are
NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class CudaError(Exception):
    """`pycuda.driver.Error`."""


class CudaMemoryError(CudaError):
    """`pycuda.driver.MemoryError`."""


class Stream:
    """Work that is done when somebody waits for it, and no sooner: what has not been waited for has not happened."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.queue: deque[Callable[[], None]] = deque()
        self.captured: list[Callable[[], None]] | None = None
        self.handle = 7 + len(gpu.streams)
        gpu.streams[self.handle] = self

    def add(self, step: Callable[[], None]) -> None:
        self.gpu.context.check()
        (self.queue if self.captured is None else self.captured).append(step)

    def synchronize(self) -> None:
        assert self.captured is None, "a stream that is captured cannot be waited for"
        while self.queue:
            self.queue.popleft()()

    def wait_for_event(self, event: Event) -> None:
        stream, count = event.at
        self.add(lambda: stream.reach(count))

    def reach(self, event: int) -> None:
        """Runs the work in front of an event, if it has not been done."""
        while event not in self.gpu.passed:
            self.queue.popleft()()


class Event:
    """`pycuda.driver.Event`: a place in a stream's queue."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.at: tuple[Stream, int]

    def record(self, stream: Stream) -> None:
        self.gpu.events += 1
        number = self.gpu.events
        self.at = stream, number
        stream.add(lambda: self.gpu.passed.add(number))

    def synchronize(self) -> None:
        stream, number = self.at
        stream.reach(number)


class Primary:
    """`pycuda.autoprimaryctx.context`: of the thread that made it, and of those that push it until they pop it."""

    def __init__(self) -> None:
        self.threads = Counter([threading.get_ident()])

    def push(self) -> None:
        self.threads[threading.get_ident()] += 1

    def pop(self) -> None:
        self.check()
        self.threads[threading.get_ident()] -= 1

    def check(self) -> None:
        """Raises CudaError where it is not this thread's."""
        if not self.threads[threading.get_ident()]:
            raise CudaError("invalid device context")


class Gpu:
    """The memory and the streams of one stand-in; ``log`` has what was done, in order. Kernels are host_gpu's."""

    def __init__(self, capability: tuple[int, int] = (8, 9), room: int = 1 << 40) -> None:
        self.capability = capability
        self.room = room
        self.context = Primary()
        self.held: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.events = 0
        self.passed: set[int] = set()
        self.log: list[str] = []
        self.fail_at = ""
        self.driver_version = 13000

    def check(self, address: int, size: int) -> None:
        """Raises CudaError unless all of it is in one allocation."""
        if not any(start <= address and address + size <= start + len(held) for start, held in self.held.items()):
            raise CudaError("an illegal memory access was encountered")

    @property
    def is_idle(self) -> bool:
        return not any(stream.queue for stream in self.streams.values())

    def synchronize(self) -> None:
        for stream in list(self.streams.values()):
            stream.synchronize()

    def modules(self) -> dict[str, ModuleType]:
        """`pycuda`, `pycuda.autoprimaryctx` and `pycuda.driver`, and `cuda.bindings.runtime`."""
        gpu = self

        class Allocation:
            def __init__(self, size: int) -> None:
                gpu.context.check()
                if sum(map(len, gpu.held.values())) + size > gpu.room:
                    raise CudaMemoryError("cuMemAlloc failed: out of memory")
                self.memory = ctypes.create_string_buffer(size + ALIGNED)
                self.start = -(-ctypes.addressof(self.memory) // ALIGNED) * ALIGNED
                gpu.held[self.start] = (ctypes.c_char * size).from_address(self.start)
                gpu.log.append(f"take {size}")

            def __int__(self) -> int:
                return self.start

            def __del__(self) -> None:
                if hasattr(self, "start"):
                    gpu.held.pop(self.start, None)
                    assert gpu.is_idle, "memory is freed while work is queued"

        def to_device(address: int, array: Any, stream: Any) -> None:
            assert isinstance(stream, Stream) and array.flags.c_contiguous
            gpu.check(address, array.nbytes)
            stream.add(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes) and None)

        def to_host(array: Any, address: int, stream: Any) -> None:
            assert isinstance(stream, Stream) and array.flags.c_contiguous
            if gpu.fail_at == "fetch":
                raise CudaError("unspecified launch failure\nin a kernel")
            gpu.check(address, array.nbytes)
            stream.add(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes) and None)

        def on_device(to: int, address: int, size: int, stream: Any) -> None:
            gpu.check(to, size)
            gpu.check(address, size)
            stream.add(lambda: ctypes.memmove(to, address, size) and None)

        def clear(address: int, value: int, count: int, stream: Any) -> None:
            gpu.check(address, 4 * count)
            stream.add(lambda: ctypes.memset(address, value, 4 * count) and None)

        def take(size: int) -> Allocation:
            if gpu.fail_at == "take":
                raise CudaMemoryError("out of memory")
            return Allocation(size)

        def load(content: bytes) -> Any:
            if gpu.fail_at == "load":
                raise CudaError("cuModuleLoadDataEx failed: device kernel image is invalid")
            return SimpleNamespace(get_function=function)

        def function(name: str) -> Any:
            def call(*arguments: Any, grid: Any, block: Any, shared: int, stream: Any) -> None:
                assert all(isinstance(each, np.number) for each in arguments), "pycuda takes NumPy's numbers alone"
                assert shared <= 48 << 10 or call.most == shared
                work = Launch(name, grid, block, shared, arguments)
                stream.add(lambda: host_gpu.launch(work))
                gpu.log.append(name)

            def set_attribute(attribute: str, value: int) -> None:
                assert attribute == "dynamic shared"
                call.most = value  # type: ignore[attr-defined]

            call.set_attribute, call.most = set_attribute, 0  # type: ignore[attr-defined]
            return call

        device = SimpleNamespace(name=lambda: "Stand-in 4090", compute_capability=lambda: gpu.capability)
        package, first, driver = (ModuleType(f"pycuda{name}") for name in ("", ".autoprimaryctx", ".driver"))
        driver.__dict__.update(
            Context=SimpleNamespace(get_device=lambda: device, synchronize=gpu.synchronize),
            Error=CudaError,
            MemoryError=CudaMemoryError,
            Stream=lambda: Stream(gpu),
            Event=lambda: Event(gpu),
            mem_alloc=take,
            memcpy_htod_async=to_device,
            memcpy_dtoh_async=to_host,
            memcpy_dtod_async=on_device,
            memset_d32_async=clear,
            pagelocked_empty=np.empty,
            module_from_buffer=load,
            function_attribute=SimpleNamespace(MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared"),
            get_driver_version=lambda: gpu.driver_version,
        )
        package.driver, package.autoprimaryctx = driver, first  # type: ignore[attr-defined]
        first.context = self.context  # type: ignore[attr-defined]
        cuda, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        runtime = self._runtime()
        cuda.bindings, bindings.runtime = bindings, runtime  # type: ignore[attr-defined]
        return {module.__name__: module for module in (package, first, driver, cuda, bindings, runtime)}

    def _runtime(self) -> ModuleType:
        """`cuda.bindings.runtime`: each function returns its error first."""

        class Code(int):
            name = property(lambda self: "cudaSuccess" if self == 0 else "cudaErrorStreamCaptureInvalidated")

        ok = Code(0)

        def begin(handle: int, mode: Any) -> tuple[Any]:
            assert mode == "thread local" and self.streams[handle].captured is None
            self.streams[handle].captured = []
            return (ok,)

        def end(handle: int) -> tuple[Any, Any]:
            captured, self.streams[handle].captured = self.streams[handle].captured, None
            if self.fail_at == "capture":
                return Code(901), None
            self.log.append(f"capture {len(captured or ())}")
            return ok, captured

        def launch(graph: Any, handle: int) -> tuple[Any]:
            for step in graph:
                self.streams[handle].add(step)
            self.log.append("graph")
            return (ok,)

        runtime = ModuleType("cuda.bindings.runtime")
        runtime.__dict__.update(
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread local"),
            cudaStreamBeginCapture=begin,
            cudaStreamEndCapture=end,
            cudaGraphInstantiate=lambda graph, flags: (ok, list(graph)),
            cudaGraphLaunch=launch,
            cudaGraphDestroy=lambda graph: (ok,),
            cudaGraphExecDestroy=lambda graph: (ok,),
        )
        return runtime


class TensorRt:
    """`tensorrt_rtx` with a runtime that opens engines on ``gpu`` by running the file they were built from."""

    def __init__(self, gpu: Gpu, onnx: Path, manifest: EngineManifest | None = None, error: float = 0.0) -> None:
        self._real = pytest.importorskip("tensorrt_rtx")
        self.__version__ = VERSION
        self.gpu, self.onnx, self.manifest, self.error = gpu, onnx, manifest, error
        self.opened: list[bytes] = []
        self.refuses = ""
        self.Runtime = self._runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _runtime(self, logger: Any) -> Any:
        def deserialize(content: bytes) -> Any:
            self.opened.append(content)
            if self.refuses == "open":
                logger.log(self._real.ILogger.Severity.ERROR, "Serialization assertion failed\nat line 48")
                return None
            return Engine(self, logger)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


class Engine:
    """`trt.ICudaEngine`."""

    def __init__(self, trt: TensorRt, logger: Any) -> None:
        self.trt, self.logger = trt, logger
        self.session = onnxruntime.InferenceSession(str(trt.onnx), providers=["CPUExecutionProvider"])
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.outputs = {tensor.name: tensor for tensor in self.session.get_outputs()}
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}
        return getattr(self.trt.DataType, kinds[NUMPY[{**self.inputs, **self.outputs}[name].type]])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = {**self.inputs, **self.outputs}[name].shape
        return tuple(dim if isinstance(dim, int) else -1 for dim in shape)

    def create_execution_context(self) -> Any:
        return None if self.trt.refuses == "context" else Context(self)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: f'{{"Layers": ["{kind.name}"]}}')


class Context:
    """`trt.IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.get_tensor_shape(name)
        batches = [has for has, dim in zip(shape, wanted, strict=True) if dim < 0]
        fits = all(dim in (-1, has) for has, dim in zip(shape, wanted, strict=True))
        profile = self.trt.manifest.profile if self.trt.manifest else SimpleNamespace(min=1, max=65535)
        if not fits or not all(profile.min <= n <= profile.max for n in batches) or self.trt.refuses == "shape":
            self.engine.logger.log(self.trt.ILogger.Severity.ERROR, f"{shape} is not in the profile")
            return False
        self.shapes[name] = shape
        (self.n,) = set(batches)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.n if dim < 0 else dim for dim in self.engine.get_tensor_shape(name))

    def execute_async_v3(self, stream: int) -> bool:
        queue = self.trt.gpu.streams[stream]
        assert self.shapes.keys() == self.engine.inputs.keys()
        assert self.addresses.keys() == self.engine.inputs.keys() | self.engine.outputs.keys()
        if self.trt.refuses == "run":
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        queue.add(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        feed = {}
        for name, tensor in self.engine.inputs.items():
            feed[name] = self._array(addresses[name], shapes[name], np.dtype(NUMPY[tensor.type])).copy()
        for name, made in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
            changed = made + np.float32(self.trt.error) if made.dtype.kind == "f" else made ^ np.uint8(self.trt.error)
            changed = made if made.dtype == np.bool_ else changed
            self._array(addresses[name], made.shape, made.dtype)[...] = changed
        self.trt.gpu.log.append(f"run {len(changed)}")

    def _array(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        self.trt.gpu.check(address, size)
        memory = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)


@contextmanager
def installed(gpu: Gpu) -> Iterator[Gpu]:
    """While it lasts, pycuda is the stand-in's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in gpu.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setitem(EXTRAS, "pycuda", "gpu")
        forget()
        try:
            yield gpu
        finally:
            forget()


def forget() -> None:
    """The next question for the driver is asked anew."""
    context.driver.cache_clear()
    context.module.cache_clear()


@contextmanager
def absent() -> Iterator[None]:
    """While it lasts, this machine has no GPU, whatever it has."""

    def refuse() -> Any:
        raise EngineError("there is no NVIDIA GPU that CUDA can use: none is here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "gpu", refuse)
        patch.setattr(context, "driver", refuse)
        yield
