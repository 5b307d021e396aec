"""cm_runtime/files/image_writer.py against loops written out, Pillow and NumPy as readers, and writers that fail."""

import json
import os
import resource
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from cm_runtime.errors import OutputError, RequestError
from cm_runtime.files.image_writer import GRID_PIXELS, NpzWriter, check_grid, grid, save_png

TEXT = {"seed": 2**64 - 1, "sigmas": [80.0, 1.382368], "labels": "all", "note": 'é\n"quoted" 漢'}


def pixels(rng, *shape):
    return rng.integers(0, 256, shape, np.uint8)


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("columns", [None, 1, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 10, 255])
def test_a_grid_is_filled_row_by_row(rng, count, columns, channels):
    images = pixels(rng, count, 3, 5, channels)
    picture = grid(images, columns)
    across = columns or next(n for n in range(1, 99) if n * n >= count)
    down = next(n for n in range(1, 999) if n * across >= count)
    expected = np.zeros((down * 3, across * 5, channels), np.uint8)
    for i, image in enumerate(images):
        top, left = i // across * 3, i % across * 5
        expected[top : top + 3, left : left + 5] = image
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_a_picture_of_other_channels_is_refused(rng, channels):
    with pytest.raises(RequestError, match=f"1 or 3 channels, not {channels}; .*npz"):
        grid(pixels(rng, 3, 3, 5, channels))


def test_the_largest_picture_is_bounded():
    most = GRID_PIXELS // (28 * 28)
    check_grid(most, 28, 28)
    with pytest.raises(RequestError, match=f"at most {most} images of 28x28"):
        check_grid(most + 1, 28, 28)
    assert GRID_PIXELS < Image.MAX_IMAGE_PIXELS  # Pillow warns of larger ones when it opens them


# --- PNG --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 1), (7, 3, 3), (255, 1, 3), (1, 255, 1)], ids=str)
def test_a_png_holds_its_pixels_and_its_text(tmp_path, rng, shape):
    picture = pixels(rng, *shape)
    save_png(picture, tmp_path / "x.png", TEXT)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and image.mode == {1: "L", 3: "RGB"}[shape[-1]]
        np.testing.assert_array_equal(np.asarray(image).reshape(shape), picture)
        assert json.loads(image.text["cm_runtime"]) == TEXT
    assert os.listdir(tmp_path) == ["x.png"]


def test_the_same_picture_is_the_same_bytes(tmp_path, rng):
    picture = pixels(rng, 7, 3, 3)
    save_png(picture, tmp_path / "a.png", TEXT)
    save_png(picture, tmp_path / "b.png", TEXT)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_png_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, rng):
    with pytest.raises(OutputError, match="there is no folder"):
        save_png(pixels(rng, 3, 3, 3), tmp_path / "none" / "x.png", TEXT)
    with pytest.raises(TypeError):
        save_png(pixels(rng, 3, 3, 3), tmp_path / "x.png", {"bad": object()})
    assert os.listdir(tmp_path) == []


# --- npz --------------------------------------------------------------------------------------------------------------


def write(path, parts, labels, dtype=np.uint8, text=None):
    count = sum(len(part) for part in parts)
    with NpzWriter(path, count, parts[0].shape[1:], dtype, TEXT if text is None else text) as file:
        for part, label in zip(parts, labels, strict=True):
            file.write(part, label)


@pytest.mark.parametrize("sizes", [(1,), (3, 7), (7, 255, 1)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_numpy_reads_what_was_streamed(tmp_path, rng, sizes, dtype):
    parts = [(255 * rng.random((n, 3, 7, 3))).astype(dtype) for n in sizes]
    labels = [rng.integers(0, 10, n) for n in sizes]
    write(tmp_path / "x.npz", parts, labels, dtype)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "arr_1", "cm_runtime"]
        assert file["arr_0"].dtype == dtype and file["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(file["arr_0"], np.concatenate(parts))
        np.testing.assert_array_equal(file["arr_1"], np.concatenate(labels))
        assert json.loads(str(file["cm_runtime"])) == TEXT
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None
    assert os.listdir(tmp_path) == ["x.npz"]


def test_without_classes_there_are_no_labels(tmp_path, rng):
    write(tmp_path / "x.npz", [pixels(rng, 3, 1, 7, 1)], [None])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "cm_runtime"]


def test_images_that_are_not_contiguous_are_written_in_order(tmp_path, rng):
    images = pixels(rng, 7, 3, 5, 1)
    write(tmp_path / "x.npz", [images.transpose(0, 2, 1, 3)], [None])
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], np.swapaxes(images, 1, 2))


def test_the_same_images_are_the_same_bytes_at_any_time(tmp_path, rng, monkeypatch):
    images = [pixels(rng, 3, 5, 7, 1)]
    write(tmp_path / "a.npz", images, [np.arange(3)])
    tomorrow = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    write(tmp_path / "b.npz", images, [np.arange(3)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("failure", [RuntimeError("crash"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_and_keeps_the_old_file(tmp_path, rng, failure):
    path = tmp_path / "x.npz"
    path.write_bytes(b"old")
    images = pixels(rng, 3, 5, 7, 1)
    with pytest.raises(type(failure)) as caught, NpzWriter(path, 6, (5, 7, 1), np.uint8, TEXT) as file:
        file.write(images, None)
        raise failure
    assert caught.value is failure
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.npz"]


def test_a_failure_at_the_very_end_leaves_nothing(tmp_path, rng):
    """The text is written last; where it cannot be, the archive is not whole."""
    with pytest.raises(TypeError):
        write(tmp_path / "x.npz", [pixels(rng, 3, 5, 7, 1)], [None], text={"bad": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [1, 3000, 9000], ids=["at the header", "in the images", "in the labels"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, rng, limit):
    """A limit on the size of files stands in for the disk. The images are 7 kB, their labels 8 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    images, labels = pixels(rng, 1000, 7, 1, 1), np.arange(1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match=r"x.npz cannot be written: File too large") as caught:
            write(tmp_path / "x.npz", [images], [labels])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("written", [0, 3, 8])
def test_another_number_of_images_than_promised_is_not_passed_off_as_whole(tmp_path, rng, written):
    """The header was written first: the file would be one that NumPy cannot read."""
    with pytest.raises(ValueError), NpzWriter(tmp_path / "x.npz", 7, (5, 7, 1), np.uint8, TEXT) as file:
        if written:
            file.write(pixels(rng, written, 5, 7, 1), None)
    assert os.listdir(tmp_path) == []


def test_an_npz_that_cannot_be_written_is_refused_before_any_image(tmp_path):
    with (
        pytest.raises(OutputError, match="there is no folder"),
        NpzWriter(tmp_path / "none" / "x.npz", 3, (5, 7, 1), np.uint8, TEXT),
    ):
        pytest.fail("the block must not run")
