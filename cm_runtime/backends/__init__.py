"""Engines behind one protocol, and the choice among them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cm_runtime import onnx_graph
from cm_runtime.backends import auto, engine_file
from cm_runtime.backends.base import Backend, EngineOptions
from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16
from cm_runtime.backends.ort import OrtBackend, has_cuda
from cm_runtime.choices import BackendName, ComputePrecision
from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.extras import has, require
from cm_runtime.files.streams import exists
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.onnx_graph import Verdict

if TYPE_CHECKING:
    from cm_runtime.backends.torch import TorchBackend

FOR_GRAPHS, FOR_CHECKPOINTS, FOR_ENGINES = ("ort", "openvino"), ("torch", "torch.compile"), ("tensorrt", "tensorrt-rtx")
DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "fashion-mnist.onnx"


def load(
    path: str | os.PathLike[str] | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    threads: int = 0,
    precision: ComputePrecision = "auto",
    micro_batch: int | None = None,
    *,
    trust: bool = False,
) -> Backend:
    """Load a model on an engine, ready to denoise or to draw.

    Args:
        path: an exported file, or a checkpoint that `load_checkpoint` reads; None is the bundled model.
        backend: for an ``.onnx``, auto takes the fastest installed engine, by a short measurement that is remembered;
            for a checkpoint, eager torch.
        device: auto (a GPU where the engine can use one, else the CPU), cpu or cuda:N.
        threads: of the engine; 0 is one per core.
        precision: what an engine computes in that can choose; auto is the file's own, and on a CPU fp32 where that is
            fp16.
        micro_batch: how many images the engine will see at once, for auto to measure; unknown by default.
        trust: lets a graph that cm-runtime export did not write run on every engine; without, ONNX Runtime alone runs
            it.

    Returns:
        The engine; `sample`, `stream` and the edits take it.

    Raises:
        ArtifactError, CheckpointError: the file is damaged, or no model.
        EngineError: the engine cannot run it.
        MissingExtraError: the engine's package is not installed.
        RequestError: no such backend or precision, or the file does not run in it.

    Example:
        >>> model = load("model.onnx", backend="openvino", threads=2)
    """
    options = EngineOptions(backend, device, precision, threads)
    if path is not None and not isinstance(path, str | os.PathLike):
        raise RequestError(f"load takes the path of a model, or None for the bundled one, not {type(path).__name__}")
    return open_model(DEFAULT_MODEL if path is None else Path(path), options, micro_batch, trust=trust)


def open_model(path: Path, options: EngineOptions, micro_batch: int | None = None, *, trust: bool = False) -> Backend:
    """`load` with its options as one value."""
    backend, device, precision = options.backend, options.device, options.precision
    if not exists(path):
        raise ArtifactError(f"{path}: no such model")
    if is_checkpoint(path):
        if backend not in ("auto", *FOR_CHECKPOINTS):
            raise RequestError(f"{path} is a checkpoint; {backend} runs what cm-runtime export makes of it")
        return _torch(path, options)
    if path.suffix == engine_file.SUFFIX:
        return _tensorrt(path, backend, device, precision)
    if backend in FOR_CHECKPOINTS:
        raise RequestError(f"{path}: the torch backend runs checkpoints (.pt), not exported files")
    if backend in FOR_ENGINES:
        raise RequestError(f"{path}: {backend} runs engines; make one with cm-runtime export CKPT --format {backend}")
    manifest = read_manifest(path)
    verdict = onnx_graph.check(path, manifest, trust=trust)
    if backend != "auto":
        return _open(path, manifest, options, verdict)
    question = auto.question(path, manifest, auto_device(device), options.threads, precision, micro_batch)
    if verdict.foreign:
        if question.names == ("openvino",):
            verdict.require_own(path, "OpenVINO")
        question = replace(question, names=tuple(name for name in question.names if name == "ort"))

    def start(name: str) -> Backend:
        return _open(
            path, manifest, replace(options, backend=cast("BackendName", name), device=question.device), verdict
        )

    return auto.fastest(question, start)


def auto_device(device: str) -> str:
    """The first GPU where ONNX Runtime can use one, else the CPU, in place of auto."""
    if device != "auto":
        return device
    return "cuda:0" if has("onnxruntime") and has_cuda() else "cpu"


def precisions() -> dict[str, str]:
    """What each installed engine computes in here."""
    found = {}
    if has("onnxruntime"):
        found["ort"] = "the file's (fp32, fp16)"
    if has("openvino"):
        found["openvino"] = "fp32, bf16" if has_bf16() else "fp32"
    if has("torch"):
        found["torch"] = "fp32, bf16, fp16"
    return found


def _open(path: Path, manifest: Manifest, options: EngineOptions, verdict: Verdict) -> Backend:
    """An exported ``.onnx`` on ONNX Runtime or OpenVINO. Raises RequestError for a precision it does not compute in."""
    precision = options.precision
    if options.backend == "openvino":
        if precision == "fp16":
            raise RequestError("OpenVINO's CPU computes in fp32 or bf16, not in fp16")
        compute: Any = precision if precision != "auto" else "bf16" if manifest.precision == "bf16" else "fp32"
        return OpenVinoBackend(path, manifest, options.device, options.threads, compute, verdict)
    if precision not in ("auto", manifest.precision):
        raise RequestError(
            f"ONNX Runtime computes in the types of the file, {manifest.precision}; for {precision} export with"
            f" --precision {precision}, or take --backend openvino"
        )
    return OrtBackend(path, manifest, auto_device(options.device), options.threads, verdict)


def _tensorrt(where: Path, backend: str, device: str, precision: str) -> Backend:
    if backend not in ("auto", *FOR_ENGINES):
        raise RequestError(f"{where} is a TensorRT engine, which {backend} does not run")
    from cm_runtime.backends.tensorrt import TensorRtBackend

    packages: dict[str, Any] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
    opened = TensorRtBackend(where, package=packages.get(backend), device=device)
    if precision not in ("auto", opened.manifest.precision):
        raise RequestError(f"{where} was built in {opened.manifest.precision}; {precision} takes another engine")
    return opened


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a folder, or named as torch and safetensors files are, and so no exported file."""
    return path.suffix in (".pt", ".pth", ".bin", ".safetensors") or os.path.isdir(path)


def is_model(path: Path) -> bool:
    """Whether ``path`` is a model, exported or not, and no data set, by its name; of folders, what diffusers saved."""
    if os.path.isdir(path):
        return any(os.path.isfile(path / name) for name in ("model_index.json", "config.json"))
    return path.suffix in (".onnx", engine_file.SUFFIX) or is_checkpoint(path)


def _torch(path: Path, options: EngineOptions) -> TorchBackend:
    require("torch", f"running the checkpoint {path}")
    from cm_runtime.backends.torch import TorchBackend, chosen_device, set_threads
    from cm_runtime.checkpoints.load import load_checkpoint

    set_threads(options.threads)
    checkpoint = load_checkpoint(path)
    opened = TorchBackend(
        checkpoint.model(),
        checkpoint.manifest(),
        str(chosen_device(options.device)),
        precision="fp32" if options.precision == "auto" else options.precision,
        is_compiled=options.backend == "torch.compile",
    )
    opened.source = path.name
    return opened
