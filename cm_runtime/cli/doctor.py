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
    from cm_runtime.backends import DEFAULT_MODEL, auto_device, choice, precisions
    from cm_runtime.errors import CmRuntimeError
    from cm_runtime.extras import EXTRAS

    typer.echo(f"cm-runtime {__version__}, Python {platform.python_version()}, {platform.machine()}")
    typer.echo(f"cores        {len(os.sched_getaffinity(0))}")
    homes = metadata.packages_distributions()
    for package, extra in {"numpy": "", **EXTRAS}.items():
        distributions = homes.get(package.partition(".")[0])
        found = metadata.version(distributions[0]) if distributions else f"missing: pip install 'cm-runtime[{extra}]'"
        typer.echo(f"{package:12} {found}")
    try:
        manifest = read_manifest(DEFAULT_MODEL)
        asked = choice.question(DEFAULT_MODEL, manifest, auto_device("auto"))
        typer.echo(f"auto         the bundled model runs on {choice.said(asked)}")
    except CmRuntimeError as error:
        typer.echo(f"auto         {error}")
        return
    if able := ", ".join(f"{name}: {what}" for name, what in precisions().items()):
        typer.echo(f"precision    {able}")
    shape = "x".join(map(str, manifest.image_shape))
    typer.echo(f"model        the bundled model draws {shape} images")
