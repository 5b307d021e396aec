"""``cm-runtime info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cm_runtime.artifact import Manifest


def describe(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain values."""
    return manifest.model_dump(mode="json", exclude_none=True)


def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="An exported .onnx or .engine, or a checkpoint.", show_default="the bundled model"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a file is: its images, classes, noise levels, parity, training, and the engine that auto takes.

    Example: cm-runtime info model.onnx
    """
    import json

    from cm_runtime.artifact import read_manifest
    from cm_runtime.backends import DEFAULT_MODEL, auto_device, choice, engine_file, is_checkpoint

    where, chosen = path or DEFAULT_MODEL, ""
    if is_checkpoint(where):
        from cm_runtime.extras import require

        require("torch", f"reading the checkpoint {where}")
        from cm_runtime.importers import load_checkpoint

        checkpoint = load_checkpoint(where)
        content = describe(checkpoint.manifest())
        content["weights"] = sum(tensor.numel() for tensor in checkpoint.ema[checkpoint.default_ema].values())
        content["ema"] = list(checkpoint.ema)
    elif where.suffix == engine_file.SUFFIX:
        content = engine_file.read_engine_manifest(where).model_dump(mode="json", exclude_none=True)
    else:
        manifest = read_manifest(where)
        content = describe(manifest)
        chosen = choice.said(choice.question(where, manifest, auto_device("auto")))
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(where)
    for key, value in content.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if k != "config") if isinstance(value, dict) else value
        if shown not in ("", []):
            typer.echo(f"  {key:16} {shown}")
    if chosen:
        typer.echo(f"  {'auto':16} {chosen}")
