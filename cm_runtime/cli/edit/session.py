"""What all edits have in common: their options, the model and the images they open, and the answers they write."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.options import (
    Answers,
    Backend,
    Device,
    Edited,
    EditSteps,
    Floats,
    Index,
    Label,
    MicroBatch,
    Precision,
    Seed,
    Sigmas,
    Steps,
    Threads,
)
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cm_runtime.backends import base
    from cm_runtime.files.inputs import Given

MODELS = {".onnx", ".engine", ".pt", ".pth", ".safetensors", ".bin", ""}  # "": a folder of diffusers'


@dataclass(frozen=True)
class How:
    """The options of every edit, as they were given; `edit` gives them to a command."""

    label: Label = None
    seed: Seed = 0
    index: Index = 0
    answers: Answers = 1
    steps: EditSteps = None
    sigmas: Sigmas = None
    micro_batch: MicroBatch = "auto"
    backend: Backend = "auto"
    device: Device = "auto"
    precision: Precision = "auto"
    threads: Threads = None
    floats: Floats = False
    output: Edited = "edited.png"


def edit(*, steps: int | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `How`'s fields options of a command, behind its own, and hands them to it as its parameter ``how``.

    steps: how many are taken unless --steps is given, in an edit that begins at a --sigma and so has no --sigmas.
    """
    shared = dict(inspect.signature(How, eval_str=True).parameters)
    if steps is not None:
        shared["steps"] = shared["steps"].replace(annotation=Steps, default=steps)
        del shared["sigmas"]

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**given: Any) -> None:
            how = How(**{name: given.pop(name) for name in shared})
            command(how=how, **given)

        own = inspect.signature(command, eval_str=True).parameters.values()
        read = [*(each for each in own if each.name != "how"), *shared.values()]
        call.__signature__ = inspect.Signature(read)  # type: ignore[attr-defined]  # typer reads both
        call.__annotations__ = {each.name: each.annotation for each in read}
        return call

    return with_options


class Work:
    """An edit in the making: the opened model, the files to edit, and where answers go."""

    def __init__(self, paths: list[Path], how: How) -> None:
        from cm_runtime import backends
        from cm_runtime.files import atomic

        is_model = paths[0].suffix.lower() in MODELS
        self.paths, self.how = paths[1:] if is_model else paths, how
        check_output(how.output, how.floats)
        for path in self.paths:
            if path.suffix.lower() in MODELS and path.suffix:
                raise RequestError(f"{path} is no picture; a model is named before them")
        if not is_folder(how.output):
            atomic.check_output(Path(how.output))
        self.engine: base.Backend = backends.load(
            paths[0] if is_model else None,
            how.backend,  # type: ignore[arg-type]
            how.device,
            parsing.threads(how.threads),
            how.precision,  # type: ignore[arg-type]
        )
        self.channels, self.height, self.width = self.engine.manifest.image_shape

    def read(self, *sizes: tuple[int, int]) -> Given:
        """The images, of the model's size unless others are taken. Raises DataError."""
        from cm_runtime.files import inputs

        return inputs.read(self.paths, self.channels, sizes or ((self.height, self.width),))

    def label(self, given: Given) -> list[int] | None:
        """What --label says, or else the images' npz: one, or one each."""
        if self.how.label is not None:
            return parsing.whole_numbers("--label", self.how.label)
        return given.labels if self.engine.manifest.num_classes else None

    def options(self, given: Given) -> dict[str, Any]:
        """For `editing`; answers are wanted as float32, to count what is clipped."""
        how, count = self.how, len(given.images) * self.how.answers
        return {
            "label": self.label(given),
            "steps": how.steps,
            "sigmas": None if how.sigmas is None else parsing.numbers("--sigmas", how.sigmas),
            "seed": how.seed,
            "index": how.index,
            "answers": how.answers,
            "batch": parsing.micro_batch(how.micro_batch, max(count, 1), self.engine.micro_batch),
            "output": "float32",
        }

    def write(self, edit: str, given: Given, columns: list[NDArray[Any]], made: NDArray[Any], **more: object) -> None:
        """Writes answers as the output's name asks, and says what was done.

        columns: what a strip shows in front of the answers, each (M,H,W,C) float32 or uint8; made: (M * answers,
        H, W, C) float32.
        """
        import numpy as np

        from cm_runtime import editing
        from cm_runtime.errors.wording import quantity

        how, label = self.how, self.label(given)
        labels = None if label is None else np.broadcast_to(label, len(given.images)).repeat(how.answers)
        text = {
            "edit": edit,
            "images": given.names,
            "label": label,
            "seed": how.seed,
            "index": how.index,
            "answers": how.answers,
            "steps": how.steps,
            "sigmas": how.sigmas,
            "model_sha256": self.engine.manifest.source_sha256,
            **more,
        }
        answers = made.reshape(len(given.images), how.answers, *made.shape[1:])
        strip = np.concatenate([np.stack([_bytes(each) for each in columns], axis=1), _bytes(answers)], axis=1)
        names = [
            f"{name}-{how.index + n * how.answers + k}"
            for n, name in enumerate(given.names)
            for k in range(how.answers)
        ]
        write(how.output, made if how.floats else _bytes(made), labels, strip, names, text)
        beyond = editing.clipped(made)
        each = quantity(how.answers, "answer")
        edited = quantity(len(given.images), "image")
        typer.echo(f"{how.output}: {edited}, {each} to each, seed {how.seed}, from index {how.index}")
        if beyond:
            typer.echo(f"clipped to black or white: {beyond} of {quantity(made.size, 'number')}")


