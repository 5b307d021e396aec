"""f, or a whole sampler, on TensorRT or TensorRT for RTX: one adapter, for the two packages have one interface."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime import cuda
from cm_runtime.artifact import OUTPUTS, Manifest
from cm_runtime.backends import engine_file
from cm_runtime.backends.base import Backend, images_at_once
from cm_runtime.backends.engine_file import FORMATS, EngineManifest, Package
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, RequestError
from cm_runtime.extras import require

DEVICES = ("auto", "cuda", "cuda:0")
KEPT_LINES = 10_000
_TYPES = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8"}  # NumPy's names and trt.DataType's


class TensorRtBackend(Backend):
    """An ``.engine`` of ours on the GPU it was built for.

    engine: a path, or an engine's bytes with their ``manifest``; package: None is the engine's own. Raises
    ArtifactError for a file that is not as its manifest says or not for this machine, before TensorRT sees it,
    MissingExtraError, and EngineError where there is no GPU or TensorRT refuses.
    """

    def __init__(
        self,
        engine: str | os.PathLike[str] | bytes,
        manifest: EngineManifest | None = None,
        package: Package | None = None,
        device: str = "auto",
    ) -> None:
        where = "the built engine" if isinstance(engine, bytes) else str(Path(engine))
        self.file = manifest or engine_file.read_engine_manifest(where)
        if self.file.model.graph == "network":
            raise RequestError(f"{where} is a network graph, which draws nothing by itself")
        if device not in DEVICES:
            raise EngineError(
                f"device must be auto or cuda:0 for TensorRT, not {device}; choose among GPUs by CUDA_VISIBLE_DEVICES"
            )
        package = package or self.file.package
        trt = module(package)
        found = cuda.gpu()
        target = package, trt.__version__, found.capability
        if isinstance(engine, bytes):
            engine_file.check_target(self.file, where, *target)
            engine_file.check_hash(engine, self.file, where)
        else:
            engine = engine_file.verified(where, self.file, *target)
        self.name = FORMATS[package]
        self.manifest = self.file.model
        self.device = "cuda:0"
        self.version = f"{package} {trt.__version__} on {found.name}"
        self._trt = trt
        self._logger = listener(trt)
        self._memory = cuda.Memory()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise EngineError(f"{where}: {package} cannot open it: {self._logger.last()}")
        self._check_tensors(where)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{where}: {package} has no room for it on the GPU: {self._logger.last()}")

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
        asked = interface(self.manifest, 0).batch(feed)
        if asked > profile.max:
            raise RequestError(
                f"this engine takes batches of {profile} (least:best:greatest), not {asked}; ask for --micro-batch"
                f" {profile.max}, or export it with a greater --batch"
            )
        run = interface(self.manifest, max(asked, profile.min))
        context = self._context
        sent = []  # a host array must outlive its copy
        for name, (dtype, shape) in run.inputs.items():
            array = _filled(np.ascontiguousarray(feed[name], dtype), shape)
            sent.append(array)
            self._must(context.set_input_shape(name, shape), f"the shape {shape} of {name}")
            self._must(context.set_tensor_address(name, self._memory.send(name, array)), f"the address of {name}")
        (name, (dtype, shape)) = run.output
        if tuple(context.get_tensor_shape(name)) != shape:
            raise EngineError(f"the engine makes {name} {tuple(context.get_tensor_shape(name))}, not {shape}")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._must(context.set_tensor_address(name, self._memory.address(name, size)), f"the address of {name}")
        self._must(context.execute_async_v3(self._memory.stream), "to run")
        made = self._memory.fetch(name, shape, np.dtype(dtype))
        return made if len(made) == asked else made[:asked].copy()

    def layers(self) -> str:
        """What the engine's layers are, as TensorRT's inspector has them in JSON."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(f"{self.file.package} refused {what}: {self._logger.last()}")

    def _check_tensors(self, where: str) -> None:
        """Raises ArtifactError if the engine's inputs and outputs are not those of its manifest."""
        engine, trt = self._engine, self._trt
        found = {}
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(engine.get_tensor_shape(name)) if is_input else ()  # an output's is checked when it is made
            found[name] = is_input, engine.get_tensor_dtype(name).name, shape
        wanted = interface(self.manifest, -1)
        expected = {name: (True, _TYPES[dtype], shape) for name, (dtype, shape) in wanted.inputs.items()}
        name, (dtype, _) = wanted.output
        expected[name] = False, _TYPES[dtype], ()
        if found != expected:
            raise ArtifactError(f"{where}: its inputs and outputs {found} are not those of its manifest, {expected}")


class Interface(NamedTuple):
    """NumPy type and shape of each of a graph's inputs, and of its output."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    output: tuple[str, tuple[str, tuple[int, ...]]]

    def batch(self, feed: Mapping[str, NDArray[Any]]) -> int:
        """How many images ``feed`` asks for."""
        return feed["noise"].shape[1] if "noise" in self.inputs else len(feed["x"])


def interface(manifest: Manifest, n: int) -> Interface:
    """The tensors of a denoiser or sampler graph at a batch of ``n``."""
    c, h, w = manifest.image_shape
    made: tuple[str, tuple[int, ...]]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    if manifest.graph == "sampler":
        inputs = {"noise": ("float32", (manifest.steps, n, c, h, w))}
        made = "uint8", (n, h, w, c)
    else:
        inputs = {"x": ("float32", (n, c, h, w)), "sigma": ("float32", (n,))}
        made = "float32", (n, c, h, w)
    if manifest.num_classes:
        inputs["label"] = "int64", (n,)
    return Interface(inputs, (OUTPUTS[manifest.graph], made))


def _filled(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """``array`` in ``shape``, whose one larger dimension, the batch, is filled with its last entry."""
    for axis, (has, wanted) in enumerate(zip(array.shape, shape, strict=True)):
        if has < wanted:
            return np.concatenate([array, np.repeat(array.take([-1], axis), wanted - has, axis)], axis)
    return array


def module(package: Package) -> Any:
    """The package itself, `tensorrt` or `tensorrt_rtx`. Raises MissingExtraError, and EngineError if it cannot load."""
    try:
        return require(package, "TensorRT" if package == "tensorrt" else "TensorRT for RTX")
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, MissingExtraError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngineError(f"{package} is installed and does not load: {reason}") from error


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
