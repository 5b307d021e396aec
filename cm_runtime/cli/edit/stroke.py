"""``cm-runtime edit stroke``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cm_runtime.cli.edit.work import How, Work
from cm_runtime.cli.options import (
    Answers,
    Backend,
    Device,
    Edited,
    Floats,
    Images,
    Index,
    Label,
    MicroBatch,
    Precision,
    Seed,
    Steps,
    Threads,
)


def stroke(
    paths: Images,
    sigma: Annotated[
        float, typer.Option(help="The noise put over a painting: the more, the less is kept of it.")
    ] = 2.0,
    label: Label = None,
    seed: Seed = 0,
    index: Index = 0,
    answers: Answers = 1,
    steps: Steps = 2,
    micro_batch: MicroBatch = "auto",
    backend: Backend = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    floats: Floats = False,
    output: Edited = Path("edited.png"),
) -> None:
    """Make pictures of paintings: forms and shades are kept, the model draws the rest.

    A picture of another size than the model's is cropped to its shape, in the middle, and resized.

    Example: cm-runtime edit stroke painting.png --sigma 3 --label 1 --answers 5
    """
    from cm_runtime import editing

    how = How(
        label, seed, index, answers, steps, None, micro_batch, backend, device, precision, threads, floats, output
    )
    work = Work(paths, how)
    images = work.read()
    made = editing.stroke(work.engine, images.images, sigma, **work.options(images))
    work.write("stroke", images, [images.images], made, sigma=sigma)
