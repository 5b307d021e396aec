"""The names we use of cuda-bindings, on the package itself; what they do without a driver, and what we make of it."""

from __future__ import annotations

import inspect

import pytest
import stand_in_gpu

from cm_runtime.cuda import graph
from cm_runtime.cuda.graph import Graph
from cm_runtime.errors import EngineError


def test_without_a_driver_a_graph_is_one_line() -> None:
    """The real package answers; with a driver it would refuse the default stream, which cannot be captured."""
    with pytest.raises(EngineError, match=r"^CUDA failed in cudaStreamBeginCapture: cudaError\w+$"):
        Graph(0, lambda: pytest.fail("nothing is captured"))


def test_the_functions_take_what_we_give_them() -> None:
    """Their signatures, which are in their docstrings' first lines."""
    runtime = graph.runtime()
    taken = {
        "cudaStreamBeginCapture": "(stream, mode: cudaStreamCaptureMode)",
        "cudaStreamEndCapture": "(stream)",
        "cudaGraphInstantiate": "(graph, unsigned long long flags)",
        "cudaGraphLaunch": "(graphExec, stream)",
        "cudaGraphDestroy": "(graph)",
        "cudaGraphExecDestroy": "(graphExec)",
    }
    for name, arguments in taken.items():
        assert inspect.getdoc(getattr(runtime, name)).splitlines()[0] == name + arguments
    stand_in = stand_in_gpu.Gpu().modules()["cuda.bindings.runtime"]
    assert {name for name in vars(stand_in) if name.startswith("cuda")} <= set(dir(runtime))
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
