"""``cm-runtime edit stroke``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import How, Work, edit
from cm_runtime.cli.options import Images


@edit(steps=2)
def stroke(
    paths: Images,
    how: How,
    sigma: Annotated[
        float, typer.Option(help="The noise put over a painting: the more, the less is kept of it.")
    ] = 2.0,
) -> None:
    """Make pictures of paintings: forms and shades are kept, the model draws the rest.

    A picture of another size than the model's is cropped to its shape, in the middle, and resized.

    Example: cm-runtime edit stroke painting.png --sigma 3 --label 1 --answers 5
    """
    from cm_runtime import editing

    work = Work(paths, how)
    images = work.read()
    made = editing.stroke(work.engine, images.images, sigma, **work.options(images))
    work.write("stroke", images, [images.images], made, sigma=sigma)
