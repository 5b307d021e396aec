"""Options that more than one command takes, and the groups of them that travel as one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm_runtime.choices import BackendName, ComputePrecision
from cm_runtime.cli import parsing
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cm_runtime.backends.base import EngineOptions
    from cm_runtime.manifest import Manifest
    from cm_runtime.request import Draw
    from cm_runtime.sampling import Denoiser, Drawer

RULE = "Replace what is there; pictures, npz files and pages are replaced without it."


def replacing(more: str) -> str:
    """The help of a --force that does more than apply the rule: the rule, and ``more``."""
    return f"{RULE} {more}"


Force = Annotated[bool, typer.Option("--force", help=RULE)]
ModelFile = Annotated[
    Path | None,
    typer.Argument(help="An exported .onnx or .engine, or a checkpoint.", show_default="the bundled model"),
]
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
Backend = Annotated[
    BackendName, typer.Option(help="The engine; auto measures, once, which of those installed is fastest for the file.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where it runs.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine.", show_default="one per core")]
MicroBatch = Annotated[
    str, typer.Option(metavar="auto|M", help="How many images the engine sees at once; decides memory.")
]
Sigmas = Annotated[str | None, typer.Option(metavar="80,1.4", help="Noise levels in place of --steps, descending.")]
Floats = Annotated[bool, typer.Option("--float", help="npz: float32 before quantisation.")]
Images = Annotated[
    list[Path],
    typer.Argument(metavar="[MODEL] IMAGE...", help="PNG, JPEG, WebP or BMP pictures, or arrays in an npz."),
]


def steps(default: str, what: str = "Network evaluations per image.") -> Any:
    """--steps of a command that takes ``default`` without it."""
    return Annotated[int | None, typer.Option(help=what, show_default=default)]


@dataclass(frozen=True)
class DrawFlags:
    """Options of what a model draws; None is an option that was not given.

    Noise levels in place of --steps come in three forms: --sigmas, OpenAI's --ts and diffusers' --timesteps.
    """

    steps: steps("2") = None  # type: ignore[valid-type]
    sigmas: Sigmas = None
    ts: Annotated[
        str | None,
        typer.Option(
            metavar="0,22,39", help="The same as OpenAI writes them: ascending indices into --grid, its last included."
        ),
    ] = None
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="22,0", help="The same as diffusers writes them: descending indices into --grid, without its last."
        ),
    ] = None
    grid: Annotated[
        int | None,
        typer.Option(metavar="40", help="Points of the model's training grid, which --ts and --timesteps count in."),
    ] = None
    count: Annotated[int | None, typer.Option(help="How many images in all.", show_default="one batch")] = None
    start: Annotated[int | None, typer.Option(help="Index of the first image.", show_default="0")] = None
    seed: Annotated[int | None, typer.Option(help="Image i of a seed is always the same.", show_default="0")] = None
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="all|random|3|0,1,2|3:100,7:50",
            help="Classes: all in turn, random, a list in turn, or so many of each.",
            show_default="all",
        ),
    ] = None
    micro_batch: Annotated[
        str | None,
        typer.Option(
            metavar="auto|M", help="How many images the engine sees at once; decides memory.", show_default="auto"
        ),
    ] = None

    def draw(self) -> Draw:
        """All but the noise levels and the micro-batch, which depend on a model. Raises RequestError."""
        from cm_runtime.request import Draw

        labels = parsing.labels(self.labels)
        return Draw(count=self.count, steps=self.steps, seed=self.seed or 0, start=self.start or 0, labels=labels)

    def levels(self, manifest: Manifest) -> Sequence[float] | None:
        """Noise levels that --sigmas, or --ts or --timesteps on a --grid, name; None without any.

        The grid spans the model's own sigma_min and sigma_max, with its rho. Raises RequestError, also where more than
        one of those and --steps is given.
        """
        names = [name for name in ("steps", "sigmas", "ts", "timesteps") if getattr(self, name) is not None]
        if len(names) > 1:
            raise RequestError(f"give {' or '.join(names)}, {'not both' if len(names) == 2 else 'only one of them'}")
        if self.ts is not None:
            return manifest.noise_range.from_ts(parsing.whole_numbers("--ts", self.ts), self._grid("--ts"))
        if self.timesteps is not None:
            timesteps = parsing.whole_numbers("--timesteps", self.timesteps)
            return manifest.noise_range.from_timesteps(timesteps, self._grid("--timesteps"))
        if self.grid is not None:
            raise RequestError("--grid is what --ts or --timesteps count in; give one of them, or leave --grid out")
        return None if self.sigmas is None else parsing.numbers("--sigmas", self.sigmas)

    def _grid(self, option: str) -> int:
        if self.grid is None:
            raise RequestError(
                f"{option} needs --grid, the points of the model's training grid: 40 for OpenAI's CD models,"
                " 201 for ct_imagenet64, 151 for CT at 256"
            )
        return self.grid

    def complete(self, engine: Denoiser | Drawer, draw: Draw, size: int) -> Draw:
        """``draw`` with the noise levels of the engine's model, and micro-batches of it.

        size: images that auto shares out evenly. Raises RequestError.
        """
        micro_batch = parsing.micro_batch(self.micro_batch, size, engine.micro_batch)
        return replace(draw, sigmas=self.levels(engine.manifest), micro_batch=micro_batch)


@dataclass(frozen=True)
class EngineFlags:
    """Options of what a model runs on."""

    backend: Backend = "auto"
    device: Device = "auto"
    precision: Annotated[
        ComputePrecision,
        typer.Option(
            help="What the engine computes in; auto: as the file. fp32 is IEEE's, to one grey level; tf32, of GPUs, has"
            " products of 10 bits."
        ),
    ] = "auto"
    threads: Threads = None

    def options(self) -> EngineOptions:
        """As engines take them. Raises RequestError."""
        from cm_runtime.backends.base import EngineOptions

        return EngineOptions(self.backend, self.device, self.precision, parsing.threads(self.threads))


def with_flags(**changes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the fields of a command's parameters that are groups of options, options of the command.

    changes: another annotation for an option, or None to leave it out of the command.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, tuple[Any, list[str]]] = {}
        own: list[inspect.Parameter] = []
        shared: list[inspect.Parameter] = []  # a command's help begins with its own options
        for each in inspect.signature(command, eval_str=True).parameters.values():
            if not is_dataclass(each.annotation):
                own.append(each)
                continue
            group: Any = each.annotation
            options = dict(inspect.signature(group, eval_str=True).parameters)
            for name, change in changes.items():
                if change is None:
                    options.pop(name, None)
                elif name in options:
                    options[name] = options[name].replace(annotation=change)
            shared += options.values()
            groups[each.name] = each.annotation, list(options)

        @functools.wraps(command)
        def call(**values: Any) -> None:
            values |= {
                name: group(**{option: values.pop(option) for option in options})
                for name, (group, options) in groups.items()
            }
            command(**values)

        by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared)]
        call.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]  # typer reads both
        call.__annotations__ = {each.name: each.annotation for each in by_name}
        return call

    return wrap
