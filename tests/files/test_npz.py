"""cm_runtime/files/npz.py: arrays streamed in blocks, against the array that numpy.savez wrote."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm_runtime.errors import DataError
from cm_runtime.files import streams
from cm_runtime.files.npz import blocks, header, open_npz


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


def test_what_unpacks_to_very_much_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All zeros, a thousandth packed: pictures do not shrink so far."""
    assert streams.most_inflated(10) == 2**28 and streams.most_inflated(2**24) == 100 * 2**24
    assert streams.most_inflated(2**30) == 2**31
    monkeypatch.setattr(streams, "USUAL_INFLATED", 2**20)
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**21, np.uint8))
    with (
        open_npz(tmp_path / "x.npz") as archive,
        pytest.raises(DataError, match="unpacks to 2097152 bytes, more than 10"),
    ):
        header(archive, archive.getinfo("a.npy"), tmp_path / "x.npz")


@pytest.mark.parametrize(("more", "there"), [(b"\0", 5), (b"", 4)])
def test_an_array_of_another_length_than_its_header_says_is_refused(tmp_path: Path, more: bytes, there: int) -> None:
    np.save(tmp_path / "a.npy", np.zeros(4 if more else 5, np.uint8))
    content = (tmp_path / "a.npy").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", content + more if more else content[:-1])
    with open_npz(tmp_path / "x.npz") as archive, pytest.raises(DataError, match=f"but {there} are there"):
        header(archive, archive.getinfo("a.npy"), tmp_path / "x.npz")


@pytest.mark.filterwarnings("error")
def test_a_header_of_python_2_is_read_in_silence(tmp_path: Path) -> None:
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (4L,), }\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + bytes(4))
    with open_npz(tmp_path / "x.npz") as archive:
        assert header(archive, archive.getinfo("a.npy"), tmp_path / "x.npz").shape == (4,)
