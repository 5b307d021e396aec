"""The one sampling loop, over requests: NumPy, CUDA and the exporter share `run`. Nothing else loops over steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cm_runtime import noise as addressable
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import Manifest
from cm_runtime.projections import Edit
from cm_runtime.request import Draw, Request, sampling_request

Array = NDArray[np.float32]
NOT_FINITE = "the model's output is not finite; its weights or its precision cannot serve"

X = TypeVar("X")
L = TypeVar("L", contravariant=True)
MOST_NORMALS = 1 << 15  # normals that are drawn in one go


class Denoiser(Protocol):
    """f on some engine. Backends fulfil it; samplers know nothing else of a model."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def micro_batch(self) -> int:
        """Images that the engine should see at once."""
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
        """Images that the engine should see at once."""
        ...

    def draw(self, noise: Array, label: NDArray[np.int64] | None = None) -> NDArray[np.uint8]:
        """noise (K,N,C,H,W) float32 standard normals, label (N,) -> (N,H,W,C) uint8."""
        ...


class CudaArray(Protocol):
    """An array in a GPU's memory: of pycuda, cupy or torch."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


class DeviceImages(CudaArray, Protocol):
    """Images (N,H,W,C) uint8 that stay in a GPU's memory, from ``address`` on: `cuda.arrays.DeviceImages`."""

    dtype: ClassVar[np.dtype[Any]]

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def copy_to_host(self) -> NDArray[np.uint8]: ...


class Evaluation(Protocol[X, L]):
    """The denoiser of the loop, whatever images and labels are to it: arrays, or addresses on a GPU."""

    def denoise(self, x: X, sigma: float, label: L, /) -> X: ...


class StepOps(Protocol[X]):
    """Steps around f: `HostSteps` in NumPy, `cuda.steps.DeviceSteps`, and `export.steps.GraphSteps` as nodes."""

    def first(self, sigma: float) -> X: ...
    def step(self, x0: X, k: int, sigma: float) -> X: ...
    def finish(self, x0: X) -> X: ...


def run(denoiser: Evaluation[X, L], ops: StepOps[X], sigmas: Sequence[float], label: L) -> X:
    """Multistep consistency sampling (arXiv 2303.01469, algorithm 1): x0, or what stands for it."""
    x = ops.first(sigmas[0])
    x0 = denoiser.denoise(x, sigmas[0], label)
    for k, sigma in enumerate(sigmas[1:], start=1):
        x = ops.step(x0, k, sigma)
        x0 = denoiser.denoise(x, sigma, label)
    return ops.finish(x0)


def not_finite(finite: NDArray[np.bool_]) -> EngineError:
    """The error of images (N,) some of which are not finite."""
    return EngineError(f"{NOT_FINITE} ({np.count_nonzero(~finite)} of {quantity(finite.size, 'image')})")


@dataclass(frozen=True)
class HostSteps:
    """First noise, clamp, projection and renoise for one micro-batch.

    noise: k -> z_k, (N,C,H,W) float32 standard normals; sigma_min: the noise that x0 is taken to hold already;
    clip: clamp each x0 to [-1, 1]; edit: of as many images, one given image each, or None.
    """

    noise: Callable[[int], Array]
    sigma_min: float
    clip: bool = True
    edit: Edit | None = None

    def first(self, sigma: float) -> Array:
        """sigma_0 z_0, with what an edit begins with."""
        if self.edit is None:
            return self.noise(0) * np.float32(sigma)
        if self.edit.is_noisy:
            return self.edit.start.copy()
        return self.edit.start + self.noise(0) * np.float32(sigma)

    def step(self, x0: Array, k: int, sigma: float) -> Array:
        """project(clamp(x0)) + sqrt(sigma_k^2 - sigma_min^2) z_k (arXiv 2303.01469, alg. 1, 4); x0 is overwritten."""
        x = self.finish(x0)
        x += self.noise(k) * np.float32(math.sqrt(sigma**2 - self.sigma_min**2))
        return x

    def finish(self, x0: Array) -> Array:
        """project(clamp(x0)), in place. Raises EngineError where x0 is not finite."""
        finite = np.isfinite(x0)
        if not finite.all():
            raise not_finite(np.array([each.all() for each in finite]))
        if self.clip:
            np.clip(x0, -1, 1, out=x0)
        return x0 if self.edit is None or self.edit.project is None else self.edit.project(x0)


