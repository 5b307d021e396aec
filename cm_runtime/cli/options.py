"""Options that more than one command takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RULE = "Replace what is there; pictures, npz files and pages are replaced without it."


def replacing(more: str) -> str:
    """The help of a --force that does more than apply the rule: the rule, and ``more``."""
    return f"{RULE} {more}"


Force = Annotated[bool, typer.Option("--force", help=RULE)]
ExtractorFile = Annotated[
    Path | None,
    typer.Option(metavar="X.onnx", help="The network whose features are compared.", show_default="the shipped one"),
]
ValueRange = Annotated[
    str | None,
    typer.Option("--range", metavar="-1:1|0:1|0:255", help="What --extractor takes for black:white, if unsaid."),
]
OutputName = Annotated[
    str | None, typer.Option(metavar="NAME", help="The output of --extractor with the features, if unsaid.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="all|random|3|0,1,2|3:100,7:50",
        help="Classes: all in turn, random, a list in turn, or so many of each.",
        show_default="all",
    ),
]
MicroBatch = Annotated[
    str, typer.Option(metavar="auto|M", help="How many images the engine sees at once; decides memory.")
]
# Three ways to name noise levels in place of --steps: ours, OpenAI's and diffusers'; `parsing.levels` reads them.
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

Steps = Annotated[int | None, typer.Option(help="Network evaluations per image.")]
BACKENDS = "auto|ort|openvino|torch|torch.compile|tensorrt|tensorrt-rtx"
Backend = Annotated[
    str,
    typer.Option(
        metavar=BACKENDS,
        help="The engine; auto measures, once, which of those installed is fastest for the file.",
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where it runs.")]
Precision = Annotated[
    str,
    typer.Option(
        metavar="auto|fp32|bf16|fp16",
        help="What OpenVINO or torch computes in; auto: as the file. fp32: to one grey level.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine.", show_default="one per core")]
# Of the edits
EditSteps = Annotated[int | None, typer.Option(help="Network evaluations per image.", show_default="8")]
Images = Annotated[
    list[Path],
    typer.Argument(metavar="[MODEL] IMAGE...", help="PNG, JPEG, WebP or BMP pictures, or arrays in an npz."),
]
Label = Annotated[
    str | None,
    typer.Option(
        metavar="3|0,1,2", help="The images' class: one for all, or one each.", show_default="what an npz says"
    ),
]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Index = Annotated[int, typer.Option(help="Number of the first answer's noise; the others count on.")]
Answers = Annotated[int, typer.Option(help="Answers to each image.")]
Floats = Annotated[bool, typer.Option("--float", help="npz: float32 before quantisation.")]
Edited = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="PATH",
        help="A strip of before, given and answers (.png), the answers (.npz), or a folder for all (NAME/);"
        " what is there is replaced.",
    ),
]
