"""``cm-runtime edit denoise``."""

from __future__ import annotations

from typing import Annotated

import typer

from cm_runtime.cli.edit.session import How, Work, edit
from cm_runtime.cli.options import Images


@edit(steps=1)
def denoise(
    paths: Images,
    how: How,
    sigma: Annotated[
        float | None,
        typer.Option(help="Of the noise, where black is -1 and white 1.", show_default="estimated for each image"),
    ] = None,
) -> None:
    """Take the noise off images.

    Noise that a picture clipped to black and white is not what the model knows; an npz of float32 is not clipped.

    Example: cm-runtime edit denoise noisy.npz --sigma 0.3 --label 9
    """
    from cm_runtime import editing

    work = Work(paths, how)
    images = work.read()
    made = editing.denoise(work.engine, images.images, sigma, **work.options(images))
    work.write("denoise", images, [images.images], made, sigma=sigma)
    if sigma is None:
        y = editing.from_images(images.images, work.engine.manifest, is_bounded=False)
        typer.echo("estimated sigma: " + ", ".join(f"{level:.3g}" for level in editing.estimated_sigma(y)))
