"""A GPU made of host memory, in Python, for what the stand-in of tests/driver cannot run: TensorRT, and ONNX Runtime.

Copies and runs are queued and happen when the stream is synchronised, as on a GPU, and each is checked: that an address
is in memory that is held, with room for what is copied; that every tensor has a shape in the profile and an address.
What the engine computes is ONNX Runtime's answer on the file it was built from. That our calls are in the right order
and fit each other is proved so; that a real GPU and a real TensorRT do what their manuals say is not.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import host_gpu
import numpy as np
import onnxruntime
import pytest

from cm_runtime.backends.engine_file import EngineManifest
from cm_runtime.cuda import context, driver
from cm_runtime.cuda.driver import DriverError
from cm_runtime.errors import EngineError
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


class Stream:
    """Work that is done when somebody waits for it, and no sooner: what has not been waited for has not happened."""

    def __init__(self, gpu: Gpu, number: int) -> None:
        self.gpu, self.number = gpu, number
        self.queue: deque[Callable[[], None]] = deque()
        self.captured: list[Callable[[], None]] | None = None

    def add(self, step: Callable[[], None]) -> None:
        self.gpu.check_context()
        (self.queue if self.captured is None else self.captured).append(step)

    def synchronize(self) -> None:
        assert self.captured is None, "a stream that is captured cannot be waited for"
        while self.queue:
            self.queue.popleft()()

    def reach(self, event: int) -> None:
        """Runs the work in front of an event, if it has not been done."""
        while event not in self.gpu.passed:
            self.queue.popleft()()


class Gpu:
    """`cuda.driver.Driver` of one GPU; ``log`` has what was done, in order. Kernels are host_gpu's."""

    name, launches_clusters = "stand-in", False

    def __init__(self, capability: str = "8.9", room: int = 1 << 40) -> None:
        self.capability = capability
        self.room = room
        self.contexts: dict[int, list[int]] = defaultdict(list)  # of each thread
        self.held: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {0: Stream(self, 0)}
        self.events: dict[int, tuple[Stream, int]] = {}
        self.passed: set[int] = set()
        self.numbers = itertools.count(7)
        self.log: list[str] = []
        self.fail_at = ""
        self.driver_version = 13000

    def check(self, address: int, size: int) -> None:
        """Raises DriverError unless all of it is in one allocation."""
        if not any(start <= address and address + size <= start + len(held) for start, held in self.held.items()):
            raise DriverError("CUDA_ERROR_ILLEGAL_ADDRESS", "a copy")

    def check_context(self) -> None:
        """Raises DriverError where none is this thread's."""
        if not self.contexts[threading.get_ident()]:
            raise DriverError("CUDA_ERROR_INVALID_CONTEXT", "a call")

    def version(self) -> int:
        return self.driver_version

    def count(self) -> int:
        return 1

    def describe(self, index: int) -> driver.Gpu:
        return driver.Gpu("Stand-in 4090", self.capability)

    def retain(self, index: int) -> int:
        return 1

    def release(self, index: int, context: int) -> None:
        self.log.append("release")

    def push(self, context: int) -> None:
        self.contexts[threading.get_ident()].append(context)

    def pop(self, state: None) -> None:
        self.contexts[threading.get_ident()].pop()

    def inside(self, context: int) -> AbstractContextManager[None]:
        return nullcontext()

    def attribute(self, index: int, number: int) -> int:
        return {driver.OPT_IN_SHARED: 99 << 10}.get(number, 0)

    def allocate(self, size: int) -> int:
        self.check_context()
        if self.fail_at == "take" or sum(map(len, self.held.values())) + size > self.room:
            raise DriverError(driver.OUT_OF_MEMORY, "cuMemAlloc")
        memory = ctypes.create_string_buffer(size + ALIGNED)
        start = -(-ctypes.addressof(memory) // ALIGNED) * ALIGNED
        self.held[start] = (ctypes.c_char * size).from_buffer(memory, start - ctypes.addressof(memory))
        self.log.append(f"take {size}")
        return start

    def free(self, address: int) -> None:
        self.check_context()
        for queue in list(self.streams.values()):
            if queue.captured is None:
                queue.synchronize()  # as cuMemFree does
        del self.held[address]

    def owner(self, address: int) -> tuple[int, int]:
        self.check(address, 1)
        return 0, 1

    def pin(self, size: int) -> int:
        self.check_context()
        memory = np.empty(size, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return int(memory.ctypes.data)

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def copy_in(self, address: int, array: Any, stream: int) -> None:
        assert array.flags.c_contiguous
        self.check(address, array.nbytes)
        self.streams[stream].add(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes) and None)

    def copy_out(self, array: Any, address: int, stream: int) -> None:
        assert array.flags.c_contiguous
        if self.fail_at == "fetch":
            raise DriverError("CUDA_ERROR_LAUNCH_FAILED", "cuMemcpyDtoHAsync")
        self.check(address, array.nbytes)
        self.streams[stream].add(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes) and None)

    def copy(self, to: int, address: int, size: int, stream: int) -> None:
        self.check(to, size)
        self.check(address, size)
        self.streams[stream].add(lambda: ctypes.memmove(to, address, size) and None)

    def clear(self, address: int, words: int, stream: int) -> None:
        self.check(address, 4 * words)
        self.streams[stream].add(lambda: ctypes.memset(address, 0, 4 * words) and None)

    def create_stream(self) -> int:
        self.check_context()
        number = next(self.numbers)
        self.streams[number] = Stream(self, number)
        return number

    def destroy_stream(self, stream: int) -> None:
        self.streams.pop(stream).synchronize()

    def synchronize(self, stream: int) -> None:
        self.check_context()
        self.streams[stream].synchronize()

    def create_event(self) -> int:
        return next(self.numbers)

    def destroy_event(self, event: int) -> None:
        self.events.pop(event, None)

    def record(self, event: int, stream: int) -> None:
        number, queue = next(self.numbers), self.streams[stream]
        self.events[event] = queue, number
        if queue.queue or queue.captured is not None:
            queue.add(lambda: self.passed.add(number))
        else:
            self.passed.add(number)

    def wait(self, stream: int, event: int) -> None:
        queue, number = self.events[event]
        if number not in self.passed:
            self.streams[stream].add(lambda: queue.reach(number))

    def synchronize_event(self, event: int) -> None:
        queue, number = self.events[event]
        queue.reach(number)

    def load(self, image: bytes) -> Any:
        if self.fail_at == "load":
            raise DriverError("CUDA_ERROR_INVALID_IMAGE", "cuModuleLoadData")
        return "module"

    def unload(self, module: Any) -> None:
        self.log.append("unload")

    def function(self, module: Any, name: str) -> Any:
        return SimpleNamespace(name=name, most=48 << 10)

    def allow_shared(self, function: Any, size: int) -> None:
        function.most = size

    def launch(self, function: Any, work: Launch, stream: int) -> None:
        assert work.shared <= function.most
        self.streams[stream].add(lambda: host_gpu.launch(work))
        self.log.append(work.kernel)

    def begin_capture(self, stream: int) -> None:
        assert self.streams[stream].captured is None
        self.streams[stream].captured = []

    def end_capture(self, stream: int) -> Any:
        captured, self.streams[stream].captured = self.streams[stream].captured, None
        if self.fail_at == "capture":
            raise DriverError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "cuStreamEndCapture")
        self.log.append(f"capture {len(captured or ())}")
        return captured

    def destroy_graph(self, graph: Any) -> None:
        pass

    def instantiate(self, graph: Any) -> Any:
        return list(graph)

    def launch_graph(self, executable: Any, stream: int) -> None:
        for step in executable:
            self.streams[stream].add(step)
        self.log.append("graph")

    def destroy_executable(self, executable: Any) -> None:
        pass


