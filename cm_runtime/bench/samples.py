"""Every sample of a run, in a file that only grows, and the result that names it.

A result never names the samples of another run. Their file has one of two names, and a run writes under the one that
the result which is there does not name. A finished result stays, with its samples, until the new one is finished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cm_runtime.bench import results
from cm_runtime.errors import ArtifactError, OutputError
from cm_runtime.files import atomic

NAMES = ".samples.jsonl", ".samples-2.jsonl"  # in place of the result's .json


class Samples:
    """The samples of a run that writes ``result``; one run at a time does.

    Raises OutputError where another run is writing it, and where it exists without ``force``.
    """

    def __init__(self, result: Path, force: bool) -> None:
        self._result = result
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._is_named = False
        paths = [result.with_suffix(name) for name in NAMES]
        with _named(result), atomic.lock(result.parent):
            for path in paths:
                atomic.check_writable(path)
                if _is_in_use(path):
                    raise OutputError(f"{path} is being written by another run; give another output with -o")
            atomic.check_output(result, force=force)
            older, self._is_over_finished = _older(result)
            if older == paths[0].name:
                paths.reverse()
            self._path, self._other = paths
            self._path.unlink(missing_ok=True)  # a killed run's
            self._file = self._path.open("xb", buffering=0)
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_named:
            self._path.unlink(missing_ok=True)
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

    def keep(self, result: results.Result) -> None:
        """Replace the result that is there by ``result``, which names these samples, and remove the older samples.

        Args:
            result: The run so far. A part of a run does not replace a finished one.

        Raises:
            OutputError: The result cannot be written.
        """
        if self._is_over_finished and not result.complete:
            return
        results.write(result, self._result)
        self._is_named = True
        self._other.unlink(missing_ok=True)


def _older(result: Path) -> tuple[str, bool]:
    """The name of the samples of the result that is there, if any, and True if it is finished or cannot be told."""
    if not result.exists():
        return "", False
    try:
        older = results.read(result)
    except ArtifactError:
        return result.with_suffix(NAMES[0]).name, True
    return older.samples.file if older.samples else "", older.complete


def _is_in_use(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # some network file systems have no locks
            return False
    return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
