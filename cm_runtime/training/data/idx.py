"""IDX, the format of MNIST and Fashion-MNIST: a magic number, big-endian dims, then the bytes.

Source: http://yann.lecun.com/exdb/mnist, "FILE FORMATS FOR THE MNIST DATABASE"
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import data_error
from cm_runtime.errors.wording import quantity
from cm_runtime.files.streams import most_inflated, open_stream, read_up_to
from cm_runtime.training.data.image_set import MAX_SIDE, ImageSet

Split = Literal["train", "test"]

UNSIGNED_BYTE = 0x08
PREFIX: dict[Split, str] = {"train": "train", "test": "t10k"}


def is_idx_folder(folder: Path) -> bool:
    """Return True if ``folder`` holds the images of either split under their original names."""
    return any(find_file(folder, f"{prefix}-images-idx3-ubyte", (".gz",)) for prefix in PREFIX.values())


def read_idx_folder(folder: Path, split: Split, name: str) -> ImageSet:
    """Read the images and labels of one split: ``train-*`` or ``t10k-*``, plain or ``.gz`` (plain wins).

    The number of classes is the highest label plus one. Raises DataError, OSError.
    """
    paths = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        file = f"{PREFIX[split]}-{kind}"
        path = find_file(folder, file, (".gz",))
        if path is None:
            raise data_error(folder, f"holds no {file} or {file}.gz", f"put it there to read the {split} split")
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels):
        wrong = f"has {quantity(len(labels), 'label')} for the {quantity(len(images), 'image')} of {paths[0].name}"
        raise data_error(paths[1], wrong, "fetch both files again")
    return ImageSet(images[:, None], labels.astype(np.int64), int(labels.max()) + 1, name)


def read_idx_images(path: Path, name: str) -> ImageSet:
    """Read one file of images, without labels. Raises DataError, OSError."""
    return ImageSet(read_idx(path, 3)[:, None], None, 0, name)


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes with that many dimensions: 3 (N, H, W) for images, 1 (N,) for labels.

    Raises DataError where magic, dims and length disagree, before memory is taken for what dims promise.
    """
    with open_stream(path) as stream:
        magic = bytes(read_up_to(stream, 4, path))
        if len(magic) < 4 or magic[:2] != b"\0\0":
            cure = "pass an IDX file, an .npz, cifar-10-binary.tar.gz, or a folder"
            raise data_error(path, f"is not an IDX file (it begins with {magic.hex() or 'nothing'})", cure)
        if magic[2:] != bytes((UNSIGNED_BYTE, dimensions)):
            wrong = f"is IDX type 0x{magic[2]:02x} with {magic[3]} dims"
            raise data_error(path, wrong, f"wanted unsigned bytes (0x08) with {dimensions}")
        head = read_up_to(stream, 4 * dimensions, path)
        if len(head) < 4 * dimensions:
            raise data_error(path, "ends inside its header", "fetch it again")
        dims: tuple[int, ...] = struct.unpack(f">{dimensions}I", head)
        size = math.prod(dims)
        if size == 0 or max(dims[1:], default=1) > MAX_SIDE:
            raise data_error(path, f"declares dims {dims}", f"none may be 0, and sides go up to {MAX_SIDE}")
        file_size = path.stat().st_size
        if size > max(file_size, most_inflated(file_size)):
            cure = f"unpack a file above {most_inflated(file_size)} bytes first, or fetch it again"
            raise data_error(path, f"declares {size} bytes, more than the file itself holds", cure)
        body = read_up_to(stream, size + 1, path)
    if len(body) != size:
        content = f"only {len(body)}" if len(body) < size else "more"
        raise data_error(path, f"declares dims {dims}, {size} bytes, but {content} are there", "fetch it again")
    return np.frombuffer(body, np.uint8).reshape(dims)


def find_file(folder: Path, name: str, suffixes: tuple[str, ...]) -> Path | None:
    """Find ``name`` in ``folder``, as it is or compressed, with one of ``suffixes``."""
    return next((path for suffix in ("", *suffixes) if (path := folder / f"{name}{suffix}").is_file()), None)
