"""``cm-runtime edit interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.edit.session import Pictures, check_output, is_folder, write
from cm_runtime.cli.options import DrawFlags, EngineFlags, Floats, ModelFile, with_flags


@with_flags(
    count=None,
    start=None,
    ts=None,
    timesteps=None,
    grid=None,
    labels=Annotated[str | None, typer.Option(metavar="3", help="The images' class.")],
)
def interpolate(
    flags: DrawFlags,
    engine: EngineFlags,
    model: ModelFile = None,
    first: Annotated[int, typer.Option("--from", help="Index of the image it begins with.")] = 0,
    last: Annotated[int, typer.Option("--to", help="Index of the image it ends with.")] = 1,
    frames: Annotated[int, typer.Option(help="How many images, both ends included.")] = 9,
    floats: Floats = False,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A strip (.png), an animation (.gif, .webp), arrays (.npz), or a folder (NAME/);"
            " what is there is replaced.",
        ),
    ] = "edited.png",
) -> None:
    """Go from one drawn image to another by the noise in between, under one label.

    Image I is that of cm-runtime sample --start I --labels LABEL with the same seed.

    Example: cm-runtime edit interpolate --from 3 --to 8 --labels 7 --frames 24 -o sneakers.webp
    """
    import numpy as np

    from cm_runtime import backends, editing
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import atomic, image_writer
    from cm_runtime.request import Draw, sampling_request

    check_output(output, floats, ".gif", ".webp")
    if not is_folder(output):
        atomic.check_output(Path(output))
    model_engine = backends.open_model(model or backends.DEFAULT_MODEL, engine.options())
    label = None if flags.labels is None else parsing.whole_number("--labels", flags.labels)
    seed, sigmas = flags.seed or 0, flags.levels(model_engine.manifest)
    images = editing.interpolate(
        model_engine,
        first,
        last,
        frames,
        steps=flags.steps,
        seed=seed,
        labels=label,
        sigmas=sigmas,
        micro_batch=parsing.micro_batch(flags.micro_batch, frames, model_engine.micro_batch),
        output="float32" if floats else "uint8",
    )
    text = {
        "edit": "interpolate",
        "from": first,
        "to": last,
        "frames": frames,
        "labels": label,
        "seed": seed,
        "steps": sampling_request(model_engine.manifest, Draw(steps=flags.steps, sigmas=sigmas, labels=label)).steps,
        "sigmas": flags.sigmas,
        "model_sha256": model_engine.manifest.source_sha256,
    }
    if not is_folder(output) and Path(output).suffix in (".gif", ".webp"):
        image_writer.save_animation(images, Path(output))
    else:
        labels = None if label is None else np.full(frames, label)
        names = [f"{n:04d}" for n in range(frames)]
        write(output, Pictures(images, labels, images[np.newaxis], names), text)
    typer.echo(f"{output}: {quantity(frames, 'image')} from {first} to {last}, seed {seed}")
