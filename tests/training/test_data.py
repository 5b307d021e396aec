"""cm_runtime.training.data against files made by hand, Pillow, NumPy and tarfile, and a local web server."""

import gzip
import hashlib
import http.server
import io
import lzma
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_runtime.errors import DataError, MissingExtraError, RequestError
from cm_runtime.training.data import DATA_SETS, cifar, open_data
from cm_runtime.training.data.catalogue import RemoteFile
from cm_runtime.training.data.download import fetch
from cm_runtime.training.data.image_set import ImageSet, Pixels

EXCERPT = Path(__file__).parents[1] / "data" / "fashion-mnist"
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
SIZES = [1, 3, 7, 255]


def refuse(source: Path | str, *words: str, **options: object) -> str:
    """``open_data`` refuses ``source`` with one line that holds ``words``."""
    with pytest.raises(DataError) as caught:
        open_data(source, **options)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line and line.isprintable()
    for word in words:
        assert word in line
    return line


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that ``call`` held at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ImageSet


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_image_set_keeps_what_it_is_given(side: int, dtype: type) -> None:
    images: Pixels = np.zeros((side, 3, 7, side), dtype)
    images[0, 0, 0, 0] = 5  # float data is not clipped
    data = ImageSet(images, np.arange(side, dtype=np.int64), side, "x")
    assert len(data) == side and data.image_shape == (3, 7, side) and data.images is images
    assert ImageSet(images, None, 0, "x").num_classes == 0


@pytest.mark.parametrize(
    ("images", "labels", "classes", "word"),
    [
        (np.zeros((2, 1, 2, 2), np.float64), None, 0, "float64"),
        ([[1]], None, 0, "list"),
        (np.zeros((2, 2, 2), np.uint8), None, 0, "(2, 2, 2)"),
        (np.zeros((0, 1, 2, 2), np.uint8), None, 0, "(0, 1, 2, 2)"),
        (np.zeros((1, 1, 1, 4097), np.uint8), None, 0, "4097"),
        (np.full((2, 1, 2, 2), np.nan, np.float32), None, 0, "NaN"),
        (np.full((2, 1, 2, 2), -np.inf, np.float32), None, 0, "infinity"),
        (np.zeros((2, 1, 2, 2), np.uint8), None, 3, "without labels"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int64), 0, "0 classes"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int32), 1, "int64"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.zeros(3, np.int64), 1, "3 labels"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.array([0, 2]), 2, "0..1"),
        (np.zeros((2, 1, 2, 2), np.uint8), np.array([0, -1]), 2, "-1..0"),
    ],
)
def test_image_set_refuses(images: object, labels: object, classes: int, word: str) -> None:
    with pytest.raises(DataError, match="x: ") as caught:
        ImageSet(images, labels, classes, "x")  # type: ignore[arg-type]
    assert word in str(caught.value)


# IDX


