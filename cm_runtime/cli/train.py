"""``cm-runtime train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from cm_runtime.training.loop import Report


def train(
    preset: Annotated[str, typer.Argument(metavar="PRESET|CONFIG.toml", help="A preset's name, or a TOML file.")],
    data: Annotated[
        str | None, typer.Option(help="Where the images are: a path or a data set's name.", show_default="the preset's")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/PRESET")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key: phase.0.steps=100. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over where the folder holds a run.")] = False,
) -> None:
    """Train a consistency model from images; writes ckpt.pt in the run folder.

    Example: cm-runtime train fashion-mnist --data fashion-mnist --out runs/fashion
    """
    import json

    from cm_runtime.errors import RequestError
    from cm_runtime.extras import require

    for package in ("torch", "tomli_w"):
        require(package, "cm-runtime train")
    from cm_runtime.training.config import load_config
    from cm_runtime.training.data import open_data
    from cm_runtime.training.loop import train as run
    from cm_runtime.training.workers import is_lead

    if Path(preset).is_dir():
        raise RequestError(f"{preset} is a folder: name a preset or a TOML file, and images by --data {preset}")
    if resume and force:
        raise RequestError("--resume goes on with a run and --force starts it over; give one of them")
    source = [f"data.source={json.dumps(data, ensure_ascii=False)}"] if data else []
    config = load_config(preset, [*(settings or []), *source])
    folder = out or Path("runs") / Path(preset).stem
    images = open_data(config.data.source, image_size=config.data.image_size, progress=is_lead())
    with _bar(is_lead()) as bar:
        checkpoint = run(config, images, folder, resume=resume, force=force, report=_reporter(bar))
    if is_lead():
        typer.echo(f"{checkpoint}: now cm-runtime export {checkpoint}")


def _bar(shown: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4g}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
    )


def _reporter(bar: Progress) -> Callable[[Report], None]:
    tasks = {}

    def show(report: Report) -> None:
        if report.phase not in tasks:
            tasks[report.phase] = bar.add_task(report.method, total=report.steps, loss=report.loss, rate=0.0)
        bar.update(tasks[report.phase], completed=report.step, loss=report.loss, rate=report.images_per_second)

    return show
