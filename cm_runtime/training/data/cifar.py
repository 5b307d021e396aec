"""CIFAR-10, binary version: records of one label byte and 3072 pixel bytes, planes red, green, blue.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import data_error
from cm_runtime.files.streams import CHUNK, CappedStream, open_stream, read_up_to
from cm_runtime.training.data.idx import Split, find_file
from cm_runtime.training.data.image_set import ImageSet

SUFFIXES = (".xz", ".gz")
CLASSES = 10
SHAPE = (3, 32, 32)
RECORD = 3073
MAX_BATCH = 10_000 * RECORD  # the original files hold exactly this
MAX_ARCHIVE = 2**28  # the original unpacks to 184 MB
MAX_MEMBERS = 10_000  # and has 9
MAX_EXTENDED = 2**16  # bytes of a long name, or of a pax header
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
BATCHES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}


def is_cifar_folder(folder: Path) -> bool:
    """Return True if ``folder`` holds any of the six batches."""
    return any(find_file(folder, batch, SUFFIXES) for batches in BATCHES.values() for batch in batches)


def read_cifar_folder(folder: Path, split: Split, name: str) -> ImageSet:
    """Read all batches of one split, each plain, ``.xz`` or ``.gz`` (the first in that order).

    Raises DataError, OSError.
    """
    records = []
    for batch in BATCHES[split]:
        path = find_file(folder, batch, SUFFIXES)
        if path is None:
            raise data_error(folder, f"holds no {batch}, .xz or .gz", f"put it there to read the {split} split")
        with open_stream(path) as stream:
            records.append(_records(read_up_to(stream, MAX_BATCH + 1, path), path))
    return _image_set(records, name)


def read_cifar_archive(archive: Path, split: Split, name: str) -> ImageSet:
    """Read all batches of one split from ``cifar-10-binary.tar.gz``; nothing is unpacked to disk.

    Raises DataError, OSError.
    """
    records: dict[str, NDArray[np.uint8]] = {}
    with open_stream(archive) as unpacked_stream:
        stream = CappedStream(unpacked_stream, MAX_ARCHIVE, archive)
        try:
            for member, data in _members(stream, archive):
                batch = PurePosixPath(member.name).name
                if batch not in BATCHES[split] or not member.isreg():
                    continue
                if member.type == tarfile.GNUTYPE_SPARSE or batch in records:
                    raise data_error(archive, f"holds an odd or second {batch}", "fetch it again")
                records[batch] = _records(data, archive / batch)
        except (tarfile.TarError, ValueError) as error:
            raise data_error(archive, f"is not a whole tar archive ({error})", "fetch it again") from error
        while stream.read(CHUNK):  # to the end, so that gzip checks its checksum
            pass
    for batch in BATCHES[split]:
        if batch not in records:
            raise data_error(archive, f"holds no {batch}", "pass the original cifar-10-binary.tar.gz")
    return _image_set([records[batch] for batch in BATCHES[split]], name)


def _members(stream: CappedStream, path: Path) -> Iterator[tuple[tarfile.TarInfo, bytearray]]:
    """Yield each member of a tar, and up to a byte more of its data than a batch has.

    Linear and without recursion, as tarfile's reader is not for many or long extended headers. Of these only the names
    count, GNU's and pax's. Raises TarError, ValueError, DataError.
    """
    name = ""
    for number in range(MAX_MEMBERS):
        block = read_up_to(stream, tarfile.BLOCKSIZE, path)
        if number and not block.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "surrogateescape")
        has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES or member.type in EXTENDED
        room = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if has_data else 0
        if room < 0:
            raise ValueError(f"a member of {member.size} bytes")
        data = read_up_to(stream, min(room, MAX_BATCH + 1), path)
        position = len(data)
        while position < room and (chunk := stream.read(min(CHUNK, room - position))):
            position += len(chunk)
        if position < room:
            raise ValueError("it ends inside a member")
        data = data[: member.size]
        if member.type in EXTENDED and member.size > MAX_EXTENDED:
            raise ValueError(f"an extended header of {member.size} bytes")
        if member.type == tarfile.GNUTYPE_LONGNAME:
            name = data.rstrip(b"\0").decode(errors="replace")
        elif member.type == tarfile.XHDTYPE:
            path_record = re.search(rb"(?:^|\n)[0-9]+ path=([^\n]*)\n", data)
            name = path_record[1].decode(errors="replace") if path_record else name
        elif member.type not in EXTENDED:
            member.name, name = name or member.name, ""
            yield member, data
    raise ValueError(f"over {MAX_MEMBERS} members")


def _records(data: bytearray, path: Path) -> NDArray[np.uint8]:
    """Check the bytes of a batch and return its records, (n, 3073) uint8. Raises DataError."""
    if len(data) > MAX_BATCH:
        raise data_error(path, f"holds more than {MAX_BATCH} bytes", "pass the original batches")
    if not data or len(data) % RECORD:
        raise data_error(path, f"holds {len(data)} bytes, no multiple of {RECORD}", "fetch it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() >= CLASSES:
        raise data_error(path, f"holds label {records[:, 0].max()}", f"CIFAR-10 has labels 0..{CLASSES - 1}")
    return records


def _image_set(records: list[NDArray[np.uint8]], name: str) -> ImageSet:
    """Concatenate the batches to a set."""
    images = np.concatenate([batch[:, 1:] for batch in records]).reshape(-1, *SHAPE)
    labels = np.concatenate([batch[:, 0] for batch in records]).astype(np.int64)
    return ImageSet(images, labels, CLASSES, name)
