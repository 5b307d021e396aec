"""``cm-runtime edit interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.edit.session import check_output, is_folder, write
from cm_runtime.cli.options import Backend, Device, Floats, MicroBatch, Precision, Seed, Sigmas, Threads


def interpolate(
    model: Annotated[
        Path | None,
        typer.Argument(help="An exported .onnx or .engine, or a checkpoint.", show_default="the bundled model"),
    ] = None,
    first: Annotated[int, typer.Option("--from", help="Index of the image it begins with.")] = 0,
    last: Annotated[int, typer.Option("--to", help="Index of the image it ends with.")] = 1,
    frames: Annotated[int, typer.Option(help="How many images, both ends included.")] = 9,
    label: Annotated[int | None, typer.Option(help="The images' class.")] = None,
    seed: Seed = 0,
    steps: Annotated[int | None, typer.Option(help="Network evaluations per image.", show_default="2")] = None,
    sigmas: Sigmas = None,
    micro_batch: MicroBatch = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
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

    Example: cm-runtime edit interpolate --from 3 --to 8 --label 7 --frames 24 -o sneakers.webp
    """
    import numpy as np

    from cm_runtime import backends, editing
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import atomic, image_writer

    check_output(output, floats, ".gif", ".webp")
    if not is_folder(output):
        atomic.check_output(Path(output))
    engine = backends.load(
        model,
        backend,  # type: ignore[arg-type]
        device,
        parsing.threads(threads),
        precision,  # type: ignore[arg-type]
    )
    made = editing.interpolate(
        engine,
        first,
        last,
        frames,
        label=label,
        steps=steps,
        sigmas=None if sigmas is None else parsing.numbers("--sigmas", sigmas),
        seed=seed,
        batch=parsing.micro_batch(micro_batch, frames, engine.micro_batch),
        output="float32" if floats else "uint8",
    )
    text = {
        "edit": "interpolate",
        "from": first,
        "to": last,
        "frames": frames,
        "label": label,
        "seed": seed,
        "steps": steps,
        "sigmas": sigmas,
        "model_sha256": engine.manifest.source_sha256,
    }
    if not is_folder(output) and Path(output).suffix in (".gif", ".webp"):
        image_writer.save_animation(made, Path(output))
    else:
        labels = None if label is None else np.full(frames, label)
        write(output, made, labels, made[np.newaxis], [f"{n:04d}" for n in range(frames)], text)
    typer.echo(f"{output}: {quantity(frames, 'image')} from {first} to {last}, seed {seed}")
