"""cm_runtime/files/image_reader.py on pictures that are damaged, deep, of other colours, or bombs."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from cm_runtime.errors import DataError
from cm_runtime.files import image_reader, inputs

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(depth: int, colour: int, row: bytes, *others: bytes) -> bytes:
    """One row of two pixels; ``others``: chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(others) + pixels + chunk(b"IEND", b"")


def swapped() -> bytes:
    """sRGB's profile with the colours of red and green exchanged."""
    return SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def profile(space: bytes, connection: bytes, tag: bytes, content: bytes) -> bytes:
    """A version 2 profile with that tag and a D50 white."""
    white = struct.pack(">4sIiii", b"XYZ ", 0, 0xF6D6, 0x10000, 0xD32D)
    content = content + bytes(-len(content) % 4)
    tags = struct.pack(">I", 2) + b"".join(
        struct.pack(">4sII", name, place, size) for name, place, size in ((b"wtpt", 156, 20), (tag, 176, len(content)))
    )
    body = bytearray(128)
    body[8:12] = struct.pack(">I", 0x02100000)
    body[12:16], body[16:20], body[20:24], body[36:40] = b"prtr", space, connection, b"acsp"
    body[68:80] = struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)
    body[:4] = struct.pack(">I", 176 + len(content))
    return bytes(body) + tags + white + content


LINEAR_GREY = profile(b"GRAY", b"XYZ ", b"kTRC", struct.pack(">4sII", b"curv", 0, 0))


def cmyk_to_lab(lightness: int) -> bytes:
    """A profile of neutral greys: paper is white, black ink black, and any other that lightness."""
    ramp = bytes(range(256))
    head = struct.pack(">4sIBBBB", b"mft1", 0, 4, 3, 2, 0) + struct.pack(
        ">9i", *(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000)
    )
    corners = b"".join(bytes([0 if n % 2 else lightness if n else 255, 128, 128]) for n in range(16))
    table = head + ramp * 4 + corners + ramp * 3
    return profile(b"CMYK", b"Lab ", b"A2B0", table)


def refusal(file: Path, content: bytes | None = None) -> str:
    if content is not None:
        file.write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(DataError) as caught:
        warnings.simplefilter("error")
        image_reader.read(file, 1)
    return str(caught.value)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2), (0, 1)], ids=["RGB", "RGBA", "LA", "grey"])
def test_16_bits_are_refused_and_8_are_not(tmp_path: Path, colour: int, channels: int) -> None:
    assert "convert it to 8-bit" in refusal(tmp_path / "x.png", png(16, colour, b"\xff" * 4 * channels))
    (tmp_path / "x.png").write_bytes(png(8, colour, b"\xff" * 2 * channels))
    assert (image_reader.read(tmp_path / "x.png", 3) == 255).all()


@pytest.mark.process
def test_a_bmp_of_16_bits_a_pixel_is_read(tmp_path: Path) -> None:
    head = struct.pack("<2sIIIIiiHHIIiiII", b"BM", 58, 0, 54, 40, 1, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    (tmp_path / "x.bmp").write_bytes(head + struct.pack("<HH", 0x7FFF, 0))
    assert image_reader.read(tmp_path / "x.bmp", 3).tolist() == [[[255, 255, 255]]]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("damage", ["cut", "no pixels", "EXIF", "EXIF far away"])
def test_damaged_masks_are_one_line(tmp_path: Path, damage: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((28, 28), 90).save(buffer, "PNG")
    whole, head = buffer.getvalue(), 33
    content = {
        "cut": whole[: len(whole) // 2],
        "no pixels": whole[:head] + chunk(b"IEND", b""),
        "EXIF": whole[:head] + chunk(b"eXIf", b"nonsense") + whole[head:],
        "EXIF far away": whole[:head] + chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff") + whole[head:],
    }[damage]
    (tmp_path / "x.png").write_bytes(content)
    for read in (
        lambda: inputs.read_mask(tmp_path / "x.png", [], (28, 28)),
        lambda: inputs.read([tmp_path / "x.png"], 1, [(28, 28), (14, 14)]),
    ):
        try:
            read()
        except DataError as error:
            assert "x.png: is" in str(error)


def jpeg(scans: int) -> bytes:
    """A progressive one with so many more scans, an EXIF segment full of what looks like scans before them."""
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 50).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    decoy = b"\xff\xe2" + struct.pack(">H", 2 + 2000) + b"\xff\xda" * 1000
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:2] + decoy + whole[2:-2] + last * scans + b"\xff\xd9" + b"\xff\xda\0\2" * 200


def test_scans_of_a_jpeg_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(0))
    assert image_reader.read(tmp_path / "x.jpg", 1).shape == (16, 16, 1)
    assert "has over 100 scans" in refusal(tmp_path / "x.jpg", jpeg(500))
    many = jpeg(0)[:2] + b"\xff\xfe\0\2" * 20_000 + jpeg(0)[2:]
    assert "has over 10000 segments" in refusal(tmp_path / "x.jpg", many)


def test_profiles_are_converted_to_srgb(tmp_path: Path) -> None:
    pixels = np.array([[[255, 0, 0], [10, 200, 30]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "srgb.png", icc_profile=SRGB)
    np.testing.assert_array_equal(image_reader.read(tmp_path / "srgb.png", 3), pixels)
    Image.fromarray(pixels).save(tmp_path / "swapped.png", icc_profile=swapped())
    np.testing.assert_allclose(image_reader.read(tmp_path / "swapped.png", 3), pixels[..., [1, 0, 2]], atol=1)
    grey = np.array([[0, 55, 128, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=LINEAR_GREY)
    expected = 255 * (1.055 * (grey / 255) ** (1 / 2.4) - 0.055)  # IEC 61966-2-1 of a linear value
    np.testing.assert_allclose(image_reader.read(tmp_path / "grey.png", 1)[0, 1:, 0], expected[0, 1:], atol=1.5)
    Image.fromarray(grey).save(tmp_path / "other.png", icc_profile=swapped())  # of colour, which grey has not
    np.testing.assert_array_equal(image_reader.read(tmp_path / "other.png", 1)[..., 0], grey)


def test_cmyk_is_converted_by_its_profile(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    inks.save(tmp_path / "plain.jpg", quality=100)
    np.testing.assert_allclose(image_reader.read(tmp_path / "plain.jpg", 3)[0, 0], [255, 0, 0], atol=2)
    inks.save(tmp_path / "profiled.jpg", quality=100, icc_profile=cmyk_to_lab(255 * 50 // 100))
    np.testing.assert_allclose(image_reader.read(tmp_path / "profiled.jpg", 3)[0, 0], [119, 119, 119], atol=2)  # L* 50
    broken = b"\0" * 16 + b"CMYK" + b"\0" * 200
    inks.save(tmp_path / "broken.jpg", icc_profile=broken)
    assert "has a colour profile that cannot be used" in refusal(tmp_path / "broken.jpg")
