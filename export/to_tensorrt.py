"""``.onnx`` -> ``.engine``: TensorRT on the GPU it is for, TensorRT for RTX on any machine."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cm_runtime import onnx_graph
from cm_runtime.backends import engine_file
from cm_runtime.backends.base import Backend, EngineOptions, images_at_once, require_target
from cm_runtime.backends.batch_profiles import Profile, format_profiles
from cm_runtime.backends.engine_file import DATA_CENTRE, FORMATS, EngineManifest, Package
from cm_runtime.backends.openvino import OpenVinoBackend
from cm_runtime.backends.ort import OrtBackend
from cm_runtime.backends.tensorrt import TensorRtBackend, module
from cm_runtime.backends.tensorrt_cache import cache_name, load_cache, save_cache
from cm_runtime.backends.tensorrt_log import listener
from cm_runtime.cuda import context
from cm_runtime.cuda.driver import Gpu
from cm_runtime.errors import ArtifactError, EngineError, MissingExtraError, RequestError
from cm_runtime.export import engine_parity, tensorrt_plugin
from cm_runtime.files import atomic, locks
from cm_runtime.manifest import Manifest, data_path, read_manifest

BEST_LEVEL = 5  # "always compiles a dynamic kernel and compares it to static kernels"


@dataclass(frozen=True)
class BuildOptions:
    """Choices for an engine.

    profiles: the batches that it takes; none are from 1 to as many images as a GPU sees together. gpus: compute
    capabilities to build for. level: TensorRT's builder_optimization_level, below 5 quicker for slower engines.
    """

    profiles: tuple[Profile, ...] = ()
    gpus: tuple[str, ...] = ()
    level: int | None = None

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= BEST_LEVEL:
            raise RequestError(f"the optimization level must be from 0 to {BEST_LEVEL}, not {self.level}")


def build(
    onnx: str | os.PathLike[str],
    path: str | os.PathLike[str],
    package: Package,
    options: BuildOptions,
    *,
    force: bool = False,
) -> EngineManifest:
    """Build ``path`` of the exported file ``onnx``; errors are those of `export.tensorrt`.

    The log is the one file that a failure leaves.
    """
    target, source = Path(path), Path(onnx)
    if target.suffix != engine_file.SUFFIX:
        raise RequestError(f"{target}: an engine's name ends in {engine_file.SUFFIX}")
    outputs = (target, *(name(target) for name in (engine_file.manifest_path, engine_file.layers_path)))
    for output in outputs:
        atomic.check_writable(output, force=force)
    model = read_manifest(source)
    require_target(model, source, package)
    data = data_path(source, model)
    onnx_graph.check(source, model).require_own(source, package)
    if package == "tensorrt_rtx" and options.level is not None:
        raise RequestError("TensorRT for RTX has no optimization level: it compiles kernels where an engine runs")
    trt = module(package)
    here, why_not = _gpu_here()
    capabilities = _capabilities(trt, package, options.gpus, here, why_not)
    profiles = options.profiles or _default_profiles(model, package)
    options = replace(options, profiles=profiles, gpus=tuple(capabilities))
    log = engine_file.log_path(target)
    compiler = _Compiler(trt, package, options, here, log)
    try:
        content, is_plugin = compiler.compile(source, model)
    finally:
        with atomic.write(log) as temporary:
            text = format_profiles(profiles)
            heading = f"{package} {trt.__version__}: {source.name} for {', '.join(capabilities)}, batches {text}"
            temporary.write_text("\n".join([heading, *compiler.logger.lines, ""]), encoding="utf-8")
    manifest = EngineManifest(
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        package=package,
        version=trt.__version__,
        gpus=tuple(capabilities),
        gpu_name=here.name if here and here.capability in capabilities else "",
        profiles=profiles,
        model=model,
        onnx_sha256=atomic.sha256(source),
        data_sha256=atomic.sha256(data) if data else None,
        plugin=is_plugin,
        log=log.name,
    )
    layers = None
    is_comparable = model.graph != "network" or model.precision != "bf16"  # which NumPy cannot feed
    if here and here.capability in capabilities and is_comparable:
        engine = TensorRtBackend(
            content,
            manifest,
            EngineOptions(backend=FORMATS[package]),
        )
        parity = engine_parity.measure(engine, _reference(source, model), max(profile.max for profile in profiles))
        manifest = manifest.model_copy(update={"parity": parity})
        layers = engine.layers()
    _write(target, content, manifest, layers, force=force)
    return manifest


def _reference(source: Path, model: Manifest) -> Backend:
    """ONNX Runtime's CPU has no convolution in bf16."""
    if model.precision == "bf16":
        return OpenVinoBackend(source, model, EngineOptions(device="cpu", precision="fp32"))
    return OrtBackend(source, model)


