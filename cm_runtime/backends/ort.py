"""f on ONNX Runtime: the CPU, or an NVIDIA GPU through its CUDA provider."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cm_runtime.artifact import OUTPUTS, Manifest, data_path, read_manifest
from cm_runtime.backends.base import Backend, checked_threads
from cm_runtime.errors import ArtifactError, EngineError
from cm_runtime.extras import require

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def has_cuda() -> bool:
    """True where the installed ONNX Runtime has a CUDA provider and the machine has an NVIDIA driver."""
    available = require("onnxruntime", "the ONNX Runtime backend").get_available_providers()
    return "CUDAExecutionProvider" in available and NVIDIA_DRIVER.exists()


class OrtBackend(Backend):
    """An exported ``.onnx`` on ONNX Runtime.

    model: a path, or the file's bytes with their ``manifest``; device: cpu or cuda:N; threads: 0 leaves it to ONNX
    Runtime (one per core). Raises ArtifactError for a file that is not ours or damaged, or whose data file is missing
    or too short, and EngineError when ONNX Runtime cannot load it or the device is not there: it never falls back to
    another.
    """

    name = "ort"

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        manifest: Manifest | None = None,
        device: str = "cpu",
        threads: int = 0,
    ) -> None:
        ort = require("onnxruntime", "the ONNX Runtime backend")
        where = "the exported graph" if isinstance(model, bytes) else str(Path(model))
        self.manifest = manifest or read_manifest(where)
        self.device = device
        self.version = f"onnxruntime {ort.__version__}"
        data = None if isinstance(model, bytes) else data_path(where, self.manifest)
        try:
            self._session = open_session(model, where, device, threads)
        except (ArtifactError, EngineError) as error:
            if data and "External" in str(error):  # as ONNX Runtime calls an initializer, or the path of its data
                raise ArtifactError(
                    f"{where}: its weights in {data} are damaged or cut short; export it again"
                ) from error
            raise

    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs; see `Backend`."""
        try:
            (made,) = self._session.run([OUTPUTS[self.manifest.graph]], dict(feed))
        except Exception as error:
            raise EngineError(f"ONNX Runtime: {str(error).splitlines()[0]}") from error
        return made  # type: ignore[no-any-return]


def open_session(model: str | os.PathLike[str] | bytes, where: str, device: str, threads: int) -> Any:
    """An onnxruntime.InferenceSession of a path or a file's bytes, on cpu or cuda:N and no other device.

    where: what errors call it; threads: 0 leaves it to ONNX Runtime. Raises ArtifactError and EngineError.
    """
    ort = require("onnxruntime", "the ONNX Runtime backend")
    options = ort.SessionOptions()
    options.intra_op_num_threads = checked_threads(threads)
    options.log_severity_level = 4 if device == "cpu" else 3  # a GPU's missing libraries are in the log alone
    provider = _provider(ort, device)
    try:
        # Without enable_fallback=0 it would print on standard output and go on with other providers.
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else where, options, providers=[provider], enable_fallback=0
        )
    except Exception as error:  # its exceptions share no base of their own
        reason = str(error).splitlines()[0]
        if provider == "CPUExecutionProvider":
            raise ArtifactError(f"{where}: ONNX Runtime cannot load it: {reason}") from error
        raise EngineError(f"ONNX Runtime cannot use {device}: {reason}") from error
    if session.get_providers()[0] != (provider if isinstance(provider, str) else provider[0]):
        raise EngineError(f"ONNX Runtime could not start on {device}; is there a driver for this GPU?")
    return session


def _provider(ort: Any, device: str) -> Any:
    if device == "cpu":
        return "CPUExecutionProvider"
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise EngineError(f"device must be auto, cpu or cuda:N, not {device}")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise EngineError(f"this ONNX Runtime has no CUDA provider for {device}: pip install 'cm-runtime[gpu]'")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # the CUDA libraries of pip packages
    return "CUDAExecutionProvider", {"device_id": number or "0"}
