"""The one sampling loop, and the requests it serves. Nothing else in the project loops over steps.

Image ``i`` of a seed depends on (model, seed, i) alone: its noise and its label are addressed by those numbers, so
micro-batches may be of any size and come in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise as addressable
from cm_runtime.artifact import Manifest
from cm_runtime.errors import RequestError
from cm_runtime.schedule import checked_sigmas, karras_sigmas, sampler_sigmas
from cm_runtime.steps import Array, HostSteps, to_nhwc, to_uint8

Labels = int | Sequence[int] | Literal["all", "random"] | None
Output = Literal["uint8", "float32"]
MICRO_BATCH_LIMIT = 1 << 16
AT_ONCE = 1 << 15  # normals that are drawn in one go


class Denoiser(Protocol):
    """f on some engine. Backends fulfil it; samplers know nothing else of a model."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def micro_batch(self) -> int:
        """How many images the engine should see at once."""
        ...

    def denoise(self, x: Array, sigma: float | Array, label: NDArray[np.int64] | None = None) -> Array:
        """x (N,C,H,W) float32, sigma scalar or (N,), label (N,) -> x0 (N,C,H,W) float32, unclamped, the caller's."""
        ...


class Drawer(Protocol):
    """A sampler graph on some engine: the loop itself is in it, with its noise levels."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def micro_batch(self) -> int:
        """How many images the engine should see at once."""
        ...

    def draw(self, noise: Array, label: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """noise (K,N,C,H,W) float32 standard normals, label (N,) -> (N,H,W,C) uint8."""
        ...


class StepOps(Protocol):
    """What surrounds f in the loop; see `steps.HostSteps`."""

    def first(self, sigma: float) -> Array: ...
    def step(self, x0: Array, k: int, sigma: float) -> Array: ...
    def finish(self, x0: Array) -> Array: ...


def run(denoiser: Denoiser, ops: StepOps, sigmas: Sequence[float], label: NDArray[np.int64] | None) -> Array:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): x0 (N,C,H,W) float32."""
    x = ops.first(sigmas[0])
    x0 = denoiser.denoise(x, sigmas[0], label)
    for k, sigma in enumerate(sigmas[1:], start=1):
        x = ops.step(x0, k, sigma)
        x0 = denoiser.denoise(x, sigma, label)
    return ops.finish(x0)


@dataclass(frozen=True)
class Request:
    """Images ``start`` to ``start + count - 1`` of a seed, checked against a model by `request`."""

    count: int
    sigmas: tuple[float, ...]
    seed: int
    start: int
    labels: Labels
    micro_batch: int
    output: Output
    clip: bool


@dataclass(frozen=True)
class Batch:
    """One micro-batch of results: index (n,) uint64, labels (n,) int64 or None, images (n,H,W,C)."""

    index: NDArray[np.uint64]
    labels: NDArray[np.int64] | None
    images: NDArray[Any]


def request(
    manifest: Manifest,
    count: int,
    steps: int | None = None,
    *,
    sigmas: Sequence[float] | None = None,
    seed: int = 0,
    start: int = 0,
    labels: Labels = None,
    micro_batch: int,
    output: Output = "uint8",
    clip: bool = True,
) -> Request:
    """A request that the model can serve, or a RequestError that says why not.

    steps (default 2) and sigmas exclude each other; labels left out: all classes in turn where there are classes.
    """
    if manifest.is_teacher:
        raise RequestError("this model is an EDM teacher, which a few steps cannot sample; make it consistent first")
    if manifest.graph == "network":
        raise RequestError("this file is a network graph, the part of a sampler on a GPU; export a denoiser or sampler")
    if manifest.graph == "sampler":
        levels = _own_levels(manifest, steps, sigmas, output, clip)
    elif sigmas is not None:
        if steps is not None:
            raise RequestError("give steps or sigmas, not both")
        levels = checked_sigmas(sigmas, manifest.sigma_min, manifest.sigma_max)
    else:
        chosen = 2 if steps is None else steps
        levels = sampler_sigmas(chosen, manifest.sigmas, manifest.sigma_min, manifest.sigma_max, manifest.rho)
    return _request(manifest, count, levels, seed, start, labels, micro_batch, output, clip)


def _own_levels(
    manifest: Manifest, steps: int | None, sigmas: Sequence[float] | None, output: Output, clip: bool
) -> tuple[float, ...]:
    """The levels of a sampler graph, where nothing else is asked of it. Raises RequestError."""
    (levels,) = manifest.sigmas.values()
    if steps not in (None, len(levels)) or (sigmas is not None and tuple(sigmas) != levels):
        asked = f"{steps} steps" if sigmas is None else f"the levels {', '.join(f'{s:g}' for s in sigmas)}"
        raise RequestError(
            f"this sampler file draws in {len(levels)} steps, at {', '.join(f'{s:g}' for s in levels)}, not {asked};"
            " a denoiser file draws in any"
        )
    if output != "uint8" or not clip:
        raise RequestError("a sampler file makes uint8 images, clamped at each step; a denoiser file makes others too")
    return levels


