"""A GPU made of host memory, for code that no GPU runs here: pycuda, and what of TensorRT needs a driver.

Copies and runs are queued and happen when the stream is synchronised, as on a GPU, and each is checked: that an address
is in memory that is held, with room for what is copied; that every tensor has a shape in the profile and an address.
What the engine computes is ONNX Runtime's answer on the file it was built from. That our calls are in the right order
and fit each other is proved so; that a real GPU and a real TensorRT do what their manuals say is not.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from cm_runtime import cuda
from cm_runtime.backends.engine_file import EngineManifest
from cm_runtime.errors import EngineError
from cm_runtime.extras import EXTRAS

VERSION = "1.7.1.116"


class CudaError(Exception):
    """`pycuda.driver.Error`."""


class Gpu:
    """The memory and the queue of work of one stand-in; ``log`` has what was done, in order."""

    def __init__(self, capability: tuple[int, int] = (8, 9)) -> None:
        self.capability = capability
        self.held: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.log: list[str] = []
        self.fail_at = ""

    def check(self, address: int, size: int) -> None:
        """Raises CudaError unless all of it is in one allocation."""
        if not any(start <= address and address + size <= start + len(held) for start, held in self.held.items()):
            raise CudaError("an illegal memory access was encountered")

    def modules(self) -> dict[str, ModuleType]:
        """`pycuda`, `pycuda.autoprimaryctx` and `pycuda.driver`."""
        gpu = self

        class Allocation:
            def __init__(self, size: int) -> None:
                self.memory = ctypes.create_string_buffer(size)
                self.start = ctypes.addressof(self.memory)
                gpu.held[self.start] = self.memory
                gpu.log.append(f"take {size}")

            def __int__(self) -> int:
                return self.start

            def __del__(self) -> None:
                assert not gpu.queue, "memory is freed while work is queued"
                gpu.held.pop(self.start, None)

        class Stream:
            handle = 7

            def synchronize(self) -> None:
                work, gpu.queue = gpu.queue, []
                for step in work:
                    step()

        def to_device(address: int, array: Any, stream: Any) -> None:
            assert isinstance(stream, Stream) and array.flags.c_contiguous
            gpu.check(address, array.nbytes)
            gpu.queue.append(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

        def to_host(array: Any, address: int, stream: Any) -> None:
            assert isinstance(stream, Stream) and array.flags.c_contiguous
            if gpu.fail_at == "fetch":
                raise CudaError("unspecified launch failure\nin a kernel")
            gpu.check(address, array.nbytes)
            gpu.queue.append(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

        def take(size: int) -> Allocation:
            if gpu.fail_at == "take":
                raise CudaError("out of memory")
            return Allocation(size)

        device = SimpleNamespace(name=lambda: "Stand-in 4090", compute_capability=lambda: gpu.capability)
        package, first, driver = (ModuleType(f"pycuda{name}") for name in ("", ".autoprimaryctx", ".driver"))
        driver.Context = SimpleNamespace(get_device=lambda: device)  # type: ignore[attr-defined]
        driver.Error, driver.Stream, driver.mem_alloc = CudaError, Stream, take  # type: ignore[attr-defined]
        driver.memcpy_htod_async, driver.memcpy_dtoh_async = to_device, to_host  # type: ignore[attr-defined]
        package.driver, package.autoprimaryctx = driver, first  # type: ignore[attr-defined]
        return {module.__name__: module for module in (package, first, driver)}


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
        kinds = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}
        return getattr(self.trt.DataType, kinds[{**self.inputs, **self.outputs}[name].type])

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
        assert stream == 7
        assert self.shapes.keys() == self.engine.inputs.keys()
        assert self.addresses.keys() == self.engine.inputs.keys() | self.engine.outputs.keys()
        if self.trt.refuses == "run":
            return False
        self.trt.gpu.queue.append(self._run)
        return True

    def _run(self) -> None:
        feed = {}
        for name, tensor in self.engine.inputs.items():
            dtype = np.dtype({"tensor(float)": "float32", "tensor(int64)": "int64"}[tensor.type])
            feed[name] = self._array(name, self.shapes[name], dtype).copy()
        for name, made in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
            changed = made + np.float32(self.trt.error) if made.dtype.kind == "f" else made ^ np.uint8(self.trt.error)
            self._array(name, made.shape, made.dtype)[...] = changed
        self.trt.gpu.log.append(f"run {self.n}")

    def _array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        self.trt.gpu.check(self.addresses[name], size)
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


@contextmanager
def installed(gpu: Gpu) -> Iterator[Gpu]:
    """While it lasts, pycuda is the stand-in's."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in gpu.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setitem(EXTRAS, "pycuda", "gpu")
        cuda.driver.cache_clear()
        try:
            yield gpu
        finally:
            cuda.driver.cache_clear()


@contextmanager
def absent() -> Iterator[None]:
    """While it lasts, this machine has no GPU, whatever it has."""

    def refuse() -> Any:
        raise EngineError("there is no NVIDIA GPU that CUDA can use: none is here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "gpu", refuse)
        patch.setattr(cuda, "driver", refuse)
        yield
