"""Picture files of other people, read with care: PNG, JPEG, WebP and BMP, one picture each, 8 bits a channel.

Pixels come out as a viewer shows them: an embedded colour profile, of CMYK too, is converted to sRGB. CMYK without a
profile is taken as the complement of RGB, Adobe's inverted kind too, as browsers do.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from cm_runtime.errors import DataError, data_error
from cm_runtime.files import streams

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
GREY = {"1", "L", "LA"}
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
MAX_PIXELS = 2**26
MAX_BYTES = 2**29  # of a file: 2^26 pixels of 32 bits, and as much again
MAX_SCANS = 100  # of a JPEG: encoders write some ten, and each passes over all pixels again
MAX_SEGMENTS = 10_000
MAX_PROFILE = 2**23  # bytes; those of printers have one or two million
ORIENTATION, TURNED = 0x0112, range(5, 9)  # the EXIF tag, and its values that exchange height and width
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in a JPEG's compressed data, which stuffs any other 255 with a 0
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01


def read(file: Path, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Read the picture as (H,W,C) uint8, grey (``channels`` 1) or RGB (3), its EXIF rotation and profile applied.

    size: (H, W) it is fitted to, see `fit`. Raises DataError for what is no picture, is damaged, transparent,
    animated, over 2^26 pixels, not of 8 bits, a JPEG of over 100 scans, or of colours that cannot be converted.
    """
    with _open(file) as unread, _open(file) as stored:
        unread.verify()  # a PNG's checksums, which decoding skips; makes the object unusable
        if stored.format in ("JPEG", "MPO"):
            with streams.open_file(file, DataError, MAX_BYTES) as content:
                _check_scans(content, file)
        image = ImageOps.exif_transpose(stored)
        if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
            raise data_error(file, "has transparent pixels", "lay it over a background first")
        image = _in_srgb(image, stored.info.get("icc_profile"), file).convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = fit(image, *size)
        return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def is_grey(file: Path) -> bool:
    """Return True if the file stores grey. Raises DataError."""
    with _open(file) as image:
        return image.mode in GREY


def size_of(file: Path) -> tuple[int, int]:
    """(H, W) of the picture as it is shown, its EXIF rotation applied. Raises DataError."""
    with _open(file) as image:
        is_turned = image.getexif().get(ORIENTATION, 1) in TURNED
        return (image.width, image.height) if is_turned else (image.height, image.width)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part with the shape height x width, resized by Pillow's (antialiased) BICUBIC.

    Cropped first: resizing with a box mixes in pixels around it.
    """
    scale = min(image.width / width, image.height / height)
    wide, high = max(round(scale * width), 1), max(round(scale * height), 1)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high)).resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def _open(file: Path) -> Iterator[Image.Image]:
    """The file's header read, its size and mode checked; no pixel is decoded yet.

    Whatever a decoder raises in the block becomes a DataError, and nobody hears its warnings.
    """
    streams.regular(file, DataError, MAX_BYTES)
    wrong, cure = "is not a readable image", "repair or remove it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs too: the size is checked below
            with Image.open(file, formats=FORMATS) as image:
                _check(image, file)
                wrong = "is truncated or damaged"
                yield image
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they trip over
        raise data_error(file, f"{wrong} ({error})", cure) from error


def _check(image: Image.Image, file: Path) -> None:
    """Raises DataError for a mode, depth or size that is not read."""
    if image.mode not in GREY | COLOUR:
        raise data_error(file, f"stores mode {image.mode}", "convert it to 8-bit grey or RGB")
    # Pillow cuts these to 8 bits without a word; a BMP's ;16 are 16 bits a pixel.
    if image.format == "PNG" and any(";16" in str(tile.args) for tile in image.tile):  # type: ignore[attr-defined]
        raise data_error(file, "stores 16 bits a channel", "convert it to 8-bit grey or RGB")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a JPEG with previews
        raise data_error(file, "is animated", "make it one picture of moderate size")
    if image.width * image.height > MAX_PIXELS:
        wrong = f"has {image.width}x{image.height} pixels, above {MAX_PIXELS}"
        raise data_error(file, wrong, "make it one picture of moderate size")


def _check_scans(content: BinaryIO, file: Path) -> None:
    """Count a JPEG's scans up to its end, without decoding: a kB of empty ones takes minutes. Raises DataError."""
    data = content.read()
    place = scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, place)
        if marker is None or data[marker.start() + 1] == EOI:
            return
        code, place = data[marker.start() + 1], marker.end()
        if code in (SOI, TEM):
            continue
        place += int.from_bytes(data[place : place + 2])
        scans += code == SOS
        if scans > MAX_SCANS:
            raise data_error(file, f"has over {MAX_SCANS} scans", "save it anew")
    raise data_error(file, f"has over {MAX_SEGMENTS} segments", "save it anew")


def _in_srgb(image: Image.Image, profile: Any, file: Path) -> Image.Image:
    """The picture as its colour profile means it; itself where that is sRGB, or of other channels than the picture's.

    Raises DataError for a profile that cannot be used.
    """
    space = profile[16:20] if isinstance(profile, bytes) else b""
    kinds = {b"GRAY": "L", b"CMYK": "CMYK", b"RGB ": "RGB"}
    mode = "L" if image.mode in GREY else "CMYK" if image.mode == "CMYK" else "RGB"
    if kinds.get(space) != mode:
        return image
    try:
        convert = _conversion(profile, mode)
    except Exception as error:  # Pillow's own, OSError, or ImportError where it is built without LittleCMS
        raise data_error(file, f"has a colour profile that cannot be used ({error})", "convert it to sRGB") from error
    return convert(image.convert(mode)) if convert else image


@lru_cache(8)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """From the profile's colours to sRGB; None where no colour moves by more than one level."""
    if len(profile) > MAX_PROFILE:
        raise ValueError(f"it has {len(profile)} bytes")
    source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(source, target, mode, "RGB")

    def convert(image: Image.Image) -> Image.Image:
        return cast(Image.Image, ImageCms.applyTransform(image, transform))

    if mode != "CMYK":
        colours = np.arange(256, dtype=np.uint8) if mode == "L" else np.arange(0, 256, 17, dtype=np.uint8)
        axes = np.meshgrid(*[colours] * len(mode), indexing="ij")
        before = Image.fromarray(np.stack(axes, -1).reshape(1, -1, len(mode)).squeeze(-1 if mode == "L" else ()))
        moved = np.asarray(convert(before), np.int16) - np.asarray(before.convert("RGB"), np.int16)
        if np.abs(moved).max() <= 1:
            return None
    return convert
