"""Locks of files and folders among processes and threads. Some network file systems have none; work goes on there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cm_runtime.errors import OutputError


def try_lock(file: int | IO[Any], *, without_locks: bool = True) -> bool:
    """Take the lock of an open file, which ends with its descriptor; False where somebody else has it.

    without_locks: the answer where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Wait until no other process, and no other thread, is in a block of the same ``folder``."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have ``folder`` alone, as `lock`. Raises OutputError where another process, or another thread, has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise OutputError(f"{folder}: another run is at work in it; wait for its end, or give another")
        yield
    finally:
        os.close(descriptor)
