"""Edits' common ground: their options, the model and the images they open, and the answers they write."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm_runtime.cli import parsing
from cm_runtime.cli.options import EngineFlags, Floats, MicroBatch, Sigmas, steps
from cm_runtime.errors import RequestError
from cm_runtime.errors.reasons import output_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cm_runtime.editing import EditOptions
    from cm_runtime.files.inputs import Inputs

MODELS = {".onnx", ".engine", ".pt", ".pth", ".safetensors", ".bin", ""}  # "": a folder of diffusers'


@dataclass(frozen=True)
class EditFlags:
    """Options of every edit."""

    labels: Annotated[
        str | None,
        typer.Option(
            metavar="3|0,1,2", help="The images' classes: one for all, or one each.", show_default="what an npz says"
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0
    start: Annotated[int, typer.Option(help="Index of the first answer's noise; the others count on.")] = 0
    answers: Annotated[int, typer.Option(help="Answers to each image.")] = 1
    steps: steps("8") = None  # type: ignore[valid-type]
    sigmas: Sigmas = None
    micro_batch: MicroBatch = "auto"
    floats: Floats = False
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A strip of before, given and answers (.png), the answers (.npz), or a folder for all (NAME/);"
            " what is there is replaced.",
        ),
    ] = "edited.png"


class Session:
    """An edit in the making: the opened model, the files to edit, and where answers go."""

    def __init__(self, paths: list[Path], flags: EditFlags, engine: EngineFlags, steps: int = 8) -> None:
        """steps: without --steps and --sigmas."""
        from cm_runtime import backends
        from cm_runtime.files import atomic

        is_model = paths[0].suffix.lower() in MODELS
        self.paths, self.flags = paths[1:] if is_model else paths, flags
        self.steps = steps if flags.steps is None and flags.sigmas is None else flags.steps
        check_output(flags.output, flags.floats)
        for path in self.paths:
            if path.suffix.lower() in MODELS and path.suffix:
                raise RequestError(f"{path} is no picture; a model is named before them")
        if not is_folder(flags.output):
            atomic.check_output(Path(flags.output))
        self.engine = backends.open_model(paths[0] if is_model else backends.DEFAULT_MODEL, engine.options())
        self.channels, self.height, self.width = self.engine.manifest.image_shape

    def read(self, *sizes: tuple[int, int]) -> Inputs:
        """Read the images, of the model's size unless others are taken. Raises DataError."""
        from cm_runtime.files import inputs

        return inputs.read(self.paths, self.channels, sizes or ((self.height, self.width),))

    def labels(self, images: Inputs) -> list[int] | None:
        """The classes that --labels names, or else the images' npz: one, or one each."""
        if self.flags.labels is not None:
            return parsing.whole_numbers("--labels", self.flags.labels)
        return images.labels if self.engine.manifest.num_classes else None

    def options(self, images: Inputs) -> EditOptions:
        """Options of `editing`'s functions; answers are float32, so that what is clipped can be counted."""
        flags = self.flags
        count = len(images.images) * flags.answers
        return {
            "labels": self.labels(images),
            "steps": self.steps,
            "sigmas": None if flags.sigmas is None else parsing.numbers("--sigmas", flags.sigmas),
            "seed": flags.seed,
            "start": flags.start,
            "answers": flags.answers,
            "micro_batch": parsing.micro_batch(flags.micro_batch, count, self.engine.micro_batch),
            "output": "float32",
        }

    def write(
        self, edit: str, images: Inputs, columns: list[NDArray[Any]], answers: NDArray[Any], **more: object
    ) -> None:
        """Write answers as the output's name asks, and print a summary.

        columns: what a strip shows in front of the answers, each (M,H,W,C) float32 or uint8; answers: (M * answers,
        H, W, C) float32.
        """
        import numpy as np

        from cm_runtime import editing
        from cm_runtime.errors.wording import quantity

        flags, classes, count = self.flags, self.labels(images), len(images.images)
        labels = None if classes is None else np.broadcast_to(classes, count).repeat(flags.answers)
        text = {
            "edit": edit,
            "images": images.names,
            "labels": classes,
            "steps": self.steps,
            **{name: getattr(flags, name) for name in ("seed", "start", "answers", "sigmas")},
            "model_sha256": self.engine.manifest.source_sha256,
            **more,
        }
        rows = answers.reshape(count, flags.answers, *answers.shape[1:])
        strip = np.concatenate([np.stack([_bytes(each) for each in columns], axis=1), _bytes(rows)], axis=1)
        names = [
            f"{name}-{flags.start + n * flags.answers + k}"
            for n, name in enumerate(images.names)
            for k in range(flags.answers)
        ]
        pictures = Pictures(answers if flags.floats else _bytes(answers), labels, strip, names)
        write(flags.output, pictures, text)
        beyond = editing.count_clipped(answers)
        each, edits = quantity(flags.answers, "answer"), quantity(count, "image")
        typer.echo(f"{flags.output}: {edits}, {each} to each, seed {flags.seed}, from index {flags.start}")
        if beyond:
            typer.echo(f"clipped to black or white: {beyond} of {quantity(answers.size, 'number')}")


@dataclass(frozen=True)
class Pictures:
    """Images to write: (N,H,W,C), their labels (N,) or None, a strip (rows, columns, H, W, C) uint8, and names."""

    images: NDArray[Any]
    labels: NDArray[Any] | None
    strip: NDArray[Any]
    names: list[str]


def check_output(output: str, floats: bool, *others: str) -> None:
    """Raises RequestError for a name that says no form, and for floats in another than npz."""
    form = "/" if is_folder(output) else Path(output).suffix
    if form not in ("/", ".png", ".npz", *others):
        forms = ", ".join((".npz (arrays)", *others))
        raise RequestError(f"{output}: an output's name ends in .png (a strip), {forms} or / (a folder)")
    if floats and form != ".npz":
        raise RequestError("--float writes arrays: give -o NAME.npz")


def is_folder(output: str) -> bool:
    """True if the name ends in /, has no ending, or is that of a folder which is there."""
    return output.endswith("/") or not Path(output).suffix or os.path.isdir(output)


def write(output: str, pictures: Pictures, text: dict[str, object]) -> None:
    """Write arrays (.npz), a strip (.png), or a folder of pictures and a strip."""
    from cm_runtime.files import image_writer

    path, images = Path(output), pictures.images
    if not is_folder(output) and path.suffix == ".npz":
        with image_writer.NpzWriter(path, len(images), images.shape[1:], images.dtype, text) as file:
            file.write(images, pictures.labels)
        return
    rows, columns, height, width, _ = pictures.strip.shape
    image_writer.check_grid(rows * columns, height, width)
    picture = image_writer.grid(pictures.strip.reshape(-1, *pictures.strip.shape[2:]), columns)
    if not is_folder(output):
        image_writer.save_png(picture, path, text)
        return
    with output_errors(output, "made"):
        path.mkdir(exist_ok=True)
    for name, image in zip(pictures.names, images, strict=True):
        image_writer.save_png(image, path / f"{name}.png", text)
    image_writer.save_png(picture, path / "strip.png", text)


def _bytes(images: NDArray[Any]) -> NDArray[Any]:
    """float32 in units of [-1, 1], or uint8 as it is -> uint8, by `sampling.to_uint8`."""
    import numpy as np

    from cm_runtime.sampling import to_uint8

    if images.dtype == np.uint8:
        return images
    flat = images.reshape(-1, *images.shape[-3:]).astype(np.float32)
    return to_uint8(np.moveaxis(flat, -1, 1)).reshape(images.shape)
