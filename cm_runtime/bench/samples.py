"""Every sample of a run, in a file that only grows, and the result that names it.

A result never names the samples of another run. Their file has one of two names, and a run writes under the one that
the result which is there does not name. A finished result stays, with its samples, until the new one is finished.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from cm_runtime.bench import results
from cm_runtime.errors import ArtifactError, OutputError
from cm_runtime.errors.reasons import output_errors
from cm_runtime.files import atomic, locks
from cm_runtime.files.locks import try_lock

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
        with output_errors(result), locks.lock(result.parent):
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
            try_lock(self._file)

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_named:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def write(self, line: str) -> None:
        """Append a line."""
        data = line.encode()
        with output_errors(self._path):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._digest.update(data)
        self._bytes += len(data)

    def sync(self) -> results.Samples:
        """Put the samples so far on the disk; returns their record."""
        with output_errors(self._path):
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
    """The name of the samples of the result that is there, if any, and True if it is finished or cannot be read."""
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
        return not try_lock(file)
