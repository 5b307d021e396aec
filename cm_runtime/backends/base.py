"""Engines' common ground: their options, checked inputs and outputs, and how many images one should see at once."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cm_runtime.choices import BackendName, ComputePrecision
from cm_runtime.errors import EngineError, RequestError
from cm_runtime.errors.wording import quantity
from cm_runtime.manifest import OUTPUTS, Manifest
from cm_runtime.precond import precond
from cm_runtime.request import whole_number
from cm_runtime.sampling import Array, not_finite

LOG = logging.getLogger("cm_runtime")
MAX_THREADS = 1024
_UNFLAGGED: set[str] = set()  # sampler files without the output `finite` that a warning has named
NETWORK_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class EngineOptions:
    """Engine and hardware of a model.

    Args:
        backend: the engine; auto takes the fastest installed one for an ``.onnx``, and eager torch for a checkpoint.
        device: auto (a GPU where the engine can use one, else the CPU), cpu or cuda:N.
        precision: of the computation, for engines that can choose; auto is the file's own. fp32 is IEEE's on every
            engine; tf32, of GPUs alone, rounds what convolutions and products multiply to 10 bits.
        threads: of the engine; 0 is one per core.

    Raises:
        RequestError: there is no such backend or precision, or threads are out of range.

    Example:
        >>> EngineOptions("openvino", precision="bf16", threads=2)
    """

    backend: BackendName = "auto"
    device: str = "auto"
    precision: ComputePrecision = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            raise RequestError(f"backend must be one of {', '.join(get_args(BackendName))}, not {self.backend!r}")
        if self.precision not in get_args(ComputePrecision):
            raise RequestError(f"precision must be auto, fp32, tf32, bf16 or fp16, not {self.precision!r}")
        if not isinstance(self.device, str):
            raise RequestError(f"device must be auto, cpu or cuda:N, not {self.device!r}")
        if not 0 <= whole_number("threads", self.threads) <= MAX_THREADS:
            raise RequestError(f"threads must be from 1 to {MAX_THREADS}, or 0 for one per core, not {self.threads}")


DEFAULTS = EngineOptions()
ON_CPU = EngineOptions(device="cpu")


class Backend(ABC):
    """A model on an engine: `sampling.Denoiser` for a graph of f, `sampling.Drawer` for a sampler graph.

    Attributes:
        name: as --backend has it.
        manifest: of the file.
        device: cpu or cuda:N.
        precision: of the computation.
        version: the engine's package and version.
        outputs: the outputs of the graph that are read, the images' first.
        source: the name of the file.

    Example:
        >>> model = cm_runtime.load("model.onnx")
        >>> x0 = model.denoise(x, 2.0, label=3)
    """

    name: str
    manifest: Manifest
    device: str
    precision: ComputePrecision
    version: str
    outputs: tuple[str, ...]
    source: str = "model"

    def __repr__(self) -> str:
        """The file, the engine, and the images: <m.onnx on ort, cpu: 1x28x28, 10 classes>."""
        return f"<{self.source} on {self.name}, {self.device}: {self.manifest.images}>"

    @abstractmethod
    def evaluate(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """One run of the graph on checked inputs, by their names; what is measured as the network.

        Raises EngineError, also where a sampler graph says that images were not finite.
        """

    @property
    def micro_batch(self) -> int:
        """Images at once, by their size."""
        return images_at_once(self.manifest, self.device)

    def denoise(self, x: ArrayLike, sigma: ArrayLike, label: ArrayLike | None = None) -> Array:
        """Denoise images: f(x, sigma), of a graph of f or F.

        Args:
            x: (N,C,H,W) float32.
            sigma: noise level, a scalar or (N,).
            label: (N,) integers, or one for all; none for a model without classes.

        Returns:
            x0 (N,C,H,W) float32, unclamped, the caller's.

        Raises:
            EngineError: The engine failed.
            RequestError: The arguments do not fit the model, or its graph is a sampler.
        """
        if self.manifest.graph == "sampler":
            raise RequestError("this file is a sampler graph; denoise needs one of cm-runtime export --graph denoiser")
        images, levels, labels = checked_inputs(self.manifest, x, sigma, label)
        feed: dict[str, NDArray[Any]] = {} if labels is None else {"label": labels}
        if self.manifest.graph == "network":
            return self._by_network(images, levels, feed)
        return self._check_output(self.evaluate({"x": images, "sigma": levels, **feed}), images.dtype, images.shape)

    def _by_network(self, x: Array, sigma: Array, feed: Mapping[str, NDArray[Any]]) -> Array:
        """f = c_skip x + c_out F(c_in x, c_noise) of a graph of F (arXiv 2303.01469, eq. 5), around it on the host."""
        m = self.manifest
        if m.precision == "bf16":
            raise RequestError(
                "a network graph in bf16 is sampled on a GPU alone; NumPy, which feeds it here, has no bf16"
            )
        form, s = precond(m.precond, m.sigma_data, m.sigma_boundary), sigma.reshape(-1, 1, 1, 1)
        x_in = (form.c_in(s) * x).astype(NETWORK_TYPES[m.precision])
        F = self.evaluate({"x_in": x_in, "c_noise": form.c_noise(sigma), **feed})
        f: Array = form.c_skip(s) * x + form.c_out(s) * self._check_output(F, x.dtype, x.shape)
        return f

    def draw(self, noise: ArrayLike, label: ArrayLike | None = None) -> NDArray[np.uint8]:
        """Draw the images of a sampler graph.

        Args:
            noise: (K,N,C,H,W) float32 standard normals.
            label: (N,) integers, or one for all; none for a model without classes.

        Returns:
            (N,H,W,C) uint8.

        Raises:
            EngineError: The engine failed, or images are not finite.
            RequestError: The arguments do not fit the model, or its graph is no sampler.
        """
        if self.manifest.graph != "sampler":
            raise RequestError(f"this file is a {self.manifest.graph} graph, which draws no images by itself")
        z, labels = checked_noise(self.manifest, noise, label)
        feed: dict[str, NDArray[Any]] = {"noise": z}
        if labels is not None:
            feed["label"] = labels
        _, n, c, h, w = z.shape
        return self._check_output(self.evaluate(feed), np.dtype(np.uint8), (n, h, w, c))

    def _check_output(self, output: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return an engine's output if it is what the manifest says. Raises EngineError."""
        kind = getattr(output, "dtype", type(output)), getattr(output, "shape", ())
        if kind != (dtype, shape):
            raise EngineError(f"the graph made {kind[0]} {kind[1]}, not the {dtype} {shape} that its manifest says")
        return output  # type: ignore[no-any-return]


