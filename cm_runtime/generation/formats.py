"""One shard of images on disk, in each of four formats: written whole or not at all, and known for whole again.

    npz      shard-000000.npz       arr_0 (N,H,W,C) and arr_1 (N,) int64 labels, as `image_writer.NpzWriter` has them
    png      shard-000000/          000000017.png, ...; labels in metadata.csv, as Hugging Face's imagefolder reads it
    wds      shard-000000.tar       000000017.png and 000000017.cls, as WebDataset reads them
    parquet  shard-000000.parquet   index, label and image, a picture to Hugging Face's datasets

Pictures are called by their index under the seed. The bytes depend on nothing but the images and the versions of what
writes them: no time, no user, no machine is in them.
"""

from __future__ import annotations

import importlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cm_runtime.choices import ShardKind
from cm_runtime.errors import DataError, data_error
from cm_runtime.errors.reasons import system_reason
from cm_runtime.errors.wording import quantity
from cm_runtime.extras import require
from cm_runtime.files import atomic, npz, streams
from cm_runtime.files.image_writer import NpzWriter, encode_png
from cm_runtime.request import Output
from cm_runtime.sampling import Batch

MOST = 1_000_000  # shards in a folder, numbered in six digits
LABELS = "metadata.csv"
END_OF_TAR = bytes(1024)


@dataclass(frozen=True)
class Contents:
    """Contents of a shard. shape: (H,W,C); text: an npz's description of itself."""

    count: int
    shape: tuple[int, int, int]
    output: Output
    has_labels: bool
    text: Mapping[str, Any]


class Format(NamedTuple):
    """A kind of shard. suffix: of its name; fault: what keeps an existing file from being that shard, or None."""

    suffix: str
    write: Callable[[Path, Contents, Iterator[Batch]], None]
    fault: Callable[[Path, Contents], str | None]


def path(folder: Path, kind: ShardKind, number: int) -> Path:
    """The path of a shard."""
    return folder / f"shard-{number:06d}{FORMATS[kind].suffix}"


def write(where: Path, kind: ShardKind, contents: Contents, parts: Iterator[Batch]) -> None:
    """Write the images of ``parts`` as a shard, whole or not at all. Raises OutputError, MissingExtraError."""
    FORMATS[kind].write(where, contents, _all(parts, contents.count))


def is_whole(where: Path, kind: ShardKind, contents: Contents) -> bool:
    """Return True if the shard is there, by its sizes and headers: no image is read.

    Raises DataError for anything else under its name.
    """
    if not streams.exists(where):
        return False
    if kind != "png":
        streams.regular(where, DataError)
    try:
        fault = FORMATS[kind].fault(where, contents)
    except OSError as error:
        fault = f"cannot be read ({system_reason(error)})"
    if fault:
        raise data_error(where, f"is not the whole shard of that name: it {fault}", "remove it and run this again")
    return True


def members(where: Path) -> list[Path]:
    """The files of a shard, in the order of their names."""
    return sorted(where.iterdir()) if where.is_dir() else [where]


def remove(where: Path) -> None:
    """Remove a shard, if it is there."""
    if where.is_dir() and not where.is_symlink():
        shutil.rmtree(where)
    else:
        where.unlink(missing_ok=True)


