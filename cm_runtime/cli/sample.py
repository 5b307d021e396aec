"""``cm-runtime sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm_runtime.cli import parsing, shards
from cm_runtime.cli.options import (
    Backend,
    Device,
    Floats,
    Grid,
    Labels,
    MicroBatch,
    Precision,
    Sigmas,
    Threads,
    Timesteps,
    Ts,
    replacing,
)
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.backends import base
    from cm_runtime.manifest import Manifest
    from cm_runtime.request import Request
    from cm_runtime.sampling import Batch, Denoiser


def sample(
    model: Annotated[
        Path | None,
        typer.Argument(help="An exported .onnx or .engine, or a checkpoint.", show_default="the bundled model"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Network evaluations per image.", show_default="2")] = None,
    sigmas: Sigmas = None,
    ts: Ts = None,
    timesteps: Timesteps = None,
    grid: Grid = None,
    batch: Annotated[int | None, typer.Option(help="How many images one request draws.", show_default="256")] = None,
    count: Annotated[int | None, typer.Option(help="How many images in all.", show_default="one batch")] = None,
    start: Annotated[int, typer.Option(help="Index of the first image.")] = 0,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    labels: Labels = None,
    micro_batch: MicroBatch = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
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
    kind: Annotated[
        str | None,
        typer.Option(
            "--shards", metavar="npz|png|wds|parquet", help="What a folder is filled with.", show_default="npz"
        ),
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images in each shard.", show_default="1000")] = None,
    force: Annotated[bool, typer.Option("--force", help=replacing("Of shards: those of another job."))] = False,
    runner: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray", help="Who draws shards: this process, or a Ray cluster.", show_default="local"
        ),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT|auto", help="The cluster; without, one on this machine.")
    ] = None,
) -> None:
    """Draw images with a consistency model, into samples.png if nothing else is said.

    Example: cm-runtime sample --steps 2 --batch 256 --seed 7 -o garments.png

    In shards, to be stopped and resumed at will: cm-runtime sample --count 1000000 --shards wds -o garments/
    """
    wanted = shards.wanted(output, kind, shard_size, force, runner, ray_address)
    name = Path(output or "samples.png")
    if wanted is None and name.suffix not in (".png", ".npz"):
        raise RequestError(
            f"{name}: an output's name ends in .png (a grid) or .npz (arrays), or in / (a folder of shards)"
        )
    if wanted is None and floats and name.suffix != ".npz":
        raise RequestError("--float writes arrays: give -o NAME.npz")
    if wanted is not None and batch is not None:
        raise RequestError("shards are drawn in micro-batches: give --count and --micro-batch, not --batch")
    at_once = 256 if batch is None else batch
    if at_once < 1:
        raise RequestError(f"--batch must be at least 1, not {batch}")
    from cm_runtime import backends
    from cm_runtime.files import atomic
    from cm_runtime.request import count_images, sampling_request

    classes = parsing.labels(labels)
    total = count_images(classes, count, at_once)

    def request(engine: base.Backend, size: int) -> Request:
        return sampling_request(
            engine.manifest,
            total,
            steps,
            sigmas=parsing.levels(engine.manifest, steps, sigmas, ts, timesteps, grid),
            seed=seed,
            start=start,
            labels=classes,
            micro_batch=size,
            output="float32" if floats else "uint8",
        )

    if wanted is not None:
        opening = shards.Opening(model or backends.DEFAULT_MODEL, backend, device, threads, precision, micro_batch)
        shards.draw(wanted, opening, total, request)
        return
    atomic.check_output(name)
    most = at_once if micro_batch == "auto" else min(at_once, int(micro_batch) if micro_batch.isdigit() else at_once)
    engine = backends.load(model, backend, device, parsing.threads(threads), precision, most)  # type: ignore[arg-type]
    chosen = request(engine, parsing.micro_batch(micro_batch, at_once, engine.micro_batch))
    _write(engine, chosen, at_once, name)


def _write(engine: Denoiser, chosen: Request, batch: int, output: Path) -> None:
    from itertools import chain

    import numpy as np

    from cm_runtime import sampling
    from cm_runtime.cli.progress import track
    from cm_runtime.errors.wording import quantity
    from cm_runtime.files import image_writer
    from cm_runtime.request import split

    channels, height, width = engine.manifest.image_shape
    if output.suffix == ".png":
        image_writer.check_grid(chosen.count, height, width)
    text = _description(chosen, engine.manifest)
    requests = split(chosen, batch)
    drawn = chain.from_iterable(sampling.batches(engine, each) for each in requests)
    parts: Iterator[Batch] = track(drawn, chosen.count, "images")
    if output.suffix == ".npz":
        with image_writer.NpzWriter(output, chosen.count, (height, width, channels), chosen.output, text) as file:
            for part in parts:
                file.write(part.images, part.labels)
    else:
        picture = image_writer.grid(np.concatenate([part.images for part in parts]))
        image_writer.save_png(picture, output, text)
    typer.echo(
        f"{output}: {quantity(chosen.count, 'image')}, {quantity(len(chosen.sigmas), 'step')}, seed {chosen.seed}"
    )


def _description(chosen: Request, manifest: Manifest) -> dict[str, object]:
    """What it takes to draw the same images again."""
    return {
        "seed": chosen.seed,
        "start": chosen.start,
        "count": chosen.count,
        "sigmas": chosen.sigmas,
        "labels": chosen.labels,
        "micro_batch": chosen.micro_batch,
        "model_sha256": manifest.source_sha256,
    }