class TensorRt:
    """`tensorrt_rtx` with a runtime that opens engines on ``gpu`` by running the file they were built from."""

    def __init__(self, gpu: Gpu, onnx: Path, manifest: EngineManifest | None = None, error: float = 0.0) -> None:
        self._real = pytest.importorskip("tensorrt_rtx")
        self.__version__ = VERSION
        self.gpu, self.onnx, self.manifest, self.error = gpu, onnx, manifest, error
        self.opened: list[bytes] = []
        self.refuses = ""
        self.reason = ""  # the error that TensorRT logs where it refuses to run, or a context
        self.is_capturable = True
        self.most = 65535  # images that there is memory for at a run, beside the context's own
        self.compiled: set[int] = set()  # batch sizes that kernels were compiled for, in this process
        self.scratch = 1000  # bytes an image that a context computes in
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

    def create_runtime_config(self) -> Any:
        return RuntimeConfig(self.trt)

    def create_execution_context(self, config: RuntimeConfig) -> Any:
        assert config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED, "REQUIRE_USER_ALLOCATION"
        if self.trt.refuses == "context":
            self.refuse()
            return None
        return Context(self, config)

    def refuse(self) -> None:
        """Log the reason, if there is one to be given."""
        if self.trt.reason:
            self.logger.log(self.trt.ILogger.Severity.ERROR, self.trt.reason)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: f'{{"Layers": ["{kind.name}"]}}')


class RuntimeConfig:
    """`trt.IRuntimeConfig` of TensorRT for RTX."""

    def __init__(self, trt: TensorRt) -> None:
        self.trt = trt
        self.strategy = trt.ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
        self.cache = RuntimeCache(trt)

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self.trt)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """`trt.IRuntimeCache`: the batch sizes that there are kernels for, with the version that compiled them."""

    def __init__(self, trt: TensorRt) -> None:
        self.trt = trt
        self.sizes: set[int] = set()

    def deserialize(self, blob: bytes) -> bool:
        version, _, sizes = blob.decode(errors="replace").partition(" for ")
        if version != f"kernels of {self.trt.__version__}":
            return False
        self.sizes = set(map(int, sizes.split()))
        return True

    def serialize(self) -> bytes:
        return f"kernels of {self.trt.__version__} for {' '.join(map(str, sorted(self.sizes)))}".encode()