def _all(parts: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Raise ValueError in a writer that gets fewer or more images than it is to write."""
    for part in parts:
        count -= len(part.index)
        yield part
    if count:
        raise ValueError(f"{quantity(abs(count), 'image')} too {'few' if count > 0 else 'many'} for a shard")


def _pictures(part: Batch) -> Iterator[tuple[int, bytes, int | None]]:
    """Index, PNG and label of each image."""
    labels = [None] * len(part.index) if part.labels is None else part.labels.tolist()
    for index, image, label in zip(part.index.tolist(), part.images, labels, strict=True):
        yield index, encode_png(image), label


def _key(index: int) -> str:
    return f"{index:09d}"


# npz


def _write_npz(where: Path, contents: Contents, parts: Iterator[Batch]) -> None:
    with NpzWriter(where, contents.count, contents.shape, contents.output, contents.text) as file:
        for part in parts:
            file.write(part.images, part.labels)


def _npz_fault(where: Path, contents: Contents) -> str | None:
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {"arr_0.npy": (contents.output, (contents.count, *contents.shape))}
    if contents.has_labels:
        arrays["arr_1.npy"] = "int64", (contents.count,)
    try:
        with zipfile.ZipFile(where) as archive:
            if {*archive.namelist()} != {*arrays, "cm_runtime.npy"}:
                return f"holds {', '.join(archive.namelist())}"
            for name, (dtype, shape) in arrays.items():
                header = npz.header(archive, archive.getinfo(name), where)
                if (header.dtype, header.shape) != (np.dtype(dtype), shape):
                    return f"holds {name} as {header.dtype} {header.shape}, not {dtype} {shape}"
    except (*npz.BROKEN, DataError) as error:
        return f"is no whole npz ({error})"
    return None


# A folder of PNG files


def _write_png(where: Path, contents: Contents, parts: Iterator[Batch]) -> None:
    is_other = where.is_dir() and _png_fault(where, contents) is not None  # a smaller job's, which grows
    with atomic.folder_written(where, "replaced" if is_other else "kept") as folder:
        lines = ["file_name,label"]
        for part in parts:
            for index, png, label in _pictures(part):
                (folder / f"{_key(index)}.png").write_bytes(png)
                lines.append(f"{_key(index)}.png,{label}")
        if contents.has_labels:
            (folder / LABELS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _png_fault(where: Path, contents: Contents) -> str | None:
    return _count_fault(sum(1 for _ in where.iterdir()), contents.count + contents.has_labels)


def _count_fault(files: int, whole: int) -> str | None:
    return None if files == whole else f"holds {quantity(files, 'file')}, not {whole}"


# WebDataset


def _write_wds(where: Path, contents: Contents, parts: Iterator[Batch]) -> None:
    with atomic.write(where) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for part in parts:
            for index, png, label in _pictures(part):
                _add(archive, f"{_key(index)}.png", png)
                if label is not None:
                    _add(archive, f"{_key(index)}.cls", str(label).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of nobody, and of 1970
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _wds_fault(where: Path, contents: Contents) -> str | None:
    try:
        with where.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            files = sum(1 for _ in archive)
            end = file.seek(-len(END_OF_TAR), io.SEEK_END) + len(END_OF_TAR)
            if end % tarfile.RECORDSIZE or file.read() != END_OF_TAR:
                return "has no end of a tar archive"
    except (tarfile.TarError, RecursionError) as error:  # the latter: long names in a row
        return f"is no whole tar archive ({error})"
    return _count_fault(files, contents.count * (1 + contents.has_labels))


# Parquet


def _write_parquet(where: Path, contents: Contents, parts: Iterator[Batch]) -> None:
    pyarrow, parquet = _pyarrow()
    schema = _schema(pyarrow, contents)
    with (
        atomic.write(where) as temporary,
        temporary.open("wb") as file,
        parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as table,
    ):
        for part in parts:  # each is a row group, so that a picture can be read without all the others
            rows = []
            for index, png, label in _pictures(part):
                row = {"index": index, "image": {"bytes": png, "path": f"{_key(index)}.png"}}
                rows.append(row if label is None else row | {"label": label})
            table.write_table(pyarrow.Table.from_pylist(rows, schema))


def _schema(pyarrow: Any, contents: Contents) -> Any:
    """The columns, and their meaning to Hugging Face's datasets."""
    columns = {"index": pyarrow.uint64(), "label": pyarrow.int64()}
    features: dict[str, Any] = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in columns.items()}
    columns["image"] = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    features["image"] = {"_type": "Image"}
    if not contents.has_labels:
        del columns["label"], features["label"]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema(list(columns.items()), metadata)


def _parquet_fault(where: Path, contents: Contents) -> str | None:
    pyarrow, parquet = _pyarrow()
    try:
        with where.open("rb") as file, parquet.ParquetFile(file) as table:
            rows, schema = table.metadata.num_rows, table.schema_arrow
    except pyarrow.ArrowException as error:
        return f"is no whole Parquet file ({error})"
    if not schema.equals(_schema(pyarrow, contents)):
        return f"has the columns {', '.join(schema.names)}"
    return None if rows == contents.count else f"holds {quantity(rows, 'image')}, not {contents.count}"


def _pyarrow() -> tuple[Any, Any]:
    return require("pyarrow", "--shards parquet"), importlib.import_module("pyarrow.parquet")


FORMATS: dict[ShardKind, Format] = {
    "npz": Format(".npz", _write_npz, _npz_fault),
    "png": Format("", _write_png, _png_fault),
    "wds": Format(".tar", _write_wds, _wds_fault),
    "parquet": Format(".parquet", _write_parquet, _parquet_fault),
}
