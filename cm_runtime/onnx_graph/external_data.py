"""Data files that the tensors of a graph lie in."""

from __future__ import annotations

from pathlib import Path

from cm_runtime.errors import ArtifactError
from cm_runtime.files import streams
from cm_runtime.onnx_graph.graph import Graph


def check(graph: Graph, where: str, data_file: str | None, *, is_any: bool = False) -> None:
    """Raise ArtifactError for a tensor outside ``graph`` whose file, keys or bytes are not there.

    where: the graph's file; data_file: the one data file that it may name, or None; is_any: take any other plain name
    beside the file too.
    """
    sizes: dict[str, int] = {}
    for tensor in graph.all_tensors():
        place = tensor.external
        if place is None:
            continue
        name = place.get("location", "")
        if name != data_file and not (is_any and _is_plain(name)):
            raise ArtifactError(f"{where}: its weights are to be in {name!r}, which is no data file beside it")
        if name not in sizes:
            sizes[name] = streams.regular(Path(where).with_name(name), ArtifactError).st_size
        numbers = [place.get("offset", "0"), place.get("length", str(tensor.size))]
        if not all(text.isascii() and text.isdigit() and len(text) < 19 for text in numbers):
            raise ArtifactError(f"{where}: its weights are damaged: {tensor.name!r} lies at no number of bytes")
        start, length = map(int, numbers)
        if length != tensor.size or start + length > sizes[name]:
            data = Path(where).with_name(name)
            raise ArtifactError(f"{where}: its weights in {data} are damaged or cut short; export it again")


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable() and not set(name) & set("/\\*:") and ".." not in name
