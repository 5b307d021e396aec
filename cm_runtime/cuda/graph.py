"""CUDA graphs through cuda-bindings, since pycuda has none: what a stream is given, captured once, launched again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from cm_runtime.errors import EngineError, OutOfMemoryError
from cm_runtime.extras import require


class Graph:
    """All that ``body`` puts in ``stream``, captured without being run. Raises EngineError where it cannot be captured.

    stream: a CUDA stream's handle. Every address that body used must stay as it is while the graph lives.
    """

    def __init__(self, stream: int, body: Callable[[], Any]) -> None:
        self._runtime = runtime()
        self._stream = stream
        self._executable: Any = None
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            body()
        except BaseException:
            self._runtime.cudaStreamEndCapture(stream)  # the stream is usable again; the graph is none
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            self._executable = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._runtime.cudaGraphDestroy(graph)

    def launch(self) -> None:
        """Puts the whole graph in the stream."""
        self._call("cudaGraphLaunch", self._executable, self._stream)

    def __del__(self) -> None:
        if getattr(self, "_executable", None) is not None:
            self._runtime.cudaGraphExecDestroy(self._executable)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a function of CUDA's runtime, whose first is its error. Raises EngineError with its name."""
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            kind = OutOfMemoryError if error.name == "cudaErrorMemoryAllocation" else EngineError
            raise kind(f"CUDA failed in {name}: {error.name}")
        return results[0] if results else None


def runtime() -> Any:
    """`cuda.bindings.runtime`. Raises MissingExtraError."""
    require("cuda.bindings", "a CUDA graph")
    return importlib.import_module("cuda.bindings.runtime")
