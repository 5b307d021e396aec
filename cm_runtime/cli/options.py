"""Options that more than one command takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ExtractorFile = Annotated[
    Path | None,
    typer.Option(metavar="X.onnx", help="The network whose features are compared. [default: the shipped one]"),
]
ValueRange = Annotated[
    str | None,
    typer.Option("--range", metavar="-1:1|0:1|0:255", help="What --extractor takes for black:white, if unsaid."),
]
OutputName = Annotated[
    str | None, typer.Option(metavar="NAME", help="The output of --extractor with the features, if unsaid.")
]
Labels = Annotated[
    str | None, typer.Option(metavar="all|random|3|0,1,2", help="Classes: all in turn, random, or a list in turn.")
]
MicroBatch = Annotated[
    str, typer.Option(metavar="auto|M", help="How many images the engine sees at once; decides memory.")
]
# Three ways to name noise levels in place of --steps: ours, OpenAI's and diffusers'; `values.levels` reads them.
Sigmas = Annotated[str | None, typer.Option(metavar="80,1.4", help="Noise levels in place of --steps, descending.")]
Ts = Annotated[
    str | None,
    typer.Option(
        metavar="0,22,39", help="The same as OpenAI writes them: ascending indices into --grid, its last included."
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        metavar="22,0", help="The same as diffusers writes them: descending indices into --grid, without its last."
    ),
]
Grid = Annotated[
    int | None,
    typer.Option(metavar="40", help="Points of the model's training grid, which --ts and --timesteps count in."),
]