class _Compiler:
    """One run of TensorRT's builder, with its log."""

    def __init__(self, trt: Any, package: Package, options: BuildOptions, here: Gpu | None, log: Path) -> None:
        self.trt, self.package, self.options, self.log = trt, package, options, log
        self.logger = listener(trt)
        self._timings = cache_name("timings", trt.__version__, here.name) if here and package == "tensorrt" else ""

    def compile(self, source: Path, model: Manifest) -> tuple[bytes, bool]:
        """The engine, and whether cm::SkipScale is our kernel in it. Raises ArtifactError and EngineError."""
        trt = self.trt
        try:
            builder = trt.Builder(self.logger)
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            if self.package == "tensorrt":  # the one that has plugins written in Python
                tensorrt_plugin.register(_plugin_module())
                flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
            network = builder.create_network(flags)
            parser = trt.OnnxParser(network, self.logger)
            if not parser.parse_from_file(str(source)):
                raise ArtifactError(
                    f"{source}: {self.package} cannot read it: {_parse_errors(parser)} ({self.log} has all it said)"
                )
            config = builder.create_builder_config()
            self._configure(config, model)
            for profile in self.options.profiles:
                config.add_optimization_profile(self._profile(builder, network, profile))
            timings = self._use_timings(config) if self._timings else None  # which must outlive the build
            serialized = builder.build_serialized_network(network, config)
            if serialized is None:
                raise self._error(source, self.logger.last())
            if timings:
                save_cache(self._timings, bytes(timings.serialize()))
            layers = map(network.get_layer, range(network.num_layers))
            return bytes(serialized), any(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
        except (RuntimeError, TypeError, ValueError) as error:  # a builder without a driver, a profile it cannot use
            raise self._error(source, f"{error} {self.logger.last()}") from error

    def _configure(self, config: Any, model: Manifest) -> None:
        """No precision but the graph's own: TF32 is no float32, so it is for networks of halves only."""
        trt = self.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names in the layer report; it costs no time
        if model.precision == "fp32":
            config.clear_flag(trt.BuilderFlag.TF32)
        if self.package == "tensorrt_rtx":
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # what takes memory as it runs cannot be captured
            config.num_compute_capabilities = len(self.options.gpus)
            for i, capability in enumerate(self.options.gpus):
                config.set_compute_capability(trt.ComputeCapability.__members__[_member(capability)], i)
        else:
            config.builder_optimization_level = BEST_LEVEL if self.options.level is None else self.options.level

    def _use_timings(self, config: Any) -> Any:
        """Timings of kernels that builds before this one measured on this GPU, to which this one adds its own."""
        timings = config.create_timing_cache(load_cache(self._timings))
        if not config.set_timing_cache(timings, False):
            timings = config.create_timing_cache(b"")
            config.set_timing_cache(timings, False)
        return timings

    def _profile(self, builder: Any, network: Any, profile: Profile) -> Any:
        """TensorRT's form of ``profile``, whose N is every input's: the one dimension that the graph leaves open."""
        shapes = builder.create_optimization_profile()
        for tensor in map(network.get_input, range(network.num_inputs)):
            shape = tuple(tensor.shape)
            sizes = (profile.min, profile.opt, profile.max)
            shapes.set_shape(tensor.name, *(tuple(n if dim < 0 else dim for dim in shape) for n in sizes))
        return shapes

    def _error(self, source: Path, reason: str) -> EngineError:
        reason = " ".join(reason.split()) or "it gave no reason"
        return EngineError(f"{source}: {self.package} cannot build it: {reason} ({self.log} has all it said)")


def _plugin_module() -> Any:
    """`tensorrt.plugin`. Raises EngineError."""
    try:
        return importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise EngineError(f"this TensorRT has no plugin module: {error}") from error


def _parse_errors(parser: Any) -> str:
    """The first three errors of the parser."""
    lines = []
    for wrong in map(parser.get_error, range(min(parser.num_errors, 3))):
        lines.append(" ".join(f"{wrong.node_operator()} {wrong.node_name()}: {wrong.desc()}".split()))
    return "; ".join(lines) or "it gave no reason"


def _gpu_here() -> tuple[Gpu | None, str]:
    """This machine's GPU, or None and why there is none that can be used."""
    try:
        return context.gpu(), ""
    except (EngineError, MissingExtraError) as error:
        return None, str(error)


def _member(capability: str) -> str:
    """The name in `trt.ComputeCapability`: SM89 for 8.9."""
    return f"SM{capability.replace('.', '')}"


def _capabilities(trt: Any, package: Package, gpus: Sequence[str], here: Gpu | None, why_not: str) -> list[str]:
    """The compute capabilities to build for. Raises RequestError for those that ``package`` has no code for."""
    if package == "tensorrt":
        if here is None:
            raise EngineError(f"TensorRT builds an engine on the GPU that will run it: {why_not}")
        if set(gpus) - {here.capability}:
            raise RequestError(
                f"TensorRT builds for the GPU here, of compute capability {here.capability}, not {', '.join(gpus)};"
                " --format tensorrt-rtx builds for others"
            )
        return [here.capability]
    numbers = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
    supported = [f"{number // 10}.{number % 10}" for number in numbers]
    if not gpus and here is None:
        raise RequestError(
            f"no GPU to build for: {why_not}; name the compute capability of one with --gpu ({', '.join(supported)})"
        )
    capabilities = list(dict.fromkeys(gpus)) or ([here.capability] if here else [])
    for capability in capabilities:
        if capability in DATA_CENTRE and capability not in supported:
            raise RequestError(
                f"TensorRT for RTX has no code for compute capability {capability} ({DATA_CENTRE[capability]}),"
                f" only for {', '.join(supported)}; build there with --format tensorrt"
            )
        if capability not in supported:
            raise RequestError(
                f"TensorRT for RTX builds for GPUs of compute capability {', '.join(supported)}, not {capability}"
            )
    return capabilities


def _default_profiles(model: Manifest, package: Package) -> tuple[Profile, ...]:
    """One image, which nothing fills a GPU with but kernels of its own, and all others up to what a GPU sees together.

    TensorRT for RTX compiles kernels for each batch where it runs, so that one profile does for it.
    """
    images = images_at_once(model, "cuda:0")
    if package == "tensorrt_rtx" or images == 1:
        return (Profile(min=1, opt=images, max=images),)
    return (Profile(min=1, opt=1, max=1), Profile(min=2, opt=images, max=images))


def _write(target: Path, content: bytes, manifest: EngineManifest, layers: str | None, *, force: bool) -> None:
    """The engine last: where one is under its final name, all that belongs to it is there."""
    beside, report = engine_file.manifest_path(target), engine_file.layers_path(target)
    with (
        atomic.draft(target, force=force) as engine,
        atomic.draft(beside, force=force) as text,
        atomic.draft(report, force=force) as inside,
    ):
        engine.write_bytes(content)
        text.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
        inside.write_text(layers or "", encoding="utf-8")
        for draft in (engine, text, inside):
            atomic.sync(draft)
        drafts = {report: inside} if layers is not None else {}
        drafts |= {beside: text, target: engine}
        with locks.lock(target.parent):
            finals: list[Path] = []
            is_new = not target.exists()
            if force:
                report.unlink(missing_ok=True)  # an older engine's, if this one has none
            try:
                for final, draft in drafts.items():
                    atomic.place(draft, final, force=force)
                    finals.append(final)
            except BaseException:
                for final in finals if is_new else ():
                    final.unlink(missing_ok=True)
                raise