def require_target(manifest: Manifest, where: object, place: str) -> None:
    """Raise EngineError for a graph of ONNX Runtime's operators for a GPU, where ``place`` is another."""
    if manifest.target == "cuda" and place.partition(":")[0] != "cuda":
        raise EngineError(
            f"{where} was exported for cuda: ONNX Runtime runs it on a GPU, and nothing on {place}; for other engines"
            " export it with --for cpu"
        )


def read_outputs(manifest: Manifest, names: Collection[str], where: object) -> tuple[str, ...]:
    """The outputs of a graph that an engine reads, out of all its ``names``.

    A sampler file of an older export has no ``finite``; a warning says so, once in a process.
    """
    images, *others = OUTPUTS[manifest.graph]
    outputs = (images, *(name for name in others if name in names))
    if outputs != OUTPUTS[manifest.graph] and str(where) not in _UNFLAGGED:
        _UNFLAGGED.add(str(where))
        LOG.warning("%s cannot tell images whose numbers are not finite from others; export it again", where)
    return outputs


def finite_images(outputs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The first of a graph's outputs. Raises EngineError where the second, ``finite`` (N,) bool, is not all true."""
    images, *flags = outputs
    for finite in flags:
        if finite.dtype != np.bool_ or finite.shape != images.shape[:1]:
            raise EngineError(f"the graph made {finite.dtype} {finite.shape} of `finite`, not a bool for each image")
        if not finite.all():
            raise not_finite(finite)
    return images


class Interface(NamedTuple):
    """NumPy type and shape of each of a graph's inputs and outputs, the images' first."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]

    def batch(self, feed: Mapping[str, NDArray[Any]]) -> int:
        """Number of images in ``feed``."""
        first = next(iter(self.inputs))  # noise (K,N,...), or what is of N images
        return int(feed[first].shape[1 if first == "noise" else 0])


def interface(manifest: Manifest, n: int, outputs: Collection[str] | None = None) -> Interface:
    """The tensors of a graph at a batch of ``n``; outputs: those that are read, by default all."""
    c, h, w = manifest.image_shape
    result: tuple[str, tuple[int, ...]]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    if manifest.graph == "sampler":
        inputs = {"noise": ("float32", (manifest.steps, n, c, h, w))}
        result = "uint8", (n, h, w, c)
    elif manifest.graph == "network":
        inputs = {"x_in": (NETWORK_TYPES[manifest.precision], (n, c, h, w)), "c_noise": ("float32", (n,))}
        result = "float32", (n, c, h, w)
    else:
        inputs = {"x": ("float32", (n, c, h, w)), "sigma": ("float32", (n,))}
        result = "float32", (n, c, h, w)
    if manifest.num_classes:
        inputs["label"] = "int64", (n,)
    kinds = dict(zip(OUTPUTS[manifest.graph], (result, ("bool", (n,))), strict=False))
    return Interface(inputs, {name: kinds[name] for name in (kinds if outputs is None else outputs)})


def checked_inputs(
    manifest: Manifest, x: ArrayLike, sigma: ArrayLike, label: ArrayLike | None
) -> tuple[Array, Array, NDArray[np.int64] | None]:
    """x (N,C,H,W) float32, sigma (N,) float32 and label (N,) int64 as engines take them.

    sigma may be a scalar, label too. Raises RequestError naming what does not fit the model.
    """
    shape = f"(N, {', '.join(map(str, manifest.image_shape))})"
    images = np.ascontiguousarray(_numbers(x, f"x must be {shape} numbers"))
    if images.ndim != 4 or images.shape[1:] != manifest.image_shape or len(images) == 0:
        raise RequestError(f"x must be {shape}, not {images.shape}")
    if not np.isfinite(images).all():
        raise RequestError("x must be finite")
    n = len(images)
    levels = _numbers(sigma, f"sigma must be a number or ({n},) numbers")
    if levels.shape not in ((), (1,), (n,)):
        raise RequestError(f"sigma must be a scalar or ({n},), not {levels.shape}")
    if not (np.isfinite(levels).all() and (levels > 0).all()):
        raise RequestError("sigma must be finite and above 0")
    return images, np.array(np.broadcast_to(levels, (n,))), _labels(manifest, label, n)


def checked_noise(
    manifest: Manifest, noise: ArrayLike, label: ArrayLike | None
) -> tuple[Array, NDArray[np.int64] | None]:
    """noise (K,N,C,H,W) float32 and label (N,) int64 as sampler graphs take them. Raises RequestError."""
    shape = f"({manifest.steps}, N, {', '.join(map(str, manifest.image_shape))})"
    z = np.ascontiguousarray(_numbers(noise, f"noise must be {shape} numbers"))
    if z.ndim != 5 or (len(z), *z.shape[2:]) != (manifest.steps, *manifest.image_shape) or z.shape[1] == 0:
        raise RequestError(f"noise must be {shape}, not {z.shape}")
    if not np.isfinite(z).all():
        raise RequestError("noise must be finite")
    return z, _labels(manifest, label, z.shape[1])


def _labels(manifest: Manifest, label: ArrayLike | None, n: int) -> NDArray[np.int64] | None:
    """One label an image, or None for a model without classes. Raises RequestError."""
    if not manifest.num_classes:
        if label is not None:
            raise RequestError("this model has no classes; leave the label out")
        return None
    if label is None:
        raise RequestError(f"this model has {quantity(manifest.num_classes, 'class')}; give a label per image")
    try:
        labels = np.asarray(label)
    except ValueError as error:  # ragged
        raise RequestError(f"label must be an integer or ({n},) integers") from error
    if labels.dtype.kind not in "iu" or labels.shape not in ((), (1,), (n,)):
        raise RequestError(f"label must be an integer or ({n},) integers, not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= manifest.num_classes:
        raise RequestError(f"labels must be from 0 to {manifest.num_classes - 1}")
    return np.array(np.broadcast_to(labels, (n,)), np.int64)


def images_at_once(manifest: Manifest, device: str) -> int:
    """As many pixels as 64 images of 32x32 on a CPU, where speed hardly depends on it; eight times those on a GPU."""
    _, height, width = manifest.image_shape
    return max(1, min(256, (64 if device == "cpu" else 512) * 32 * 32 // (height * width)))


def _numbers(value: ArrayLike, expectation: str) -> Array:
    """``value`` as float32; no copy where it is that already. Raises RequestError with ``expectation``."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # ragged
        raise RequestError(expectation) from error
    if array.dtype.kind not in "fiu":
        raise RequestError(f"{expectation}, not {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, and refused as such
        return array.astype(np.float32, copy=False)