def idx_bytes(array: np.ndarray) -> bytes:
    """The format by its definition: 0 0 08 ndim, dims big-endian, bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "train", gz: bool = False) -> None:
    for array, kind in ((images, "images-idx3"), (labels, "labels-idx1")):
        data = idx_bytes(array)
        name = f"{prefix}-{kind}-ubyte"
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("gz", [False, True])
def test_idx_folder_and_file(tmp_path: Path, side: int, gz: bool) -> None:
    images = RNG.integers(0, 256, (side, 3, side), np.uint8)
    labels = (np.arange(side) % 5).astype(np.uint8)
    write_idx(tmp_path, images, labels, gz=gz)
    write_idx(tmp_path, images[:1] ^ 255, labels[:1], "t10k", gz=gz)
    data = open_data(tmp_path)
    assert data.labels is not None and data.labels.dtype == np.int64
    np.testing.assert_array_equal(data.images, images[:, None])
    np.testing.assert_array_equal(data.labels, labels)
    assert data.num_classes == min(side, 5) and data.name == tmp_path.name
    np.testing.assert_array_equal(open_data(tmp_path, split="test").images, images[:1, None] ^ 255)
    alone = open_data(str(tmp_path / "train-images-idx3-ubyte") + ".gz" * gz)
    np.testing.assert_array_equal(alone.images, images[:, None])
    assert alone.labels is None and alone.num_classes == 0


def test_excerpt_is_fashion_mnist() -> None:
    train, test = open_data(EXCERPT), open_data(EXCERPT, split="test")
    assert train.labels is not None and test.labels is not None
    assert train.image_shape == test.image_shape == (1, 28, 28)
    assert np.bincount(train.labels).tolist() == [52, 52] + [51] * 8
    assert np.bincount(test.labels).tolist() == [13] * 8 + [12] * 2
    # the originals begin so in every tutorial
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert test.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert train.images.max() == 255 and not train.images[:, 0, 0, 0].any()
    for file in EXCERPT.glob("*.gz"):
        assert file.read_bytes()[4:8] == b"\0\0\0\0"  # no time stamp


GOOD_IDX = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 2, 2))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "nothing"),
        (b"\0\0", "0000"),
        (b"hello world", "68656c6c"),
        (b"\0\0\x0d\x03" + GOOD_IDX[4:], "0x0d"),
        (idx_bytes(np.zeros(9, np.uint8)), "1 dims"),
        (GOOD_IDX[:13], "header"),
        (GOOD_IDX[:-1], "only 11"),
        (GOOD_IDX + b"x", "more"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 0, 2, 2), "(0, 2, 2)"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 1, 1, 5000) + bytes(5000), "5000"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 4096, 4096), "declares"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**28, 1, 1), "only 0"),
        (struct.pack(">4B3I", 0, 0, 8, 3, 2**28 + 1, 1, 1), "unpack a file above 268435456 bytes"),
    ],
)
@pytest.mark.parametrize("gz", [False, True])
def test_idx_garbage(tmp_path: Path, content: bytes, word: str, gz: bool) -> None:
    file = tmp_path / "odd-images"
    file.write_bytes(gzip.compress(content) if gz else content)
    assert peak_bytes(lambda: refuse(file, "odd-images: ", word)) < 4 * 2**20


def test_idx_damaged_gzip(tmp_path: Path) -> None:
    file = tmp_path / "images.gz"
    packed = gzip.compress(idx_bytes(RNG.integers(0, 256, (9, 28, 28), np.uint8)))
    for damaged in (
        packed[:-1],
        packed[: len(packed) // 2],
        packed[:-8] + b"1234" + packed[-4:],
        packed[:12] + packed[13:],
    ):
        file.write_bytes(damaged)
        refuse(file, "images.gz: is truncated or damaged")


def test_idx_bomb_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "bomb.gz"
    packer = zlib.compressobj(9, wbits=31)
    megabyte = bytes(2**20)
    bomb = packer.compress(struct.pack(">4B3I", 0, 0, 8, 3, 1, 28, 28))
    file.write_bytes(bomb + b"".join(packer.compress(megabyte) for _ in range(64)) + packer.flush())
    assert peak_bytes(lambda: refuse(file, "but more are there")) < 8 * 2**20


def test_idx_counts_and_missing_halves(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((3, 2, 2), np.uint8), np.zeros(4, np.uint8))
    refuse(tmp_path, "train-labels-idx1-ubyte: ", "4 labels", "3 images")
    refuse(tmp_path, "t10k-images-idx3-ubyte.gz", split="test")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    refuse(tmp_path, "holds no train-labels-idx1-ubyte")


# CIFAR-10


def cifar_batch(count: int, seed: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Records by their definition, with the images and labels that they stand for."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    images = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
    records = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
    return records, images, labels


def cifar_files(count: int = 3) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """All six files, and the training images and labels."""
    train = [cifar_batch(count, seed) for seed in range(5)]
    files = {f"data_batch_{i + 1}.bin": batch[0] for i, batch in enumerate(train)}
    files["test_batch.bin"] = cifar_batch(count, 5)[0]
    return files, np.concatenate([batch[1] for batch in train]), np.concatenate([batch[2] for batch in train])


def tar_gz(files: dict[str, bytes]) -> bytes:
    """As the original: one folder; the batches in no particular order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in sorted(files, reverse=True):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    return buffer.getvalue()


