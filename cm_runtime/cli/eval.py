"""``cm-runtime eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cm_runtime.choices import BackendName
from cm_runtime.cli import image_sources, parsing
from cm_runtime.cli.options import DrawFlags, ExtractorFile, Force, OutputName, ValueRange, with_flags
from cm_runtime.cli.options import steps as steps_option
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from cm_runtime.evaluate.metrics import Report


@with_flags(
    start=None,
    steps=steps_option("2; 18", "Network evaluations per image; ODE steps of a teacher."),
    count=Annotated[int | None, typer.Option(help="How many images a model draws.", show_default="10000")],
    seed=Annotated[int | None, typer.Option(help="Of a model's images.", show_default="0")],
)
def evaluate(
    flags: DrawFlags,
    images: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|IMAGES",
            help="A model or checkpoint, samples (.npz), or a data set: path or name.",
            show_default="the bundled model",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|STATS.npz",
            help="What to compare with: the training split of a data set, samples, or statistics.",
            show_default="those of Fashion-MNIST, for its models",
        ),
    ] = None,
    extractor: ExtractorFile = None,
    value_range: ValueRange = None,
    output_name: OutputName = None,
    split: Annotated[
        str | None, typer.Option(metavar="train|test", help="Of IMAGES that are a data set.", show_default="train")
    ] = None,
    backend: Annotated[BackendName | None, typer.Option(help="A model's engine.", show_default="auto")] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda:0", help="Where model and extractor run.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of each engine.", show_default="one per core")] = None,
    manifold: Annotated[
        int, typer.Option(help="Features of each side kept for precision and recall; decides memory.")
    ] = 10_000,
    save_statistics: Annotated[
        Path | None, typer.Option(metavar="OUT.npz", help="Keep the images' statistics, for a later --reference.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The report, as JSON.")] = None,
    force: Force = False,
) -> None:
    """Measure images against real ones: Frechet distance, precision and recall, class agreement.

    Example: cm-runtime eval model.onnx --steps 2 --reference fashion-mnist -o report.json
    """
    for path, suffix in ((save_statistics, ".npz"), (output, ".json")):
        if path is not None and path.suffix != suffix:
            raise RequestError(f"{path}: the name must end in {suffix}")
    from cm_runtime import __version__, backends
    from cm_runtime.backends.base import EngineOptions
    from cm_runtime.cli.progress import spinner
    from cm_runtime.evaluate import metrics, statistics
    from cm_runtime.evaluate.extractor import Extractor
    from cm_runtime.files import atomic

    for path in (save_statistics, output):
        if path is not None:
            atomic.check_output(path, force=force)
    if manifold < 4:
        raise RequestError(f"--manifold must be at least 4, one more than the neighbours, not {manifold}")
    workers = parsing.threads(threads)
    if images is None or backends.is_model(Path(images)):
        if split is not None:
            raise RequestError("--split is for data sets, and a model is measured; leave it out")
        options = EngineOptions(backend or "auto", device, threads=workers)
        source = image_sources.draw_images(Path(images) if images else None, flags, options)
    else:
        image_sources.check_no_flags(flags, backend, images)
        source = image_sources.open_images(images, split)
    network = Extractor(extractor, value_range=value_range, output_name=output_name, device=device, threads=workers)
    network.check(source.shape)
    real: metrics.Observation | None = None
    description: dict[str, Any] | None = None
    if reference is not None or save_statistics is None:
        real, description = image_sources.reference(reference, network, source.manifest, manifold)
    statistics_of = None if real is None else real.statistics
    observation = image_sources.observe_images(source, network, manifold, "images", reference=statistics_of)
    with spinner("precision and recall"):
        figures = metrics.compare(observation, real)
    few = metrics.few_images(observation, real)
    report = metrics.Report(
        cm_runtime=__version__,
        images=source.description,
        reference=description,
        extractor=network.describe(source.shape),
        figures=figures,
        warnings=() if few is None else (few,),
    )
    if save_statistics is not None:
        statistics.write_statistics(save_statistics, observation.statistics)
    if output is not None:
        with atomic.write(output, force=force) as temporary:
            temporary.write_text(report.model_dump_json(indent=2) + "\n")
    _print(report)


def _print(report: Report) -> None:
    from cm_runtime.errors.wording import quantity
    from cm_runtime.schedule import level_text

    figures, images, reference, extractor = report.figures, report.images, report.reference, report.extractor
    how = ""
    if "sigmas" in images:
        how = f", {images['sampler']}, sigmas {level_text(images['sigmas'])}, seed {images['seed']}"
    network = f"{Path(extractor['path']).name} {extractor['sha256'][:12]}"
    rows = [("images", f"{figures.count} of {images['path']}{how}")]
    rows.append(("labels", _label_policy(images["kind"], images["labels"])))
    rows.append(("extractor", f"{network}, {quantity(figures.dimension, 'feature')}, resize {extractor['resize']}"))
    if reference is not None:
        rows.append(("reference", f"{reference['count'] or 'unknown number'} of {reference['path']}"))
        rows.append(("Frechet distance", _format(figures.frechet_distance, "{:.4g}")))
        sides = "-, which needs images as the reference" if figures.manifold is None else ""
        rows.append(("precision", sides or _format(figures.precision, "{:.2%}")))
        rows.append(("recall", sides or _format(figures.recall, "{:.2%}")))
    rows.append(("class agreement", _format(figures.class_agreement, "{:.2%}")))
    rows += [("warning", warning) for warning in report.warnings]
    for name, value in rows:
        typer.echo(f"{name:17} {value}")


def _label_policy(kind: str, labels: Any) -> str:
    """The classes of the images: as a model was asked for them, or as the data have them."""
    if labels is None:
        return "none"
    if kind != "model":
        return f"their own, {labels}"
    if isinstance(labels, str):
        return {"all": "all classes in turn", "random": "random classes"}[labels]
    return f"{'class' if len(labels) == 1 else 'classes'} {', '.join(map(str, labels))}{' in turn' * (len(labels) > 1)}"


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
