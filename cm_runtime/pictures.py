"""Picture files of other people, read with care: PNG, JPEG, WebP and BMP, one picture each, 8 bits a channel."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cm_runtime.errors import DataError, data_error

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
GREY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
MAX_PIXELS = 2**26
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF tag, and its values that exchange height and width


def read(file: Path, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The picture as (H,W,C) uint8, its EXIF rotation applied, grey (``channels`` 1) or RGB (3).

    size: (H, W) it is fitted to, see `fitted`. Raises DataError for what is no picture, is damaged, transparent,
    animated, over 2^26 pixels or not of 8 bits.
    """
    with _open(file) as unread, _open(file) as stored:
        try:
            unread.verify()  # a PNG's checksums, which decoding skips; makes the object unusable
            image = ImageOps.exif_transpose(stored)
            if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
                raise data_error(file, "has transparent pixels", "lay it over a background first")
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None:
                image = fitted(image, *size)
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever they trip over
            raise data_error(file, f"is truncated or damaged ({error})", "repair or remove it") from error
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def is_grey(file: Path) -> bool:
    """Whether the file stores grey. Raises DataError."""
    with _open(file) as image:
        return image.mode in GREY


def size_of(file: Path) -> tuple[int, int]:
    """(H, W) of the picture as it is shown, its EXIF rotation applied. Raises DataError."""
    with _open(file) as image:
        is_turned = image.getexif().get(ORIENTATION, 1) in TURNED
        return (image.width, image.height) if is_turned else (image.height, image.width)


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part with the shape height x width, resized by Pillow's (antialiased) BICUBIC.

    Cropped first: resizing with a box mixes in pixels around it.
    """
    scale = min(image.width / width, image.height / height)
    wide, high = max(round(scale * width), 1), max(round(scale * height), 1)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high)).resize((width, height), Image.Resampling.BICUBIC)


def _open(file: Path) -> Image.Image:
    """The file's header read, its size and mode checked; no pixel is decoded. Raises DataError."""
    if not file.is_file():
        raise data_error(file, "is not a regular file", "repair or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(file, formats=FORMATS)
    except Exception as error:  # decoders raise whatever they trip over
        raise data_error(file, f"is not a readable image ({error})", "repair or remove it") from error
    if image.mode not in GREY | COLOUR:
        image.close()
        raise data_error(file, f"stores mode {image.mode}", "convert it to 8-bit grey or RGB")
    animated = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: a JPEG with previews
    if animated or image.width * image.height > MAX_PIXELS:
        image.close()
        wrong = "is animated" if animated else f"has {image.width}x{image.height} pixels, above {MAX_PIXELS}"
        raise data_error(file, wrong, "make it one picture of moderate size")
    return image
