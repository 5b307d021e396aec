"""CIFAR-10, binary version: records of one label byte and 3072 pixel bytes, planes red, green, blue.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cm_runtime.bounded import CHUNK, CappedStream, open_stream, read_up_to
from cm_runtime.errors import data_error
from cm_runtime.training.data.idx import Split
from cm_runtime.training.data.image_set import ImageSet

CLASSES = 10
SHAPE = (3, 32, 32)
RECORD = 3073
MAX_BATCH = 10_000 * RECORD  # the original files hold exactly this
MAX_ARCHIVE = 2**28  # the original unpacks to 184 MB
BATCHES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}


def is_cifar_folder(folder: Path) -> bool:
    """Whether ``folder`` holds any of the six batches."""
    return any(_find(folder, batch) for batches in BATCHES.values() for batch in batches)


def read_cifar_folder(folder: Path, split: Split, name: str) -> ImageSet:
    """All batches of one split, each plain, ``.xz`` or ``.gz`` (the first found in that order).

    Raises DataError, OSError.
    """
    records = []
    for batch in BATCHES[split]:
        path = _find(folder, batch)
        if path is None:
            raise data_error(folder, f"holds no {batch}, .xz or .gz", f"put it there to read the {split} split")
        with open_stream(path) as stream:
            records.append(_records(read_up_to(stream, MAX_BATCH + 1, path), path))
    return _image_set(records, name)


def read_cifar_archive(archive: Path, split: Split, name: str) -> ImageSet:
    """The same from ``cifar-10-binary.tar.gz`` as it comes; nothing is unpacked to disk.

    Raises DataError, OSError.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    with open_stream(archive) as inflated:
        stream = CappedStream(inflated, MAX_ARCHIVE, archive)
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as members:
                for member in members:
                    batch = PurePosixPath(member.name).name
                    if batch not in BATCHES[split] or not member.isfile():
                        continue
                    data = members.extractfile(member)
                    if data is None or member.issparse() or batch in found:
                        raise data_error(archive, f"holds an odd or second {batch}", "fetch it again")
                    found[batch] = _records(read_up_to(data, MAX_BATCH + 1, archive), archive / batch)
        # tarfile lets struct and value errors of hostile headers through
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise data_error(archive, f"is not a whole tar archive ({error})", "fetch it again") from error
        while stream.read(CHUNK):  # to the end, so that gzip checks its checksum
            pass
    missing = [batch for batch in BATCHES[split] if batch not in found]
    if missing:
        raise data_error(archive, f"holds no {missing[0]}", "pass the original cifar-10-binary.tar.gz")
    return _image_set([found[batch] for batch in BATCHES[split]], name)


def _records(data: bytearray, path: Path) -> NDArray[np.uint8]:
    """The file's records, (n, 3073) uint8. Raises DataError."""
    if len(data) > MAX_BATCH:
        raise data_error(path, f"holds more than {MAX_BATCH} bytes", "pass the original batches")
    if not data or len(data) % RECORD:
        raise data_error(path, f"holds {len(data)} bytes, no multiple of {RECORD}", "fetch it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() >= CLASSES:
        raise data_error(path, f"holds label {records[:, 0].max()}", f"CIFAR-10 has labels 0..{CLASSES - 1}")
    return records


def _image_set(records: list[NDArray[np.uint8]], name: str) -> ImageSet:
    """The batches one after the other."""
    images = np.concatenate([batch[:, 1:] for batch in records]).reshape(-1, *SHAPE)
    labels = np.concatenate([batch[:, 0] for batch in records]).astype(np.int64)
    return ImageSet(images, labels, CLASSES, name)


def _find(folder: Path, batch: str) -> Path | None:
    """``batch`` in ``folder``, as it is or compressed."""
    return next((folder / file for file in (batch, f"{batch}.xz", f"{batch}.gz") if (folder / file).is_file()), None)
