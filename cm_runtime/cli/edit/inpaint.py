"""``cm-runtime edit inpaint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.edit.session import How, Work, edit
from cm_runtime.cli.options import Images
from cm_runtime.errors import RequestError


@edit()
def inpaint(
    paths: Images,
    how: How,
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

    Example: cm-runtime edit inpaint coat.png --box 8,8,12,12 --label 4 --answers 5
    """
    import numpy as np

    from cm_runtime import editing
    from cm_runtime.files import inputs

    if (mask is None) == (box is None):
        raise RequestError("give --mask FILE or --box LEFT,TOP,WIDTH,HEIGHT")
    work = Work(paths, how)
    images, size = work.read(), (work.height, work.width)
    if mask is not None:
        hole = inputs.read_mask(mask, work.paths, size)
    else:
        hole = inputs.hole_of_box(parsing.whole_numbers("--box", box or ""), size)
    made = editing.inpaint(work.engine, images.images, hole, **work.options(images))
    y = np.moveaxis(editing.from_images(images.images, work.engine.manifest), 1, -1)
    work.write("inpaint", images, [images.images, np.where(hole[..., None], np.float32(0), y)], made)
