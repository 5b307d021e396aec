"""Exported files written: an ``.onnx`` and its data file, which appear and go together, and another manifest in one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cm_runtime.errors import ArtifactError
from cm_runtime.files import atomic, locks, onnx_metadata, streams
from cm_runtime.files.protobuf import MalformedError
from cm_runtime.manifest import DATA_FILE, METADATA_KEY, Manifest, data_path, read_manifest

FICLONE = 0x40049409  # of linux/fs.h


def data_name(path: str | os.PathLike[str], sha256: str) -> str:
    """Name the data file of the exported file ``path`` by the hash of its content.

    Other weights have another name, so that no ``.onnx`` ever reads those of the export that replaced it.
    """
    stem = re.sub(r"[^\w .+-]|\.{2,}", "_", Path(path).stem)
    stem = stem.encode()[:200].decode(errors="ignore")  # a name has at most 255 bytes
    return f"{stem}-{sha256[:12]}.data"


def write_manifest(
    source: str | os.PathLike[str], target: str | os.PathLike[str], manifest: Manifest, *, force: bool = False
) -> None:
    """Copy the exported file ``source`` with ``manifest`` instead of its own; both may be one path.

    The rest is copied as it is, a piece at a time, so that it takes no memory either. Its data file is copied where
    ``target`` is in another folder. The copy appears whole or not at all.

    Raises:
        ArtifactError: ``source`` is damaged, no export, or without its data file.
        OutputError: ``target`` cannot be written, or exists without ``force``.
    """
    data = data_path(source, read_manifest(source))
    manifest = manifest.model_copy(update={"data_file": data.name if data else ""})
    with write_export(target, force=force) as (temporary, temporary_data):
        with streams.open_file(source, ArtifactError) as old, temporary.open("wb") as new:
            size = os.fstat(old.fileno()).st_size
            onnx_metadata.replace(old, size, new, METADATA_KEY, manifest.model_dump_json().encode())
        if read_manifest(temporary) != manifest:
            raise ArtifactError(f"{target}: the manifest does not read back as it was written")
        if data and not _same_size(data, Path(target).with_name(data.name)):
            _clone(data, temporary_data)


@contextmanager
def write_export(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths of an ``.onnx`` and of its data file, moved to their names when the block ends well.

    The name of the data file is in the manifest; it may be left unwritten where a file of that name is there. Older
    data files of ``path`` that no ``.onnx`` of the folder names any more are removed, also those that a kill left.
    Raises OutputError as `files.atomic.write` does.
    """
    target = Path(path)
    with atomic.draft(target, force=force) as temporary:
        data = temporary.with_suffix(".data")
        yield temporary, data
        manifest = read_manifest(temporary)
        atomic.sync(temporary)
        if data.exists():
            atomic.sync(data)
        with locks.lock(target.parent):
            older = {_named_by(target), *_data_files(target)}
            try:
                if data.exists():
                    os.replace(data, target.with_name(manifest.data_file))
                data_path(target, manifest)
                atomic.place(temporary, target, force=force)
            finally:
                _remove_unnamed(target.parent, {manifest.data_file, *older})


def _named_by(path: Path) -> str:
    """The data file of an exported file, a later version's too; "" if it has none or cannot be read."""
    try:
        with streams.open_file(path, ArtifactError) as file:
            content = json.loads(onnx_metadata.read(file, os.fstat(file.fileno()).st_size, METADATA_KEY) or "")
        return str(content.get("data_file", ""))
    except (ArtifactError, MalformedError, ValueError, AttributeError, RecursionError):
        return ""


def _data_files(path: Path) -> list[str]:
    """The data files in the folder whose names are of the exported file ``path``."""
    stem = data_name(path, "").removesuffix(".data")
    name = re.compile(re.escape(stem) + r"[0-9a-f]{12}\.data")
    return [each for each in os.listdir(path.parent) if name.fullmatch(each)]


def _remove_unnamed(folder: Path, names: set[str]) -> None:
    """Remove those data files of exports that no ``.onnx`` of the folder names, and no file of another kind."""
    doubtful = {name for name in names if DATA_FILE.fullmatch(name)}
    if doubtful:
        graphs = [path for path in folder.glob("*.onnx") if path.is_file()]
        for name in doubtful - {_named_by(path) for path in graphs}:
            (folder / name).unlink(missing_ok=True)


def _same_size(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size


def _clone(source: Path, target: Path) -> None:
    """A copy that shares its blocks where the file system can; a second name would be refused by the onnx package."""
    try:
        with source.open("rb") as old, target.open("wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
    except OSError:
        shutil.copyfile(source, target)
