"""Engines behind one protocol, and the choice among them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cm_runtime import onnx_graph
from cm_runtime.backends import auto, engine_file
from cm_runtime.backends.base import Backend, checked_threads
from cm_runtime.backends.openvino import OpenVinoBackend, has_bf16
from cm_runtime.backends.ort import OrtBackend, has_cuda
from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.extras import has, require
from cm_runtime.files.streams import exists
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.onnx_graph import Verdict

if TYPE_CHECKING:
    from cm_runtime.backends.torch import TorchBackend

BackendName = Literal["auto", "ort", "openvino", "torch", "torch.compile", "tensorrt", "tensorrt-rtx"]
ComputePrecision = Literal["auto", "fp32", "bf16", "fp16"]
FOR_GRAPHS, FOR_CHECKPOINTS, FOR_ENGINES = ("ort", "openvino"), ("torch", "torch.compile"), ("tensorrt", "tensorrt-rtx")
DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "fashion-mnist.onnx"


def load(
    path: str | os.PathLike[str] | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    threads: int = 0,
    precision: ComputePrecision = "auto",
    batch: int | None = None,
    *,
    trust: bool = False,
) -> Backend:
    """The model in ``path`` on an engine, ready to denoise or draw: an exported file, or a checkpoint.

    path: None is the bundled model; a checkpoint is whatever `load_checkpoint` reads. backend: for an
    ``.onnx``, auto takes the fastest installed engine, by a short measurement that is remembered (see `auto`); for a
    checkpoint, eager torch. device: auto (a GPU where the engine can use one, else the CPU), cpu or cuda:N. threads: 0
    is one per core. precision: what an engine computes in that can choose; auto is the file's own, and on a CPU fp32
    where that is fp16. batch: how many images a request will have, for auto to measure; unknown by default. trust:
    lets a graph that cm-runtime export did not write run on every engine; without, ONNX Runtime alone runs it. Raises
    ArtifactError, CheckpointError, EngineError, MissingExtraError, and RequestError for a backend or precision that
    such a file does not run in.
    """
    if path is not None and not isinstance(path, str | os.PathLike):
        raise RequestError(f"load takes the path of a model, or None for the bundled one, not {type(path).__name__}")
    where = DEFAULT_MODEL if path is None else Path(path)
    if backend not in get_args(BackendName):
        raise RequestError(f"backend must be one of {', '.join(get_args(BackendName))}, not {backend!r}")
    if precision not in get_args(ComputePrecision):
        raise RequestError(f"precision must be auto, fp32, bf16 or fp16, not {precision!r}")
    checked_threads(threads)
    if not exists(where):
        raise ArtifactError(f"{where}: no such model")
    if is_checkpoint(where):
        if backend not in ("auto", *FOR_CHECKPOINTS):
            raise RequestError(f"{where} is a checkpoint; {backend} runs what cm-runtime export makes of it")
        return _torch(where, device, threads, precision, is_compiled=backend == "torch.compile")
    if where.suffix == engine_file.SUFFIX:
        return _tensorrt(where, backend, device, precision)
    if backend in FOR_CHECKPOINTS:
        raise RequestError(f"{where}: the torch backend runs checkpoints (.pt), not exported files")
    if backend in FOR_ENGINES:
        raise RequestError(f"{where}: {backend} runs engines; make one with cm-runtime export CKPT --format {backend}")
    manifest = read_manifest(where)
    verdict = onnx_graph.check(where, manifest, trust=trust)
    if backend != "auto":
        return _open(backend, where, manifest, device, threads, precision, verdict)
    asked = auto.question(where, manifest, auto_device(device), threads, precision, batch)
    if verdict.foreign:
        if asked.names == ("openvino",):
            verdict.require_own(where, "OpenVINO")
        asked = replace(asked, names=tuple(name for name in asked.names if name == "ort"))
    return auto.fastest(asked, lambda name: _open(name, where, manifest, asked.device, threads, precision, verdict))


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


def _open(
    name: str, where: Path, manifest: Manifest, device: str, threads: int, precision: str, verdict: Verdict
) -> Backend:
    """An exported ``.onnx`` on ONNX Runtime or OpenVINO. Raises RequestError for a precision it does not compute in."""
    if name == "openvino":
        if precision == "fp16":
            raise RequestError("OpenVINO's CPU computes in fp32 or bf16, not in fp16")
        chosen: Any = precision if precision != "auto" else "bf16" if manifest.precision == "bf16" else "fp32"
        return OpenVinoBackend(where, manifest, device, threads, chosen, verdict)
    if precision not in ("auto", manifest.precision):
        raise RequestError(
            f"ONNX Runtime computes in the types of the file, {manifest.precision}; for {precision} export with"
            f" --precision {precision}, or take --backend openvino"
        )
    return OrtBackend(where, manifest, auto_device(device), threads, verdict)


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


def _torch(path: Path, device: str, threads: int, precision: ComputePrecision, *, is_compiled: bool) -> TorchBackend:
    require("torch", f"running the checkpoint {path}")
    from cm_runtime.backends.torch import TorchBackend, chosen_device, set_threads
    from cm_runtime.checkpoints.load import load_checkpoint

    set_threads(threads)
    checkpoint = load_checkpoint(path)
    opened = TorchBackend(
        checkpoint.model(),
        checkpoint.manifest(),
        str(chosen_device(device)),
        precision="fp32" if precision == "auto" else precision,
        is_compiled=is_compiled,
    )
    opened.source = path.name
    return opened
