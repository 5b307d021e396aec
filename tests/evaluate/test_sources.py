"""Samples streamed from an npz, and data sets in memory, against the arrays they hold."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cm_runtime.errors import DataError
from cm_runtime.evaluate import sources
from cm_runtime.evaluate.sources import array_batches, is_samples, open_samples
from cm_runtime.files.image_writer import NpzWriter


def together(batches: Any) -> tuple[Any, Any, Any]:
    parts = list(batches)
    labels = None if parts[0].labels is None else np.concatenate([part.labels for part in parts])
    return np.concatenate([p.index for p in parts]), labels, np.concatenate([p.images for p in parts])


def pictures(rng: np.random.Generator, count: int, channels: int = 1) -> Any:
    return rng.integers(0, 256, (count, 5, 4, channels), dtype=np.uint8)


@pytest.mark.parametrize("count", [1, 3, 7, 255, 1023])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_come_as_they_were_saved(tmp_path: Path, rng: np.random.Generator, count: int, save: Any) -> None:
    images, labels = pictures(rng, count, 3), rng.integers(0, 10, count).astype(np.int32)
    save(tmp_path / "s.npz", images, labels)
    samples = open_samples(tmp_path / "s.npz")
    assert (samples.count, samples.image_shape) == (count, (5, 4, 3))
    index, found, pixels = together(samples.batches())
    assert np.array_equal(index, np.arange(count))
    assert np.array_equal(pixels, images) and found.dtype == np.int64 and np.array_equal(found, labels)


def test_what_sample_writes_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    images, labels = pictures(rng, 10), np.arange(10)
    with NpzWriter(tmp_path / "s.npz", 10, (5, 4, 1), "uint8", {"seed": 0}) as writer:
        writer.write(images, labels)
    assert is_samples(tmp_path / "s.npz")
    _, found, pixels = together(open_samples(tmp_path / "s.npz").batches())
    assert np.array_equal(pixels, images) and np.array_equal(found, labels)


def test_float_samples_are_rounded_as_sampling_does(tmp_path: Path) -> None:
    """Half to even, and clipped: the design's formula, by hand."""
    values = [-3, -1, -1 + 0.4 / 127.5, -1 + 1.6 / 127.5, 0, 1, 1.2]
    np.savez(tmp_path / "s.npz", np.float32(values).reshape(7, 1, 1, 1))
    _, labels, pixels = together(open_samples(tmp_path / "s.npz").batches())
    assert labels is None and pixels.ravel().tolist() == [0, 0, 0, 2, 128, 255, 255]


def test_memory_is_that_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "s.npz", np.zeros((40_000, 28, 28, 1), np.uint8), np.zeros(40_000, np.int64))
    tracemalloc.start()
    assert sum(len(batch.images) for batch in open_samples(tmp_path / "s.npz").batches()) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
    monkeypatch.setattr(sources, "_BLOCK", 1)
    assert len(next(open_samples(tmp_path / "s.npz").batches()).images) == 1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": np.zeros((3, 5, 4), np.uint8)}, r"arr_0 is uint8 \(3, 5, 4\)"),
        ({"arr_0": np.zeros((3, 5, 4, 2), np.uint8)}, "1 or 3 channels"),
        ({"arr_0": np.zeros((3, 5, 4, 1), np.float64)}, "arr_0 is float64"),
        ({"arr_0": np.zeros((1, 5000, 1, 1), np.uint8)}, "sides go up to 4096"),
        ({"arr_0": np.zeros((0, 5, 4, 1), np.uint8)}, "non-empty"),
        ({"arr_0": np.zeros((3, 5, 4, 1), np.uint8), "arr_1": np.zeros(2, int)}, r"arr_1 is int64 \(2,\) for 3 images"),
        ({"arr_0": np.zeros((3, 5, 4, 1), np.uint8), "arr_1": np.zeros(3)}, "labels are integers"),
        ({"arr_0": np.zeros((3, 5, 4, 1), np.uint8), "arr_1": np.array([0, -1, 2])}, r"labels -1\.\.2"),
        ({"arr_0": np.full((3, 5, 4, 1), np.nan, np.float32)}, "NaN"),
        ({"arr_0": np.asfortranarray(np.zeros((3, 5, 4, 1), np.uint8))}, "Fortran"),
        ({"arr_0": np.array([{}])}, "arr_0"),
    ],
)
def test_what_is_no_samples_is_one_line(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words) as caught:
        together(open_samples(tmp_path / "bad.npz").batches())
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("position", [200, 3000, -10])
def test_damage_is_one_line(tmp_path: Path, rng: np.random.Generator, position: int) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, pictures(rng, 400))
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"s\.npz"):
        together(open_samples(path).batches())


def test_a_data_sets_own_keys_are_no_samples(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "d.npz", images=pictures(rng, 3), arr_0=pictures(rng, 3))
    np.savez(tmp_path / "s.npz", pictures(rng, 3))
    assert not is_samples(tmp_path / "d.npz") and is_samples(tmp_path / "s.npz")
    assert not is_samples(tmp_path / "none.npz") and not is_samples(tmp_path)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.npz"):
        is_samples(tmp_path / "junk.npz")


@pytest.mark.parametrize("size", [1, 3, 7, 255])
def test_arrays_come_in_batches(rng: np.random.Generator, size: int) -> None:
    images, labels = pictures(rng, 23, 3), np.arange(23)
    index, found, pixels = together(array_batches(images.transpose(0, 3, 1, 2), labels, size))
    assert np.array_equal(pixels, images) and np.array_equal(found, labels) and np.array_equal(index, labels)
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    assert np.array_equal(together(array_batches(floats, None, size))[2], images)
