"""``cm-runtime edit superres``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import EditFlags, Session
from cm_runtime.cli.options import EngineFlags, Images, with_flags


@with_flags()
def superres(
    paths: Images,
    flags: EditFlags,
    engine: EngineFlags,
    factor: Annotated[int, typer.Option(metavar="2|4|8", help="How many pixels a side are made of one.")] = 2,
) -> None:
    """Enlarge images to the model's size; the mean of each patch stays what the small image says.

    An image of the model's size over the factor is taken as it is. Any other is fitted to the model's size (cropped to
    its shape, in the middle, and resized), and the means of its patches are what is enlarged.

    Example: cm-runtime edit superres small.png --factor 4 --labels 7
    """
    import numpy as np

    from cm_runtime import editing

    session = Session(paths, flags, engine)
    whole, small = (session.height, session.width), editing.small_size(session.engine.manifest, factor)
    images = session.read(whole, small)
    columns, small_images = [], images.images
    if small_images.shape[1:3] == whole:
        columns = [small_images]
        means = editing.patch_means(editing.from_images(small_images, session.engine.manifest), factor)
        small_images = np.moveaxis(means, 1, -1)
    answers = editing.superres(session.engine, small_images, factor, **session.options(images))
    columns.append(small_images.repeat(factor, axis=1).repeat(factor, axis=2))
    session.write("superres", images, columns, answers, factor=factor)
