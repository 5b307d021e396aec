"""f, or a whole sampler, on OpenVINO: the CPU, in float32 or bfloat16."""

from __future__ import annotations

import functools
import importlib
import io
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime import onnx_graph
from cm_runtime.backends import external_data
from cm_runtime.backends.base import ON_CPU, Backend, EngineOptions, finite_images, read_outputs, require_target
from cm_runtime.errors import ArtifactError, CmRuntimeError, EngineError, RequestError
from cm_runtime.errors.reasons import openvino_reason
from cm_runtime.errors.wording import quantity
from cm_runtime.extras import require
from cm_runtime.manifest import OUTPUTS, Manifest, read_manifest
from cm_runtime.onnx_graph import Verdict
from cm_runtime.onnx_graph.expression import Expression
from cm_runtime.onnx_graph.skip_scale import CONSTANTS, DOMAIN, NAME
from cm_runtime.precond import c_out, c_skip
from cm_runtime.subprocesses import engine_threads

HINTS = {"fp32": "f32", "bf16": "bf16"}
# Its primitives of 5000 shapes would stay, and memory grow with every batch size: by 70% over 100 sizes of a small
# network. To make them anew takes 2 ms where the size changes, and nothing where it does not.
KEEPS_NO_SHAPES = {"CPU_RUNTIME_CACHE_CAPACITY": "0"}
TELEMETRY = "openvino_telemetry"
IMAGES = {"denoiser": "x", "sampler": "noise", "network": "x_in"}  # the input that is as large as the images
INPUTS = {"denoiser": {"x", "sigma"}, "sampler": {"noise"}, "network": {"x_in", "c_noise"}}


