"""``cm-runtime sample``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm_runtime.cli import values
from cm_runtime.cli.options import Grid, Labels, MicroBatch, Sigmas, Timesteps, Ts
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.artifact import Manifest
    from cm_runtime.sampling import Batch, Denoiser, Request


def sample(
    model: Annotated[
        Path | None, typer.Argument(help="An exported .onnx or .engine, or a checkpoint. [default: the bundled model]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Network evaluations per image. [default: 2]")] = None,
    sigmas: Sigmas = None,
    ts: Ts = None,
    timesteps: Timesteps = None,
    grid: Grid = None,
    batch: Annotated[int, typer.Option(help="How many images one request draws.")] = 256,
    count: Annotated[int | None, typer.Option(help="How many images in all. [default: one batch]")] = None,
    start: Annotated[int, typer.Option(help="Index of the first image.")] = 0,
    seed: Annotated[int, typer.Option(help="Image i of a seed is always the same.")] = 0,
    labels: Labels = None,
    micro_batch: MicroBatch = "auto",
    backend: Annotated[
        str,
        typer.Option(
            metavar="auto|ort|openvino|torch|torch.compile|tensorrt|tensorrt-rtx",
            help="The engine; auto measures, once, which of those installed is fastest for the file.",
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where it runs.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(metavar="auto|fp32|bf16|fp16", help="What OpenVINO or torch computes in. [auto: as the file]"),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine. [default: one per core]")] = None,
    floats: Annotated[bool, typer.Option("--float", help="npz: float32 before quantisation.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="A grid (.png), or arrays (.npz).")] = Path(
        "samples.png"
    ),
) -> None:
    """Draw images with a consistency model.

    Example: cm-runtime sample --steps 2 --batch 256 --seed 7 -o garments.png
    """
    if output.suffix not in (".png", ".npz"):
        raise RequestError(f"{output}: an output's name ends in .png (a grid) or .npz (arrays)")
    if floats and output.suffix != ".npz":
        raise RequestError("--float writes arrays: give -o NAME.npz")
    from cm_runtime import backends, files, sampling

    files.check_writable(output)
    if batch < 1:
        raise RequestError(f"--batch must be at least 1, not {batch}")
    at_once = batch if micro_batch == "auto" else min(batch, int(micro_batch) if micro_batch.isdigit() else batch)
    engine = backends.load(model, backend, device, values.threads(threads), precision, at_once)  # type: ignore[arg-type]
    chosen = sampling.request(
        engine.manifest,
        batch if count is None else count,
        steps,
        sigmas=values.levels(engine.manifest, steps, sigmas, ts, timesteps, grid),
        seed=seed,
        start=start,
        labels=values.labels(labels),
        micro_batch=values.micro_batch(micro_batch, batch, engine.micro_batch),
        output="float32" if floats else "uint8",
    )
    _write(engine, chosen, batch, output)


def _write(engine: Denoiser, chosen: Request, batch: int, output: Path) -> None:
    from itertools import chain

    import numpy as np

    from cm_runtime import images, sampling
    from cm_runtime.cli.progress import tracked

    channels, height, width = engine.manifest.image_shape
    if output.suffix == ".png":
        images.check_grid(chosen.count, height, width)
    text = _description(chosen, engine.manifest)
    requests = sampling.split(chosen, batch)
    drawn = chain.from_iterable(sampling.batches(engine, each) for each in requests)
    parts: Iterator[Batch] = tracked(drawn, chosen.count, "images")
    if output.suffix == ".npz":
        with images.NpzWriter(output, chosen.count, (height, width, channels), chosen.output, text) as file:
            for part in parts:
                file.write(part.images, part.labels)
    else:
        picture = images.grid(np.concatenate([part.images for part in parts]))
        images.save_png(picture, output, text)
    typer.echo(f"{output}: {chosen.count} images, {len(chosen.sigmas)} steps, seed {chosen.seed}")


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