def to_nhwc(x0: Array) -> Array:
    """(N,C,H,W) -> (N,H,W,C), contiguous."""
    return np.ascontiguousarray(np.moveaxis(x0, 1, -1))


def to_uint8(x0: Array) -> NDArray[np.uint8]:
    """rint((clip(x0, -1, 1) + 1) * 127.5), half to even, with (N,C,H,W) -> (N,H,W,C)."""
    grey = np.clip(to_nhwc(x0), -1, 1)
    grey += 1
    grey *= 127.5
    return np.rint(grey, out=grey).astype(np.uint8)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of results: index (n,) uint64, labels (n,) int64 or None, images (n,H,W,C)."""

    index: NDArray[np.uint64]
    labels: NDArray[np.int64] | None
    images: NDArray[Any]

    def __repr__(self) -> str:
        """Shapes, and the first and the last index."""
        first, last = (self.index[0], self.index[-1]) if self.index.size else (0, -1)
        labels = "no labels" if self.labels is None else f"labels {self.labels.shape}"
        return f"Batch(index {first} to {last}, {labels}, images {self.images.shape} {self.images.dtype})"


def batches(model: Denoiser | Drawer, request: Request, noise: Array | None = None) -> Iterator[Batch]:
    """The request's images, one micro-batch at a time, in order of index. Memory does not grow with the count.

    noise: (K,count,C,H,W) standard normals in place of those of the request's seed.
    """
    on_device: Callable[..., Iterator[Batch] | None] | None = getattr(model, "batches", None)
    if on_device is not None and (parts := on_device(request, noise)) is not None:
        yield from parts
        return
    for index, labels, source in _parts(model.manifest, request, request.steps, noise):
        edit = request.edit and request.edit.part(int(index[0]) - request.start, index.size)
        yield Batch(index, labels, _images(model, request, source, labels, edit))


def _images(
    model: Denoiser | Drawer,
    request: Request,
    source: Callable[[int], Array],
    label: NDArray[np.int64] | None,
    edit: Edit | None,
) -> NDArray[Any]:
    """A micro-batch, (n,H,W,C), by the loop, or by the graph that holds it."""
    if model.manifest.graph == "sampler":
        z = np.stack([source(k) for k in range(request.steps)])
        return cast("Drawer", model).draw(z, label)
    ops = HostSteps(source, model.manifest.sigma_min, request.clip, edit)
    x0 = run(cast("Denoiser", model), ops, request.sigmas, label)
    return to_uint8(x0) if request.output == "uint8" else to_nhwc(x0)


def teacher_batches(model: Denoiser, request: Request) -> Iterator[Batch]:
    """The images of a `teacher_request`, from the same first noise and with the same labels, by `heun`."""
    for index, labels, source in _parts(model.manifest, request, 1, None):
        ops = HostSteps(source, model.manifest.sigma_min)
        x0 = heun(model, ops.first(request.sigmas[0]), labels, request.steps)
        yield Batch(index, labels, to_uint8(ops.finish(x0)))


def _parts(
    manifest: Manifest, request: Request, draws: int, noise: Array | None
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64] | None, Callable[[int], Array]]]:
    """Index, labels and noise of each micro-batch."""
    for first in range(0, request.count, request.micro_batch):
        size = min(request.micro_batch, request.count - first)
        index = np.arange(size, dtype=np.uint64) + np.uint64(request.start + first)
        shape = manifest.image_shape
        source = _seed_noise(request.seed, index, draws, shape) if noise is None else _noise_part(noise, first, size)
        yield index, labels_of(request, index, manifest.num_classes), source


def labels_of(request: Request, index: NDArray[np.uint64], num_classes: int) -> NDArray[np.int64] | None:
    """The label of each image, a function of (seed, index) or of the edit: (n,) int64, or None without classes."""
    if request.edit is not None:
        return request.edit.labels(int(index[0]) - request.start, index.size)
    if request.labels is None:
        return None
    if request.labels == "random":
        return addressable.random_labels(request.seed, index, num_classes)
    if request.labels == "all":
        return (index % np.uint64(num_classes)).astype(np.int64)
    classes = np.asarray(request.labels, np.int64)
    turn: NDArray[np.int64] = classes[(index % np.uint64(classes.size)).astype(np.intp)]
    return turn


def draw_images(model: Denoiser | Drawer, draw: Draw, noise: Array | CudaArray | None = None) -> NDArray[Any]:
    """Draw images of a loaded model: (count,H,W,C), uint8 or float32 as the draw says.

    noise: (K,N,C,H,W) standard normals in place of seed, start and count; those in a GPU's memory are read there, and
    what is not finite in them is an EngineError. Raises RequestError and EngineError.
    """
    request, z = _check_draw(model, draw, noise)
    return np.concatenate([part.images for part in batches(model, request, z)])


def draw_on_device(model: Denoiser | Drawer, draw: Draw, noise: Array | CudaArray | None = None) -> DeviceImages:
    """Draw uint8 images that stay in a GPU's memory. Raises as `draw_images`."""
    request, z = _check_draw(model, replace(draw, output="uint8"), noise)
    images: DeviceImages = _on_device(model, "output device").draw(model, request, z)
    return images


