"""``cm-runtime edit colorize``."""

from __future__ import annotations

from cm_runtime.cli.edit.session import EditFlags, Session
from cm_runtime.cli.options import EngineFlags, Images, with_flags


@with_flags()
def colorize(paths: Images, flags: EditFlags, engine: EngineFlags) -> None:
    """Give grey images colours; their luminance stays as it is (0.2989 R + 0.5870 G + 0.1140 B).

    Of an image with colours the luminance is taken. A picture of another size than the model's is cropped to its
    shape, in the middle, and resized.

    Example: cm-runtime edit colorize model.onnx grey.png --answers 4
    """
    import numpy as np

    from cm_runtime import editing

    session = Session(paths, flags, engine)
    images = session.read()
    answers = editing.colorize(session.engine, images.images, **session.options(images))
    luminance = editing.luminance(editing.from_images(images.images, session.engine.manifest))
    grey = np.repeat(np.moveaxis(luminance, 1, -1), 3, axis=-1)
    session.write("colorize", images, [images.images, grey], answers)
