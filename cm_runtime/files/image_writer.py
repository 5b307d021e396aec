"""Pictures and arrays on disk: PNG grids, and npz files in the field's convention. Metadata travels inside."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.files import atomic, streams
from cm_runtime.files.npz import BROKEN

GRID_PIXELS = 1 << 26
MOST_TEXT = 1 << 22  # bytes of a file's own description


def check_grid(count: int, height: int, width: int) -> None:
    """Raises RequestError when ``count`` images are too many for one picture."""
    if count * height * width > GRID_PIXELS:
        most = GRID_PIXELS // (height * width)
        raise RequestError(
            f"a picture holds at most {quantity(most, 'image')} of {height}x{width}; write more with -o NAME.npz"
        )


def grid(images: NDArray[np.uint8], columns: int | None = None) -> NDArray[np.uint8]:
    """One picture of all images, row by row: (N,H,W,C) uint8 -> (rows*H, columns*W, C); missing cells are black.

    columns: default the smallest square that holds them all. C must be 1 or 3, else RequestError.
    """
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise RequestError(f"a picture has 1 or 3 channels, not {channels}; write these with -o NAME.npz")
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:count] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def save_png(picture: NDArray[np.uint8], path: str | os.PathLike[str], text: Mapping[str, Any]) -> None:
    """Writes (H,W,C) uint8 as PNG, whole or not at all, with ``text`` as JSON under the key cm_runtime.

    Raises OutputError.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("cm_runtime", json.dumps(text))
    with atomic.write(path) as temporary:
        _pillow(picture).save(temporary, format="PNG", pnginfo=info, compress_level=6)


def provenance(path: Path) -> dict[str, Any]:
    """Read the provenance in a picture or npz of cm-runtime: seed, noise levels, labels, model.

    Raises ArtifactError for a file that says nothing of it.
    """
    try:
        text = _text_of_npz(path) if path.suffix == ".npz" else _text_of_png(path)
        content = json.loads(text)
    except (*BROKEN, OSError, RecursionError, SyntaxError) as error:  # SyntaxError: Pillow's, of damaged chunks
        raise ArtifactError(f"{path}: no picture or npz that says how cm-runtime made it ({error})") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: what it says under cm_runtime is no object")
    return content


def _text_of_png(path: Path) -> str:
    with streams.open_file(path, ArtifactError) as file, Image.open(file, formats=("PNG",)) as picture:
        text = picture.info.get("cm_runtime")
    if not isinstance(text, str):
        raise KeyError("it has no text called cm_runtime")
    return text


def _text_of_npz(path: Path) -> str:
    with (
        streams.open_file(path, ArtifactError) as file,
        zipfile.ZipFile(file) as archive,
        archive.open("cm_runtime.npy") as stream,
    ):
        data = bytes(streams.read_up_to(stream, MOST_TEXT, path))
    head = io.BytesIO(data)
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError("its text is no array of version 1")
    shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    if shape != () or dtype.kind != "U" or dtype.itemsize != len(data) - head.tell():
        raise ValueError("its text is no string of moderate length")
    return str(np.frombuffer(data, dtype, 1, head.tell())[0])


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """(H,W,C) uint8 as a PNG file's bytes; C must be 1 or 3."""
    file = io.BytesIO()
    _pillow(picture).save(file, format="PNG", compress_level=6)
    return file.getvalue()


def _pillow(picture: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def save_animation(frames: NDArray[np.uint8], path: str | os.PathLike[str], milliseconds: int = 80) -> None:
    """Writes (N,H,W,C) uint8 as an animated .gif or lossless .webp, there and back for ever, whole or not at all.

    milliseconds: that each frame stays. Raises OutputError.
    """
    pictures = [_pillow(each) for each in (*frames, *frames[-2:0:-1])]
    with atomic.write(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, lossless=True
        )


class NpzWriter:
    """Streams images and labels into an npz of known length; a context manager, whole or not at all.

    arr_0: (count,H,W,C) images; arr_1: (count,) int64 labels, where there are classes; cm_runtime: JSON as a 0-d
    string array. Memory does not grow with the count.
    """

    def __init__(
        self, path: str | os.PathLike[str], count: int, shape: tuple[int, ...], dtype: Any, text: Mapping[str, Any]
    ) -> None:
        self._path, self._text = path, text
        self._shape, self._dtype = (count, *shape), np.dtype(dtype)
        self._labels: list[NDArray[np.int64]] = []
        self._count = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic.write(self._path))
            self._archive = stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED))
            self._array = stack.enter_context(self._archive.open("arr_0.npy", "w", force_zip64=True))
            header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": self._shape}
            np.lib.format.write_array_header_1_0(self._array, header)
            self._stack = stack.pop_all()
        return self

    def write(self, images: NDArray[Any], labels: NDArray[np.int64] | None) -> None:
        """Appends (n,H,W,C) images and their labels."""
        self._array.write(np.ascontiguousarray(images, self._dtype).data)
        self._count += len(images)
        if labels is not None:
            self._labels.append(labels)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._count != self._shape[0]:
                raise ValueError(f"{self._count} of {quantity(self._shape[0], 'image')} were written")
            self._array.close()
            if self._labels:
                self._member("arr_1.npy", np.concatenate(self._labels))
            self._member("cm_runtime.npy", np.array(json.dumps(self._text)))

    def _member(self, name: str, array: NDArray[Any]) -> None:
        with self._archive.open(name, "w") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
