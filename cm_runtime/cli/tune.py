"""``cm-runtime tune``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cm_runtime.cli import image_sources
from cm_runtime.cli.options import DrawFlags, EngineFlags, ExtractorFile, OutputName, ValueRange, replacing, with_flags
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.evaluate.tuning import Tuned
    from cm_runtime.sampling import Batch


@with_flags(
    steps=None,
    sigmas=None,
    ts=None,
    timesteps=None,
    grid=None,
    count=None,
    start=None,
    precision=None,
    seed=Annotated[int | None, typer.Option(help="Of those images: the same for all candidates.", show_default="0")],
    device=Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where model and extractor run.")],
    threads=Annotated[int | None, typer.Option(help="Threads of each engine.", show_default="one per core")],
)
def tune(
    flags: DrawFlags,
    engine: EngineFlags,
    model: Annotated[Path | None, typer.Argument(help="An exported .onnx.", show_default="the bundled model")] = None,
    steps: Annotated[str, typer.Option(metavar="2|3|4|2,3,4", help="Samplers to tune, by their steps.")] = "2",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|STATS.npz",
            help="Real images, or their statistics.",
            show_default="those of Fashion-MNIST, for its models",
        ),
    ] = None,
    extractor: ExtractorFile = None,
    value_range: ValueRange = None,
    output_name: OutputName = None,
    samples: Annotated[int, typer.Option(help="Images drawn for each candidate.")] = 5000,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A copy of the model that carries the levels.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help=replacing("Without -o: the model itself."))] = False,
) -> None:
    """Search the middle noise levels of few-step samplers, and store them in the model.

    Example: cm-runtime tune model.onnx --steps 2 -o tuned.onnx
    """
    from cm_runtime import backends
    from cm_runtime.backends import engine_file
    from cm_runtime.files import atomic
    from cm_runtime.manifest import read_manifest
    from cm_runtime.onnx_graph.export_writer import write_manifest
    from cm_runtime.request import sampling_request

    counts = _steps(steps)
    if model is not None and backends.is_checkpoint(model):
        raise RequestError(f"{model} is a checkpoint; tune what cm-runtime export makes of it")
    if model is not None and model.suffix != engine_file.SUFFIX and read_manifest(model).graph == "sampler":
        raise RequestError(
            f"{model} is a sampler file, whose levels are fixed: tune the denoiser file of its checkpoint, then"
            " cm-runtime export CKPT --graph sampler --sigmas with the levels found"
        )
    if model is None and output is None:
        raise RequestError("give -o OUT.onnx: the bundled model is not replaced")
    if output is None and not force:
        raise RequestError(f"give -o OUT.onnx for a copy, or --force to store the levels in {model} itself")
    if output is not None and output.suffix != ".onnx":
        raise RequestError(f"{output}: an ONNX file's name ends in .onnx")
    from cm_runtime.cli import progress
    from cm_runtime.cli.progress import track
    from cm_runtime.errors.wording import quantity
    from cm_runtime.evaluate import tuning
    from cm_runtime.evaluate.extractor import Extractor
    from cm_runtime.evaluate.objective import FirstStep, FrechetObjective
    from cm_runtime.schedule import level_text

    source = model or backends.DEFAULT_MODEL
    target = output or source
    atomic.check_output(target, force=force)
    if samples < 2:
        raise RequestError(f"--samples must be at least 2, not {samples}")
    options = engine.options()
    model_engine = backends.open_model(source, options)
    manifest = model_engine.manifest
    network = Extractor(
        extractor,
        value_range=value_range,
        output_name=output_name,
        device=options.device,
        threads=options.threads,
    )
    draw = flags.complete(model_engine, replace(flags.draw(), count=samples), min(samples, 256))
    sampling_request(manifest, draw)  # refused now, if ever
    channels, height, width = manifest.image_shape
    network.check((height, width, channels))
    real, _ = image_sources.reference(reference, network, manifest, manifold=0)

    candidates_left = 0

    def show(parts: Iterator[Batch], sigmas: tuple[float, ...]) -> Iterator[Batch]:
        nonlocal candidates_left
        candidates_left = max(1, candidates_left - 1)  # the search decides how many there are
        return track(parts, samples, f"images at {level_text(sigmas)}", candidates_left)

    objective = FrechetObjective(FirstStep(model_engine), network, real, draw, show)
    levels = dict(manifest.sigmas)
    for count in counts:
        candidates_left = 1 + tuning.most_candidates(count)
        candidates, images = quantity(candidates_left - 1, "candidate"), quantity(samples, "image")
        progress.phase(f"tuning {quantity(count, 'step')}, by up to {candidates} of {images}")
        result = tuning.search(objective, count, levels, manifest.noise_range)
        levels[count] = result.sigmas
        write_manifest(source, target, manifest.model_copy(update={"sigmas": levels}), force=force)
        source, force = target, True  # this result is kept, whatever becomes of the next search
        _print(result)
    typer.echo(f"{target}: now cm-runtime sample {target} --steps {counts[-1]}")


def _steps(text: str) -> list[int]:
    """2, 3 or 4, or several of them separated by commas, ascending: three steps begin where two ended."""
    words = text.split(",")
    if not set(words) <= {"2", "3", "4"} or len(set(words)) < len(words):
        raise RequestError(f"--steps takes 2, 3, 4 or several of them separated by commas, not {text!r}")
    return sorted(map(int, words))


def _print(result: Tuned) -> None:
    from cm_runtime.errors.wording import quantity
    from cm_runtime.schedule import level_text

    steps = quantity(len(result.sigmas), "step")
    typer.echo(f"{steps}, default {level_text(result.default)}: Frechet distance {result.default_value:.4g}")
    typer.echo(
        f"{steps}, tuned   {level_text(result.sigmas)}: Frechet distance {result.value:.4g}"
        f" after {quantity(result.evaluations, 'candidate')}"
    )
