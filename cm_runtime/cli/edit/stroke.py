"""``cm-runtime edit stroke``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import EditFlags, Session
from cm_runtime.cli.options import EngineFlags, Images, steps, with_flags


@with_flags(steps=steps("2"), sigmas=None)
def stroke(
    paths: Images,
    flags: EditFlags,
    engine: EngineFlags,
    sigma: Annotated[
        float, typer.Option(help="The noise put over a painting: the more, the less is kept of it.")
    ] = 2.0,
) -> None:
    """Make pictures of paintings: forms and shades are kept, the model draws the rest.

    A picture of another size than the model's is cropped to its shape, in the middle, and resized.

    Example: cm-runtime edit stroke painting.png --sigma 3 --labels 1 --answers 5
    """
    from cm_runtime import editing

    session = Session(paths, flags, engine, steps=2)
    images = session.read()
    answers = editing.stroke(session.engine, images.images, sigma, **session.options(images))
    session.write("stroke", images, [images.images], answers, sigma=sigma)
