"""Weights that a link leads to, as a hub's cache, a Nix store or a mounted volume keeps them.

ONNX Runtime and OpenVINO refuse a data file that lies outside of its model's folder once links are followed. Such a
file is mapped into memory here, and the engines are given the mapping: it takes no memory of its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import ArtifactError
from cm_runtime.errors.reasons import system_reason
from cm_runtime.files import streams
from cm_runtime.files.protobuf import MalformedError, fields, read_entry, write_entry, write_head
from cm_runtime.manifest import Manifest, data_path

LARGEST_GRAPH = 2**31  # bytes of an .onnx, a limit of protobuf
GRAPH, INITIALIZER, EXTERNAL_DATA = 7, 5, 13  # fields of onnx.ModelProto, GraphProto and TensorProto
IN_MEMORY = "*/_ORT_MEM_ADDR_/*"  # a location by which ONNX Runtime and OpenVINO understand an offset as an address


@dataclass(frozen=True)
class MappedWeights:
    """A data file that is a link, and its bytes, mapped."""

    path: Path
    content: NDArray[np.uint8]


def data_file(path: Path, manifest: Manifest) -> Path | None:
    """The data file of the exported file ``path``, which can be read, or None. Raises ArtifactError."""
    data = data_path(path, manifest)
    if data is not None:
        with streams.open_file(data, ArtifactError):
            pass
    return data


def map_link(data: Path | None) -> MappedWeights | None:
    """A data file that is a link, mapped; None if it is none, as engines open it themselves. Raises ArtifactError."""
    if data is None or not data.is_symlink():
        return None
    try:
        return MappedWeights(data, np.memmap(data, np.uint8, "r"))
    except ValueError as error:  # there is no mapping of nothing
        raise ArtifactError(f"{data}: is empty; export it again") from error
    except OSError as error:
        raise ArtifactError(f"{data} cannot be read: {system_reason(error)}") from error


def embed_addresses(path: Path, data: MappedWeights) -> bytes:
    """The exported file ``path`` with the addresses of its weights in memory in place of their file's name.

    Only the initializers of its graph are rewritten. Raises ArtifactError where one lies outside of the data file.
    """
    content = streams.read_bytes(path, ArtifactError, LARGEST_GRAPH)
    start = data.content.ctypes.data

    def tensor(message: bytes) -> bytes:
        entries = dict(read_entry(each) for number, each in _payloads(message) if number == EXTERNAL_DATA)
        if not entries:
            return message
        offset, length = (int(entries.get(key, b"0")) for key in ("offset", "length"))
        is_within = 0 <= offset <= offset + length <= data.content.size
        if entries.get("location") != data.path.name.encode() or not is_within:
            raise ValueError(entries)
        rest = _rewritten(message, EXTERNAL_DATA, lambda _: None)
        place = {"location": IN_MEMORY, "offset": str(start + offset), "length": str(length)}
        return rest + b"".join(write_entry(EXTERNAL_DATA, key, value.encode()) for key, value in place.items())

    try:
        return _rewritten(content, GRAPH, lambda graph: _rewritten(graph, INITIALIZER, tensor))
    except (MalformedError, ValueError) as error:
        raise damage_error(path, data.path) from error


def damage_error(path: Path | str, data: Path) -> ArtifactError:
    """The error of weights that are not what the graph says."""
    return ArtifactError(f"{path}: its weights in {data} are damaged or cut short; export it again")


def _payloads(message: bytes) -> list[tuple[int, bytes]]:
    fields_of_message = fields(io.BytesIO(message), len(message))
    return [(field.number, message[field.payload : field.payload + field.length]) for field in fields_of_message]


def _rewritten(message: bytes, number: int, change: Callable[[bytes], bytes | None]) -> bytes:
    """A message whose fields ``number``, messages themselves, are changed; None drops one."""
    parts = []
    for field in fields(io.BytesIO(message), len(message)):
        end = field.payload + field.length
        if field.number != number:
            parts.append(message[field.start : end])
        elif (payload := change(message[field.payload : end])) is not None:
            parts.append(write_head(number, len(payload)) + payload)
    return b"".join(parts)
