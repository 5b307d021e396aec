"""What `eval` and `tune` share: the extractor, the reference, and images from wherever they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cm_runtime.cli import parsing, progress
from cm_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cm_runtime.evaluate.extractor import Extractor
    from cm_runtime.evaluate.metrics import Observation
    from cm_runtime.manifest import Manifest
    from cm_runtime.sampling import Batch


@dataclass(frozen=True)
class Drawing:
    """How a model's images are drawn; None is the default, and what a set of images must leave."""

    steps: int | None = None
    sigmas: str | None = None
    ts: str | None = None
    timesteps: str | None = None
    grid: int | None = None
    count: int | None = None
    seed: int | None = None
    labels: str | None = None
    micro_batch: str | None = None
    backend: str | None = None

    def refuse(self, where: object) -> None:
        """Raises RequestError naming the first option that was given: a set of images has no use for it."""
        for name, value in vars(self).items():
            if value is not None:
                raise RequestError(f"--{name.replace('_', '-')} is for models, and {where} is images; leave it out")


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


def drawn(model: Path | None, drawing: Drawing, device: str, threads: int) -> Images:
    """Images of a model, 10000 by default: few steps of a consistency model, or 18 ODE steps of an EDM teacher."""
    from cm_runtime import backends, sampling
    from cm_runtime.files import atomic
    from cm_runtime.request import count_images, sampling_request, teacher_request

    engine = backends.load(model, drawing.backend or "auto", device, threads)  # type: ignore[arg-type]
    manifest = engine.manifest
    labels = parsing.labels(drawing.labels)
    count = count_images(labels, drawing.count, 10_000)
    given: dict[str, Any] = {
        "seed": drawing.seed or 0,
        "labels": labels,
        "micro_batch": parsing.micro_batch(drawing.micro_batch, min(count, 256), engine.micro_batch),
    }
    if manifest.is_teacher:
        for name in ("sigmas", "ts", "timesteps", "grid"):
            if getattr(drawing, name) is not None:
                raise RequestError(f"an EDM teacher is sampled by an ODE solver; give its --steps, not --{name}")
        steps = 18 if drawing.steps is None else drawing.steps
        request = teacher_request(manifest, count, steps, **given)
        batches, sampler = sampling.teacher_batches(engine, request), "heun"
    else:
        levels = parsing.levels(manifest, drawing.steps, drawing.sigmas, drawing.ts, drawing.timesteps, drawing.grid)
        request = sampling_request(manifest, count, drawing.steps, sigmas=levels, **given)
        batches, sampler = sampling.batches(engine, request), "multistep"
    where = model or backends.DEFAULT_MODEL
    channels, height, width = manifest.image_shape
    description = {
        "kind": "model",
        "path": str(where),
        "sha256": atomic.sha256(where),
        "source_sha256": manifest.source_sha256,
        "shape": [height, width, channels],
        "sampler": sampler,
        "sigmas": request.sigmas,
        "count": request.count,
        "seed": request.seed,
        "labels": request.labels,
        "micro_batch": request.micro_batch,
        "backend": engine.name,
        "device": engine.device,
        "threads": threads or "one per core",
    }
    return Images(batches, request.count, (height, width, channels), manifest.num_classes, description, manifest)


def collected(source: str, split: str | None) -> Images:
    """Samples in an npz, streamed, or a data set: a folder, IDX, npz or a name; ``split`` (train) is for the latter."""
    from cm_runtime.evaluate import sources
    from cm_runtime.files import atomic

    path = Path(os.path.expanduser(source))  # of a user who is not there the name stays
    if sources.is_samples(path):
        if split is not None:
            raise RequestError(f"--split is for data sets, and {source} holds samples; leave it out")
        samples = sources.open_samples(path)
        described: dict[str, Any] = {"kind": "samples", "path": source, "sha256": atomic.sha256(path)}
        described |= {"shape": list(samples.image_shape), "count": samples.count}
        described["labels"] = "arr_1" if samples.has_labels else None
        return Images(samples.batches(), samples.count, samples.image_shape, None, described)
    from cm_runtime.training.data import open_data

    with progress.spinner(f"reading {source}", has_bar=True):
        data = open_data(source, split=split or "train", progress=not progress.is_quiet())  # type: ignore[arg-type]
    channels, height, width = data.image_shape
    described = {"kind": "data", "path": source, "name": data.name, "split": split or "train"}
    described |= {"shape": [height, width, channels], "count": len(data)}
    described["labels"] = None if data.labels is None else "of the data set"
    batches = sources.array_batches(data.images, data.labels)
    return Images(batches, len(data), (height, width, channels), data.num_classes, described)


def observed(images: Images, extractor: Extractor, manifold: int, unit: str, **expected: Any) -> Observation:
    """One pass over ``images``, with a progress bar."""
    from cm_runtime.cli.progress import track
    from cm_runtime.evaluate.metrics import observe

    extractor.check(images.shape)
    parts = track(images.batches, images.count, unit)
    return observe(parts, extractor, manifold=manifold, classes=images.classes, **expected)


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
        images = collected(source, None)
        return observed(images, extractor, manifold, "reference"), images.description
    found = statistics.read_statistics(path)
    if found.extractor_sha256 is not None:
        found.check(len(found.mean), extractor.sha256, source)
    description = {"kind": "statistics", "path": source, "sha256": atomic.sha256(path), "count": found.count}
    return Observation(found), description