def check_output(output: str, floats: bool, *others: str) -> None:
    """Raises RequestError for a name that says no form, and for floats in another than npz."""
    form = "/" if is_folder(output) else Path(output).suffix
    if form not in ("/", ".png", ".npz", *others):
        forms = ", ".join((".npz (arrays)", *others))
        raise RequestError(f"{output}: an output's name ends in .png (a strip), {forms} or / (a folder)")
    if floats and form != ".npz":
        raise RequestError("--float writes arrays: give -o NAME.npz")


def is_folder(output: str) -> bool:
    """Whether the name ends in /, has no ending, or is that of a folder which is there."""
    return output.endswith("/") or not Path(output).suffix or os.path.isdir(output)


def write(
    output: str,
    made: NDArray[Any],
    labels: NDArray[Any] | None,
    strip: NDArray[Any],
    names: list[str],
    text: dict[str, object],
) -> None:
    """made: (N,H,W,C); labels: (N,) or None; strip: (rows, columns, H, W, C) uint8; names: of pictures."""
    from cm_runtime.errors import OutputError
    from cm_runtime.files import image_writer

    path = Path(output)
    if not is_folder(output) and path.suffix == ".npz":
        with image_writer.NpzWriter(path, len(made), made.shape[1:], made.dtype, text) as file:
            file.write(made, labels)
        return
    rows, columns, height, width, _ = strip.shape
    image_writer.check_grid(rows * columns, height, width)
    picture = image_writer.grid(strip.reshape(-1, *strip.shape[2:]), columns)
    if not is_folder(output):
        image_writer.save_png(picture, path, text)
        return
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror or error}") from error
    for name, image in zip(names, made, strict=True):
        image_writer.save_png(image, path / f"{name}.png", text)
    image_writer.save_png(picture, path / "strip.png", text)


def _bytes(made: NDArray[Any]) -> NDArray[Any]:
    """float32 in units of [-1, 1], or uint8 as it is -> uint8, by `sampling.to_uint8`."""
    import numpy as np

    from cm_runtime.sampling import to_uint8

    if made.dtype == np.uint8:
        return made
    flat = made.reshape(-1, *made.shape[-3:]).astype(np.float32)
    return to_uint8(np.moveaxis(flat, -1, 1)).reshape(made.shape)
