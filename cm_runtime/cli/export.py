"""``cm-runtime export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint that cm-runtime train made.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The .onnx file. [default: the checkpoint's name]")
    ] = None,
    inline: Annotated[
        bool, typer.Option("--inline", help="Skip-scale as standard ops, for engines without local functions.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Export a checkpoint to ONNX, with the skip-scaling in the graph, proved equal to the torch model.

    Example: cm-runtime export runs/fashion-mnist/ckpt.pt -o model.onnx
    """
    from cm_runtime.extras import require

    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        require(package, "cm-runtime export")
    from cm_runtime import export as exporting
    from cm_runtime.checkpoint import load_checkpoint

    target = output or checkpoint.with_suffix(".onnx")
    manifest = exporting.onnx(load_checkpoint(checkpoint), target, inline=inline, force=force)
    assert manifest.parity is not None  # no file is written without its proof
    typer.echo(
        f"{target}: {target.stat().st_size / 1e6:.1f} MB, within {manifest.parity.max_abs:.1e} of torch at"
        f" {len(manifest.parity.sigmas)} noise levels ({manifest.parity.engine});"
        f" now cm-runtime sample {target}"
    )
