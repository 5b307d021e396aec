"""``cm-runtime edit superres``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import How, Work, edit
from cm_runtime.cli.options import Images


@edit()
def superres(
    paths: Images,
    how: How,
    factor: Annotated[int, typer.Option(metavar="2|4|8", help="How many pixels a side are made of one.")] = 2,
) -> None:
    """Enlarge images to the model's size; the mean of each patch stays what the small image says.

    An image of the model's size over the factor is taken as it is. Any other is fitted to the model's size (cropped to
    its shape, in the middle, and resized), and the means of its patches are what is enlarged.

    Example: cm-runtime edit superres small.png --factor 4 --label 7
    """
    import numpy as np

    from cm_runtime import editing

    work = Work(paths, how)
    whole, small = (work.height, work.width), editing.small_size(work.engine.manifest, factor)
    images = work.read(whole, small)
    columns, given = [], images.images
    if given.shape[1:3] == whole:
        columns = [given]
        means = editing.patch_means(editing.from_images(given, work.engine.manifest), factor)
        given = np.moveaxis(means, 1, -1)
    made = editing.superres(work.engine, given, factor, **work.options(images))
    columns.append(given.repeat(factor, axis=1).repeat(factor, axis=2))
    work.write("superres", images, columns, made, factor=factor)
