"""Reading plain, gzip and xz files that may lie about their size."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Protocol

from cm_runtime.errors import data_error

MAX_INFLATED = 2**31  # bytes one compressed file may grow to in memory
CHUNK = 2**20


class Readable(Protocol):
    """What all streams here share, however the standard library types them."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


def open_stream(path: Path) -> io.BufferedIOBase:
    """The bytes of ``path``, decompressed where they begin like gzip or xz. Raises OSError."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path)
    return path.open("rb")


def read_up_to(stream: Readable, count: int, path: Path) -> bytearray:
    """At most ``count`` bytes of ``stream``, fewer only at its end; memory grows with what is really there.

    Ask for one byte more than is wanted to learn that nothing follows, which also makes gzip and xz check
    their checksums. ``path`` names the file in the DataError that damaged compression raises.
    """
    data = bytearray()
    try:
        while len(data) < count and (chunk := stream.read(min(CHUNK, count - len(data)))):
            data += chunk
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise data_error(path, f"is truncated or damaged ({error})", "fetch it again") from error
    return data


class CappedStream(io.RawIOBase):
    """A stream that ends in a DataError once more than ``limit`` bytes were read from it."""

    def __init__(self, stream: Readable, limit: int, path: Path) -> None:
        """``path`` names the file in errors."""
        super().__init__()
        self._stream, self._left, self._limit, self._path = stream, limit, limit, path

    def read(self, size: int = -1) -> bytes:
        """As ``io.RawIOBase.read``; raises DataError past the limit and on damaged compression."""
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        data = read_up_to(self._stream, wanted, self._path)
        self._left -= len(data)
        if self._left < 0:
            raise data_error(self._path, f"unpacks to more than {self._limit} bytes", "fetch the original again")
        return bytes(data)
