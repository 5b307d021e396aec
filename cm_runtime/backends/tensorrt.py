"""f, or a whole sampler, on TensorRT or TensorRT for RTX: one adapter, for the two packages have one interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
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
from cm_runtime.backends.batch_profiles import choose_profile
from cm_runtime.backends.engine_file import FORMATS, EngineManifest, Package
from cm_runtime.backends.tensorrt_cache import cache_name
from cm_runtime.backends.tensorrt_contexts import BoundContext, Contexts
from cm_runtime.backends.tensorrt_log import listener
from cm_runtime.choices import GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.graph import Graph
from cm_runtime.cuda.layout import pad_batch
from cm_runtime.cuda.sampler import OnDevice, device_index
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import NO_DRIVER, has, has_driver, require
from cm_runtime.kernels.launches import Images
from cm_runtime.request import Request
from cm_runtime.sampling import Array, Batch

LOG = logging.getLogger("cm_runtime")
HOST_SIZES = 4  # batch sizes that come through the host whose contexts are kept
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
        with self._device.use("opening an engine"):
            self._runtime = trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                raise EngineError(f"{where}: {package} cannot open it: {self._logger.last()}")
            self._check_tensors(where)
            tensors = partial(interface, self.manifest, outputs=self.outputs)
            cache = cache_name("kernels", self.file.sha256, self.version) if package == "tensorrt_rtx" else ""
            self._contexts = Contexts(trt, self._engine, self._logger, self._device, tensors, cache)
            self._device.follow()  # what that has put in the legacy stream
        self._bind_host = lru_cache(HOST_SIZES)(self._contexts.bind)
        self._has_warned = False
        self.on_device = OnDevice(self._device)

    @property
    def micro_batch(self) -> int:
        """Images at once, by their size, as far as the engine was built for so many; at least what it is best at."""
        profile = max(self.file.profiles, key=lambda profile: profile.max)
        return min(max(images_at_once(self.manifest, self.device), profile.opt), profile.max)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs; see `Backend`.

        A batch below the engine's least is filled up with copies of its last image, which are dropped again. Raises
        RequestError for one above its greatest.
        """
        count = interface(self.manifest, 0).batch(feed)
        profile, batch = choose_profile(self.file.profiles, count)
        with self._device.use("evaluating"):
            outputs = self._run(self._bind_host(profile, batch), interface(self.manifest, batch, self.outputs), feed)
            self._contexts.save()
        return finite_images([each if len(each) == count else each[:count].copy() for each in outputs])

    def _run(self, evaluate: BoundContext, run: Interface, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        device, addresses, arrays = self._device, {}, []  # a host array must outlive its copy
        for name, (dtype, shape) in run.inputs.items():
            axis = 1 if name == "noise" else 0
            array = pad_batch(np.ascontiguousarray(feed[name], dtype), shape[axis], axis)
            arrays.append(array)
            addresses[name] = device.send(name, array)
        for name, (dtype, shape) in run.outputs.items():
            addresses[name] = device.address(name, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        evaluate(addresses)
        return [device.fetch(name, shape, np.dtype(dtype)) for name, (dtype, shape) in run.outputs.items()]

    # On the GPU, as cuda.engine.Engine has it

    def batches(self, request: Request, noise: Array | None = None) -> Iterator[Batch]:
        """`sampling.batches`, of which nothing but images leaves the GPU."""
        yield from self.on_device.batches(self, request, noise)
        with self._device.use("keeping kernels"):
            self._contexts.save()

    @property
    def graph(self) -> GraphKind:
        """The file's."""
        return self.manifest.graph

    def images(self, count: int) -> Images:
        """At least as many as the engine takes. Raises RequestError for more than it takes."""
        _, batch = choose_profile(self.file.profiles, count)
        kind = self.manifest.precision if self.manifest.graph == "network" else "fp32"
        return Images(batch, *self.manifest.image_shape, type=kind, output="fp32")

    def bind(self, device: Device, count: int) -> BoundContext:
        """A context of its own for each batch size, as a captured graph needs it."""
        profile, batch = choose_profile(self.file.profiles, count)
        return self._contexts.bind(profile, batch)

    def capture(self, device: Device, body: Callable[[], Any]) -> Graph | None:
        """The whole loop in one graph; none, and a line, where TensorRT says that the engine cannot be captured."""
        self._contexts.save()  # now that each shape has run
        if self._contexts.are_capturable:
            return device.capture(body)
        if not self._has_warned:
            LOG.warning("%s runs without a CUDA graph: %s cannot capture it", self.source, self.file.package)
            self._has_warned = True
        return None

    def layers(self) -> str:
        """The engine's layers, as TensorRT's inspector has them in JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

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


def module(package: Package) -> Any:
    """The package itself, `tensorrt` or `tensorrt_rtx`. Raises MissingExtraError, and EngineError if it cannot load."""
    try:
        return require(package, "TensorRT" if package == "tensorrt" else "TensorRT for RTX")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise EngineError(f"{package} is installed and does not load: {first_line(error)}") from error
