"""The graph of an ``.onnx``, checked before any engine sees it.

    message     protobuf, read more strictly than by any engine: bounded, no subgraphs, sparse tensors or training
    operators   the graphs that `export` writes, operator by operator (`rules`): these run on every engine
    bounds      any other graph: its `shapes` are bounded, and it runs on ONNX Runtime alone, which checks indices

Engines differ in what they check of a file, and OpenVINO trusts it: an index out of range is an address to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from cm_runtime.errors import ArtifactError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest, data_path
from cm_runtime.onnx_graph import bounds, external_data, operators
from cm_runtime.onnx_graph.message import read_graph
from cm_runtime.onnx_graph.rules import NotOwn

TRUST = "CM_RUNTIME_TRUST"  # in the environment, 1 lets foreign graphs run on every engine, in child processes too
MOST_IMAGES = 1024  # that an extractor takes together, where its graph says how many


class Verdict(NamedTuple):
    """foreign: why the graph is none of ours; empty where it is, or where its author is trusted."""

    foreign: str

    def require_own(self, where: str | os.PathLike[str], engine: str) -> None:
        """Raises ArtifactError for a foreign graph, which ``engine`` is not to see."""
        if self.foreign:
            raise ArtifactError(
                f"{where}: {engine} runs only graphs as cm-runtime export writes them, because it trusts their numbers,"
                f" and {self.foreign}; take --backend ort, or --trust for a file whose author you trust"
            )


def check(model: str | os.PathLike[str] | bytes, manifest: Manifest, *, trust: bool = False) -> Verdict:
    """Check the graph of an exported file, a path or its bytes.

    trust: a foreign graph may run on every engine; its bounds hold all the same. Raises ArtifactError for a file that
    no engine is to see: damaged, with data that is not its own, or beyond all bounds of time or memory.
    """
    where = "the exported graph" if isinstance(model, bytes) else str(Path(model))
    data = None if isinstance(model, bytes) else data_path(where, manifest)
    graph = read_graph(model, where)
    try:
        operators.check(graph, manifest)
        reason = ""
    except NotOwn as error:
        reason = str(error)
    external_data.check(graph, where, data.name if data else None, is_any=bool(reason) and data is None)
    if reason:
        bounds.check(graph, where)
        if trust or os.environ.get(TRUST) == "1":
            reason = ""
    return Verdict(reason)


def check_extractor(path: Path) -> None:
    """Check the graph of an extractor of features, which runs on ONNX Runtime.

    Raises ArtifactError as `check` does, and where the graph takes more images together than any extractor.
    """
    where = str(path)
    graph = read_graph(path, where)
    external_data.check(graph, where, None, is_any=True)
    for name, port in graph.inputs.items():
        first = port.dims[0] if port.dims else None
        if name not in graph.tensors and isinstance(first, int) and first > MOST_IMAGES:
            raise ArtifactError(
                f"{path}: takes {quantity(first, 'image')} together; an extractor takes at most {MOST_IMAGES}"
            )
    bounds.check(graph, where)
