"""The one way to open a file that somebody else wrote: regular, of a bounded size, and read only as far as it goes.

Every reader of the package opens its files by `open_file`, `read_bytes` or `read_text`, or, for a library that takes a
path, calls `regular` first. Pipes, sockets, devices and folders are refused before a byte of them is read.
"""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from cm_runtime.errors import CmRuntimeError, DataError, data_error
from cm_runtime.errors.reasons import system_reason

MAX_INFLATED = 2**31  # bytes one compressed file may grow to in memory
USUAL_INFLATED, USUAL_RATIO = 2**28, 100  # above so many bytes, pictures do not shrink to a hundredth
CHUNK = 2**20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: str | os.PathLike[str], error: type[CmRuntimeError], most: int | None = None) -> os.stat_result:
    """Check that ``path`` is a regular file of at most ``most`` bytes; links are followed.

    Args:
        path: The file.
        error: What to raise.
        most: Bytes that a file of its kind has at most; None where its reader needs no bound.

    Returns:
        The file's status.

    Raises:
        CmRuntimeError: Of type ``error``, in one line: there is no such file, it is something else than a file, too
            large, or cannot be reached.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as wrong:  # ValueError: a name with a NUL
        raise error(_unreadable(path, wrong)) from wrong
    _check(path, status, error, most)
    return status


@contextmanager
def open_file(
    path: str | os.PathLike[str], error: type[CmRuntimeError], most: int | None = None
) -> Iterator[io.BufferedReader]:
    """The file open for reading bytes; `regular` says what is refused, and with what.

    A pipe that takes the file's place meanwhile does not hang. An OSError while the block reads becomes ``error`` too.
    """
    regular(path, error, most)  # first: to open some devices is to start them
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            _check(path, os.fstat(descriptor), error, most)
            yield file
    except OSError as wrong:
        raise error(_unreadable(path, wrong)) from wrong


def read_bytes(path: str | os.PathLike[str], error: type[CmRuntimeError], most: int) -> bytes:
    """The content of a file of at most ``most`` bytes; `open_file` says what is refused."""
    with open_file(path, error, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it grows, or its file system does not know its size
        raise error(f"{path}: has over {most} bytes, more than such a file has")
    return content


def read_text(path: str | os.PathLike[str], error: type[CmRuntimeError], most: int) -> str:
    """The same as text. Raises ``error`` where it is not UTF-8, too."""
    try:
        return read_bytes(path, error, most).decode()
    except UnicodeDecodeError as wrong:
        raise error(f"{path}: is not text in UTF-8 ({wrong.reason} at byte {wrong.start})") from wrong


def exists(path: str | os.PathLike[str]) -> bool:
    """True if anything is there; False, and no OSError, for names that no file can have."""
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False
    return True


def _check(path: str | os.PathLike[str], status: os.stat_result, error: type[CmRuntimeError], most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: is {KINDS.get(stat.S_IFMT(status.st_mode), 'no file')}, not a regular file")
    if most is not None and status.st_size > most:
        raise error(f"{path}: has {status.st_size} bytes, more than the {most} that such a file has at most")


def _unreadable(path: str | os.PathLike[str], wrong: OSError | ValueError) -> str:
    if isinstance(wrong, FileNotFoundError):
        return f"{path}: no such file"
    if not isinstance(wrong, OSError):
        return f"{os.fspath(path)!r}: no file can have such a name ({wrong})"
    if wrong.errno == errno.ELOOP:
        return f"{path}: is a link that leads back to itself"
    return f"{path} cannot be read: {system_reason(wrong)}"


class Readable(Protocol):
    """The common part of all streams here, however the standard library types them."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


def open_stream(path: Path) -> io.BufferedIOBase:
    """The bytes of ``path``, decompressed where they begin like gzip or xz. Raises DataError, OSError."""
    regular(path, DataError)
    with path.open("rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)
    if magic == b"\xfd7zXZ\0":
        return lzma.open(path)
    return path.open("rb")


def most_inflated(compressed_size: int) -> int:
    """Bytes that ``compressed_size`` compressed ones may grow to: 2^28, or a hundred times as many up to 2^31."""
    return min(max(USUAL_INFLATED, USUAL_RATIO * compressed_size), MAX_INFLATED)


def read_up_to(stream: Readable, count: int, path: Path) -> bytearray:
    """At most ``count`` bytes of ``stream``, fewer only at its end; memory grows with what is really there.

    Ask for one byte more than is size_limit to learn that nothing follows, which also makes gzip and xz check
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
        self._stream, self._rest, self._limit, self._path = stream, limit, limit, path

    def read(self, size: int = -1) -> bytes:
        """As ``io.RawIOBase.read``; raises DataError past the limit and on damaged compression."""
        size_limit = self._rest + 1 if size < 0 else min(size, self._rest + 1)
        data = read_up_to(self._stream, size_limit, self._path)
        self._rest -= len(data)
        if self._rest < 0:
            raise data_error(self._path, f"unpacks to more than {self._limit} bytes", "fetch the original again")
        return bytes(data)
