"""Images in NumPy's ``.npz``, their channels second or last."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cm_runtime.errors import data_error
from cm_runtime.files.npz import Member, array, class_numbers, header, label_header, open_npz
from cm_runtime.training.data.image_set import ImageSet

CHANNELS = (1, 3)


def read_npz(path: Path, name: str) -> ImageSet:
    """Read ``images`` with optional ``labels``, else the field's ``arr_0`` with optional ``arr_1``.

    Layouts: ``arr_0`` is (N, H, W, C), C 1 or 3. ``images`` in float32 is (N, C, H, W), C up to 4. ``images``
    in uint8 is (N, C, H, W) or (N, H, W, C): the one whose channels are 1 or 3, refused if both or
    neither are. Labels are (N,) of any integer type. Other keys are left alone.

    Raises DataError, OSError.
    """
    with open_npz(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        key, label_key = ("images", "labels") if "images" in members else ("arr_0", "arr_1")
        if key not in members:
            names = ", ".join(name[:20] for name in sorted(members)[:4]) or "it is empty"
            cure = "save arrays named images and labels, or arr_0 and arr_1"
            raise data_error(path, f"holds neither images nor arr_0 ({names})", cure)
        images = header(archive, members[key], path)
        channel_axis = _channel_axis(images, key, path)
        labels = label_header(archive, label_key, images.shape[0], path)
        pixels = array(archive, images, path)
        values = None if labels is None else array(archive, labels, path)
    pixels = np.ascontiguousarray(np.moveaxis(pixels, channel_axis, 1))
    if values is None:
        return ImageSet(pixels, None, 0, name)
    return ImageSet(pixels, class_numbers(values, path), int(values.max()) + 1, name)


def _channel_axis(images: Member, key: str, path: Path) -> int:
    """Axis of the channels, 1 or 3, by the rule that ``read_npz`` states. Raises DataError."""
    shape, dtype = images.shape, images.dtype.newbyteorder("=")
    if len(shape) != 4 or dtype not in (np.uint8, np.float32):
        raise data_error(path, f"{key} is {dtype} {shape}", "give uint8 or float32 images with 4 dims")
    if key == "arr_0":
        fits, axis, layout = shape[3] in CHANNELS, 3, "(N, H, W, C) with 1 or 3 channels"
    elif dtype == np.float32:
        fits, axis, layout = shape[1] <= 4, 1, "(N, C, H, W) with up to 4 channels"
    else:
        fits = (shape[1] in CHANNELS) != (shape[3] in CHANNELS)
        axis = 1 if shape[1] in CHANNELS else 3
        layout = "1 or 3 channels in one place only, the 2nd or the 4th; or name it arr_0, always (N, H, W, C)"
    if not fits:
        raise data_error(path, f"{key} is {dtype} {shape}", f"give {layout}")
    return axis
