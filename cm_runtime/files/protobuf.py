"""The outermost fields of a protobuf message, read from a file one at a time: no field is held that nobody asks for.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_DELIMITED = 2  # the wire type of strings and messages
_FIXED = {1: 8, 5: 4}


class MalformedError(Exception):
    """The bytes are not a protobuf message."""


class Field(NamedTuple):
    """One field: its number, the byte that it starts at, the byte that its payload starts at, the payload's length."""

    number: int
    start: int
    payload: int
    length: int


def fields(file: BinaryIO, end: int, most: int | None = None) -> Iterator[Field]:
    """Each field up to byte ``end``, ``file`` standing at its payload; where the caller leaves it does not matter.

    Raises MalformedError, also where there are more than ``most`` of them.
    """
    count = 0
    while (start := file.tell()) < end:
        tag = _varint(file)
        number, wire = tag >> 3, tag & 7
        if wire not in (0, _DELIMITED, *_FIXED) or number == 0:
            raise MalformedError(f"byte {file.tell()} starts no field")
        if wire == 0:
            _varint(file)
            length = 0
        else:
            length = _FIXED.get(wire) or _varint(file)
        payload = file.tell()
        count += 1
        if most is not None and count > most:
            raise MalformedError(f"it has over {most} fields")
        if payload + length > end:
            raise MalformedError(f"a field of {length} bytes runs past its end")
        yield Field(number, start, payload, length)
        file.seek(payload + length, os.SEEK_SET)


def read_entry(entry: bytes) -> tuple[str, bytes]:
    """A string map's entry, as onnx.StringStringEntryProto: key is field 1, value is field 2. Raises MalformedError."""
    entry_fields = {1: b"", 2: b""}
    file = io.BytesIO(entry)
    for field in fields(file, len(entry), 8):
        entry_fields[field.number] = file.read(field.length)
    return entry_fields[1].decode(errors="replace"), entry_fields[2]


def write_entry(number: int, key: str, value: bytes) -> bytes:
    """The same as field ``number`` of a message, tag and length included."""
    return _delimit(number, _delimit(1, key.encode()) + _delimit(2, value))


def write_head(number: int, length: int) -> bytes:
    """Write what precedes the ``length`` bytes of a string or message that is field ``number``."""
    return _number(number << 3 | _DELIMITED) + _number(length)


def _delimit(number: int, payload: bytes) -> bytes:
    return write_head(number, len(payload)) + payload


def _number(value: int) -> bytes:
    """Base 128, least significant group first."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise MalformedError("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise MalformedError("a number has too many bytes")
