"""``cm-runtime edit colorize``."""

from __future__ import annotations

from cm_runtime.cli.edit.session import How, Work, edit
from cm_runtime.cli.options import Images


@edit()
def colorize(paths: Images, how: How) -> None:
    """Give grey images colours; their luminance stays as it is (0.2989 R + 0.5870 G + 0.1140 B).

    Of an image with colours the luminance is taken. A picture of another size than the model's is cropped to its
    shape, in the middle, and resized.

    Example: cm-runtime edit colorize model.onnx grey.png --answers 4
    """
    import numpy as np

    from cm_runtime import editing

    work = Work(paths, how)
    images = work.read()
    made = editing.colorize(work.engine, images.images, **work.options(images))
    luminance = editing.luminance(editing.from_images(images.images, work.engine.manifest))
    grey = np.repeat(np.moveaxis(luminance, 1, -1), 3, axis=-1)
    work.write("colorize", images, [images.images, grey], made)
