"""A folder of picture files, in class subfolders or not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from cm_runtime.errors import data_error
from cm_runtime.files import image_reader
from cm_runtime.files.image_reader import SUFFIXES
from cm_runtime.training.data.idx import Split
from cm_runtime.training.data.image_set import MAX_SIDE, ImageSet

SPLIT_FOLDERS = {"train", "test", "val", "valid"}


def read_folder(folder: Path, split: Split, name: str, *, image_size: int | None, bar: Progress) -> ImageSet:
    """Read every png, jpg, jpeg, webp and bmp in ``folder``, in sorted order; one that cannot be read is an error.

    Files directly inside have no labels. Where there are subfolders instead, each is a class, numbered in
    sorted order, and is searched to its depths; only if all are called train, test, val or valid are they
    splits. Names that begin with a dot are passed over.

    Images must be of one size, unless ``image_size`` is set: then the largest centred square is resized to
    it with Pillow's (antialiased) BICUBIC. EXIF rotation and colour profiles are applied; `image_reader.read`
    also says what is refused. Grey when every file's mode is grey, else RGB.

    Raises DataError, OSError. Returns (N, 1 or 3, H, W) uint8.
    """
    files, labels, num_classes = _list_images(_split_folder(folder, split))
    channels = 1 if all(image_reader.is_grey(file) for file in files) else 3
    size = None if image_size is None else (image_size, image_size)
    images: NDArray[np.uint8] | None = None
    with bar:
        for index, file in enumerate(bar.track(files, description=f"reading {name}")):
            pixels = image_reader.read(file, channels, size).transpose(2, 0, 1)
            if max(pixels.shape) > MAX_SIDE:
                wrong = f"is {pixels.shape[2]}x{pixels.shape[1]}"
                raise data_error(file, wrong, f"give image_size: sides go up to {MAX_SIDE}")
            if images is None:
                images = np.empty((len(files), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                sizes = [f"{shape[1]}x{shape[0]}" for shape in (pixels.shape[1:], images.shape[2:])]
                wrong = f"is {sizes[0]}, but {files[0].name} is {sizes[1]}"
                raise data_error(file, wrong, "make all images one size, or give image_size")
            images[index] = pixels
    assert images is not None  # _list_images never returns an empty list
    return ImageSet(images, labels, num_classes, name)


def _split_folder(folder: Path, split: Split) -> Path:
    """Return the subfolder of the split, or ``folder`` if it has no splits. Raises DataError."""
    subfolders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    has_splits = bool(subfolders) and subfolders <= SPLIT_FOLDERS
    if has_splits and split in subfolders:
        return folder / split
    if has_splits or split != "train":
        raise data_error(folder, f"has no {split} subfolder", f"pass the folder of the {split} images itself")
    return folder


def _list_images(folder: Path) -> tuple[list[Path], NDArray[np.int64] | None, int]:
    """List the picture files, their labels and the number of classes. Raises DataError if there are none."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    classes = [entry for entry in entries if entry.is_dir()]
    if files and classes:
        wrong = f"holds images ({files[0].name}) beside subfolders ({classes[0].name})"
        raise data_error(folder, wrong, "put every image into a class subfolder, or none")
    if files:
        return files, None, 0
    labels: list[int] = []
    for label, class_folder in enumerate(classes):
        members = _walk(class_folder)
        if not members:
            raise data_error(class_folder, "is a class without images", "add images or remove it")
        files += members
        labels += [label] * len(members)
    if not files:
        cure = "give images (png, jpg, webp, bmp), IDX files or CIFAR-10 batches under their original names"
        raise data_error(folder, "holds no data that can be read", cure)
    return files, np.array(labels, np.int64), len(classes)


def _walk(folder: Path) -> list[Path]:
    """List the picture files below ``folder``, sorted; links to folders inside it are not followed."""
    paths: list[Path] = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
