"""Weights outside their graph: joined with it only in the file, one tensor at a time, inside it or beside it.

A graph of 526M parameters is 2.1 GB, more than protobuf holds in one message; without its weights it is a few MB.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cm_runtime.files.protobuf import fields, write_head

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # fields of onnx.ModelProto, GraphProto and TensorProto
_PAGE = 4096  # engines map a weight of more than a page where it lies
_LINE = 64
_SMALL = 1024  # bytes; shape inference needs the values of some initializers, such as the scales of a Resize


class Network(NamedTuple):
    """A graph, and the weights that its initializers of the same names lack.

    weights: views of the model's tensors, cast to the initializer's type only when they are written.
    """

    graph: onnx.ModelProto
    weights: dict[str, NDArray[np.generic]]

    @property
    def size(self) -> int:
        """The bytes that the weights take in a file."""
        return sum(_size(tensor) for tensor in self.graph.graph.initializer if tensor.name in self.weights)


def write(network: Network, path: Path) -> int:
    """Write the ``.onnx`` with what there is of ``weights`` inside, and let them go.

    Returns the number of bytes up to the graph's end, before the metadata.
    """
    message = network.graph.SerializeToString(deterministic=True)
    end = 0
    with path.open("wb") as file:
        for field in fields(io.BytesIO(message), len(message)):
            stop = field.payload + field.length
            if field.number != _GRAPH:
                file.write(message[field.start : stop])
                continue
            parts = list(_graph_parts(message[field.payload : stop], network))
            file.write(write_head(_GRAPH, sum(len(head) + (_size(tensor) if tensor else 0) for head, tensor in parts)))
            for head, tensor in parts:
                file.write(head)
                if tensor:
                    file.write(_content(tensor, network))
            end = file.tell()
    network.weights.clear()
    return end


def write_behind(graph: onnx.ModelProto, path: Path, end: int) -> None:
    """Replace what follows the graph, which ends at byte ``end`` of the file, by what follows it in ``graph``."""
    message = graph.SerializeToString(deterministic=True)
    (inside,) = [field for field in fields(io.BytesIO(message), len(message)) if field.number == _GRAPH]
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(message[inside.payload + inside.length :])


def write_external(network: Network, path: Path) -> str:
    """Write the weights alone, each at an aligned offset, which its initializer records; return their SHA-256.

    The network's weights are let go; the smallest go into the graph.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for tensor in network.graph.graph.initializer:
            if tensor.name not in network.weights:
                continue
            content = _content(tensor, network)
            if len(content) <= _SMALL:
                tensor.raw_data = bytes(content)
                continue
            start = file.tell()
            padding = bytes(-start % (_PAGE if len(content) > _PAGE else _LINE))
            for part in (padding, content):
                digest.update(part)
                file.write(part)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": path.name, "offset": start + len(padding), "length": len(content)}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
    network.weights.clear()
    return digest.hexdigest()


def rename_external(graph: onnx.ModelProto, name: str) -> None:
    """Name the data file beside the ``.onnx`` that holds what `write_external` wrote."""
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name


def _graph_parts(message: bytes, network: Network) -> Iterator[tuple[bytes, TensorProto | None]]:
    """A serialised graph, cut where the data of an initializer belongs that lacks them."""
    tensors = iter(network.graph.graph.initializer)
    for field in fields(io.BytesIO(message), len(message)):
        start, stop = field.payload, field.payload + field.length
        tensor = next(tensors) if field.number == _INITIALIZER else None
        if tensor is None or tensor.name not in network.weights:
            yield message[field.start : stop], None
            continue
        inside = fields(io.BytesIO(message[start:stop]), field.length)
        middle = start + next((part.start for part in inside if part.number > _RAW_DATA), field.length)
        data = write_head(_RAW_DATA, _size(tensor))
        head = write_head(_INITIALIZER, field.length + len(data) + _size(tensor))
        yield head + message[start:middle] + data, tensor
        yield message[middle:stop], None


def _size(tensor: TensorProto) -> int:
    size: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
    return size


def _content(tensor: TensorProto, network: Network) -> Any:
    """The bytes of an initializer's weight, little-endian; a copy only where the type or layout is another."""
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
    with np.errstate(over="ignore"):  # what a half type cannot hold is infinite, and no parity
        return np.ascontiguousarray(network.weights[tensor.name], kind).reshape(-1).view(np.uint8).data
