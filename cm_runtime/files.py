"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cm_runtime.errors import OutputError

TEMPORARY = ".cm-"  # how the names of files begin that are still being written, or that a kill left behind


@contextmanager
def written(path: str | os.PathLike[str], *, force: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, moved onto it when the block ends well and removed when it does not.

    The name's ending is kept, for writers that choose a format by it. Raises OutputError when the folder
    cannot be written, the disk is full, or ``path`` exists and ``force`` is off.
    """
    with drafted(path, force=force) as temporary:
        yield temporary
        sync(temporary)
        place(temporary, path, force=force)


@contextmanager
def drafted(path: str | os.PathLike[str], suffix: str | None = None, *, force: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` with its ending, or ``suffix``; removed when the block ends, unless moved.

    Raises OutputError, which names ``path``, where `written` does.
    """
    target = Path(path)
    check_writable(target, force=force)
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}{target.suffix if suffix is None else suffix}")
    try:
        yield temporary
    except FileExistsError as error:
        raise OutputError(f"{target} exists; replace it with --force") from error
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `written`, but a folder with all that the block puts in it.

    Where there is such a folder by then, it stays and the block's is removed. Raises OutputError.
    """
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        os.sync()  # once, and not a thousand times for a thousand files
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Removes what a kill left behind; nobody may be writing in the folder."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def sync(path: Path) -> None:
    """Returns when the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def place(temporary: Path, path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Moves ``temporary`` onto ``path`` in one step; raises FileExistsError if it exists and ``force`` is off."""
    if force:
        os.replace(temporary, path)
    else:
        os.link(temporary, path)  # fails if another process was first
        temporary.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, and one thread, is in a block of the same ``folder``; where locks work at all."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """As `locked`, but no process waits: yields False where locks do not work.

    Raises OutputError where another process, or another thread, is in such a block.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            works = True
        except BlockingIOError as error:
            raise OutputError(f"{folder}: another run is at work in it; wait for its end, or give another") from error
        except OSError:  # some network file systems have none
            works = False
        yield works
    finally:
        os.close(descriptor)


def check_writable(path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Raises OutputError if ``path`` could not be written, so that hours of work are not lost to a typing error."""
    target = Path(path)
    folder = target.parent
    try:
        if target.is_dir():
            raise OutputError(f"{target} is a folder; give the name of a file")
        if target.exists() and not force:
            raise OutputError(f"{target} exists; replace it with --force")
        if not folder.is_dir():
            raise OutputError(f"{target} cannot be written: there is no folder {folder}")
    except OSError as error:  # a name too long, a folder that may not be entered
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target} cannot be written: no permission to write in {folder}")


def cache_folder() -> Path:
    """Where everything that can be made again is kept: $XDG_CACHE_HOME/cm-runtime, by default ~/.cache/cm-runtime.

    Raises RuntimeError where there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm-runtime"


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
