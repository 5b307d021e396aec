"""``cm-runtime info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm_runtime.errors import ArtifactError

if TYPE_CHECKING:
    from cm_runtime.manifest import Manifest


def describe(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain values."""
    return manifest.model_dump(mode="json", exclude_none=True)


def info(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help="An exported .onnx or .engine, a checkpoint, or images that cm-runtime drew (.png, .npz).",
            show_default="the bundled model",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a file is: its images, classes, noise levels, parity, training, and the engine that auto takes.

    Of images it says what they were drawn with.

    Example: cm-runtime info model.onnx
    """
    import json

    from cm_runtime import onnx_graph
    from cm_runtime.backends import DEFAULT_MODEL, auto, auto_device, engine_file, is_checkpoint
    from cm_runtime.manifest import read_manifest

    where, choice = path or DEFAULT_MODEL, ""
    if is_checkpoint(where):
        from cm_runtime.extras import require

        require("torch", f"reading the checkpoint {where}")
        from cm_runtime.checkpoints.load import load_checkpoint

        checkpoint = load_checkpoint(where)
        content = describe(checkpoint.manifest())
        content["weights"] = sum(tensor.numel() for tensor in checkpoint.ema[checkpoint.default_ema].values())
        content["ema"] = list(checkpoint.ema)
    elif where.suffix == engine_file.SUFFIX:
        content = engine_file.read_engine_manifest(where).model_dump(mode="json", exclude_none=True)
    elif where.suffix.lower() in (".png", ".npz"):
        from cm_runtime.files.image_writer import provenance

        content = provenance(where)
    else:
        manifest = read_manifest(where)
        content = describe(manifest)
        choice = auto.explain(auto.question(where, manifest, auto_device("auto")))
        try:
            if reason := onnx_graph.check(where, manifest).foreign:
                choice = f"ort alone: cm-runtime export did not write this graph, for {reason}"
        except ArtifactError as error:
            choice = f"no engine: {error}"
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    from cm_runtime.errors import one_line

    typer.echo(where)
    for line in _lines(content):
        typer.echo(f"  {one_line(line)}")
    if choice:
        typer.echo(f"  {'auto':16} {choice}")


def _lines(content: dict[str, Any]) -> list[str]:
    """A line for each value; a model inside an engine's manifest has lines of its own below its key."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict) and any(isinstance(each, dict) for name, each in value.items() if name != "config"):
            lines += [key, *(f"  {line}" for line in _lines(value))]
        elif value not in ("", [], {}):
            lines.append(f"{key:16} {_format(value)}")
    return lines


def _format(value: Any) -> str:
    """Numbers in six digits, tiny ones in three; lists and tables on one line, but for a run's configuration."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, dict):
        values = {
            k: f"({_format(v)})" if isinstance(v, list) else _format(v) for k, v in value.items() if k != "config"
        }
        return ", ".join(f"{key} {each}" for key, each in values.items())
    return str(value)
