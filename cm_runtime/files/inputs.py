"""Inputs of an editor: pictures of any size, arrays in an npz, masks and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.errors import RequestError, data_error
from cm_runtime.errors.wording import quantity
from cm_runtime.files import image_reader, npz

MOST = 4096  # images at once, which are all in memory
WHITE = 128


@dataclass(frozen=True)
class Inputs:
    """names: of M images, without folder and ending; images: (M,H,W,C) uint8, or float32 in units of [-1, 1].

    labels: (M,) where every file says them.
    """

    names: list[str]
    images: NDArray[Any]
    labels: list[int] | None


def read(paths: Sequence[Path], channels: int, sizes: Sequence[tuple[int, int]]) -> Inputs:
    """The images in picture files and npz files (``arr_0`` (N,H,W,C), labels in ``arr_1``), in their order.

    sizes: (H, W) that are taken as they are. Pictures of another are fitted to the first (`image_reader.fit`);
    arrays are not. All must have the same one in the end. Raises DataError, RequestError.
    """
    names: list[str] = []
    parts: list[NDArray[Any]] = []
    labels: list[int] | None = []
    for path in paths:
        if path.suffix.lower() == ".npz":
            images, file_labels = _arrays(path, channels, sizes)
            names += [f"{path.stem}-{n}" for n in range(len(images))]
        else:
            size = next((size for size in sizes[1:] if image_reader.size_of(path) == size), sizes[0])
            images, file_labels = image_reader.read(path, channels, size)[None], None
            names.append(path.stem)
        if parts and images.shape[1:] != parts[0].shape[1:]:
            (h, w), (height, width) = images.shape[1:3], parts[0].shape[1:3]
            raise data_error(path, f"is taken as {w}x{h}, but {paths[0].name} as {width}x{height}", "edit them apart")
        parts.append(images)
        labels = None if labels is None or file_labels is None else labels + file_labels
        if len(names) > MOST:
            raise RequestError(f"at most {MOST} images are edited at once")
    if not parts:
        raise RequestError("there is no image to edit: name files after the model")
    if any(part.dtype != np.uint8 for part in parts):
        parts = [part / np.float32(127.5) - 1 if part.dtype == np.uint8 else part for part in parts]
    return Inputs(names, np.concatenate(parts), labels)


def read_mask(path: Path, paths: Sequence[Path], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The hole that a picture shows in white: (H,W) of ``size``.

    It has the size of the pictures in ``paths``, and is fitted as they are, or that of the model's images. Raises
    DataError.
    """
    file_labels = image_reader.size_of(path)
    for each in paths:
        if file_labels != size and (each.suffix.lower() == ".npz" or image_reader.size_of(each) != file_labels):
            high, wide = size if each.suffix.lower() == ".npz" else image_reader.size_of(each)
            cure = f"make it {size[1]}x{size[0]}, as the model's images, or as {each.name}"
            raise data_error(path, f"is {file_labels[1]}x{file_labels[0]}, but {each.name} is {wide}x{high}", cure)
    hole: NDArray[np.bool_] = image_reader.read(path, 1, size)[..., 0] >= WHITE
    return hole


def hole_of_box(box: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The hole (H,W) of a box (left, top, width, height) in pixels of the model's images. Raises RequestError."""
    height, width = size
    if len(box) != 4:
        raise RequestError(f"a box is LEFT,TOP,WIDTH,HEIGHT, not {quantity(len(box), 'number')}")
    left, top, wide, high = box
    if min(left, top) < 0 or min(wide, high) < 1 or left + wide > width or top + high > height:
        raise RequestError(f"a box of {wide}x{high} at {left},{top} is not inside images of {width}x{height}")
    hole = np.zeros(size, np.bool_)
    hole[top : top + high, left : left + wide] = True
    return hole


def _arrays(path: Path, channels: int, sizes: Sequence[tuple[int, int]]) -> tuple[NDArray[Any], list[int] | None]:
    """Images, and labels where there are such."""
    names = npz.keys(path)
    if "arr_0" not in names:
        raise data_error(path, "has no arr_0", "give images (N, H, W, C) under that name, as numpy.savez does")
    with npz.open_npz(path) as archive:
        member = npz.header(archive, archive.getinfo("arr_0.npy"), path)
        shape, kind = member.shape, member.dtype.newbyteorder("=")
        if len(shape) != 4 or kind not in (np.uint8, np.float32) or shape[3] != channels or shape[1:3] not in sizes:
            shapes = " or ".join(f"(N, {h}, {w}, {channels})" for h, w in sizes)
            raise data_error(path, f"arr_0 is {member.dtype} {shape}", f"give {shapes}, uint8 or float32")
        if shape[0] > MOST:
            raise data_error(path, f"holds {quantity(shape[0], 'image')}", f"at most {MOST} are edited at once")
        images = npz.array(archive, member, path)
        labels = npz.label_header(archive, "arr_1", shape[0], path)
        return images, None if labels is None else [int(label) for label in npz.array(archive, labels, path)]
