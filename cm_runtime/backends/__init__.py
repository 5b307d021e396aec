"""Engines behind one protocol, and the choice among them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import cast

from cm_runtime import onnx_graph
from cm_runtime.backends import auto, engine_file
from cm_runtime.backends.base import Backend, EngineOptions, require_target
from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16
from cm_runtime.backends.ort import OrtBackend, has_cuda
from cm_runtime.choices import BackendName, ComputePrecision
from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.extras import has, require
from cm_runtime.files.streams import exists
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.onnx_graph import Verdict

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
            fp16. tf32, of GPUs alone, is fp32 with products of 10 bits; fp32 never is.
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
    backend = options.backend
    if not exists(path):
        raise ArtifactError(f"{path}: no such model")
    if is_checkpoint(path):
        if backend not in ("auto", *FOR_CHECKPOINTS):
            raise RequestError(f"{path} is a checkpoint; {backend} runs what cm-runtime export makes of it")
        return _open_checkpoint(path, options)
    if path.suffix == engine_file.SUFFIX:
        return _open_engine(path, options)
    if backend in FOR_CHECKPOINTS:
        raise RequestError(f"{path}: the torch backend runs checkpoints (.pt), not exported files")
    if backend in FOR_ENGINES:
        raise RequestError(f"{path}: {backend} runs engines; make one with cm-runtime export CKPT --format {backend}")
    manifest = read_manifest(path)
    verdict = onnx_graph.check(path, manifest, trust=trust)
    if backend != "auto":
        return _open_graph(path, manifest, options, verdict)
    device = auto_device(options.device)
    require_target(manifest, path, device)
    question = auto.question(path, manifest, device, options.threads, options.precision, micro_batch)
    if verdict.foreign:
        if question.names == ("openvino",):
            verdict.require_own(path, "OpenVINO")
        question = replace(question, names=tuple(name for name in question.names if name == "ort"))
    return auto.fastest(
        question,
        lambda name: _open_graph(
            path, manifest, replace(options, backend=cast("BackendName", name), device=device), verdict
        ),
    )


def auto_device(device: str) -> str:
    """The first GPU where ONNX Runtime can use one, else the CPU, in place of auto."""
    if device != "auto":
        return device
    return "cuda:0" if has("onnxruntime") and has_cuda() else "cpu"


def precisions() -> dict[str, str]:
    """The precisions that each installed engine computes in on this machine, in words."""
    words = {}
    if has("onnxruntime"):
        words["ort"] = "the file's (fp32, fp16)" + (", on a GPU bf16 too, and tf32 of fp32" if has_cuda() else "")
    if has("openvino"):
        words["openvino"] = "fp32, bf16" if has_bf16() else "fp32"
    if has("torch"):
        words["torch"] = "fp32, tf32 (on a GPU), bf16, fp16"
    return words


def _open_graph(path: Path, manifest: Manifest, options: EngineOptions, verdict: Verdict) -> Backend:
    if options.backend == "openvino":
        return OpenVinoBackend(path, manifest, options, verdict)
    return OrtBackend(path, manifest, replace(options, device=auto_device(options.device)), verdict)


def _open_engine(path: Path, options: EngineOptions) -> Backend:
    if options.backend not in ("auto", *FOR_ENGINES):
        raise RequestError(f"{path} is a TensorRT engine, which {options.backend} does not run")
    from cm_runtime.backends.tensorrt import TensorRtBackend

    engine = TensorRtBackend(path, options=options)
    if options.precision == "tf32":
        raise RequestError(f"{path}: engines are built without tf32; float32 is float32 in them")
    if options.precision not in ("auto", engine.precision):
        raise RequestError(f"{path} was built in {engine.precision}; {options.precision} takes another engine")
    return engine


def is_checkpoint(path: Path) -> bool:
    """Return True if `path` is a folder, or has a suffix of torch's or safetensors' files, and so is no export."""
    return path.suffix in (".pt", ".pth", ".bin", ".safetensors") or os.path.isdir(path)


def is_model(path: Path) -> bool:
    """Return True if `path` looks like a model: a known suffix, or a folder that diffusers saved."""
    if os.path.isdir(path):
        return any(os.path.isfile(path / name) for name in ("model_index.json", "config.json"))
    return path.suffix in (".onnx", engine_file.SUFFIX) or is_checkpoint(path)


def _open_checkpoint(path: Path, options: EngineOptions) -> Backend:
    require("torch", f"running the checkpoint {path}")
    from cm_runtime.backends.torch import TorchBackend, set_threads
    from cm_runtime.checkpoints.load import load_checkpoint

    set_threads(options.threads)
    checkpoint = load_checkpoint(path)
    engine = TorchBackend(checkpoint.model(), checkpoint.manifest(), options)
    engine.source = path.name
    return engine
