"""``cm-runtime train``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm_runtime.cli import parsing, progress
from cm_runtime.cli.options import replacing

if TYPE_CHECKING:
    from rich.progress import Progress

    from cm_runtime.training.config import TrainConfig
    from cm_runtime.training.data.image_set import ImageSet
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
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; beside other work fewer are faster.", show_default="one per core")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=replacing("A run: by one that starts over."))] = False,
) -> None:
    """Train a consistency model from images; writes ckpt.pt in the run folder.

    Example: cm-runtime train fashion-mnist --data fashion-mnist --out runs/fashion
    """
    import json

    from cm_runtime.errors import RequestError
    from cm_runtime.extras import require

    for package in ("torch", "tomli_w"):
        require(package, "cm-runtime train")
    from cm_runtime.backends.torch import set_threads
    from cm_runtime.training.config import load_config
    from cm_runtime.training.data import open_data
    from cm_runtime.training.distributed import is_lead
    from cm_runtime.training.loop import Observer
    from cm_runtime.training.loop import train as run

    if Path(preset).is_dir():
        raise RequestError(f"{preset} is a folder: name a preset or a TOML file, and images by --data {preset}")
    if resume and force:
        raise RequestError("--resume goes on with a run and --force starts it over; give one of them")
    set_threads(parsing.threads(threads))
    source = [f"data.source={json.dumps(data, ensure_ascii=False)}"] if data else []
    config = load_config(preset, [*(settings or []), *source])
    folder = out or Path("runs") / Path(preset).stem
    quiet = progress.is_quiet() or not is_lead()
    with progress.spinner(f"reading {config.data.source}", has_bar=True):
        images = open_data(config.data.source, image_size=config.data.image_size, progress=not quiet)
    with closing(_Progress(_plan(config, images, folder), config, quiet)) as display:
        observer = Observer(display.begin, display.step, display.save)
        checkpoint = run(config, images, folder, resume=resume, force=force, observer=observer)
    if is_lead():
        typer.echo(f"{checkpoint}: now cm-runtime export {checkpoint}")


def _plan(config: TrainConfig, images: ImageSet, folder: Path) -> str:
    """Write the plan: the phases, their images, the device, and the folder."""
    import torch

    from cm_runtime.backends.torch import find_device
    from cm_runtime.errors.wording import quantity

    phases = ", ".join(
        f"{phase.method} {quantity(phase.steps, 'step')} of {quantity(phase.batch, 'image')}" for phase in config.phase
    )
    shape = "x".join(map(str, images.image_shape))
    device = find_device(config.device)
    threads = f" with {quantity(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    data = f"{quantity(len(images), 'image')} {shape} of {images.name}"
    return f"training on {data}: {phases}; on {device}{threads}, into {folder}/"


class _Progress:
    """Display of a run: the plan, then a bar, a notebook's line or plain lines."""

    def __init__(self, plan: str, config: TrainConfig, quiet: bool) -> None:
        self._plan, self._config, self._text = plan, config, ""
        self._place: progress.Place = "nowhere" if quiet else progress.place()
        self._bar = _bar() if self._place == "terminal" else None
        self._line = progress.Line() if self._place == "notebook" else None
        self._first, self._start_time = 0, 0.0
        self._task: Any = None

    def close(self) -> None:
        """Stop the bar, or clear the line."""
        if self._bar is not None:
            self._bar.stop()
        if self._line is not None:
            self._line.clear()

    def begin(self, phase: int, step: int) -> None:
        """Print the plan, once, and that a phase begins."""
        if self._place == "nowhere":
            return
        if self._plan:
            progress.say(self._plan)
            self._plan = ""
        self._first, self._start_time = step, progress.now()
        method, steps = self._config.phase[phase].method, self._config.phase[phase].steps
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(method, total=steps, completed=step, loss=0.0, rate=0.0)
        elif self._place == "lines":
            from cm_runtime.errors.wording import quantity

            at = f" from step {step}" if step else ""
            progress.say(f"phase {phase + 1} of {len(self._config.phase)}: {method}, {quantity(steps, 'step')}{at}")

    def step(self, report: Report) -> None:
        """Show the step, its loss and the time that is left."""
        if self._bar is not None:
            rate = report.images_per_second
            self._bar.update(self._task, completed=report.step, loss=report.loss, rate=rate)
        elif self._place != "nowhere":
            seconds = (progress.now() - self._start_time) / (report.step - self._first) * (report.steps - report.step)
            self._text = (
                f"{report.method}: step {report.step}/{report.steps}, loss {report.loss:.3g},"
                f" {report.images_per_second:.0f} images/s, {progress.duration(seconds)} left"
            )
            if self._line is not None:
                self._line.show(self._text)
            else:
                progress.tick(self._text)

    def save(self, phase: int, step: int) -> None:
        """Print that a step is saved, off a terminal, if it is the phase's last or a line is due."""
        if self._place == "lines" and (step == self._config.phase[phase].steps or progress.is_due(progress.LONG)):
            progress.say(f"{self._text}, saved")


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4g}  {task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
