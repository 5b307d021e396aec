"""The protocol of an engine that reads and writes memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cm_runtime.choices import GraphKind
from cm_runtime.cuda.device import Device
from cm_runtime.kernels.launches import Images
from cm_runtime.manifest import Manifest

# Puts one evaluation in the device's stream: addresses of the graph's inputs and output, by their names.
Evaluate = Callable[[Mapping[str, int]], None]


class Captured(Protocol):
    """A graph, which goes into the stream as a whole."""

    def launch(self) -> None: ...


class Engine(Protocol):
    """A backend on a GPU.

    graph: what one evaluation computes, f (denoiser), F (network) or the whole loop (sampler). outputs: those of the
    graph's that are read.
    """

    manifest: Manifest

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def graph(self) -> GraphKind: ...

    def images(self, count: int) -> Images:
        """The batch that the graph takes for ``count`` images, at least so many: its type and layout."""
        ...

    def bind(self, device: Device, count: int) -> Evaluate:
        """Prepare evaluations of a batch of ``count`` in the device's stream. Raises EngineError."""
        ...

    def capture(self, device: Device, body: Callable[[], Any]) -> Captured | None:
        """Capture all that ``body`` puts in the stream; None where such evaluations cannot be captured."""
        ...
