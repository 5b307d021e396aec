"""Every sample of a run, in a file that only grows."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cm_runtime.bench import results
from cm_runtime.errors import OutputError


class Samples:
    """The file of all samples, which only grows. One run at a time has it.

    Raises OutputError where another run is writing it, and where ``result``, the file beside it, exists without force.
    """

    def __init__(self, path: Path, result: Path, force: bool) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._bytes = 0
        with _named(path):
            self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if result.exists() and not force:
                raise OutputError(f"{result} exists; replace it with --force")
            self._file.truncate(0)
        except BlockingIOError as error:
            self._file.close()
            raise OutputError(f"{path} is being written by another run; give another output with -o") from error
        except OutputError:
            self._file.close()
            raise

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        """Appends a line."""
        data = line.encode()
        with _named(self._path):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._digest.update(data)
        self._bytes += len(data)

    def so_far(self) -> results.Samples:
        """What of the file is on the disk and belongs to the run."""
        with _named(self._path):
            os.fsync(self._file.fileno())
        return results.Samples(file=self._path.name, bytes=self._bytes, sha256=self._digest.hexdigest())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
