"""``cm-runtime sample``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm_runtime.cli import shards
from cm_runtime.cli.options import DrawFlags, EngineFlags, Floats, ModelFile, with_flags
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.manifest import Manifest
    from cm_runtime.request import Request
    from cm_runtime.sampling import Batch, Denoiser


@with_flags()
def sample(
    flags: DrawFlags,
    engine: EngineFlags,
    folder: shards.ShardFlags,
    model: ModelFile = None,
    batch: Annotated[int | None, typer.Option(help="How many images one request draws.", show_default="256")] = None,
    floats: Floats = False,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A grid (.png), arrays (.npz), or a folder of shards (NAME/).",
            show_default="samples.png",
        ),
    ] = None,
) -> None:
    """Draw images with a consistency model, into samples.png if nothing else is said.

    Example: cm-runtime sample --steps 2 --batch 256 --seed 7 -o garments.png

    In shards, to be stopped and resumed at will: cm-runtime sample --count 1000000 --shards wds -o garments/
    """
    target = folder.folder(output)
    name = Path(output or "samples.png")
    if target is None and name.suffix not in (".png", ".npz"):
        raise RequestError(
            f"{name}: an output's name ends in .png (a grid) or .npz (arrays), or in / (a folder of shards)"
        )
    if target is None and floats and name.suffix != ".npz":
        raise RequestError("--float writes arrays: give -o NAME.npz")
    if target is not None and batch is not None:
        raise RequestError("shards are drawn in micro-batches: give --count and --micro-batch, not --batch")
    size = 256 if batch is None else batch
    if size < 1:
        raise RequestError(f"--batch must be at least 1, not {batch}")
    from cm_runtime import backends
    from cm_runtime.files import atomic
    from cm_runtime.request import sampling_request

    draw = flags.draw()
    draw = replace(draw, count=draw.total(size), output="float32" if floats else "uint8")
    path = model or backends.DEFAULT_MODEL
    if target is not None:
        shards.draw(shards.ShardTask(path, target, folder, flags, engine), draw)
        return
    atomic.check_output(name)
    text = flags.micro_batch or "auto"
    most = min(size, int(text)) if text.isdecimal() else size
    model_engine = backends.open_model(path, engine.options(), most)
    request = sampling_request(model_engine.manifest, flags.complete(model_engine, draw, size))
    _write(model_engine, request, size, name)


def _write(engine: Denoiser, request: Request, batch: int, output: Path) -> None:
    from itertools import chain

    import numpy as np

    from cm_runtime import sampling
    from cm_runtime.cli.progress import track
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import image_writer
    from cm_runtime.request import split

    channels, height, width = engine.manifest.image_shape
    if output.suffix == ".png":
        image_writer.check_grid(request.count, height, width)
    text = _description(request, engine.manifest)
    images = chain.from_iterable(sampling.batches(engine, each) for each in split(request, batch))
    parts: Iterator[Batch] = track(images, request.count, "images")
    if output.suffix == ".npz":
        with image_writer.NpzWriter(output, request.count, (height, width, channels), request.output, text) as file:
            for part in parts:
                file.write(part.images, part.labels)
    else:
        picture = image_writer.grid(np.concatenate([part.images for part in parts]))
        image_writer.save_png(picture, output, text)
    typer.echo(f"{output}: {quantity(request.count, 'image')}, {quantity(request.steps, 'step')}, seed {request.seed}")


def _description(request: Request, manifest: Manifest) -> dict[str, object]:
    """All that draws the same images again."""
    names = ("seed", "start", "count", "sigmas", "labels", "micro_batch")
    return {**{name: getattr(request, name) for name in names}, "model_sha256": manifest.source_sha256}
