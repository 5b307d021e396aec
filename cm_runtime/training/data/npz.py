"""Images in NumPy's ``.npz``, header first: what a header claims takes no memory until it is really there."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cm_runtime.training.data.bounded import MAX_INFLATED, read_up_to
from cm_runtime.training.data.image_set import MAX_CLASSES, ImageSet, data_error

HEADER = 2**16
CHANNELS = (1, 3)


@dataclass(frozen=True)
class Member:
    """One array of the archive as its header declares it, its data from byte ``offset``."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int


def read_npz(path: Path, name: str) -> ImageSet:
    """``images`` with optional ``labels``, else the field's ``arr_0`` with optional ``arr_1``.

    Layouts: ``arr_0`` is (N, H, W, C), C 1 or 3. ``images`` in float32 is (N, C, H, W), C up to 4. ``images``
    in uint8 is (N, C, H, W) or (N, H, W, C), told apart by the one of the two places that holds 1 or 3;
    refused where both or neither do. Labels are (N,) of any integer type. Other keys are left alone.

    Raises DataError, OSError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            key, label_key = ("images", "labels") if "images" in members else ("arr_0", "arr_1")
            if key not in members:
                found = ", ".join(name[:20] for name in sorted(members)[:4]) or "it is empty"
                cure = "save arrays named images and labels, or arr_0 and arr_1"
                raise data_error(path, f"holds neither images nor arr_0 ({found})", cure)
            images = _header(archive, members[key], path)
            labels = _header(archive, members[label_key], path) if label_key in members else None
            channel_axis = _channel_axis(images, key, path)
            if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
                wrong = f"{label_key} is {labels.dtype} {labels.shape} for {images.shape[0]} images"
                raise data_error(path, wrong, "labels are integers, one an image")
            pixels = _array(archive, images, path)
            values = None if labels is None else _array(archive, labels, path)
    # what zipfile lets through when a directory entry or a local header lies
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise data_error(path, f"is not a whole .npz ({error})", "write it again with numpy.savez") from error
    pixels = np.ascontiguousarray(np.moveaxis(pixels, channel_axis, 1))
    if values is None:
        return ImageSet(pixels, None, 0, name)
    if values.min() < 0 or values.max() >= MAX_CLASSES:
        raise data_error(path, f"labels {values.min()}..{values.max()}", f"they must lie in 0..{MAX_CLASSES - 1}")
    return ImageSet(pixels, values.astype(np.int64), int(values.max()) + 1, name)


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Member:
    """Read one array's header and check it against the length that the archive gives; the array is not read.

    Raises DataError.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise data_error(path, f"{info.filename} is packed in an unusual way", "write it with numpy.savez")
    with archive.open(info) as stream:
        head = io.BytesIO(read_up_to(stream, HEADER, path))
    try:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
        shape, fortran_order, dtype = read(head)
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
    if info.compress_type == zipfile.ZIP_DEFLATED and size > MAX_INFLATED:
        wrong = f"{info.filename} unpacks to {size} bytes, more than {MAX_INFLATED}"
        raise data_error(path, wrong, "save it uncompressed, with numpy.savez")
    return Member(info, shape, fortran_order, dtype, head.tell())


def _array(archive: zipfile.ZipFile, member: Member, path: Path) -> NDArray[Any]:
    """Read the array that ``member`` declares, in native byte order. Raises DataError where it ends early."""
    size = math.prod(member.shape) * member.dtype.itemsize
    with archive.open(member.info) as stream:
        read_up_to(stream, member.offset, path)
        data = read_up_to(stream, size + 1, path)  # one more, so that zipfile checks its checksum
    if len(data) != size:
        raise data_error(path, f"{member.info.filename} ends after {len(data)} of {size} bytes", "write it again")
    array = np.frombuffer(data, member.dtype).reshape(member.shape, order="F" if member.fortran_order else "C")
    return array.astype(member.dtype.newbyteorder("="), copy=False)


def _channel_axis(images: Member, key: str, path: Path) -> int:
    """1 or 3: where the channels are, by the rule that ``read_npz`` states. Raises DataError."""
    shape, dtype = images.shape, images.dtype.newbyteorder("=")
    if len(shape) != 4 or dtype not in (np.uint8, np.float32):
        raise data_error(path, f"{key} is {dtype} {shape}", "give uint8 or float32 images with 4 dims")
    if key == "arr_0":
        fits, axis, layout = shape[3] in CHANNELS, 3, "(N, H, W, C) with 1 or 3 channels"
    elif dtype == np.float32:
        fits, axis, layout = shape[1] <= 4, 1, "(N, C, H, W) with up to 4 channels"
    else:
        fits = (shape[1] in CHANNELS) != (shape[3] in CHANNELS)
        axis = 1 if shape[1] in CHANNELS else 3
        layout = "1 or 3 channels in one place only, the 2nd or the 4th; or name it arr_0, always (N, H, W, C)"
    if not fits:
        raise data_error(path, f"{key} is {dtype} {shape}", f"give {layout}")
    return axis
