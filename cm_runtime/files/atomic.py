"""Files and folders that appear whole or not at all, and the one rule for replacing them."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from cm_runtime.errors import CmRuntimeError, FileError, OutputError
from cm_runtime.errors.reasons import output_errors
from cm_runtime.files import streams
from cm_runtime.files.workspaces import REPLACED, workspace

REWRITTEN = {".png", ".gif", ".webp", ".npz", ".html", ".htm"}  # pictures, arrays, and pages made of a result
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def write(path: str | os.PathLike[str], *, force: bool = True) -> Iterator[Path]:
    """A temporary path, moved onto ``path`` when the block ends well and removed when it does not.

    The name's ending is kept, for writers that choose a format by it. Raises OutputError when the folder
    cannot be written, the disk is full, or ``path`` exists and ``force`` is off.
    """
    with draft(path, force=force) as temporary:
        yield temporary
        sync(temporary)
        place(temporary, path, force=force)


@contextmanager
def draft(path: str | os.PathLike[str], *, force: bool = True) -> Iterator[Path]:
    """A temporary path with the ending of ``path``, in a folder of its own on the same file system.

    The folder goes with the block, and with it all that was not moved. Raises OutputError, which names ``path``, where
    `write` does.
    """
    target = Path(path)
    check_writable(target, force=force)
    with output_errors(target):
        try:
            with workspace(target.parent, ending=target.suffix) as folder:
                yield folder / f"x{target.suffix}"  # no longer than the final name, which may be as long as names get
        except FileExistsError as error:
            raise OutputError(f"{target} exists; replace it with --force") from error


@contextmanager
def folder_written(
    path: str | os.PathLike[str], existing: Literal["kept", "refused", "replaced"], *, ending: str = ""
) -> Iterator[Path]:
    """A temporary folder, which becomes ``path`` with all that the block puts in it; the pendant of `write`.

    Args:
        path: The folder.
        existing: The fate of a folder of that name that is there when the block ends; "kept": the block's is removed.
        ending: Of the workspace's name: what its kind of output is swept by.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    target = Path(path)
    with output_errors(target), workspace(target.parent, ending=ending) as folder:
        draft = folder / "draft"
        draft.mkdir()
        yield draft
        os.sync()  # once, and not a thousand times for a thousand files
        try:
            draft.rename(target)
        except OSError:
            if existing == "refused" or not target.is_dir():
                raise
            if existing == "replaced":
                _exchange(draft, target)


def _exchange(new: Path, old: Path) -> None:
    """Swap two paths in one step.

    Where the file system has no such step, ``old`` is moved aside first, to where it is restored from if this process
    ends before ``new`` is in its place.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap and swap(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    aside = new.with_name(REPLACED)
    aside.mkdir()
    old.rename(aside / old.name)
    new.rename(old)


def sync(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def place(temporary: Path, path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Move ``temporary`` onto ``path`` in one step; raises FileExistsError if it exists and ``force`` is off."""
    if force:
        os.replace(temporary, path)
    else:
        os.link(temporary, path)  # fails if another process was first
        temporary.unlink()


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Apply the one rule for what commands write: pictures, arrays and pages are rewritten, all else needs --force.

    Args:
        path: A file that a command is about to write.
        force: Whether --force was given.

    Raises:
        OutputError: As `check_writable`.
    """
    check_writable(path, force=force or Path(path).suffix in REWRITTEN)


def check_writable(path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Raises OutputError if ``path`` could not be written, so that hours of work are not lost to a typing error."""
    target = Path(path)
    folder = target.parent
    with output_errors(target):  # a name too long, a folder that may not be entered
        if target.is_dir():
            raise OutputError(f"{target} is a folder; give the name of a file")
        if target.exists() and not force:
            raise OutputError(f"{target} exists; replace it with --force")
        if not folder.is_dir():
            raise OutputError(f"{target} cannot be written: there is no folder {folder}")
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} cannot be written: no file can have such a name")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{target} cannot be written: no permission to write in {folder}")


def cache_folder() -> Path:
    """The folder of all that can be made again: $XDG_CACHE_HOME/cm-runtime, by default ~/.cache/cm-runtime.

    Raises RuntimeError where there is no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cm-runtime"


def sha256(path: str | os.PathLike[str], error: type[CmRuntimeError] = FileError) -> str:
    """The file's SHA-256, as 64 hexadecimal digits. Raises ``error`` for what is no regular file."""
    with streams.open_file(path, error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(files: Mapping[str, Path], line: str = "{name} {sha256}\n") -> str:
    """One SHA-256 over several files, by a line of name and hash for each, in the mapping's order."""
    lines = "".join(line.format(name=name, sha256=sha256(path)) for name, path in files.items())
    return hashlib.sha256(lines.encode()).hexdigest()
