"""Shards on disk: other tools read what was put in, and whatever is not whole is told apart."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from PIL import Image

from cm_runtime.errors import DataError, OutputError
from cm_runtime.files import atomic
from cm_runtime.generation import formats
from cm_runtime.generation.formats import Contents
from cm_runtime.sampling import Batch

KINDS = ("npz", "png", "wds", "parquet")
FIRST = 4


def contents(count: int, channels: int = 3, has_labels: bool = True, output: Any = "uint8") -> Contents:
    return Contents(count, (5, 7, channels), output, has_labels, {"seed": 3, "start": FIRST})


def parts(wanted: Contents, at_once: int = 3, first: int = FIRST) -> Iterator[Batch]:
    """Random images, a few at once, with labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(wanted.count)
    for start in range(0, wanted.count, at_once):
        size = min(at_once, wanted.count - start)
        index = np.arange(size, dtype=np.uint64) + np.uint64(first + start)
        images = rng.integers(0, 256, (size, *wanted.shape), np.uint8)
        yield Batch(index, (index % np.uint64(3)).astype(np.int64) if wanted.has_labels else None, images)


def written(kind: Any, wanted: Contents, folder: Path, number: int = 0) -> Path:
    where = formats.path(folder, kind, number)
    formats.write(where, kind, wanted, parts(wanted))
    assert [path.name for path in folder.iterdir()] == [where.name]  # and nothing of the writing
    return where


def together(wanted: Contents) -> tuple[list[int], list[int | None], NDArray[np.uint8]]:
    batches = list(parts(wanted, wanted.count))
    (whole,) = batches
    labels = [None] * wanted.count if whole.labels is None else whole.labels.tolist()
    images = np.concatenate([part.images for part in parts(wanted)])
    return whole.index.tolist(), labels, images


def pixels(png: bytes | Path) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


# What other tools read


def by_numpy(where: Path) -> Iterator[tuple[int, int | None, NDArray[Any]]]:
    with np.load(where, allow_pickle=False) as arrays:
        start = json.loads(str(arrays["cm_runtime"]))["start"]
        labels = arrays["arr_1"].tolist() if "arr_1" in arrays else [None] * len(arrays["arr_0"])
        for n, (label, image) in enumerate(zip(labels, arrays["arr_0"], strict=True)):
            yield start + n, label, image


def by_pillow(where: Path) -> Iterator[tuple[int, int | None, NDArray[Any]]]:
    labels: dict[str, int] = {}
    if (where / "metadata.csv").exists():
        with (where / "metadata.csv").open(newline="") as file:
            labels = {row["file_name"]: int(row["label"]) for row in csv.DictReader(file)}
    for path in sorted(where.glob("*.png")):
        yield int(path.stem), labels.get(path.name), pixels(path)


