"""f on ONNX Runtime: the CPU, or an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import onnx_graph
from cm_runtime.backends import external_data
from cm_runtime.backends.base import (
    ON_CPU,
    Backend,
    EngineOptions,
    Interface,
    finite_images,
    interface,
    read_outputs,
    require_target,
)
from cm_runtime.choices import ComputePrecision, GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.engine import Evaluate
from cm_runtime.cuda.sampler import CUDA, OnDevice, device_index, open_device
from cm_runtime.errors import ArtifactError, EngineError, OutOfMemoryError, RequestError
from cm_runtime.errors.reasons import first_line
from cm_runtime.extras import NO_DRIVER, TWO_RUNTIMES, has_driver, has_two_runtimes, require
from cm_runtime.files import streams
from cm_runtime.kernels.launches import Images
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.onnx_graph import Verdict
from cm_runtime.onnx_graph.graph import BFLOAT, BOOL, FLOAT, HALF, INT64, UINT8
from cm_runtime.request import Request
from cm_runtime.sampling import Array, Batch
from cm_runtime.subprocesses import engine_threads

LOG = logging.getLogger("cm_runtime")
# ONNX's numbers by the names of types: NumPy has no bfloat16.
TYPES = {"float32": FLOAT, "uint8": UINT8, "int64": INT64, "bool": BOOL, "float16": HALF, "bfloat16": BFLOAT}
MOST_BOUND = 4  # batch sizes whose memory is kept
MOST_GRAPHS = 64  # CUDA graphs of a session, which lets none of them go
WITHOUT_GRAPH = "-1"  # as the number of a run's graph
NO_CAPTURE = "graph capture"  # in what ONNX Runtime says of a session some of whose nodes are not on the GPU


def has_cuda() -> bool:
    """True where ONNX Runtime has a CUDA provider and the machine has an NVIDIA driver, whose GPUs are not hidden."""
    available = require("onnxruntime", "the ONNX Runtime backend").get_available_providers()
    is_shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
    return "CUDAExecutionProvider" in available and is_shown and has_driver()


class OrtBackend(Backend):
    """An exported ``.onnx`` on ONNX Runtime.

    On a GPU inputs and outputs are bound to memory of the device, once for each batch size, and where every node runs
    there the whole run is one CUDA graph.

    Args:
        model: a path, or the file's bytes with their ``manifest``.
        manifest: the file's, if it was read before.
        options: device cpu or cuda:N; precision auto, or the file's, or on a GPU tf32 for a file in fp32.
        verdict: of `onnx_graph.check`, if the file was checked before.

    Raises:
        ArtifactError: The file is no export, or damaged, or its data file is missing or too short.
        EngineError: ONNX Runtime cannot load it, or the device is not there; it never falls back to another.
        RequestError: Another precision than the file's, or tf32 on a CPU.
    """

    name = "ort"

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        manifest: Manifest | None = None,
        options: EngineOptions = ON_CPU,
        verdict: Verdict | None = None,
    ) -> None:
        ort = require("onnxruntime", "the ONNX Runtime backend")
        where = "the exported graph" if isinstance(model, bytes) else str(Path(model))
        self.source = Path(where).name
        self.manifest = manifest or read_manifest(where)
        self.device = options.device
        require_target(self.manifest, where, self.device)
        self.precision: ComputePrecision = self.manifest.precision
        if options.precision == "tf32":
            if self.device == "cpu":
                raise RequestError("tf32 is a precision of GPUs; on the CPU take fp32")
            if self.precision != "fp32":
                raise RequestError(f"tf32 is of files in fp32, and this one is in {self.precision}")
            self.precision = "tf32"
        elif options.precision not in ("auto", self.precision):
            raise RequestError(
                f"ONNX Runtime computes in the types of the file, {self.precision}; for {options.precision} export with"
                f" --precision {options.precision}, or take --backend openvino"
            )
        self._graphs = GraphNumbers()
        self._lock = threading.Lock()  # of the memory that evaluations are bound to
        self.version = f"onnxruntime {ort.__version__}"
        if self.device != "cpu":
            _check_cuda(ort, self.device)
        self._device = open_device(self.device)
        self.on_device = OnDevice(self._device) if self._device else None
        data = None if isinstance(model, bytes) else external_data.data_file(Path(where), self.manifest)
        if verdict is None:
            onnx_graph.check(model, self.manifest)
        self._bound: OrderedDict[tuple[Any, ...], MemoryBinding] = OrderedDict()
        try:
            stream = self._device.stream if self._device else 0
            self._session = open_session(model, where, options, stream, data)
        except (ArtifactError, EngineError) as error:
            if data and "External" in str(error):  # as ONNX Runtime calls an initializer, or the path of its data
                raise external_data.damage_error(where, data) from error
            raise
        self.outputs = read_outputs(self.manifest, {each.name for each in self._session.get_outputs()}, where)

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs; see `Backend`."""
        try:
            if self.device == "cpu":
                results = self._session.run(list(self.outputs), dict(feed))
            else:
                with self._lock:
                    results = self._bind_memory(feed).run(feed)
        except Exception as error:
            raise _wrap(error) from error
        return finite_images(results)

    # On the GPU, as cuda.engine.Engine has it

    def batches(self, request: Request, noise: Array | None = None) -> Iterator[Batch] | None:
        """`sampling.batches`, of which nothing but images leaves the GPU; None where it cannot stay there."""
        return self.on_device.batches(self, request, noise) if self.on_device else None

    @property
    def graph(self) -> GraphKind:
        """The file's."""
        return self.manifest.graph

    def images(self, count: int) -> Images:
        """As the file's graph takes them."""
        kind = self.manifest.precision if self.graph == "network" else "fp32"
        return Images(count, *self.manifest.image_shape, type=kind, output="fp32")

    def bind(self, device: Device, count: int) -> Evaluate:
        """Evaluations bound to addresses; those of each step are a binding, and a CUDA graph, of their own."""
        tensors = interface(self.manifest, count, self.outputs)
        return AddressBinding(self._session, tensors, self.device, self._graphs).evaluate

    def capture(self, device: Device, body: Callable[[], Any]) -> None:
        """None: ONNX Runtime captures its own runs, each as a graph, and cannot be captured from outside."""
        return None

    def _bind_memory(self, feed: Mapping[str, NDArray[Any]]) -> MemoryBinding:
        """The memory for inputs of these shapes; that of the shape longest unused is let go beyond a few."""
        key = tuple(array.shape for array in feed.values())
        if key not in self._bound:
            if len(self._bound) == MOST_BOUND:
                self._bound.popitem(last=False)
            self._bound[key] = MemoryBinding(self._session, feed, self.outputs, self.device, self._graphs)
        self._bound.move_to_end(key)
        return self._bound[key]