class OpenVinoBackend(Backend):
    """An exported ``.onnx`` on OpenVINO.

    It runs no foreign graph: OpenVINO does not check the indices and shapes that a graph computes. In bf16, all that
    does not depend on the images (the noise level's embedding above all, which bfloat16 cannot hold) is a model of its
    own in float32.

    Args:
        model: the file.
        manifest: the file's, if it was read before.
        options: precision fp32 or bf16, whatever types the file has; auto is the file's, and fp32 where that is fp16.
        verdict: of `onnx_graph.check`, if the file was checked before.

    Raises:
        ArtifactError: The file is no export, or damaged.
        EngineError: bf16 on a processor without it; the engine never falls back.
        RequestError: Another device than the CPU, or fp16 or tf32.
    """

    name = "openvino"

    def __init__(
        self,
        model: str | os.PathLike[str],
        manifest: Manifest | None = None,
        options: EngineOptions = ON_CPU,
        verdict: Verdict | None = None,
    ) -> None:
        if options.precision in ("fp16", "tf32"):
            raise RequestError(f"OpenVINO's CPU computes in fp32 or bf16, not in {options.precision}")
        ov = package()
        if options.device not in ("cpu", "auto"):
            raise RequestError(f"OpenVINO runs on the CPU here, not on {options.device}")
        where = Path(model)
        self.source = where.name
        self.manifest = manifest or read_manifest(where)
        self.device = "cpu"
        require_target(self.manifest, where, "OpenVINO")
        if options.precision == "auto":
            self.precision = "bf16" if self.manifest.precision == "bf16" else "fp32"
        else:
            self.precision = options.precision
        self.version = f"openvino {ov.__version__.partition('-')[0]}"
        data = external_data.data_file(where, self.manifest)
        self._weights = external_data.map_link(data)  # alive as long as the engine that may read it
        self._lock = threading.Lock()  # a request serves one thread at a time
        plugins = core()
        if self.precision == "bf16" and not has_bf16():
            raise EngineError(
                "OpenVINO computes in bf16 only where the processor does, and this one does not: use fp32"
            )
        (verdict or onnx_graph.check(where, self.manifest)).require_own(where, "OpenVINO")
        try:
            graph = read_model(where if self._weights is None else external_data.embed_addresses(where, self._weights))
        except CmRuntimeError:
            raise
        except Exception as error:  # its exceptions have many lines and no base of their own
            if self._weights is not None:
                raise EngineError(
                    f"{where}: OpenVINO cannot load it with its weights behind a link: {openvino_reason(error)}"
                ) from error
            if data and data.name in str(error):
                raise external_data.damage_error(where, data) from error
            raise ArtifactError(f"{where}: OpenVINO cannot load it: {openvino_reason(error)}") from error
        _check_ports(graph, self.manifest, where)
        self.outputs = read_outputs(self.manifest, set().union(*(port.names for port in graph.outputs)), where)
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", **KEEPS_NO_SHAPES}
        if threads := engine_threads(options.threads):
            config["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._cut_names: list[str] = []
            self._prefix = None
            if self.precision == "bf16":
                before, graph, self._cut_names = split(graph, IMAGES[self.manifest.graph])
                if self._cut_names:
                    self._prefix = plugins.compile_model(before, "CPU", config | {"INFERENCE_PRECISION_HINT": "f32"})
            compiled = plugins.compile_model(graph, "CPU", config | {"INFERENCE_PRECISION_HINT": HINTS[self.precision]})
            self._request = compiled.create_infer_request()
        except Exception as error:
            raise ArtifactError(f"{where}: OpenVINO cannot load it: {openvino_reason(error)}") from error
        self._names = {each.any_name for each in compiled.inputs}

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs; see `Backend`."""
        try:
            values = dict(feed)
            with self._lock:
                if self._prefix is not None:
                    embedding = self._prefix({each.any_name: values[each.any_name] for each in self._prefix.inputs})
                    values |= {name: embedding[i] for i, name in enumerate(self._cut_names)}
                answer = self._request.infer({name: values[name] for name in self._names}, share_inputs=True)
                results = [np.array(answer[name]) for name in self.outputs]
        except Exception as error:
            raise EngineError(f"OpenVINO: {openvino_reason(error)}") from error
        return finite_images(results)


def package() -> ModuleType:
    """openvino, imported without its telemetry, which would send an event and leave files in the home folder.

    Raises MissingExtraError.
    """
    absent = object()
    before = sys.modules.get(TELEMETRY, absent)
    if before is absent and "openvino" not in sys.modules:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        return require("openvino", "the OpenVINO backend")
    finally:
        if before is absent and sys.modules.get(TELEMETRY, absent) is None:
            del sys.modules[TELEMETRY]


def core() -> Any:
    """The ov.Core of this process. Raises EngineError in a fork, where it would wait for threads that are not there."""
    value, process = _start_core()
    if process != os.getpid():
        raise EngineError("OpenVINO was at work before this process was forked, and would hang: start it by spawn")
    return value


@functools.cache
def _start_core() -> tuple[Any, int]:
    """A core and its process, never let go.

    Each loads a CPU plugin that gives its thread another stack for signal handlers. Of two, whichever goes last puts
    back that of the other, which is unmapped by then, and the next Ctrl-C ends the process by a segmentation fault.
    """
    ov = package()
    try:
        return ov.Core(), os.getpid()
    except RuntimeError as error:  # where no thread can be started, for one
        raise EngineError(f"OpenVINO cannot start: {openvino_reason(error)}") from error


def has_bf16() -> bool:
    """Return True if OpenVINO can compute in bfloat16 on this processor, which need not be faster."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def read_model(model: Path | bytes) -> Any:
    """The ov.Model of an ``.onnx``, a path or its bytes; never by a reader of another format, which would print."""
    manager = importlib.import_module("openvino.frontend").FrontEndManager()
    reader = manager.load_by_framework("onnx")
    reader.add_extension(_skip_scale_extension())
    return reader.convert(reader.load(io.BytesIO(model) if isinstance(model, bytes) else str(model)))


def _check_ports(graph: Any, manifest: Manifest, where: Path) -> None:
    """Raises ArtifactError where inputs, outputs or the table that labels look into are not what the manifest says.

    Of a label beyond such a table OpenVINO makes zeros, and no error.
    """
    takes, makes = (set().union(*(port.names for port in ports)) for ports in (graph.inputs, graph.outputs))
    names = INPUTS[manifest.graph] | ({"label"} if manifest.num_classes else set())
    if not takes <= names or OUTPUTS[manifest.graph][0] not in makes:
        raise ArtifactError(f"{where}: its graph's inputs and outputs are not those of its manifest")
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Gather":
            continue
        index = node.input_value(1).get_node()
        while index.get_type_name() == "Convert":
            index = index.input_value(0).get_node()
        shape = node.input_value(0).get_partial_shape()
        is_table = shape.rank.is_static and len(shape) > 0 and shape[0] == manifest.num_classes
        if index.get_type_name() == "Parameter" and not is_table:
            raise ArtifactError(
                f"{where}: its graph is not for the {quantity(manifest.num_classes, 'class')} of its manifest"
            )


def split(graph: Any, images: str) -> tuple[Any, Any, list[str]]:
    """An ov.Model as two: what does not depend on the input ``images``, and the rest, which is given its results.

    The third is the names of those results, in their order: inputs of the second model, outputs of the first.
    """
    ov = package()
    ops = importlib.import_module("openvino.opset13")
    late: set[str] = set()  # names of nodes that depend on the images
    fixed: set[str] = set()  # and on no input at all
    cut_sources: dict[tuple[str, int], Any] = {}
    cuts: dict[tuple[str, int], Any] = {}
    for node in graph.get_ordered_ops():
        name, sources = node.get_name(), [node.input_value(i) for i in range(node.get_input_size())]
        parents = {source.get_node().get_name() for source in sources}
        if node.get_type_name() == "Parameter":
            if images in node.output(0).get_names():
                late.add(name)
        elif parents <= fixed:  # a constant has none
            fixed.add(name)
        elif parents & late:
            late.add(name)
            for i, source in enumerate(sources):
                parent = source.get_node().get_name()
                if parent not in late | fixed:
                    key = parent, source.get_index()
                    cut_sources.setdefault(key, source)
                    if key not in cuts:
                        cuts[key] = ops.parameter(source.get_partial_shape(), source.get_element_type())
                        cuts[key].output(0).set_names({f"apart{len(cuts) - 1}"})
                    node.input(i).replace_source_output(cuts[key].output(0))
    inputs = [each for each in graph.get_parameters() if images in each.output(0).get_names()]
    others = [each for each in graph.get_parameters() if images not in each.output(0).get_names()]
    results = [ops.result(source) for source in cut_sources.values()]
    before = ov.Model(results, others, "before") if results else None
    rest = ov.Model(graph.get_results(), [*inputs, *cuts.values()], "rest")
    return before, rest, [f"apart{i}" for i in range(len(cuts))]


class _Opset:
    """An emitter of OpenVINO's operators; see `onnx_graph.expression`."""

    def __init__(self) -> None:
        self._ops = importlib.import_module("openvino.opset13")
        self._kinds = {
            "Add": self._ops.add,
            "Sub": self._ops.subtract,
            "Mul": self._ops.multiply,
            "Div": self._ops.divide,
            "Sqrt": self._ops.sqrt,
        }

    def constant(self, value: float) -> Any:
        return self._ops.constant(np.float32(value))

    def op(self, kind: str, *inputs: Any) -> Any:
        return self._kinds[kind](*inputs)


def _skip_scale_extension() -> Any:
    """cm::SkipScale in OpenVINO's operators: it does not read the file's own function."""
    ops = importlib.import_module("openvino.opset13")
    emitter = _Opset()

    def convert(node: Any) -> list[Any]:
        x, F, sigma = (node.get_input(i) for i in range(3))
        constants = [float(node.get_attribute(name)) for name in CONSTANTS]
        column = ops.constant(np.array([-1, 1, 1, 1], np.int64))
        s = Expression(emitter, ops.reshape(sigma, column, special_zero=False))
        skip, out = c_skip(s, *constants), c_out(s, *constants)
        y = skip * Expression(emitter, x) + out * Expression(emitter, ops.convert(F, "f32"))
        return [y.value.output(0)]

    frontend = importlib.import_module("openvino.frontend.onnx")
    return frontend.ConversionExtension(NAME, DOMAIN, convert)
