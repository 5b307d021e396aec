"""Engines behind one protocol, and the choice among them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cm_runtime.artifact import read_manifest
from cm_runtime.backends.base import Backend, checked_threads
from cm_runtime.backends.ort import OrtBackend, has_cuda
from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.extras import require

if TYPE_CHECKING:
    from cm_runtime.backends.torch import TorchBackend

BackendName = Literal["auto", "ort", "torch"]
DEFAULT_MODEL = Path(__file__).parent.parent / "models" / "fashion-mnist.onnx"


def load(
    path: str | os.PathLike[str] | None = None,
    backend: BackendName = "auto",
    device: str = "auto",
    threads: int = 0,
) -> Backend:
    """The model in ``path`` on an engine, ready to denoise: an exported ``.onnx``, or a checkpoint.

    path: None is the bundled model; a checkpoint is whatever `importers.load_checkpoint` reads. backend: auto takes
    ONNX Runtime for ``.onnx`` and torch for checkpoints. device: auto (a GPU where the engine can use one, else the
    CPU), cpu or cuda:N. threads: 0 is one per core. Raises ArtifactError, CheckpointError, EngineError,
    MissingExtraError, and RequestError for a backend that cannot run such a file.
    """
    where = DEFAULT_MODEL if path is None else Path(path)
    if backend not in ("auto", "ort", "torch"):
        raise RequestError(f"backend must be auto, ort or torch, not {backend!r}")
    checked_threads(threads)
    if not where.exists():
        raise ArtifactError(f"{where}: no such model")
    if is_checkpoint(where):
        if backend == "ort":
            raise RequestError(f"{where} is a checkpoint; ONNX Runtime runs what cm-runtime export makes of it")
        return _torch(where, device, threads)
    if backend == "torch":
        raise RequestError(f"{where}: the torch backend runs checkpoints (.pt), not exported files")
    manifest = read_manifest(where)
    chosen = ("cuda:0" if has_cuda() else "cpu") if device == "auto" else device
    return OrtBackend(where, manifest, chosen, threads)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a folder, or named as torch and safetensors files are, and so no exported file."""
    return path.suffix in (".pt", ".pth", ".bin", ".safetensors") or path.is_dir()


def is_model(path: Path) -> bool:
    """Whether ``path`` is a model, exported or not, and no data set, by its name; of folders, what diffusers saved."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("model_index.json", "config.json"))
    return path.suffix == ".onnx" or is_checkpoint(path)


def _torch(path: Path, device: str, threads: int) -> TorchBackend:
    torch = require("torch", f"running the checkpoint {path}")
    from cm_runtime.backends.torch import TorchBackend, chosen_device
    from cm_runtime.importers import load_checkpoint

    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(path)
    return TorchBackend(checkpoint.model(), checkpoint.manifest(), str(chosen_device(device)))