class Context:
    """`trt.IExecutionContext`, which has no memory of its own: it is given some, and overwrites it at each run."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self.engine, self.trt, self.config = engine, engine.trt, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile = 0
        self.scratch = 0, 0

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        assert not self.shapes, "a profile is chosen before the shapes, which it resets"
        assert stream in self.trt.gpu.streams
        self.profile = number
        return number < len(self.profiles())

    def profiles(self) -> tuple[Any, ...]:
        return self.trt.manifest.profiles if self.trt.manifest else (SimpleNamespace(min=1, max=65535),)

    def update_device_memory_size_for_shapes(self) -> int:
        return self.n * self.trt.scratch if self.shapes.keys() == self.engine.inputs.keys() else 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0, "setDeviceMemory: memory must be aligned on 256"
        self.trt.gpu.check(address, size)
        self.scratch = address, size

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.is_capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.get_tensor_shape(name)
        batches = [has for has, dim in zip(shape, wanted, strict=True) if dim < 0]
        fits = all(dim in (-1, has) for has, dim in zip(shape, wanted, strict=True))
        profile = self.profiles()[self.profile]
        if not fits or not all(profile.min <= n <= profile.max for n in batches) or self.trt.refuses == "shape":
            self.engine.logger.log(self.trt.ILogger.Severity.ERROR, f"{shape} is not in the profile")
            return False
        self.shapes[name] = shape
        (self.n,) = set(batches)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name}: the pointer must have at least 256-byte alignment (NvInferRuntime.h)"
        self.addresses[name] = address
        return name in self.engine.inputs or name in self.engine.outputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.n if dim < 0 else dim for dim in self.engine.get_tensor_shape(name))

    def execute_async_v3(self, stream: int) -> bool:
        queue = self.trt.gpu.streams[stream]
        assert self.shapes.keys() == self.engine.inputs.keys()
        assert self.addresses.keys() == self.engine.inputs.keys() | self.engine.outputs.keys()
        assert self.scratch[1] >= max(1, self.update_device_memory_size_for_shapes()), "no memory to compute in"
        assert queue.captured is None or self.trt.is_capturable, "this TRT engine is not stream capturable"
        if self.trt.refuses == "run" or self.n > self.trt.most:
            self.engine.refuse()
            return False
        if self.n not in self.config.cache.sizes:
            eager = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
            assert self.config.dynamic_shapes_kernel_specialization_strategy == eager, "a graph would keep slow kernels"
            assert queue.captured is None, "kernels are compiled before a capture"
            self.config.cache.sizes.add(self.n)
            self.trt.compiled.add(self.n)
        shapes, addresses, scratch = dict(self.shapes), dict(self.addresses), self.scratch
        queue.add(lambda: self._run(shapes, addresses, scratch))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: tuple[int, int]) -> None:
        self.trt.gpu.check(*scratch)
        ctypes.memset(scratch[0], 0xAA, scratch[1])
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


class OrtBinding:
    """`onnxruntime.IOBinding` of a session on a GPU, which is given addresses."""

    def __init__(self, session: OrtSession) -> None:
        self.session = session
        self.ports: dict[str, tuple[str, int, int, tuple[int, ...], int]] = {}

    def bind_input(self, name: str, kind: str, index: int, element_type: Any, shape: Any, buffer_ptr: int) -> None:
        assert type(element_type) is int, "ONNX's number: NumPy, which has no bfloat16, is not asked"
        assert name in self.session.names
        assert name not in self.ports
        assert buffer_ptr
        self.ports[name] = kind, index, element_type, tuple(shape), buffer_ptr

    bind_output = bind_input


class OrtSession:
    """A session of ONNX Runtime's CUDA provider that captures as its documentation has it.

    A number is captured at its first run, for its thread, with the addresses of that run, and kept for ever; a later
    run of that number reads and writes those, whatever it is bound to. -1 is never captured. names: of the inputs and
    outputs, which must all be bound.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.captured: dict[tuple[int, str], Any] = {}
        self.runs: list[str] = []

    def io_binding(self) -> OrtBinding:
        return OrtBinding(self)

    def run_with_iobinding(self, binding: OrtBinding, options: Any) -> None:
        assert binding.session is self
        assert set(binding.ports) == set(self.names)
        number = options.get_run_config_entry("gpu_graph_id")
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.runs.append(number)
        if number != "-1":
            first = self.captured.setdefault((threading.get_ident(), number), dict(binding.ports))
            assert first == binding.ports, "the graph of that number reads and writes elsewhere"


@contextmanager
def installed(gpu: Gpu) -> Iterator[Gpu]:
    """While it lasts, the driver is the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "driver", lambda name="": gpu)
        patch.setattr(context, "_contexts", {})
        try:
            yield gpu
        finally:
            for opened in context._contexts.values():
                opened.close()


@contextmanager
def absent() -> Iterator[None]:
    """While it lasts, this machine has no GPU, whatever it has."""

    def refuse(name: str = "") -> Any:
        raise EngineError("there is no NVIDIA GPU that CUDA can use: none is here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "driver", refuse)
        yield