def teacher_request(
    manifest: Manifest,
    count: int,
    steps: int = 18,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Labels = None,
    micro_batch: int,
) -> Request:
    """A request for `teacher_batches`: the Karras grid of ``steps`` ODE steps. Raises RequestError."""
    if not manifest.is_teacher:
        raise RequestError("this model is no EDM teacher; a few steps sample it")
    if not 2 <= steps <= 1000:
        raise RequestError(f"an EDM teacher takes from 2 to 1000 ODE steps, not {steps}")
    levels = tuple(float(s) for s in karras_sigmas(steps, manifest.sigma_min, manifest.sigma_max, manifest.rho))
    return _request(manifest, count, levels, seed, start, labels, micro_batch, "uint8", True)


def _request(
    manifest: Manifest,
    count: int,
    levels: tuple[float, ...],
    seed: int,
    start: int,
    labels: Labels,
    micro_batch: int,
    output: Output,
    clip: bool,
) -> Request:
    if count < 1:
        raise RequestError(f"count must be at least 1, not {count}")
    micro_batch = min(micro_batch, count)
    if not 1 <= micro_batch <= MICRO_BATCH_LIMIT:
        raise RequestError(f"micro-batch must be from 1 to {MICRO_BATCH_LIMIT}, not {micro_batch}")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 64:
        raise RequestError(f"seed must be from 0 to 2^64-1, not {seed}")
    if not 0 <= start <= (1 << 64) - count:
        raise RequestError(f"image indices must be from 0 to 2^64-1; {count} images from {start} are not")
    if output not in ("uint8", "float32"):
        raise RequestError(f"output must be uint8 or float32, not {output!r}")
    checked = _checked_labels(labels, manifest.num_classes)
    return Request(count, levels, seed, start, checked, micro_batch, output, clip)


def even(count: int, most: int) -> int:
    """The size of micro-batches that splits ``count`` images evenly with at most ``most`` in each."""
    return -(-count // -(-count // most))


def split(chosen: Request, batch: int) -> Iterator[Request]:
    """The same images as requests of ``batch`` each, the last one shorter."""
    for first in range(0, chosen.count, batch):
        yield replace(chosen, start=chosen.start + first, count=min(batch, chosen.count - first))


def labels_of(chosen: Request, index: NDArray[np.uint64], num_classes: int) -> NDArray[np.int64] | None:
    """The label of each image, a function of (seed, index): (n,) int64, or None without classes."""
    if chosen.labels is None:
        return None
    if chosen.labels == "random":
        return addressable.random_labels(chosen.seed, index, num_classes)
    if chosen.labels == "all":
        return (index % np.uint64(num_classes)).astype(np.int64)
    listed = np.atleast_1d(np.asarray(chosen.labels, np.int64))
    picked: NDArray[np.int64] = listed[(index % np.uint64(listed.size)).astype(np.intp)]
    return picked


def batches(model: Denoiser | Drawer, chosen: Request, noise: Array | None = None) -> Iterator[Batch]:
    """The request's images, one micro-batch at a time, in order of index. Memory does not grow with the count.

    noise: (K,count,C,H,W) standard normals in place of those of the request's seed.
    """
    for index, labels, source in _parts(model.manifest, chosen, len(chosen.sigmas), noise):
        yield Batch(index, labels, _images(model, chosen, source, labels))


def _images(
    model: Denoiser | Drawer, chosen: Request, source: Callable[[int], Array], label: NDArray[np.int64] | None
) -> NDArray[Any]:
    """A micro-batch, (n,H,W,C), by the loop, or by the graph that holds it."""
    if model.manifest.graph == "sampler":
        z = np.stack([source(k) for k in range(len(chosen.sigmas))])
        return cast("Drawer", model).draw(z, label)
    ops = HostSteps(source, model.manifest.sigma_min, chosen.clip)
    x0 = run(cast("Denoiser", model), ops, chosen.sigmas, label)
    return to_uint8(x0) if chosen.output == "uint8" else to_nhwc(x0)


def teacher_batches(model: Denoiser, chosen: Request) -> Iterator[Batch]:
    """The images of a `teacher_request`, from the same first noise and with the same labels, by `heun`."""
    for index, labels, source in _parts(model.manifest, chosen, 1, None):
        ops = HostSteps(source, model.manifest.sigma_min)
        x0 = heun(model, ops.first(chosen.sigmas[0]), labels, len(chosen.sigmas))
        yield Batch(index, labels, to_uint8(ops.finish(x0)))


def _parts(
    manifest: Manifest, chosen: Request, draws: int, noise: Array | None
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64] | None, Callable[[int], Array]]]:
    """Index, labels and noise of each micro-batch."""
    for first in range(0, chosen.count, chosen.micro_batch):
        size = min(chosen.micro_batch, chosen.count - first)
        index = np.arange(size, dtype=np.uint64) + np.uint64(chosen.start + first)
        shape = manifest.image_shape
        source = _seeded(chosen.seed, index, draws, shape) if noise is None else _given(noise, first, size)
        yield index, labels_of(chosen, index, manifest.num_classes), source


