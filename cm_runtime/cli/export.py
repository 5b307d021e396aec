"""``cm-runtime export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.checkpoint import Checkpoint


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CKPT", help="A checkpoint of cm-runtime train or OpenAI's, or a diffusers folder."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The .onnx file, or diffusers' folder. [default: the checkpoint's name]"),
    ] = None,
    form: Annotated[
        Literal["onnx", "diffusers"],
        typer.Option(
            "--format", help="A graph for engines, or a folder that diffusers' ConsistencyModelPipeline opens."
        ),
    ] = "onnx",
    inline: Annotated[
        bool, typer.Option("--inline", help="Skip-scale as standard ops, for engines without local functions.")
    ] = False,
    precond: Annotated[
        Literal["boundary", "edm", "piecewise"] | None,
        typer.Option(help="The preconditioning form, of files that do not say it."),
    ] = None,
    head_channels: Annotated[
        int | None, typer.Option(help="Channels of an attention head, of OpenAI's files. [default: 64]")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels a side, of OpenAI's files. [default: innermost feature map 8x8, as they have]"),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The published model that this is, as cd_imagenet64_l2. [default: the file's]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Export a checkpoint to ONNX, with the skip-scaling in the graph, proved equal to the torch model.

    Example: cm-runtime export runs/fashion-mnist/ckpt.pt -o model.onnx
    """
    from cm_runtime.extras import require

    if inline and form != "onnx":
        raise RequestError("--inline is of --format onnx")
    for package in ("torch", "onnx", "onnxruntime"):
        require(package, "cm-runtime export")
    from cm_runtime import export as exporting
    from cm_runtime import files
    from cm_runtime.importers import load_checkpoint

    def load() -> Checkpoint:
        return load_checkpoint(
            checkpoint, precond=precond, head_channels=head_channels, image_size=image_size, model_name=model_name
        )

    name = checkpoint.absolute()  # "." has none of its own
    if form == "diffusers":
        target = output or name.with_suffix("")
        if target.absolute() == name:
            raise RequestError(f"{checkpoint} is where the folder would go by default; give another with -o")
        exporting.diffusers(load(), target, force=force)
        typer.echo(f"{target}: now ConsistencyModelPipeline.from_pretrained({str(target)!r})")
        return
    target = output or (checkpoint if checkpoint.name else name).with_suffix(".onnx")
    if checkpoint.exists():
        files.check_writable(target, force=force)  # before minutes of reading
    manifest = exporting.onnx(load(), target, inline=inline, force=force).manifest
    assert manifest.parity is not None  # no file is written without its proof
    size = target.stat().st_size
    data = f" with {manifest.data_file} beside it" if manifest.data_file else ""
    if manifest.data_file:
        size += (target.parent / manifest.data_file).stat().st_size
    typer.echo(
        f"{target}{data}: {size / 1e6:.1f} MB, within {manifest.parity.max_abs:.1e} of torch at"
        f" {len(manifest.parity.sigmas)} noise levels ({manifest.parity.engine});"
        f" now cm-runtime sample {target}"
    )
