"""``cm-runtime edit denoise``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import EditFlags, Session
from cm_runtime.cli.options import EngineFlags, Images, steps, with_flags


@with_flags(steps=steps("1"), sigmas=None)
def denoise(
    paths: Images,
    flags: EditFlags,
    engine: EngineFlags,
    sigma: Annotated[
        float | None,
        typer.Option(help="Of the noise, where black is -1 and white 1.", show_default="estimated for each image"),
    ] = None,
) -> None:
    """Take the noise off images.

    Noise that a picture clipped to black and white is not what the model knows; an npz of float32 is not clipped.

    Example: cm-runtime edit denoise noisy.npz --sigma 0.3 --labels 9
    """
    from cm_runtime import editing

    session = Session(paths, flags, engine, steps=1)
    images = session.read()
    answers = editing.denoise(session.engine, images.images, sigma, **session.options(images))
    session.write("denoise", images, [images.images], answers, sigma=sigma)
    if sigma is None:
        y = editing.from_images(images.images, session.engine.manifest, is_bounded=False)
        typer.echo("estimated sigma: " + ", ".join(f"{level:.3g}" for level in editing.estimated_sigma(y)))