class GraphNumbers:
    """Numbers that a session captures runs under, at most `MOST_GRAPHS`: one for each set of addresses and shapes.

    Memory that is freed and taken again at the same place has its graph still. The provider captures for each thread
    anew, and in a mode in which no other thread may take memory: so only the thread that loads the engine captures, and
    what runs ahead of a training loop does not.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._numbers: dict[Hashable, str] = {}

    def find(self, key: Hashable) -> str:
        """The number for the next run with those addresses and shapes, or `WITHOUT_GRAPH`."""
        if threading.get_ident() != self._thread:
            return WITHOUT_GRAPH
        if key not in self._numbers and len(self._numbers) < MOST_GRAPHS:
            self._numbers[key] = str(len(self._numbers) + 1)
        return self._numbers.get(key, WITHOUT_GRAPH)


class MemoryBinding:
    """A session's inputs and outputs in memory of ``device`` whose addresses stay, as a CUDA graph needs them.

    The first run makes the outputs' memory, the engine knowing their shapes best.
    """

    def __init__(
        self, session: Any, feed: Mapping[str, NDArray[Any]], outputs: Sequence[str], device: str, graphs: GraphNumbers
    ) -> None:
        ort = require("onnxruntime", "the ONNX Runtime backend")
        kind, _, index = device.partition(":")
        self._session = session
        self._inputs = {  # of copies: on the CPU a value is the array's own memory
            name: ort.OrtValue.ortvalue_from_numpy(array.copy(), kind, int(index or 0)) for name, array in feed.items()
        }
        binding = session.io_binding()
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, kind, int(index or 0))
        session.run_with_iobinding(binding, run_options(WITHOUT_GRAPH))  # this once: its outputs' addresses are new
        self._outputs = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(outputs, self._outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        self._binding, self._graphs = binding, graphs
        values = *self._inputs.values(), *self._outputs
        self._place = tuple((value.data_ptr(), *value.shape()) for value in values)

    def run(self, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One run of inputs of the same shapes; the answers are in memory of their own."""
        for name, array in feed.items():
            self._inputs[name].update_inplace(array)
        self._session.run_with_iobinding(self._binding, run_options(self._graphs.find(self._place)))
        return [np.array(value.numpy()) for value in self._outputs]


class AddressBinding:
    """A session's runs from and to addresses of ``device``, put in the session's stream and not waited for."""

    def __init__(self, session: Any, tensors: Interface, device: str, graphs: GraphNumbers) -> None:
        self._session, self._graphs = session, graphs
        self._kind, _, index = device.partition(":")
        self._index = int(index or 0)
        self._interface = tensors
        self._shapes = tuple(shape for _, shape in tensors.inputs.values())
        self._bindings: dict[tuple[int, ...], Any] = {}

    def evaluate(self, addresses: Mapping[str, int]) -> None:
        """See `cuda.engine.Evaluate`."""
        names = (*self._interface.inputs, *self._interface.outputs)
        key = tuple(addresses[name] for name in names)
        if key not in self._bindings:
            self._bindings[key] = self._bind(addresses)
        options = run_options(self._graphs.find((key, self._shapes)))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session.run_with_iobinding(self._bindings[key], options)
        except Exception as error:
            raise _wrap(error) from error

    def _bind(self, addresses: Mapping[str, int]) -> Any:
        binding = self._session.io_binding()
        for name, (dtype, shape) in self._interface.inputs.items():
            binding.bind_input(name, self._kind, self._index, TYPES[dtype], shape, addresses[name])
        for name, (dtype, shape) in self._interface.outputs.items():
            binding.bind_output(name, self._kind, self._index, TYPES[dtype], shape, addresses[name])
        return binding


