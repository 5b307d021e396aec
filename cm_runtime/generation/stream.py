"""Images that a model draws, whichever way it is named: an array of them, or a sequence to train on.

A sequence may be endless; its images are drawn while others are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cm_runtime import backends, sampling
from cm_runtime.errors import RequestError
from cm_runtime.extras import require
from cm_runtime.generation.prefetch import prefetch
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.request import Labels, Output, Request, count_images, sampling_request, split
from cm_runtime.sampling import Array, Batch, Denoiser, Drawer
from cm_runtime.subprocesses import cores

INDICES = 1 << 64


@dataclass(frozen=True)
class Stream:
    """An iterable of `sampling.Batch`, from the first on each time; made by `stream`."""

    model: Denoiser | Drawer | Path
    count: int | None
    seed: int
    start: int
    steps: int | None
    sigmas: Sequence[float] | None
    labels: Labels
    batch: int | None
    output: Output
    clip: bool
    prefetch: int

    def __iter__(self) -> Iterator[Batch]:
        engine = backends.load(self.model) if isinstance(self.model, Path) else self.model
        return self._ahead(sampling.batches(engine, self.request(engine.manifest, engine.micro_batch)))

    def share(self, worker: int, workers: int) -> Iterator[Batch]:
        """The batches ``worker``, ``worker + workers``, ..., drawn in a process of its own on its share of the cores.

        Raises RequestError for a model that is loaded, in another process.
        """
        if not isinstance(self.model, Path):
            raise RequestError("a loaded model cannot go to worker processes: give stream its path, or num_workers=0")
        share = max(1, cores() // workers)
        is_torch = backends.is_checkpoint(self.model)  # which DataLoader has told to take one thread, as a fork must
        engine = backends.load(self.model, threads=0 if is_torch else share)
        whole = self.request(engine.manifest, engine.micro_batch)
        parts = islice(split(whole, whole.micro_batch), worker, None, workers)
        return self._ahead(chain.from_iterable(sampling.batches(engine, part) for part in parts))

    def dataset(self) -> Any:
        """The images one by one as a torch IterableDataset, `torch_dataset.Images`. Raises MissingExtraError.

        Items are (image, label), or images of a model without classes: (C,H,W) uint8 or float32 tensors, labels int.
        A DataLoader's workers share them, each with the model open by itself, so that it must be given as a path.
        """
        require("torch", "stream(...).dataset()")
        from cm_runtime.generation.torch_dataset import Images

        return Images(self)

    def request(self, manifest: Manifest, micro_batch: int) -> Request:
        """For all the images. Raises RequestError."""
        return sampling_request(
            manifest,
            count_images(self.labels, self.count, INDICES - self.start),
            self.steps,
            sigmas=self.sigmas,
            seed=self.seed,
            start=self.start,
            labels=self.labels,
            micro_batch=micro_batch if self.batch is None else self.batch,
            output=self.output,
            clip=self.clip,
        )

    def _ahead(self, parts: Iterator[Batch]) -> Iterator[Batch]:
        with closing(prefetch(parts, self.prefetch)) as drawn:
            yield from drawn


def sample(
    model: Denoiser | Drawer | str | os.PathLike[str] | None = None,
    count: int | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Labels = None,
    batch: int | None = None,
    sigmas: Sequence[float] | None = None,
    noise: Array | None = None,
    output: Output = "uint8",
    clip: bool = True,
) -> NDArray[Any]:
    """Draws images: (count,H,W,C) uint8, or float32 before quantisation with output="float32".

    Example: ``cm.sample("model.onnx", 256, steps=2, labels=[0, 3])``

    Args:
        model: a loaded one, or the path of one, which is opened for this call; None is the bundled one.
        count: default 256, or the sum of what ``labels`` counts.
        steps: network evaluations of an image, default 2.
        seed: image i of a seed is always the same.
        start: index of the first image.
        labels: "all" (i mod classes, the default), "random", one label, a list used in turn (image i has entry i mod
            its length), or a mapping of classes to counts: {3: 100, 7: 50} is 100 images of class 3 and then 50 of 7,
            from ``start`` on; ``count`` must be their sum, or left out.
        batch: images that the engine sees at once; by default its own choice.
        sigmas: noise levels in place of steps, descending from sigma_max.
        noise: the caller's own (K,N,C,H,W) standard normals in place of seed, start and count.
        clip: clamp every x0 to [-1, 1].

    Raises:
        RequestError: for what no model could draw.
        EngineError: where the model's output is not finite, or the engine fails; and what `load` raises for a path.
    """
    where = _model(model)
    engine = backends.load(where) if isinstance(where, Path) else where
    return sampling.sample(
        engine,
        count,
        steps,
        seed=seed,
        start=start,
        labels=labels,
        batch=batch,
        sigmas=sigmas,
        noise=noise,
        output=output,
        clip=clip,
    )


def _model(model: Denoiser | Drawer | str | os.PathLike[str] | None) -> Denoiser | Drawer | Path:
    """A loaded model, or the path of one. Raises RequestError."""
    if model is None:
        return backends.DEFAULT_MODEL
    if isinstance(model, str | os.PathLike):
        return Path(model)
    sampling.check_model(model)
    return model


def stream(
    model: Denoiser | Drawer | str | os.PathLike[str] | None = None,
    count: int | None = None,
    seed: int = 0,
    *,
    start: int = 0,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    labels: Labels = None,
    batch: int | None = None,
    output: Output = "uint8",
    clip: bool = True,
    prefetch: int = 2,
) -> Stream:
    """Images ``start``, ``start + 1``, ... of a seed, as an iterable of `sampling.Batch`; with None as count, endless.

    model: a loaded one; or the path of one, by default the bundled one, which is opened whenever iteration begins.
    count: None is endless, or the sum of what ``labels`` counts; batch: images in each, by default what suits the
    engine; prefetch: batches that a thread draws before they are asked for. The rest is as in `sample`. A batch has
    index (n,) uint64, labels (n,) int64 or None, images (n,H,W,C). Raises RequestError; what drawing raises comes where
    the batch would.
    """
    where = _model(model)
    if prefetch < 1:
        raise RequestError(f"prefetch must be at least 1, not {prefetch}")
    made = Stream(where, count, seed, start, steps, sigmas, labels, batch, output, clip, prefetch)
    if not isinstance(where, Path):
        made.request(where.manifest, where.micro_batch)
    elif where.suffix == ".onnx":
        made.request(read_manifest(where), 1)
    return made
