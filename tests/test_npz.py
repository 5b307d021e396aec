"""cm_runtime/npz.py: arrays streamed in blocks, against the array that numpy.savez wrote."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm_runtime.errors import DataError
from cm_runtime.npz import blocks, header


def read(path: Path, rows: int) -> list[Any]:
    with zipfile.ZipFile(path) as archive:
        return list(blocks(archive, header(archive, archive.getinfo("a.npy"), path), path, rows))


@pytest.mark.parametrize("rows", [1, 3, 7, 255, 1023])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_blocks_are_the_array(tmp_path: Path, rows: int, save: Any) -> None:
    expected = np.arange(255 * 6, dtype=">i4").reshape(255, 2, 3)
    save(tmp_path / "x.npz", a=expected)
    found = read(tmp_path / "x.npz", rows)
    assert [len(block) for block in found[:-1]] == [rows] * ((255 - 1) // rows)
    assert np.array_equal(np.concatenate(found), expected) and found[0].dtype == np.int32


def test_damaged_bytes_are_found_by_the_last_block(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, a=np.zeros((100, 50), np.uint8))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        read(path, 30)


def test_fortran_order_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.asfortranarray(np.zeros((5, 4))))
    with pytest.raises(DataError, match="Fortran"):
        read(tmp_path / "x.npz", 2)
