"""Images that a model draws, whichever way it is named: an array of them, or a sequence to train on.

A sequence may be endless; its images are drawn while others are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from numpy.typing import NDArray

from cm_runtime import backends, sampling
from cm_runtime.errors import RequestError
from cm_runtime.extras import require
from cm_runtime.generation.prefetch import prefetch
from cm_runtime.manifest import Manifest, read_manifest
from cm_runtime.request import (
    INDICES,
    Draw,
    DrawOptions,
    ImageOptions,
    Request,
    explicit_signature,
    sampling_request,
    split,
    whole_number,
)
from cm_runtime.sampling import Array, Batch, CudaArray, Denoiser, DeviceImages, Drawer
from cm_runtime.subprocesses import cores

Model = Denoiser | Drawer | str | os.PathLike[str] | None


@dataclass(frozen=True)
class Stream:
    """An iterable of `sampling.Batch`, from the first on each time; made by `stream`.

    prefetch: batches that a thread draws ahead.
    """

    model: Denoiser | Drawer | Path
    draw: Draw
    prefetch: int

    def __iter__(self) -> Iterator[Batch]:
        engine = backends.load(self.model) if isinstance(self.model, Path) else self.model
        return self._prefetch(sampling.batches(engine, self.request(engine.manifest, engine.micro_batch)))

    def share(self, worker: int, workers: int) -> Iterator[Batch]:
        """Draw the batches ``worker``, ``worker + workers``, ... in a process of its own, on its share of the cores.

        Raises RequestError for a model that is loaded, in another process.
        """
        if not isinstance(self.model, Path):
            raise RequestError("a loaded model cannot go to worker processes: give stream its path, or num_workers=0")
        threads = max(1, cores() // workers)
        is_torch = backends.is_checkpoint(self.model)  # DataLoader has set it to one thread, as a fork must
        engine = backends.load(self.model, threads=0 if is_torch else threads)
        whole = self.request(engine.manifest, engine.micro_batch)
        parts = islice(split(whole, whole.micro_batch), worker, None, workers)
        return self._prefetch(chain.from_iterable(sampling.batches(engine, part) for part in parts))

    def dataset(self) -> Any:
        """Return the images one by one as a torch IterableDataset, `torch_dataset.Images`. Raises MissingExtraError.

        Items are (image, label), or images of a model without classes: (C,H,W) uint8 or float32 tensors, labels int.
        A DataLoader's workers share them, each with the model open by itself, so that it must be given as a path.
        """
        require("torch", "stream(...).dataset()")
        from cm_runtime.generation.torch_dataset import Images

        return Images(self)

    def request(self, manifest: Manifest, micro_batch: int) -> Request:
        """Check all the images of the stream as one request, in batches of one size. Raises RequestError."""
        draw = self.draw
        size = micro_batch if draw.micro_batch is None else draw.micro_batch
        count = draw.total(INDICES - whole_number("start", draw.start))
        return sampling_request(manifest, replace(draw, count=count, micro_batch=size))

    def _prefetch(self, parts: Iterator[Batch]) -> Iterator[Batch]:
        with closing(prefetch(parts, self.prefetch)) as batches:
            yield from batches


@overload
def sample(
    model: Model = None,
    count: int | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    noise: Array | CudaArray | None = None,
    output: Literal["uint8", "float32"] = "uint8",
    **options: Unpack[ImageOptions],
) -> NDArray[Any]: ...


@overload
def sample(
    model: Model = None,
    count: int | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    noise: Array | CudaArray | None = None,
    output: Literal["device"],
    **options: Unpack[ImageOptions],
) -> DeviceImages: ...


@explicit_signature()
def sample(
    model: Model = None,
    count: int | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    noise: Array | CudaArray | None = None,
    **options: Unpack[DrawOptions],
) -> NDArray[Any] | DeviceImages:
    """Draw images with a consistency model.

    Args:
        model: a loaded one, or the path of one, which is opened for this call; None is the bundled one.
        count: default 256, or the sum of what ``labels`` counts.
        steps: network evaluations of an image, default 2.
        seed: image i of a seed is always the same.
        noise: (K,N,C,H,W) standard normals of the caller's in place of seed and count; labels still go by start. An
            array with `__cuda_array_interface__`, float32 and contiguous, is read in the GPU's memory, behind its
            stream, or behind the legacy one where it names none.
        **options: start, labels, micro_batch, sigmas, output and clip, as `cm.Draw` explains them.

    Returns:
        (count,H,W,C) uint8, or float32 before quantisation with output="float32"; with output="device" the uint8 images
        in the GPU's memory, a `cuda.arrays.DeviceImages`.

    Raises:
        RequestError: the model cannot draw them, or not in a GPU's memory.
        EngineError: the model's output is not finite, or the engine fails.
        CmRuntimeError: of `load`, for a path.

    Example:
        >>> images = cm.sample("model.onnx", 256, steps=2, labels=[0, 3])
    """
    draw = Draw(count=count, steps=steps, seed=seed, **options)
    source = _model(model)
    engine = backends.load(source) if isinstance(source, Path) else source
    draw_with = sampling.draw_on_device if draw.output == "device" else sampling.draw_images
    return draw_with(engine, draw, noise)


def _model(model: Model) -> Denoiser | Drawer | Path:
    """A loaded model, or the path of one. Raises RequestError."""
    if model is None:
        return backends.DEFAULT_MODEL
    if isinstance(model, str | os.PathLike):
        return Path(model)
    sampling.check_model(model)
    return model


@explicit_signature()
def stream(
    model: Model = None,
    count: int | None = None,
    seed: int = 0,
    *,
    steps: int | None = None,
    prefetch: int = 2,
    **options: Unpack[DrawOptions],
) -> Stream:
    """Draw images ``start``, ``start + 1``, ... of a seed while others are used.

    Args:
        model: a loaded one; or the path of one, by default the bundled one, which is opened whenever iteration begins.
        count: None is endless, or the sum of what ``labels`` counts.
        seed: image i of a seed is always the same.
        steps: network evaluations of an image, default 2.
        prefetch: batches that a thread draws ahead.
        **options: start, labels, micro_batch (the images of a batch), sigmas, output and clip, as `cm.Draw`
            explains them.

    Returns:
        An iterable of `sampling.Batch`: index (n,) uint64, labels (n,) int64 or None, images (n,H,W,C).

    Raises:
        RequestError: the model cannot draw them; what drawing raises comes where the batch would.

    Example:
        >>> for batch in cm.stream("model.onnx", steps=1): ...
    """
    draw = Draw(count=count, steps=steps, seed=seed, **options)
    source = _model(model)
    if whole_number("prefetch", prefetch) < 1:
        raise RequestError(f"prefetch must be at least 1, not {prefetch}")
    images = Stream(source, draw, prefetch)
    if not isinstance(source, Path):
        images.request(source.manifest, source.micro_batch)
    elif source.suffix == ".onnx":
        images.request(read_manifest(source), 1)
    return images