def by_tar(where: Path) -> Iterator[tuple[int, int | None, NDArray[Any]]]:
    """As WebDataset groups files: neighbours of one name up to its first dot are a sample."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(where) as archive:
        for member in archive:
            key, _, ending = member.name.partition(".")
            file = archive.extractfile(member)
            assert file is not None and member.mtime == member.uid == member.gid == 0
            assert key not in samples or key == list(samples)[-1]
            samples.setdefault(key, {})[ending] = file.read()
    for key, sample in samples.items():
        yield int(key), int(sample["cls"]) if "cls" in sample else None, pixels(sample["png"])


def by_pyarrow(where: Path) -> Iterator[tuple[int, int | None, NDArray[Any]]]:
    for row in pyarrow.parquet.read_table(where).to_pylist():
        assert row["image"]["path"] == f"{row['index']:09d}.png"
        yield row["index"], row.get("label"), pixels(row["image"]["bytes"])


READERS = {"npz": by_numpy, "png": by_pillow, "wds": by_tar, "parquet": by_pyarrow}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3, 7, 255])
def test_another_tool_reads_the_same_images_labels_and_indices(tmp_path: Path, kind: str, count: int) -> None:
    wanted = contents(count)
    found = list(READERS[kind](written(kind, wanted, tmp_path)))
    indices, labels, images = together(wanted)
    assert [index for index, _, _ in found] == indices
    assert [label for _, label, _ in found] == labels
    assert np.array_equal(np.stack([image for _, _, image in found]), images)


@pytest.mark.parametrize("kind", KINDS)
def test_grey_images_without_labels_are_just_that(tmp_path: Path, kind: str) -> None:
    wanted = contents(5, channels=1, has_labels=False)
    found = list(READERS[kind](written(kind, wanted, tmp_path)))
    assert [label for _, label, _ in found] == [None] * 5
    assert np.array_equal(np.stack([image for _, _, image in found]), together(wanted)[2])


def test_parquet_says_to_datasets_which_column_is_a_picture(tmp_path: Path) -> None:
    schema = pyarrow.parquet.read_schema(written("parquet", contents(3), tmp_path))
    told = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert told == {
        "index": {"dtype": "uint64", "_type": "Value"},
        "label": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
    }
    assert [str(field.type) for field in schema] == ["uint64", "int64", "struct<bytes: binary, path: string>"]


def test_the_last_index_there_is_has_a_name(tmp_path: Path) -> None:
    wanted = contents(1)
    for kind in ("png", "wds", "parquet"):
        where = formats.path(tmp_path, kind, 0)  # type: ignore[arg-type]
        formats.write(where, kind, wanted, parts(wanted, first=2**64 - 1))  # type: ignore[arg-type]
        assert next(READERS[kind](where))[0] == 2**64 - 1


@pytest.mark.process
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_the_same_bytes_later_and_elsewhere(tmp_path: Path, kind: str) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for n, folder in enumerate(folders):
        folder.mkdir()
        time.sleep(2.1 * n * (kind == "npz"))  # zip counts time in steps of two seconds, tar and Parquet finer
        written(kind, contents(7), folder, number=n)
    one, other = (
        [path.read_bytes() for path in formats.members(formats.path(folder, kind, n))]  # type: ignore[arg-type]
        for n, folder in enumerate(folders)
    )
    assert one == other


# Whole or not


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_labels", [True, False])
def test_a_shard_is_there_or_it_is_not(tmp_path: Path, kind: Any, has_labels: bool) -> None:
    wanted = contents(7, has_labels=has_labels)
    assert not formats.is_whole(formats.path(tmp_path, kind, 0), kind, wanted)
    where = written(kind, wanted, tmp_path)
    assert formats.is_whole(where, kind, wanted)
    for other in (contents(8, has_labels=has_labels), contents(7, has_labels=not has_labels)):
        with pytest.raises(DataError, match=r"is not the whole shard of that name: .*; remove it and run this again"):
            formats.is_whole(where, kind, other)
    formats.remove(where)
    formats.remove(where)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["npz", "wds", "parquet"])
def test_a_file_that_ends_anywhere_early_is_not_whole(tmp_path: Path, kind: Any) -> None:
    where = written(kind, contents(7), tmp_path)
    whole = where.read_bytes()
    for length in [0, 1, 100, 511, 512, *range(600, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        where.write_bytes(whole[:length])
        with pytest.raises(DataError, match=where.name):
            formats.is_whole(where, kind, contents(7))
    where.write_bytes(whole)
    assert formats.is_whole(where, kind, contents(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["npz", "wds", "parquet", "folder", "text"])
def test_a_foreign_file_under_a_shards_name_is_named(tmp_path: Path, kind: Any, other: Any) -> None:
    if other == kind:
        return
    where = formats.path(tmp_path, kind, 0)
    if other == "folder":
        where.mkdir()
    elif other == "text":
        where.write_text("my notes")
    else:
        shutil.move(written(other, contents(7), tmp_path), where)
    with pytest.raises(DataError, match=where.name):
        formats.is_whole(where, kind, contents(7))


def test_a_picture_missing_from_a_folder_is_noticed(tmp_path: Path) -> None:
    where = written("png", contents(7), tmp_path)
    (where / "000000005.png").unlink()
    with pytest.raises(DataError, match="holds 7 files, not 8"):
        formats.is_whole(where, "png", contents(7))


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_stop_coming_leave_nothing(tmp_path: Path, kind: Any) -> None:
    def failing() -> Iterator[Batch]:
        yield from parts(contents(6))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        formats.write(formats.path(tmp_path, kind, 0), kind, contents(7), failing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, kind: Any) -> None:
    wanted = contents(255)
    where = formats.path(tmp_path, kind, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 60) if kind == "png" else (0, 1, 4096, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(OutputError, match=rf"{where.name} cannot be written: File too large"):
                formats.write(where, kind, wanted, parts(wanted))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_made_first_stays(tmp_path: Path) -> None:
    where = written("png", contents(3), tmp_path)
    before = os.stat(where).st_ino
    written("png", contents(3), tmp_path)
    assert os.stat(where).st_ino == before
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match="file cannot be written: Not a directory"),
        atomic.folder_written(tmp_path / "file", "kept"),
    ):
        pass


@pytest.mark.process
def test_other_programs_list_the_archive(tmp_path: Path) -> None:
    """The system's tar and unzip, where they are installed."""
    where = written("wds", contents(3), tmp_path)
    if shutil.which("tar"):
        listed = subprocess.run(["tar", "-tf", where], capture_output=True, text=True, check=True).stdout.split()
        assert listed[:2] == ["000000004.png", "000000004.cls"]
        assert len(listed) == 6


@pytest.mark.parametrize("kind", formats.FORMATS)
@pytest.mark.parametrize("is_what", ["pipe", "device", "loop"])
def test_what_is_no_file_under_a_shards_name_is_refused_and_not_waited_for(
    tmp_path: Path, kind: formats.Kind, is_what: str
) -> None:
    where = formats.path(tmp_path, kind, 0)
    if is_what == "pipe":
        os.mkfifo(where)
    else:
        where.symlink_to("/dev/zero" if is_what == "device" else where)
    if is_what == "loop":
        assert not formats.is_whole(where, kind, contents(3))
        return
    with pytest.raises(DataError, match=r"not a regular file|is not the whole shard of that name"):
        formats.is_whole(where, kind, contents(3))


def test_a_tar_of_long_names_in_a_row_is_no_whole_shard(tmp_path: Path) -> None:
    """The standard library follows them by calling itself."""
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 1
    block = head.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")
    where = formats.path(tmp_path, "wds", 0)
    where.write_bytes(block * 5000 + bytes(10240))
    with pytest.raises(DataError, match="is not the whole shard of that name"):
        formats.is_whole(where, "wds", contents(3))