@pytest.mark.parametrize("count", [1, 3, 7])
def test_cifar_folder_and_archive(tmp_path: Path, count: int) -> None:
    files, images, labels = cifar_files(count)
    pack: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
    ]
    folder = tmp_path / "batches"
    folder.mkdir()
    for i, (name, content) in enumerate(files.items()):
        suffix, compress = pack[i % 3]
        (folder / (name + suffix)).write_bytes(compress(content))
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.write_bytes(tar_gz(files | {"readme.html": b"<html>"}))
    for source in (folder, archive):
        data = open_data(source)
        assert data.labels is not None and data.num_classes == 10 and data.labels.dtype == np.int64
        np.testing.assert_array_equal(data.images, images)
        np.testing.assert_array_equal(data.labels, labels)
        np.testing.assert_array_equal(open_data(source, split="test").images, cifar_batch(count, 5)[1])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "holds 0 bytes"),
        (bytes(3072), "multiple of 3073"),
        (bytes(3074), "multiple of 3073"),
        (bytes(3073) + b"\x0a" + bytes(3072), "label 10"),
        (bytes(3073 * 10_001), "more than 30730000 bytes"),
        (gzip.compress(bytes(3073), mtime=0)[:-9], "truncated or damaged"),
        (lzma.compress(bytes(3073))[:-9], "truncated or damaged"),
        (lzma.compress(bytes(3073 * 10_001)), "more than 30730000 bytes"),
    ],
)
def test_cifar_garbage(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    refuse(tmp_path, "test_batch.bin: ", word, split="test")
    refuse(tmp_path, "holds no data_batch_1.bin")


def tar_head(size: int, kind: bytes, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.process
def test_cifar_archive_of_extended_headers(tmp_path: Path) -> None:
    """Those that tarfile takes squared time, its whole stack, or all memory for."""
    archive = tmp_path / "c.tar"
    long = 200_000
    for content, word in (
        (tar_head(long, b"x") + (b"1" * long).ljust(-(-long // 512) * 512, b"\0") + bytes(1024), "200000 bytes"),
        ((tar_head(1, b"L") + b"a".ljust(512, b"\0")) * 5000 + bytes(1024), "holds no data_batch_1.bin"),
        (tar_head(0, b"0") * 10_001, "over 10000 members"),
    ):
        archive.write_bytes(content)
        start = time.monotonic()
        refuse(archive, word)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_cifar_archive_as_other_tools_pack_it(tmp_path: Path, form: int) -> None:
    files, images, _ = cifar_files(2)
    with tarfile.open(tmp_path / "c.tar", "w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{'folder/' * (3 if form == tarfile.USTAR_FORMAT else 30)}{name}")
            info.size, info.mtime = len(content), 0.5
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("readme.html"))
    np.testing.assert_array_equal(open_data(tmp_path / "c.tar").images, images)


def test_cifar_archive_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _, _ = cifar_files(1)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    whole = tar_gz(files)
    raw = gzip.decompress(whole)
    header = raw.index(b"cifar-10-batches-bin/data_batch_5.bin")
    for damaged, word in (
        (whole[:-1], "truncated or damaged"),
        (whole[: len(whole) // 2], "truncated or damaged"),
        (whole[:-8] + b"1234" + whole[-4:], "truncated or damaged"),
        (gzip.compress(raw[: header + 512 + 1000], mtime=0), "not a whole tar"),
        (gzip.compress(b"not a tar" * 1000, mtime=0), "not a whole tar"),
        (b"", "not a whole tar"),
        (tar_gz({"data_batch_1.bin": files["data_batch_1.bin"]}), "holds no data_batch_2.bin"),
        (tar_gz(files | {"data_batch_3.bin": bytes(99)}), "data_batch_3.bin: holds 99 bytes"),
        (
            tar_gz({f"{i}/data_batch_1.bin": files["data_batch_1.bin"] for i in range(2)}),
            "second data_batch_1",
        ),
    ):
        archive.write_bytes(damaged)
        refuse(archive, word)
    monkeypatch.setattr(cifar, "MAX_ARCHIVE", 2**20)
    archive.write_bytes(tar_gz(files | {"a-bomb": bytes(2**22)}))
    refuse(archive, "unpacks to more than 1048576 bytes")


# npz


@pytest.mark.parametrize("side", [2, 7, 255])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_layouts(tmp_path: Path, side: int, channels: int, save: Callable[..., None]) -> None:
    file = tmp_path / "x.npz"
    images = RNG.integers(0, 256, (3, channels, side, 7), np.uint8)
    nhwc = images.transpose(0, 2, 3, 1)
    labels = np.array([4, 0, 2], np.int16)
    floats = (images / np.float32(127.5) - 1).astype(np.float32)
    for arrays, expected in (
        ({"images": images, "labels": labels, "other": np.zeros(3)}, images),
        ({"images": np.ascontiguousarray(nhwc), "labels": labels}, images),
        ({"images": np.asfortranarray(images), "labels": labels}, images),
        ({"images": floats, "labels": labels}, floats),
        ({"images": floats.astype(">f4"), "labels": labels.astype(">u8")}, floats),
        ({"arr_0": nhwc, "arr_1": labels}, images),
        ({"arr_0": floats.transpose(0, 2, 3, 1), "arr_1": labels}, floats),
    ):
        save(file, **arrays)
        data = open_data(file)
        assert data.images.dtype == expected.dtype and data.images.flags.c_contiguous
        np.testing.assert_array_equal(data.images, expected)
        assert data.labels is not None and data.labels.dtype == np.int64
        assert data.labels.tolist() == [4, 0, 2] and data.num_classes == 5
    save(file, images=images)
    assert open_data(file).labels is None


def test_npz_arr_0_settles_what_images_cannot(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    images = RNG.integers(0, 256, (5, 3, 7, 1), np.uint8)
    np.savez(file, images=images)
    refuse(file, "(5, 3, 7, 1)", "arr_0")
    np.savez(file, images)
    assert open_data(file).image_shape == (1, 3, 7)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"x_train": np.zeros((2, 1, 2, 2), np.uint8)}, "x_train"),
        ({"images": np.zeros((2, 4, 2, 4), np.uint8)}, "(2, 4, 2, 4)"),
        ({"images": np.zeros((2, 32, 32, 3), np.float32)}, "(N, C, H, W)"),
        ({"arr_0": np.zeros((2, 3, 32, 32), np.uint8)}, "(N, H, W, C)"),
        ({"images": np.zeros((2, 28, 28), np.uint8)}, "(2, 28, 28)"),
        ({"images": np.zeros((2, 1, 2, 2))}, "float64"),
        ({"images": np.zeros((2, 1, 2, 2), object)}, "nothing is unpickled"),
        ({"images": np.zeros((0, 1, 2, 2), np.uint8)}, "non-empty"),
        ({"images": np.zeros((2, 1, 2, 2), "V4")}, "plain numbers"),
        ({"images": np.full((2, 1, 2, 2), np.inf, np.float32)}, "infinity"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "2 images"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.zeros((2, 10), int)}, "(2, 10)"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.zeros(2)}, "integers"),
        ({"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.array([0, -1])}, "-1..0"),
        (
            {"images": np.zeros((2, 1, 4, 4), np.uint8), "labels": np.array([0, 2**63], np.uint64)},
            "9223372036854775808",
        ),
    ],
)
def test_npz_garbage(tmp_path: Path, arrays: dict[str, np.ndarray], word: str) -> None:
    file = tmp_path / "odd.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    refuse(file, "odd.npz: ", word)


def npy_header(shape: str, descr: str = "'|u1'", version: int = 1) -> bytes:
    """The npy format by its definition (numpy NEP 1)."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUM",
        b"PK\3\4",
        npy_header("(10000, 1000, 1000, 1)") + bytes(100),
        npy_header("(1, 3, 2**9, 4)") + bytes(100),
        npy_header("(-1, -3, 4, 4)") + bytes(48),
        npy_header("(1, 3, 4, 4)") + bytes(47),
        npy_header("(1, 3, 4, 4)") + bytes(49),
        npy_header("{[]: 1}") + bytes(48),
        npy_header("((((((((") + bytes(48),
        npy_header("(1, 3, 4, 4)", "[('a', '|u1')]") + bytes(48),
        npy_header("(1, 3, 4, 4)", "'|O'") + bytes(384),
        npy_header("(1, 3, 4, 4)", version=3) + bytes(48),
        b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(2**18),
    ],
)
def test_npz_lying_headers(tmp_path: Path, content: bytes, packing: int) -> None:
    file = tmp_path / "odd.npz"
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("images.npy", content)
    assert peak_bytes(lambda: refuse(file, "odd.npz: ", "images.npy")) < 4 * 2**20


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_directory_lies_along(tmp_path: Path, packing: int) -> None:
    """Header and zip directory agree on 2 GB that are not there."""
    file = tmp_path / "odd.npz"
    head = npy_header("(2000, 1000, 1000, 1)")
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("images.npy", head + bytes(1000))
    data = bytearray(file.read_bytes())
    entry = data.index(b"PK\1\2")
    lie = struct.pack("<I", len(head) + 2 * 10**9)
    data[entry + 24 : entry + 28] = lie
    if packing == zipfile.ZIP_STORED:
        data[entry + 20 : entry + 24] = lie
    file.write_bytes(data)
    assert peak_bytes(lambda: refuse(file, "odd.npz: ")) < 8 * 2**20


def test_npz_damaged_archives(tmp_path: Path) -> None:
    file = tmp_path / "odd.npz"
    np.savez(file, images=np.zeros((3, 1, 8, 8), np.uint8))
    whole = file.read_bytes()
    for damaged in (b"", b"hello", whole[:100], whole[:-10], whole[:200] + b"\1" + whole[201:]):
        file.write_bytes(damaged)
        refuse(file, "odd.npz: ")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("images.npy", npy_header("(1, 3, 4, 4)") + bytes(48))
    refuse(file, "unusual")
    refuse(file, "no test split", split="test")


@pytest.mark.process
def test_npz_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    file = tmp_path / "odd.npz"
    np.savez_compressed(file, images=RNG.integers(0, 256, (2, 1, 4, 4), np.uint8), labels=np.array([0, 1]))
    whole = file.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        try:
            open_data(file)
        except DataError as error:
            assert "\n" not in str(error)


# Folders of pictures


def picture(side: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, *channels), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folder_without_classes(tmp_path: Path, side: int, mode: str) -> None:
    for i, suffix in enumerate(("png", "bmp", "PNG")):
        picture(side, mode, i).save(tmp_path / f"{i}.{suffix}")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "._0.png").write_bytes(b"what a Mac leaves")
    data = open_data(tmp_path)
    expected = np.stack([np.asarray(picture(side, mode, i)) for i in range(3)])
    expected = expected[:, None] if mode == "L" else expected.transpose(0, 3, 1, 2)
    assert data.labels is None and data.num_classes == 0
    np.testing.assert_array_equal(data.images, expected)


def test_folder_with_classes_in_sorted_order(tmp_path: Path) -> None:
    for i, name in enumerate(("b/1.png", "b/deep/0.png", "a/9.jpg", "c/x.webp")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8, "RGB", i).save(tmp_path / name, lossless=True)
    data = open_data(tmp_path)
    assert data.labels is not None and data.labels.tolist() == [0, 1, 1, 2] and data.num_classes == 3
    for row, seed in ((1, 0), (2, 1), (3, 3)):  # all but the jpeg, which is lossy
        np.testing.assert_array_equal(data.images[row].transpose(1, 2, 0), np.asarray(picture(8, "RGB", seed)))
    refuse(tmp_path, "no test subfolder", split="test")


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(count):
            picture(4).save(tmp_path / split / "cat" / f"{i}.png")
    assert len(open_data(tmp_path)) == 3 and len(open_data(tmp_path, split="test")) == 2
    (tmp_path / "bus").mkdir()
    picture(4).save(tmp_path / "bus" / "0.png")
    assert open_data(tmp_path).num_classes == 3  # "train" may be a class among others


def test_folder_one_colour_picture_makes_all_colour(tmp_path: Path) -> None:
    picture(4, "L").save(tmp_path / "0.png")
    picture(4, "RGB").save(tmp_path / "1.png")
    data = open_data(tmp_path)
    assert data.image_shape == (3, 4, 4)
    np.testing.assert_array_equal(data.images[0], np.stack([np.asarray(picture(4, "L"))] * 3))


def test_folder_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((4, 10), np.uint8)
    wide[:, 3:7] = 200  # the centred square; the rest must not bleed in
    Image.fromarray(wide).save(tmp_path / "0.png")
    Image.fromarray(wide.T).save(tmp_path / "1.png")
    for size in (2, 4, 7):
        data = open_data(tmp_path, image_size=size)
        assert data.image_shape == (1, size, size) and (data.images == 200).all()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / "0.png")
    np.testing.assert_array_equal(open_data(tmp_path, image_size=4).images[0, 0], np.arange(16).reshape(4, 4))


def test_folder_turns_pictures_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    np.testing.assert_array_equal(open_data(tmp_path).images[0, 0], np.rot90(pixels, -1))


def test_folder_sizes_must_agree(tmp_path: Path) -> None:
    picture(4).save(tmp_path / "0.png")
    picture(5).save(tmp_path / "1.png")
    refuse(tmp_path, "1.png: is 5x5", "0.png is 4x4", "image_size")
    assert open_data(tmp_path, image_size=3).image_shape == (3, 3, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_folder_truncated_picture_is_named(tmp_path: Path, suffix: str) -> None:
    picture(16, seed=1).save(tmp_path / f"0.{suffix}")
    picture(16, seed=2).save(tmp_path / f"1.{suffix}")
    whole = (tmp_path / f"1.{suffix}").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 20):
        (tmp_path / f"1.{suffix}").write_bytes(whole[:length])
        refuse(tmp_path, f"1.{suffix}: is ")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header declares that size, and nothing behind it."""
    chunks = ((b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    pack = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack)


def test_folder_flipped_bit_in_a_png_is_named(tmp_path: Path) -> None:
    picture(16).save(tmp_path / "0.png")
    whole = bytearray((tmp_path / "0.png").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "0.png").write_bytes(whole)
    refuse(tmp_path, "0.png: is truncated or damaged")


@pytest.mark.filterwarnings("error")
def test_folder_refuses(tmp_path: Path) -> None:
    def only(name: str, write: Callable[[Path], object], *words: str) -> None:
        file = tmp_path / name
        write(file)
        assert peak_bytes(lambda: refuse(tmp_path, f"{name}: ", *words)) < 4 * 2**20
        file.unlink()

    glass = picture(4, "RGBA")
    frames = [picture(4, seed=1), picture(4, seed=2)]
    deep = Image.fromarray(np.full((4, 4), 40000, np.uint16))
    refuse(tmp_path, "holds no data")
    only("a.png", lambda file: file.write_text("hello"), "not a readable image")
    only("bomb.png", lambda file: file.write_bytes(png_claiming(10_000, 10_000)), "10000x10000")
    only("bigger.png", lambda file: file.write_bytes(png_claiming(60_000, 60_000)), "not a readable image")
    only("glass.png", glass.save, "transparent")
    only("deep.png", deep.save, "16")
    only("film.png", lambda file: frames[0].save(file, save_all=True, append_images=frames[1:]), "animated")
    only("gif.png", lambda file: frames[0].save(file, format="GIF"), "not a readable image")
    only("wide.png", Image.new("L", (5000, 1)).save, "5000x1")
    only("pipe.png", os.mkfifo, "not a regular file")
    only("link.png", lambda file: file.symlink_to(tmp_path / "gone"), "no such file")
    only("two lines.png", lambda file: file.write_text("hello"), "not a readable image")
    glass.putalpha(255)
    glass.save(tmp_path / "0.png")
    np.testing.assert_array_equal(open_data(tmp_path).images[0], np.asarray(glass)[..., :3].transpose(2, 0, 1))
    (tmp_path / "sub").mkdir()
    refuse(tmp_path, "0.png", "sub", "beside")
    (tmp_path / "0.png").unlink()
    refuse(tmp_path, "sub: ", "without images")


def test_folder_deep_picture_after_a_colour_one(tmp_path: Path) -> None:
    """The grey test stops at the first colour picture; the mode of the others is checked all the same."""
    picture(4).save(tmp_path / "0.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "1.png")
    refuse(tmp_path, "1.png: stores mode I;16")


# Sources and arguments


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("~nobody-of-this-name/x", "no such file or folder; check the path"),
        ("a\0b", "no file can have such a name; check the path"),
        ("loop", "is neither a file nor a folder"),
    ],
)
def test_open_data_paths_that_lead_nowhere(
    tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    refuse(name, words)


def test_open_data_missing_paths(tmp_path: Path) -> None:
    for name in ("fashion_mnist", "CIFAR10"):
        line = refuse(name, name, *DATA_SETS)
        assert line.count("\n") == 0
    line = refuse(tmp_path / "gone.npz", "no such file", "check the path")
    assert "fashion-mnist" not in line
    refuse(tmp_path / "a\nb\x1b[31m", "a b?[31m: no such file")
    refuse("x" * 5000, "cannot be read")
    refuse("/dev/null", "neither a file nor a folder")


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read everything")
def test_open_data_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    file.touch(mode=0)
    refuse(file, "Permission denied")


def test_open_data_arguments() -> None:
    with pytest.raises(RequestError, match="split 'valid'"):
        open_data(EXCERPT, split="valid")  # type: ignore[arg-type]
    for size in (0, 4097):
        with pytest.raises(RequestError, match=f"image_size {size}"):
            open_data(EXCERPT, image_size=size)
    assert open_data(EXCERPT, image_size=28, split="test").image_shape == (1, 28, 28)
    refuse(EXCERPT, "28x28 images, not 32x32", image_size=32)
    refuse(EXCERPT / "t10k-images-idx3-ubyte.gz", "no test split", split="test")


def test_known_files_are_those_published() -> None:
    """What a typing slip would break; the checksums themselves are compared with a real copy by hand."""
    for files in DATA_SETS.values():
        for name, remote in files.items():
            assert len(bytes.fromhex(remote.sha256)) == 32 and remote.size > 4000
            assert remote.urls and all(url.startswith("http") and url.endswith("/" + name) for url in remote.urls)
    everything = [remote.sha256 for files in DATA_SETS.values() for remote in files.values()]
    assert len(everything) == len(set(everything)) == 9


# Downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers each path by a function of the handler; counts what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[http.server.BaseHTTPRequestHandler], None]] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def serve(self, path: str, content: bytes, sent: int | None = None, length: bool = True) -> str:
        """Answer ``path`` with ``content``, of which only ``sent`` bytes are really sent."""

        def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            if length:
                handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:sent])

        self.answers[path] = answer
        return self.url + path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        if self.path in self.server.answers:
            self.server.answers[self.path](self)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def published(content: bytes, *urls: str) -> RemoteFile:
    return RemoteFile(hashlib.sha256(content).hexdigest(), len(content), urls)


def serve_data_set(monkeypatch: pytest.MonkeyPatch, server: Server, name: str, files: dict[str, bytes]) -> None:
    """Publish ``files`` as the data set ``name`` on the server, as its mirror."""
    for file, content in files.items():
        server.serve(f"/mirror/{name}/{file}", content)
    monkeypatch.setitem(DATA_SETS, name, {file: published(content) for file, content in files.items()})
    monkeypatch.setenv("CM_RUNTIME_MIRROR", server.url + "/mirror/")


def test_download_by_name(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {file.name: file.read_bytes() for file in EXCERPT.glob("*.gz")}
    serve_data_set(monkeypatch, server, "fashion-mnist", files)
    monkeypatch.setenv("CM_RUNTIME_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data = open_data("fashion-mnist", progress=True)
    assert len(data) == 512 and data.num_classes == 10 and data.name == "fashion-mnist"
    folder = tmp_path / "data" / "fashion-mnist"
    assert {file.name for file in folder.iterdir()} == {name for name in files if name.startswith("train")}
    assert sorted(server.requests) == sorted(f"/mirror/fashion-mnist/{file.name}" for file in folder.iterdir())
    server.requests.clear()
    np.testing.assert_array_equal(open_data("fashion-mnist").images, data.images)
    assert server.requests == []  # the cache, and nothing else
    assert len(open_data("fashion-mnist", split="test", cache=tmp_path / "other")) == 128
    assert len(list((tmp_path / "other" / "data" / "fashion-mnist").iterdir())) == 2
    assert capfd.readouterr() == ("", "")  # not a terminal


def test_download_archive_by_name(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    files, images, _ = cifar_files(2)
    serve_data_set(monkeypatch, server, "cifar-10", {"cifar-10-binary.tar.gz": tar_gz(files)})
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(open_data("cifar-10", cache=tmp_path).images, images)
    assert len(open_data("cifar-10", cache=tmp_path, split="test")) == 2
    assert len(server.requests) == 1


def test_download_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.uint8))
    monkeypatch.chdir(tmp_path.parent)
    tmp_path.rename("mnist")
    assert len(open_data("mnist")) == 3


def test_download_repairs_a_damaged_cache(tmp_path: Path, server: Server) -> None:
    content = RNG.bytes(1000)
    remote = published(content, server.serve("/x", content))
    (tmp_path / "x").write_bytes(content[:500])
    fetch(tmp_path / "x", remote)
    assert (tmp_path / "x").read_bytes() == content
    assert (tmp_path / "x").stat().st_mode & 0o044  # a shared cache can be read by others


def test_download_failures_leave_nothing(tmp_path: Path, server: Server) -> None:
    content = RNG.bytes(300_000)
    good = published(content)
    bad = {
        "404": (server.url + "/gone", "HTTP 404"),
        "other": (server.serve("/other", content[::-1]), "not the published file"),
        "longer": (server.serve("/longer", content + b"x", length=False), "not the published file"),
        "broken": (server.serve("/broken", content, sent=200_000), "broke before the end"),
        "short": (server.serve("/short", content, sent=200_000, length=False), "not the published file"),
        "refused": ("http://127.0.0.1:9/x", "no connection"),
        "scheme": ("file:///etc/hostname", "file:///etc/hostname"),
    }
    for url, word in bad.values():
        with pytest.raises(DataError) as caught:
            fetch(tmp_path / "cache" / "x", replace(good, urls=(url,)))
        assert word in str(caught.value) and "CM_RUNTIME_MIRROR" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache").iterdir()) == []
    urls = (*(url for url, _ in bad.values()), server.serve("/good", content))
    fetch(tmp_path / "cache" / "x", replace(good, urls=urls))
    assert (tmp_path / "cache" / "x").read_bytes() == content
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="set CM_RUNTIME_CACHE"):
        fetch(tmp_path / "file" / "x", replace(good, urls=urls))


def test_download_ignores_gzip_labels(tmp_path: Path, server: Server) -> None:
    """A server that honours Accept-Encoding and calls a .gz file encoded gets no chance to."""
    content = gzip.compress(b"idx")

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if "gzip" in handler.headers.get("Accept-Encoding", ""):
            handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(content)

    server.answers["/x.gz"] = answer
    fetch(tmp_path / "x.gz", published(content, server.url + "/x.gz"))
    assert (tmp_path / "x.gz").read_bytes() == content


FETCH = """
import sys
from pathlib import Path
from cm_runtime.training.data.download import fetch
from cm_runtime.training.data.image_set import Pixels
from cm_runtime.training.data.catalogue import RemoteFile
target, sha256, size, url = sys.argv[1:]
fetch(Path(target), RemoteFile(sha256, int(size), (url,)))
"""


def start_fetch(target: Path, remote: RemoteFile) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", FETCH, str(target), remote.sha256, str(remote.size), remote.urls[0]]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.process
def test_download_by_two_processes_at_once(tmp_path: Path, server: Server) -> None:
    content = RNG.bytes(300_000)
    both_ask = threading.Barrier(2, timeout=30)

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        both_ask.wait()
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content)

    server.answers["/x"] = answer
    remote = published(content, server.url + "/x")
    processes = [start_fetch(tmp_path / "x", remote) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "x").read_bytes() == content and len(list(tmp_path.iterdir())) == 1


@pytest.mark.process
@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_download_killed_half_way(tmp_path: Path, server: Server) -> None:
    content = RNG.bytes(300_000)
    killed = threading.Event()

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:200_000])
        handler.wfile.flush()
        killed.wait(30)

    server.answers["/x"] = answer
    remote = published(content, server.url + "/x")
    process = start_fetch(tmp_path / "x", remote)
    while not any(file.stat().st_size for file in tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    killed.set()
    assert not (tmp_path / "x").exists()
    server.serve("/x", content)
    fetch(tmp_path / "x", remote)
    assert (tmp_path / "x").read_bytes() == content


def test_download_without_pooch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingExtraError, match=r"pooch: pip install 'cm-runtime\[train\]'"):
        open_data("mnist", cache=tmp_path)