def sample(
    model: Denoiser | Drawer,
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

    count: default 256; steps: default 2; sigmas: noise levels in place of steps, descending from sigma_max;
    labels: "all" (i mod classes, the default), "random", one label or a list used in turn; batch: images the engine
    sees at once (default: the engine's choice); noise: the caller's own (K,N,C,H,W) standard normals in place of
    seed, start and count; clip: clamp every x0 to [-1, 1]. Raises RequestError.
    """
    z = None if noise is None else np.asarray(noise, np.float32)
    if z is not None:
        if z.ndim != 5 or z.shape[2:] != model.manifest.image_shape or z.shape[1] == 0:
            raise RequestError(
                f"noise must be (K, N, {', '.join(map(str, model.manifest.image_shape))}), not {z.shape}"
            )
        if count not in (None, z.shape[1]):
            raise RequestError(f"count is {count} but the noise is for {z.shape[1]} images")
        if not np.isfinite(z).all():
            raise RequestError("noise must be finite")
        count = z.shape[1]
        if steps is None and sigmas is None:
            steps = z.shape[0]
    count = 256 if count is None else count
    chosen = request(
        model.manifest,
        count,
        steps,
        sigmas=sigmas,
        seed=seed,
        start=start,
        labels=labels,
        micro_batch=even(max(count, 1), model.micro_batch) if batch is None else batch,
        output=output,
        clip=clip,
    )
    if z is not None and len(z) != len(chosen.sigmas):
        raise RequestError(f"noise is for {len(z)} steps, but {len(chosen.sigmas)} were asked for")
    return np.concatenate([part.images for part in batches(model, chosen, z)])


def heun(denoiser: Denoiser, x: Array, label: NDArray[np.int64] | None, steps: int = 18) -> Array:
    """x0 of the probability-flow ODE from x = sigma_max z: EDM's deterministic sampler (arXiv 2206.00364, alg. 1).

    x: (N,C,H,W) float32; for teachers, whose D is a denoiser but not a consistency function.
    """
    m = denoiser.manifest
    t = [*karras_sigmas(steps, m.sigma_min, m.sigma_max, m.rho), 0.0]
    for now, after in pairwise(t):
        d = (x - denoiser.denoise(x, now, label)) / np.float32(now)
        euler = x + np.float32(after - now) * d
        if after > 0:
            d = (d + (euler - denoiser.denoise(euler, after, label)) / np.float32(after)) / 2
        x = x + np.float32(after - now) * d
    return x


def _seeded(seed: int, index: NDArray[np.uint64], draws: int, shape: tuple[int, int, int]) -> Callable[[int], Array]:
    """Draw by draw where they are large, or else, where calls cost more than numbers, all of them at once."""
    if draws * index.size * math.prod(shape) <= AT_ONCE:
        return list(addressable.normals(seed, index, draws, shape)).__getitem__
    return lambda k: addressable.normal(seed, index, k, shape)


def _given(noise: Array, first: int, size: int) -> Callable[[int], Array]:
    return lambda k: noise[k, first : first + size]


def _checked_labels(labels: Labels, num_classes: int) -> Labels:
    if not num_classes:
        if labels is not None:
            raise RequestError("this model has no classes; leave the labels out")
        return None
    if labels is None:
        return "all"
    if isinstance(labels, str):
        if labels not in ("all", "random"):
            raise RequestError(f"labels must be all, random or numbers from 0 to {num_classes - 1}, not {labels!r}")
        return labels
    listed = [labels] if isinstance(labels, int | np.integer) else list(labels)
    if not listed:
        raise RequestError("the list of labels is empty")
    for label in listed:
        if not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
            raise RequestError(f"labels must be from 0 to {num_classes - 1}, not {label}")
    return tuple(int(label) for label in listed)
