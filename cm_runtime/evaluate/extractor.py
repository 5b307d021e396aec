"""Features of images from an ONNX graph: the bundled classifier, or any Inception of the user's.

The range, layout and size of a graph's input decide a Fréchet distance as much as the images do, and tools disagree on
them. So nothing is guessed: they are read from the file or the options, and are in every report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cm_runtime import onnx_graph
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import has_cuda, open_session
from cm_runtime.errors import ArtifactError, EngineError, RequestError
from cm_runtime.errors.reasons import first_line
from cm_runtime.errors.wording import quantity
from cm_runtime.evaluate.extractor_metadata import METADATA_KEY, RANGES, from_graph, from_metadata
from cm_runtime.files import atomic, streams

SHIPPED = Path(__file__).parent.parent / "models" / "fashion-mnist-classifier.onnx"
_PIXELS = 1 << 20  # of one batch
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Extraction:
    """An extractor's outputs: features (N, D) float32; logits (N, classes) float32, or None if the graph has none."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class Extractor:
    """An ONNX graph from one image input, uint8 or float32, (N,H,W,C) or (N,C,H,W), to features and perhaps logits.

    path: None is the bundled Fashion-MNIST classifier. value_range: black and white of a float32 input, for files
    without metadata; output_name: the output that holds the features, for files with several of which none is called
    ``features``. device: auto, cpu or cuda:N; threads: 0 is one per core. Raises ArtifactError for a graph that is no
    extractor, RequestError for an option that is missing or that the file's metadata answers.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        value_range: str | None = None,
        output_name: str | None = None,
        device: str = "auto",
        threads: int = 0,
    ) -> None:
        self.path = path or SHIPPED
        self.sha256 = _sha256(self.path)
        onnx_graph.check_extractor(self.path)
        self.device = ("cuda:0" if has_cuda() else "cpu") if device == "auto" else device
        self._session = open_session(self.path, str(self.path), EngineOptions(device=self.device, threads=threads))
        inputs, outputs, metadata = _read_signature(self._session, self.path)
        if len(inputs) != 1:
            raise ArtifactError(f"{self.path} has {len(inputs)} inputs; an extractor has one, the images")
        self._input, kind, shape = inputs[0]
        if kind not in ("tensor(uint8)", "tensor(float)") or len(shape) != 4:
            raise ArtifactError(f"{self.path} takes {kind} {shape}; an extractor takes uint8 or float32 images, 4 dims")
        if any(isinstance(side, int) and side < 1 for side in shape):
            raise ArtifactError(f"{self.path} takes {shape}, which is no image")
        self._dtype = np.dtype(np.uint8 if kind == "tensor(uint8)" else np.float32)
        if metadata is None:
            is_uint8 = self._dtype == np.uint8
            self.preparation = from_graph(self.path, is_uint8, shape, outputs, value_range, output_name)
        elif value_range is not None or output_name is not None:
            raise RequestError(f"{self.path} says itself what it takes and gives; leave --range and --output-name out")
        else:
            self.preparation = from_metadata(self.path, metadata, shape, outputs)
        batch, *sides = shape
        self.channels, *size = sides[-1:] + sides[:2] if self.preparation.layout == "NHWC" else sides
        self._size = None if any(not isinstance(side, int) for side in size) else (size[0], size[1])
        self._batch_size = batch if isinstance(batch, int) else None

    @property
    def is_shipped(self) -> bool:
        """True for the file that comes with cm-runtime."""
        return self.path == SHIPPED

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise RequestError unless images (H, W, C) can be converted to the graph's input."""
        height, width, channels = shape
        if channels != self.channels and not (channels == 1 and self.channels == 3):
            raise RequestError(f"{self._requirement()}, not {quantity(channels, 'channel')}; give another --extractor")
        if self.preparation.resize == "none" and self._size not in (None, (height, width)):
            raise RequestError(f"{self._requirement()}, not {height}x{width}; give another --extractor")

    def __call__(self, images: NDArray[np.uint8]) -> Extraction:
        """Extract features (N, D) and logits of (N,H,W,C) uint8. Raises RequestError, EngineError."""
        self.check(images.shape[1:])
        height, width = self._size or images.shape[1:3]
        size = self._batch_size or max(1, min(_BATCH, _PIXELS // (height * width)))
        parts = [self._run(self._prepare(images[first : first + size])) for first in range(0, len(images), size)]
        features, logits = zip(*parts, strict=True)
        return Extraction(np.concatenate(features), None if self.preparation.logits is None else np.concatenate(logits))

    def describe(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """Describe the extractor and its preparation of images (H, W, C), for a report."""
        height, width, channels = shape
        resize = "none"
        if self._size not in (None, (height, width)):
            rounding = ", rounded" if self._dtype == np.uint8 else ""
            resize = f"bicubic, antialiased, float channels{rounding} (Pillow)"
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "device": self.device,
            "input": f"{self._dtype} {self.preparation.layout} {self.preparation.value_range}",
            "size": list(self._size or (height, width)),
            "resize": resize,
            "channels": "grey repeated 3 times" if channels != self.channels else "as they are",
            "features": self.preparation.features,
            "logits": self.preparation.logits,
        }

    def _requirement(self) -> str:
        side = "" if self._size is None else f"{self._size[0]}x{self._size[1]} "
        return f"the extractor {self.path.name} takes {side}images of {quantity(self.channels, 'channel')}"

    def _prepare(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """Convert (n,H,W,C) uint8 to the graph's input."""
        pixels: NDArray[Any] = images
        if self._size not in (None, images.shape[1:3]):
            assert self._size is not None
            pixels = resize(images, self._size)
        if pixels.shape[3] != self.channels:
            pixels = np.repeat(pixels, self.channels, axis=3)
        if self._dtype == np.uint8:
            pixels = np.rint(pixels).astype(np.uint8)
        else:
            low, high = RANGES[self.preparation.value_range]
            pixels = pixels.astype(np.float32) * np.float32((high - low) / 255) + np.float32(low)
        if self.preparation.layout == "NCHW":
            pixels = np.moveaxis(pixels, 3, 1)
        return np.ascontiguousarray(pixels)

    def _run(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        count, names = len(pixels), [self.preparation.features]
        if self.preparation.logits is not None:
            names.append(self.preparation.logits)
        if self._batch_size is not None and count < self._batch_size:  # filled up with the first image
            pixels = np.concatenate([pixels, np.repeat(pixels[:1], self._batch_size - count, axis=0)])
        try:
            outputs = self._session.run(names, {self._input: pixels})
        except Exception as error:  # its exceptions share no base of their own
            raise EngineError(f"{self.path}: ONNX Runtime: {first_line(error)}") from error
        rows = [_rows(name, array, len(pixels), self.path)[:count] for name, array in zip(names, outputs, strict=True)]
        return rows[0], rows[1] if len(rows) > 1 else None


def resize(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize (N,H,W,C) to ``size`` (height, width) as clean-fid does (arXiv 2104.11222): float32 in 0..255.

    Bicubic with an antialiasing filter, on float channels that are not rounded. Resizers without the filter, or with
    rounding, move a Fréchet distance by whole points.
    """
    height, width = size
    pixels = np.empty((len(images), height, width, images.shape[3]), np.float32)
    for image, target in zip(images, pixels, strict=True):
        for channel in range(images.shape[3]):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            target[..., channel] = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(pixels, 0, 255, out=pixels)


def _read_signature(session: Any, path: Path) -> tuple[list[tuple[str, str, list[Any]]], list[str], str | None]:
    """Read inputs (name, type, shape), names of outputs, and the extractor's metadata. Raises ArtifactError."""
    try:
        inputs = [(one.name, one.type, list(one.shape)) for one in session.get_inputs()]
        names = [output.name for output in session.get_outputs()]
        return inputs, names, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} has names that are no text; it is damaged") from error


def _rows(name: str, array: Any, count: int, path: Path) -> NDArray[np.float32]:
    """Flatten an output to one row an image: of (N, D), or (N, D, 1, 1) and the like. Raises ArtifactError."""
    shape: tuple[int, ...] = getattr(array, "shape", ())
    dtype = getattr(array, "dtype", np.dtype(object))
    if len(shape) < 2 or shape[0] != count or math.prod(shape[2:]) != 1 or not shape[1] or dtype.kind != "f":
        raise ArtifactError(
            f"{path}: its output {name} is {dtype} {shape} for {quantity(count, 'image')}, not (N, D) floats"
        )
    rows: NDArray[np.float32] = array.reshape(count, shape[1]).astype(np.float32, copy=False)
    return rows


def _sha256(path: Path) -> str:
    if not streams.exists(path):
        raise ArtifactError(f"{path}: no such extractor")
    return atomic.sha256(path, ArtifactError)
