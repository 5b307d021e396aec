"""f, or a whole sampler, on TensorRT or TensorRT for RTX: one adapter, for the two packages have one interface."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.backends import engine_file
from cm_runtime.backends.base import (
    DEFAULTS,
    Backend,
    EngineOptions,
    Interface,
    finite_images,
    images_at_once,
    interface,
    read_outputs,
)
from cm_runtime.backends.engine_file import FORMATS, EngineManifest, Package, Profile
from cm_runtime.choices import GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.engine import Evaluate
from cm_runtime.cuda.graph import Graph
from cm_runtime.cuda.layout import pad_batch
from cm_runtime.cuda.sampler import OnDevice, device_index
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, OutOfMemoryError, RequestError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import NO_DRIVER, has, has_driver, require
from cm_runtime.kernels.launches import Images
from cm_runtime.request import Request
from cm_runtime.sampling import Array, Batch

KEPT_LINES = 10_000
MEMORY = "out of memory", "outofmemory", "could not be allocated"  # in the errors of TensorRT that are of memory
PACKAGES: dict[str, Package] = {form: package for package, form in FORMATS.items()}
# NumPy's names, with bfloat16, which it has not, and trt.DataType's
_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}


class TensorRtBackend(Backend):
    """An exported ``.engine`` on the GPU it was built for.

    Args:
        engine: a path, or an engine's bytes with their ``manifest``.
        manifest: the file's, if it was read before.
        options: backend tensorrt or tensorrt-rtx, or auto for the engine's own; device auto (cuda:0) or cuda:N.

    Raises:
        ArtifactError: The file is not as its manifest says or not for this machine; TensorRT never sees it.
        EngineError: There is no GPU, or TensorRT refuses.
        MissingExtraError: The package is not installed.
    """

    def __init__(
        self,
        engine: str | os.PathLike[str] | bytes,
        manifest: EngineManifest | None = None,
        options: EngineOptions = DEFAULTS,
    ) -> None:
        where = "the built engine" if isinstance(engine, bytes) else str(Path(engine))
        self.source = Path(where).name
        self.file = manifest or engine_file.read_engine_manifest(where)
        index = 0 if options.device == "auto" else device_index(options.device)
        package = PACKAGES.get(options.backend, self.file.package)
        if not has_driver() and not has(package):
            raise EngineError(f"{where} runs on an NVIDIA GPU: {NO_DRIVER}")
        trt = module(package)
        self._device = Device(index)
        gpu = self._device.context.gpu
        target = package, trt.__version__, gpu.capability
        if isinstance(engine, bytes):
            engine_file.check_target(self.file, where, *target)
            engine_file.check_hash(engine, self.file, where)
        else:
            engine = engine_file.read_engine(where, self.file, *target)
        self.name = FORMATS[package]
        self.manifest = self.file.model
        self.device = f"cuda:{index}"
        self.precision = self.manifest.precision
        self.version = f"{package} {trt.__version__} on {gpu.name}"
        self._trt = trt
        self._logger = listener(trt)
        self._must = partial(_require, package, self._logger)
        with self._device.use("opening an engine"):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                raise EngineError(f"{where}: {package} cannot open it: {self._logger.last()}")
            self._check_tensors(where)
            self._context = self._new_context(where)
            self._device.follow()  # what that has put in the legacy stream
        self.on_device = OnDevice(self._device)

    @property
    def micro_batch(self) -> int:
        """Images at once, by their size, as far as the engine was built for so many; at least what it is best at."""
        profile = self.file.profile
        return min(max(images_at_once(self.manifest, self.device), profile.opt), profile.max)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs; see `Backend`.

        A batch below the engine's least is filled up with copies of its last image, which are dropped again. Raises
        RequestError for one above its greatest.
        """
        profile = self.file.profile
        count = interface(self.manifest, 0).batch(feed)
        if count > profile.max:
            raise RequestError(_beyond(profile, count))
        run = interface(self.manifest, max(count, profile.min), self.outputs)
        with self._device.use("evaluating"):
            outputs = self._run(run, feed)
        return finite_images([each if len(each) == count else each[:count].copy() for each in outputs])

    def _run(self, run: Interface, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        context = self._context
        arrays = []  # a host array must outlive its copy
        for name, (dtype, shape) in run.inputs.items():
            axis = 1 if name == "noise" else 0
            array = pad_batch(np.ascontiguousarray(feed[name], dtype), shape[axis], axis)
            arrays.append(array)
            self._must(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
            self._must(context.set_tensor_address(name, self._device.send(name, array)), f"the address of {name}")
        for name, (dtype, shape) in run.outputs.items():
            if tuple(context.get_tensor_shape(name)) != shape:
                raise EngineError(f"the engine makes {name} {tuple(context.get_tensor_shape(name))}, not {shape}")
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._must(context.set_tensor_address(name, self._device.address(name, size)), f"the address of {name}")
        self._must(context.execute_async_v3(self._device.stream), "to run")
        return [self._device.fetch(name, shape, np.dtype(dtype)) for name, (dtype, shape) in run.outputs.items()]

    # On the GPU, as cuda.engine.Engine has it

    def batches(self, request: Request, noise: Array | None = None) -> Iterator[Batch]:
        """`sampling.batches`, of which nothing but images leaves the GPU."""
        return self.on_device.batches(self, request, noise)

    @property
    def graph(self) -> GraphKind:
        """The file's."""
        return self.manifest.graph

    def images(self, count: int) -> Images:
        """At least as many as the engine takes. Raises RequestError for more than it takes."""
        profile, network = self.file.profile, self.manifest.graph == "network"
        if count > profile.max:
            raise RequestError(_beyond(profile, count))
        kind = self.manifest.precision if network else "fp32"
        return Images(max(count, profile.min), *self.manifest.image_shape, type=kind, output="fp32")

    def bind(self, device: Device, count: int) -> Evaluate:
        """A context of its own for each batch size, as a captured graph needs it."""
        context, must = (
            self._new_context(f"a batch of {count}"),
            self._must,
        )  # not the backend, which owns what is bound
        run = interface(self.manifest, count, self.outputs)
        for name, (_, shape) in run.inputs.items():
            must(context.set_input_shape(name, shape), f"the shape {shape} of {name}")

        def evaluate(addresses: Mapping[str, int]) -> None:
            for name in (*run.inputs, *run.outputs):
                must(context.set_tensor_address(name, addresses[name]), f"the address of {name}")
            must(context.execute_async_v3(device.stream), "to run")

        return evaluate

    def capture(self, device: Device, body: Callable[[], Any]) -> Graph:
        """The whole loop in one graph."""
        return device.capture(body)

    def layers(self) -> str:
        """The engine's layers, as TensorRT's inspector has them in JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _new_context(self, what: str) -> Any:
        context = self._engine.create_execution_context()
        self._must(context is not None, f"an execution context for {what}")
        return context

    def _check_tensors(self, where: str) -> None:
        """Raises ArtifactError if the engine's inputs and outputs are not those of its manifest."""
        engine, trt = self._engine, self._trt
        tensors = {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(engine.get_tensor_shape(name)) if is_input else ()  # an output's is checked when it is made
            tensors[name] = is_input, engine.get_tensor_dtype(name).name, shape
        self.outputs = read_outputs(self.manifest, tensors, where)
        tensors_of_graph = interface(self.manifest, -1, self.outputs)
        expected = {name: (True, _TYPES[dtype], shape) for name, (dtype, shape) in tensors_of_graph.inputs.items()}
        expected |= {name: (False, _TYPES[dtype], ()) for name, (dtype, _) in tensors_of_graph.outputs.items()}
        if tensors != expected:
            raise ArtifactError(f"{where}: its inputs and outputs {tensors} are not those of its manifest, {expected}")


def _require(package: str, logger: Any, done: bool, what: str) -> None:
    """Raise EngineError for what TensorRT has refused; OutOfMemoryError where its log speaks of memory."""
    if not done:
        reason = logger.last()
        is_memory = any(words in reason.lower() for words in MEMORY)
        raise (OutOfMemoryError if is_memory else EngineError)(f"{package} refused {what}: {reason}")


def _beyond(profile: Profile, count: int) -> str:
    return (
        f"this engine takes batches of {profile} (least:best:greatest), not {count}; ask for --micro-batch"
        f" {profile.max}, or export it with a greater --batch"
    )


def module(package: Package) -> Any:
    """The package itself, `tensorrt` or `tensorrt_rtx`. Raises MissingExtraError, and EngineError if it cannot load."""
    try:
        return require(package, "TensorRT" if package == "tensorrt" else "TensorRT for RTX")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise EngineError(f"{package} is installed and does not load: {first_line(error)}") from error


@cache
def _listener(base: Any) -> Any:
    class Listener(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.forget()

        def forget(self) -> None:
            self.lines: deque[str] = deque(maxlen=KEPT_LINES)
            self._last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity == base.Severity.VERBOSE:
                return
            self.lines.append(f"[{severity.name}] {message}")
            if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                self._last = " ".join(message.split())

        def last(self) -> str:
            """The last error, on one line."""
            return self._last or "it gave no reason"

    return Listener()


def listener(trt: Any) -> Any:
    """A `trt.ILogger` that prints nothing, and remembers what it hears from now on, without the chatter.

    There is one for all, since TensorRT keeps the first that a process gives it.
    """
    one = _listener(trt.ILogger)
    one.forget()
    return one
