"""``cm-runtime edit inpaint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.edit.session import EditFlags, Session
from cm_runtime.cli.options import EngineFlags, Images, with_flags
from cm_runtime.errors import RequestError


@with_flags()
def inpaint(
    paths: Images,
    flags: EditFlags,
    engine: EngineFlags,
    mask: Annotated[
        Path | None,
        typer.Option(help="A picture, white where to fill, of the images' size or the model's, fitted as they are."),
    ] = None,
    box: Annotated[
        str | None, typer.Option(metavar="LEFT,TOP,WIDTH,HEIGHT", help="Or a box, in pixels of the model's images.")
    ] = None,
) -> None:
    """Fill a hole in images; all around it stays as it is.

    A picture of another size than the model's is cropped to its shape, in the middle, and resized.

    Example: cm-runtime edit inpaint coat.png --box 8,8,12,12 --labels 4 --answers 5
    """
    import numpy as np

    from cm_runtime import editing
    from cm_runtime.files import inputs

    if (mask is None) == (box is None):
        raise RequestError("give --mask FILE or --box LEFT,TOP,WIDTH,HEIGHT")
    session = Session(paths, flags, engine)
    images, size = session.read(), (session.height, session.width)
    if mask is not None:
        hole = inputs.read_mask(mask, session.paths, size)
    else:
        hole = inputs.hole_of_box(parsing.whole_numbers("--box", box or ""), size)
    answers = editing.inpaint(session.engine, images.images, hole, **session.options(images))
    y = np.moveaxis(editing.from_images(images.images, session.engine.manifest), 1, -1)
    session.write("inpaint", images, [images.images, np.where(hole[..., None], np.float32(0), y)], answers)
