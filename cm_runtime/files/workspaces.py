"""Folders for output in the making, which go with the process that works in them, however it ends.

A workspace is a folder ``.cm-XXXXXXXX.ENDING`` beside the final place of what is written in it. It holds a file that
its process locks. The lock goes with the process, after SIGKILL too, so `sweep` can tell the workspaces of the dead.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cm_runtime.files.locks import try_lock

TEMPORARY = ".cm-"  # how their names begin
REPLACED = "replaced"  # the folder in a workspace for what was moved aside
_LOCK = "lock"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_LONGEST_ENDING = 16


@contextmanager
def workspace(parent: Path, *, prefix: str = TEMPORARY, ending: str = "") -> Iterator[Path]:
    """A folder in ``parent`` for this process alone, removed with what it still holds when the block ends.

    Those of the same prefix and ending that dead processes left there are removed first, once in a process.
    """
    ending = ending[:_LONGEST_ENDING]
    _sweep_once(os.path.abspath(parent), prefix, ending)
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}{ending}"
        folder.mkdir(mode=0o700)
        try:
            lock = os.open(folder / _LOCK, _FLAGS, 0o600)
        except FileNotFoundError:  # another process took it for a dead one's
            continue
        try:
            if try_lock(lock) and os.fstat(lock).st_nlink:  # no process that sweeps was first
                yield folder
                return
        finally:
            _remove(folder, lock)


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A `workspace` called ``name``-XXXXXXXX in the system's folder for temporary files."""
    with workspace(Path(tempfile.gettempdir()), prefix=f"{name}-") as folder:
        yield folder


def sweep(parent: Path, endings: Collection[str] | None = None, *, prefix: str = TEMPORARY) -> None:
    """Remove the workspaces that dead processes left in ``parent``; those of living ones are locked, and stay.

    Args:
        parent: The folder that they lie in.
        endings: Of their names; None for all.
        prefix: Of their names.
    """
    name = re.compile(re.escape(prefix) + r"[0-9a-f]{8}(\..*)?", re.DOTALL)
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            match = name.fullmatch(entry.name)
            if match and (endings is None or (match[1] or "") in endings) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # of another user
                    _remove_dead(Path(parent, entry.name))


def _remove_dead(folder: Path) -> None:
    """Remove a workspace unless a living process has its lock, or the file system has no locks."""
    lock = os.open(folder / _LOCK, _FLAGS, 0o600)
    if try_lock(lock, without_locks=False):
        _remove(folder, lock)
    else:
        os.close(lock)


@functools.lru_cache(maxsize=1024)
def _sweep_once(parent: str, prefix: str, ending: str) -> None:
    sweep(Path(parent), (ending,), prefix=prefix)


def _remove(folder: Path, lock: int) -> None:
    """Remove a workspace whose lock this process has; first restore what was moved aside and never replaced."""
    try:
        with suppress(OSError):
            for old in (folder / REPLACED).iterdir():
                if not os.path.lexists(folder.parent / old.name):
                    old.rename(folder.parent / old.name)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
        with suppress(OSError):  # NFS keeps the name of an open file
            folder.rmdir()