def run_options(graph: str) -> Any:
    """The options of a run under that number of a CUDA graph."""
    options = require("onnxruntime", "the ONNX Runtime backend").RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


def _wrap(error: Exception) -> EngineError:
    """Wrap an exception of ONNX Runtime's run; its exceptions share no base of their own."""
    line = first_line(error)
    is_memory = "Failed to allocate memory" in line or "out of memory" in line
    return (OutOfMemoryError if is_memory else EngineError)(f"ONNX Runtime: {line}")


def open_session(
    model: str | os.PathLike[str] | bytes,
    where: str,
    options: EngineOptions,
    stream: int = 0,
    data: Path | None = None,
) -> Any:
    """An onnxruntime.InferenceSession of a path or a file's bytes, on cpu or cuda:N and no other device.

    where: what errors call it; stream: a CUDA stream's handle that its runs go to, or 0 for one of its own; data: the
    file of the weights, if any. Raises ArtifactError and EngineError.
    """
    ort, device = require("onnxruntime", "the ONNX Runtime backend"), options.device
    if device != "cpu":
        _check_cuda(ort, device)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = engine_threads(options.threads)
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file begins with
    settings.log_severity_level = 4 if device == "cpu" else 3  # a GPU's missing libraries are in the log alone
    provider = _provider(device, stream, is_tf32=options.precision == "tf32")
    missing = missing_library() if device != "cpu" else ""
    source = model if isinstance(model, bytes) else where
    if weights := external_data.map_link(data):
        _give_weights(settings, weights)
        source = streams.read_bytes(where, ArtifactError, external_data.LARGEST_GRAPH)
    try:
        # Without enable_fallback=0 it would print on standard output and go on with other providers.
        try:
            session = ort.InferenceSession(source, settings, providers=[provider], enable_fallback=0)
        except Exception as error:
            if isinstance(provider, str) or NO_CAPTURE not in str(error):
                raise
            LOG.warning("%s runs without a CUDA graph: ONNX Runtime has not all of its nodes on the GPU", where)
            provider = provider[0], {**provider[1], "enable_cuda_graph": "0"}
            session = ort.InferenceSession(source, settings, providers=[provider], enable_fallback=0)
    except Exception as error:  # its exceptions share no base of their own
        reason = first_line(error)
        if provider == "CPUExecutionProvider":
            raise ArtifactError(f"{where}: ONNX Runtime cannot load it: {reason}") from error
        raise EngineError(f"ONNX Runtime cannot use {device}: {reason}") from error
    if session.get_providers()[0] != (provider if isinstance(provider, str) else provider[0]):
        cause = missing or "is its driver of CUDA 13 (580 or newer)?"
        raise EngineError(f"ONNX Runtime could not start on {device}; {cause}")
    return session


def _give_weights(settings: Any, data: external_data.MappedWeights) -> None:
    """Let a session of a file's bytes take its weights from memory. Raises EngineError for an older ONNX Runtime."""
    if not hasattr(settings, "add_external_initializers_from_files_in_memory"):
        raise EngineError(f"ONNX Runtime before 1.24 cannot read weights behind a link, {data.path}: update it")
    settings.add_external_initializers_from_files_in_memory([data.path.name], [data.content], [data.content.size])


def _check_cuda(ort: Any, device: str) -> None:
    """Raise EngineError unless ONNX Runtime has CUDA, and the machine a driver, for the ``device`` cuda:N."""
    if not CUDA.fullmatch(device):
        raise EngineError(f"device must be auto, cpu or cuda:N, not {device}")
    if not has_driver():
        raise EngineError(f"ONNX Runtime cannot run on {device}: {NO_DRIVER}")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        if has_two_runtimes():
            raise EngineError(f"this ONNX Runtime has no CUDA provider for {device}: {TWO_RUNTIMES}")
        raise EngineError(f"this ONNX Runtime has no CUDA provider for {device}: pip install 'cm-runtime[gpu]'")


def missing_library() -> str:
    """Load the CUDA libraries of pip packages; the first that is not found, with the cure, else nothing."""
    with redirect_stdout(io.StringIO()) as lines:  # where ONNX Runtime prints of them
        require("onnxruntime", "the ONNX Runtime backend").preload_dlls()
    first = next(iter(lines.getvalue().splitlines()), "")
    return first and f"{first}: pip install 'cm-runtime[gpu]'"


def _provider(device: str, stream: int, *, is_tf32: bool) -> Any:
    if device == "cpu":
        return "CPUExecutionProvider"
    stream_option = {"user_compute_stream": str(stream)} if stream else {}
    # TF32, ONNX Runtime's default, has ten bits of a float32's 23, and moves images by more than rounding does.
    config = {"enable_cuda_graph": "1", "use_tf32": "1" if is_tf32 else "0"}
    return "CUDAExecutionProvider", {"device_id": str(device_index(device)), **config, **stream_option}
