"""An entry of the metadata in an ``.onnx``, read and replaced in the protobuf's outermost fields.

A 2 GB file takes no memory for it, and no package.
"""

from __future__ import annotations

from typing import BinaryIO

from cm_runtime.files.protobuf import Field, MalformedError, fields, read_entry, write_entry

LARGEST = 1 << 20  # bytes of an entry
MOST_FIELDS = 20_000  # outermost ones: a graph, some entries, functions by the hundred
_GRAPH, _METADATA_PROPS = 7, 14  # fields of onnx.ModelProto
_PIECE = 1 << 20


def read(file: BinaryIO, size: int, key: str) -> bytes | None:
    """Read the value of ``key`` in an ONNX file of ``size`` bytes, the last where there are several.

    Raises MalformedError for what is no ONNX file.
    """
    value = None
    has_graph = False
    for field in fields(file, size, MOST_FIELDS):
        if (entry := _entry(field, file)) and entry[0] == key:
            value = entry[1]
        has_graph = has_graph or field.number == _GRAPH
    if not has_graph:
        raise MalformedError("it holds no graph")
    return value


def replace(old: BinaryIO, size: int, new: BinaryIO, key: str, value: bytes) -> None:
    """Copy an ONNX file of ``size`` bytes, a piece at a time, with another value of ``key``."""
    for field in fields(old, size, MOST_FIELDS):
        if (entry := _entry(field, old)) and entry[0] == key:
            continue
        old.seek(field.start)
        count = field.payload + field.length - field.start
        while count and (piece := old.read(min(count, _PIECE))):
            new.write(piece)
            count -= len(piece)
    new.write(write_entry(_METADATA_PROPS, key, value))


def _entry(field: Field, file: BinaryIO) -> tuple[str, bytes] | None:
    """The key and value of a metadata entry, at whose payload ``file`` stands; None for another field."""
    if field.number != _METADATA_PROPS or field.length > LARGEST:
        return None
    return read_entry(file.read(field.length))
