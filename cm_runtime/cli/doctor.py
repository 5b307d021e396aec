"""``cm-runtime doctor``."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Say what this installation can do: packages, engines and devices, and how to get what is missing."""
    import os
    import platform
    from importlib import metadata

    from cm_runtime import __version__
    from cm_runtime.artifact import read_manifest
    from cm_runtime.backends import DEFAULT_MODEL
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.extras import EXTRAS

    typer.echo(f"cm-runtime {__version__}, Python {platform.python_version()}, {platform.machine()}")
    typer.echo(f"cores        {len(os.sched_getaffinity(0))}")
    homes = metadata.packages_distributions()
    for package, extra in {"numpy": "", **EXTRAS}.items():
        distributions = homes.get(package)
        found = metadata.version(distributions[0]) if distributions else f"missing: pip install 'cm-runtime[{extra}]'"
        typer.echo(f"{package:12} {found}")
    try:
        from cm_runtime.backends.ort import has_cuda

        device = "cuda:0" if has_cuda() else "cpu"
        typer.echo(f"auto         .onnx files run on ONNX Runtime, device {device}")
    except CmRuntimeError as error:
        typer.echo(f"auto         {error}")
    try:
        shape = "x".join(map(str, read_manifest(DEFAULT_MODEL).image_shape))
        typer.echo(f"model        the bundled model draws {shape} images")
    except CmRuntimeError as error:
        typer.echo(f"model        {error}")
