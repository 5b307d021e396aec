"""Images and references of `eval` and `tune`: drawn, of a data set, of a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm_runtime.cli import progress
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.backends.base import EngineOptions
    from cm_runtime.cli.options import DrawFlags
    from cm_runtime.evaluate.extractor import Extractor
    from cm_runtime.evaluate.metrics import Observation
    from cm_runtime.manifest import Manifest
    from cm_runtime.sampling import Batch


@dataclass(frozen=True)
class Images:
    """Batches of uint8 images, how many, their (H, W, C), their classes, and what it takes to have them again.

    classes: None where nothing but the labels tells.
    """

    batches: Iterator[Batch]
    count: int
    shape: tuple[int, int, int]
    classes: int | None
    description: dict[str, Any]
    manifest: Manifest | None = None


def check_no_flags(flags: DrawFlags, backend: str | None, where: object) -> None:
    """Raise RequestError for the first option of drawing that has a value: a set of images has no use for it."""
    for name, value in (*vars(flags).items(), ("backend", backend)):
        if value is not None:
            raise RequestError(f"--{name.replace('_', '-')} is for models, and {where} is images; leave it out")


def draw_images(model: Path | None, flags: DrawFlags, options: EngineOptions) -> Images:
    """Images of a model, 10000 by default: few steps of a consistency model, or 18 ODE steps of an EDM teacher."""
    from cm_runtime import backends, sampling
    from cm_runtime.files import atomic
    from cm_runtime.request import sampling_request, teacher_request

    where = model or backends.DEFAULT_MODEL
    engine = backends.open_model(where, options)
    manifest, draw = engine.manifest, flags.draw()
    count = draw.total(10_000)
    draw = replace(draw, count=count)
    if manifest.is_teacher:
        for name in ("sigmas", "ts", "timesteps", "grid"):
            if getattr(flags, name) is not None:
                raise RequestError(f"an EDM teacher is sampled by an ODE solver; give its --steps, not --{name}")
        request = teacher_request(manifest, flags.complete(engine, draw, min(count, 256)))
        batches, sampler = sampling.teacher_batches(engine, request), "heun"
    else:
        request = sampling_request(manifest, flags.complete(engine, draw, min(count, 256)))
        batches, sampler = sampling.batches(engine, request), "multistep"
    channels, height, width = manifest.image_shape
    description = {
        "kind": "model",
        "path": str(where),
        "sha256": atomic.sha256(where),
        "source_sha256": manifest.source_sha256,
        "shape": [height, width, channels],
        "sampler": sampler,
        **{name: getattr(request, name) for name in ("sigmas", "count", "seed", "labels", "micro_batch")},
        "backend": engine.name,
        "device": engine.device,
        "threads": options.threads or "one per core",
    }
    return Images(batches, request.count, (height, width, channels), manifest.num_classes, description, manifest)


def open_images(source: str, split: str | None) -> Images:
    """Samples in an npz, streamed, or a data set: a folder, IDX, npz or a name; ``split`` (train) is for the latter."""
    from cm_runtime.evaluate import sources
    from cm_runtime.files import atomic

    path = Path(os.path.expanduser(source))  # of a user who is not there the name stays
    if sources.is_samples(path):
        if split is not None:
            raise RequestError(f"--split is for data sets, and {source} holds samples; leave it out")
        samples = sources.open_samples(path)
        description: dict[str, Any] = {"kind": "samples", "path": source, "sha256": atomic.sha256(path)}
        description |= {"shape": list(samples.image_shape), "count": samples.count}
        description["labels"] = "arr_1" if samples.has_labels else None
        return Images(samples.batches(), samples.count, samples.image_shape, None, description)
    from cm_runtime.training.data import open_data

    with progress.spinner(f"reading {source}", has_bar=True):
        data = open_data(source, split=split or "train", progress=not progress.is_quiet())  # type: ignore[arg-type]
    channels, height, width = data.image_shape
    description = {"kind": "data", "path": source, "name": data.name, "split": split or "train"}
    description |= {"shape": [height, width, channels], "count": len(data)}
    description["labels"] = None if data.labels is None else "of the data set"
    batches = sources.array_batches(data.images, data.labels)
    return Images(batches, len(data), (height, width, channels), data.num_classes, description)


def observe_images(images: Images, extractor: Extractor, manifold: int, unit: str, **options: Any) -> Observation:
    """One pass over ``images``, with a progress bar."""
    from cm_runtime.cli.progress import track
    from cm_runtime.evaluate.metrics import observe

    extractor.check(images.shape)
    parts = track(images.batches, images.count, unit)
    return observe(parts, extractor, manifold=manifold, classes=images.classes, **options)


def reference(
    source: str | None, extractor: Extractor, manifest: Manifest | None, manifold: int
) -> tuple[Observation, dict[str, Any]]:
    """The reference and its description: statistics (.npz), the training split of a data set, or samples.

    None is the statistics that ship with cm-runtime, for a model of Fashion-MNIST under the shipped extractor only.
    """
    from cm_runtime.evaluate import statistics
    from cm_runtime.evaluate.metrics import Observation
    from cm_runtime.files import atomic

    if source is None:
        trained_on = manifest.training.data if manifest is not None and manifest.training is not None else None
        fits = manifest is not None and manifest.image_shape == (1, 28, 28) and trained_on == "fashion-mnist"
        if not (fits and extractor.is_shipped):
            raise RequestError(
                "give --reference DATA or STATS.npz: only Fashion-MNIST models under the shipped extractor have one"
            )
        source = str(statistics.SHIPPED)
    path = Path(os.path.expanduser(source))  # of a user who is not there the name stays
    if not statistics.is_statistics(path):
        images = open_images(source, None)
        return observe_images(images, extractor, manifold, "reference"), images.description
    reference_statistics = statistics.read_statistics(path)
    if reference_statistics.extractor_sha256 is not None:
        reference_statistics.check(len(reference_statistics.mean), extractor.sha256, source)
    description = {
        "kind": "statistics",
        "path": source,
        "sha256": atomic.sha256(path),
        "count": reference_statistics.count,
    }
    return Observation(reference_statistics), description