def _on_device(model: Denoiser | Drawer, what: str) -> Any:
    """The model's `cuda.sampler.OnDevice`. Raises RequestError where its sampling goes through the host."""
    on_device = getattr(model, "on_device", None)
    if on_device is None:
        raise RequestError(f"{what} needs a model that samples in a GPU's memory, not {model!r}")
    return on_device


def _check_draw(model: Denoiser | Drawer, draw: Draw, noise: Array | CudaArray | None) -> tuple[Request, Any]:
    """The request of a draw, and a caller's noise: float32 on the host, or as `OnDevice.noise` has it."""
    check_model(model)
    z: Any = None
    if hasattr(noise, "__cuda_array_interface__"):
        z = _on_device(model, "noise in a GPU's memory").noise(noise)
    elif noise is not None:
        z = np.asarray(noise, np.float32)
    if z is not None:
        if len(z.shape) != 5 or z.shape[2:] != model.manifest.image_shape or z.shape[1] == 0:
            raise RequestError(
                f"noise must be (K, N, {', '.join(map(str, model.manifest.image_shape))}), not {z.shape}"
            )
        if draw.count not in (None, z.shape[1]):
            raise RequestError(f"count is {draw.count} but the noise is for {quantity(z.shape[1], 'image')}")
        if isinstance(z, np.ndarray) and not np.isfinite(z).all():
            raise RequestError("noise must be finite")
        steps = z.shape[0] if draw.steps is None and draw.sigmas is None else draw.steps
        draw = replace(draw, count=z.shape[1], steps=steps)
    request = sampling_request(model.manifest, draw, model.micro_batch)
    if z is not None and z.shape[0] != request.steps:
        raise RequestError(f"noise is for {quantity(z.shape[0], 'step')}, but {request.steps} were asked for")
    return request, z


def check_model(model: object) -> None:
    """Raise RequestError for what is no loaded model."""
    if not isinstance(getattr(model, "manifest", None), Manifest):
        kind = type(model).__name__
        raise RequestError(
            f"model must be what cm.load returns, the path of one, or None for the bundled one, not {kind}"
        )


def heun(denoiser: Denoiser, x: Array, label: NDArray[np.int64] | None, steps: int = 18) -> Array:
    """x0 of the probability-flow ODE from x = sigma_max z: EDM's deterministic sampler (arXiv 2206.00364, alg. 1).

    x: (N,C,H,W) float32; for teachers, whose D is a denoiser but not a consistency function.
    """
    m = denoiser.manifest
    t = [*m.noise_range.karras(steps), 0.0]
    for now, after in pairwise(t):
        d = (x - denoiser.denoise(x, now, label)) / np.float32(now)
        euler = x + np.float32(after - now) * d
        if after > 0:
            d = (d + (euler - denoiser.denoise(euler, after, label)) / np.float32(after)) / 2
        x = x + np.float32(after - now) * d
    return x


def _seed_noise(
    seed: int, index: NDArray[np.uint64], draws: int, shape: tuple[int, int, int]
) -> Callable[[int], Array]:
    """k -> z_k of a seed: drawn one by one where they are large, in one call where calls cost more than numbers."""
    if draws * index.size * math.prod(shape) <= MOST_NORMALS:
        return list(addressable.normals(seed, index, draws, shape)).__getitem__
    return lambda k: addressable.normal(seed, index, k, shape)


def _noise_part(noise: Array, first: int, size: int) -> Callable[[int], Array]:
    """k -> z_k of a caller's noise."""
    return lambda k: noise[k, first : first + size]
