"""Training images from untrusted files: IDX, CIFAR-10, npz, folders of pictures; or of a published data set."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cm_runtime.errors import RequestError, data_error
from cm_runtime.errors.reasons import system_reason
from cm_runtime.files.streams import exists
from cm_runtime.training.data.catalogue import DATA_SETS
from cm_runtime.training.data.cifar import is_cifar_folder, read_cifar_archive, read_cifar_folder
from cm_runtime.training.data.download import download
from cm_runtime.training.data.folder import read_folder
from cm_runtime.training.data.idx import PREFIX, Split, is_idx_folder, read_idx_folder, read_idx_images
from cm_runtime.training.data.image_set import MAX_SIDE, ImageSet
from cm_runtime.training.data.npz import read_npz

__all__ = ["DATA_SETS", "ImageSet", "Split", "open_data"]


def open_data(
    source: str | Path,
    *,
    split: Split = "train",
    image_size: int | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> ImageSet:
    """Read a data set into memory.

    ``source`` is a path, or where no such path exists one of the names in DATA_SETS, which is downloaded
    first (into ``cache``, see ``download``). A path is one of:

    - a folder of ``train-images-idx3-ubyte[.gz]`` and so on, or one such images file, then without labels;
    - a folder of CIFAR-10 binary batches (plain, .xz, .gz), or ``cifar-10-binary.tar.gz``;
    - an ``.npz``, see ``read_npz`` for keys and layouts;
    - a folder of pictures, see ``read_folder``. Only these are cropped and resized to ``image_size``; images
      of another kind must have that size already.

    ``split="test"`` of a source without splits is an error, not the training data. ``progress`` draws bars if standard
    error is a terminal.
    Returns images (N, C, H, W), uint8 in 0..255 or float32 in [-1, 1] units.
    Raises DataError for files that cannot be downloaded or read, RequestError for a wrong argument,
    MissingExtraError where a download needs pooch.
    """
    if split not in PREFIX:
        raise RequestError(f"split {split!r}: choose train or test")
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise RequestError(f"image_size {image_size}: choose 1 to {MAX_SIDE}")
    if "\0" in str(source):
        raise data_error(repr(str(source)), "no file can have such a name", "check the path")
    path = Path(os.path.expanduser(source))  # an unknown user's name stays
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    try:
        name = os.path.basename(os.path.realpath(path)) or str(path)
        if str(source) in DATA_SETS and not exists(path):
            name = str(source)
            path = download(name, split, cache, bar)
        data = _read(path, split, name, image_size, bar)
    except OSError as error:
        wrong = f"cannot be read ({system_reason(error)})"
        raise data_error(error.filename or path, wrong, "check the path and its permissions") from error
    except MemoryError as error:
        raise data_error(path, "does not fit into memory", "use smaller images or fewer") from error
    if image_size is not None and data.image_shape[1:] != (image_size, image_size):
        _, height, width = data.image_shape
        cure = "leave image_size out; only folders of pictures are resized"
        raise data_error(path, f"holds {width}x{height} images, not {image_size}x{image_size}", cure)
    return data


def _read(path: Path, split: Split, name: str, image_size: int | None, bar: Progress) -> ImageSet:
    """Read the set with the reader of its format. Raises DataError, OSError."""
    if path.is_dir():
        if is_idx_folder(path):
            return read_idx_folder(path, split, name)
        if is_cifar_folder(path):
            return read_cifar_folder(path, split, name)
        return read_folder(path, split, name, image_size=image_size, bar=bar)
    if not path.is_file():
        wrong = "is neither a file nor a folder" if os.path.lexists(path) else "no such file or folder"
        looks_like_name = path.name == str(path) and not path.suffix
        names = ", ".join(sorted(DATA_SETS))
        raise data_error(path, wrong, f"known data set names: {names}" if looks_like_name else "check the path")
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return read_cifar_archive(path, split, name)
    if split != "train":
        raise data_error(path, f"a single file has no {split} split", f"pass the {split} file itself")
    return read_npz(path, name) if path.suffix == ".npz" else read_idx_images(path, name)
