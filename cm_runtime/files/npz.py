"""NumPy's ``.npz``, header first: what a header claims takes no memory until it is really there."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cm_runtime.errors import DataError, data_error
from cm_runtime.errors.wording import quantity
from cm_runtime.files import streams
from cm_runtime.files.streams import most_inflated, read_up_to

HEADER = 2**16
MAX_CLASSES = 65536
# what zipfile lets through when a directory entry or a local header lies
BROKEN = (zipfile.BadZipFile, EOFError, KeyError, ValueError, RuntimeError, struct.error)


@dataclass(frozen=True)
class Member:
    """One array of the archive as its header declares it, its data from byte ``offset``."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive open for reading; what zipfile raises in the block becomes a DataError."""
    try:
        with streams.open_file(path, DataError) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except BROKEN as error:
        raise data_error(path, f"is not a whole .npz ({error})", "write it again with numpy.savez") from error


def keys(path: Path) -> set[str]:
    """The names of the arrays in ``path``, by which readers tell what kind of file it is. Raises DataError."""
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Member:
    """Read one array's header and check it against the length that the archive gives; the array is not read.

    Raises DataError.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise data_error(path, f"{info.filename} is packed in an unusual way", "write it with numpy.savez")
    with archive.open(info) as stream:
        head = io.BytesIO(read_up_to(stream, HEADER, path))
    try:
        parse = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy remarks on headers that Python 2 wrote
            shape, fortran_order, dtype = parse(head)
    except Exception as error:  # the parser of Python literals raises whatever it trips over
        wrong = f"{info.filename} has no npy header of version 1 or 2 ({error})"
        raise data_error(path, wrong, "write it with numpy.savez") from error
    if min(shape, default=1) < 1 or dtype.kind not in "uif":
        cure = "give non-empty arrays of plain numbers (nothing is unpickled)"
        raise data_error(path, f"{info.filename} is {dtype} {shape}", cure)
    size = math.prod(shape) * dtype.itemsize
    if head.tell() + size != info.file_size:
        there = info.file_size - head.tell()
        wrong = f"{info.filename} declares {dtype} {shape}, {size} bytes, but {there} are there"
        raise data_error(path, wrong, "write it again")
    most = most_inflated(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED and size > most:
        wrong = f"{info.filename} unpacks to {size} bytes, more than {most}"
        raise data_error(path, wrong, "save it uncompressed, with numpy.savez")
    return Member(info, shape, fortran_order, dtype, head.tell())


def label_header(archive: zipfile.ZipFile, name: str, count: int, path: Path) -> Member | None:
    """Read the header of the labels of ``count`` images; None where there is no array ``name``. Raises DataError."""
    if f"{name}.npy" not in archive.namelist():
        return None
    labels = header(archive, archive.getinfo(f"{name}.npy"), path)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        wrong = f"{name} is {labels.dtype} {labels.shape} for {quantity(count, 'image')}"
        raise data_error(path, wrong, "labels are integers, one an image")
    return labels


def class_numbers(labels: NDArray[Any], path: Path) -> NDArray[np.int64]:
    """Labels as int64. Raises DataError for one that no class has."""
    if labels.min() < 0 or labels.max() >= MAX_CLASSES:
        raise data_error(path, f"labels {labels.min()}..{labels.max()}", f"they must lie in 0..{MAX_CLASSES - 1}")
    return labels.astype(np.int64)


def array(archive: zipfile.ZipFile, member: Member, path: Path) -> NDArray[Any]:
    """Read the array that ``member`` declares, in native byte order. Raises DataError where it ends early."""
    size = math.prod(member.shape) * member.dtype.itemsize
    with archive.open(member.info) as stream:
        read_up_to(stream, member.offset, path)
        data = read_up_to(stream, size + 1, path)  # one more, so that zipfile checks its checksum
    if len(data) != size:
        raise data_error(path, f"{member.info.filename} ends after {len(data)} of {size} bytes", "write it again")
    array = np.frombuffer(data, member.dtype).reshape(member.shape, order="F" if member.fortran_order else "C")
    return array.astype(member.dtype.newbyteorder("="), copy=False)


def blocks(archive: zipfile.ZipFile, member: Member, path: Path, rows: int) -> Iterator[NDArray[Any]]:
    """The array that ``member`` declares, ``rows`` entries of its first axis at a time, in native byte order.

    Memory does not grow with the array. Raises DataError where it ends early or lies in Fortran's order.
    """
    if member.fortran_order and len(member.shape) > 1:
        raise data_error(path, f"{member.info.filename} is in Fortran's order", "save numpy.ascontiguousarray of it")
    entry = math.prod(member.shape[1:]) * member.dtype.itemsize
    with archive.open(member.info) as stream:
        read_up_to(stream, member.offset, path)
        for first in range(0, member.shape[0], rows):
            count = min(rows, member.shape[0] - first)
            last = first + count == member.shape[0]
            data = read_up_to(stream, count * entry + last, path)  # one more, so that zipfile checks its checksum
            if len(data) != count * entry:
                raise data_error(
                    path, f"{member.info.filename} ends before its {member.shape[0]} entries", "write it again"
                )
            block = np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])
            yield block.astype(member.dtype.newbyteorder("="), copy=False)
