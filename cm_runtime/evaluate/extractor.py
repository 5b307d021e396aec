"""Features of images from an ONNX graph: ours, or whatever Inception a user has.

What a graph does not say about its input decides a Fréchet distance as much as the images do, and tools disagree on
it. So nothing is guessed: it is read from the file, or asked for, and it is in every report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cm_runtime import onnx_graph
from cm_runtime.backends.base import EngineOptions
from cm_runtime.backends.ort import has_cuda, open_session
from cm_runtime.errors import ArtifactError, EngineError, RequestError
from cm_runtime.errors.reasons import first_line
from cm_runtime.errors.wording import quantity
from cm_runtime.evaluate.extractor_metadata import METADATA_KEY, RANGES, foreign, own
from cm_runtime.evaluate.resize import resized
from cm_runtime.files import atomic, streams

SHIPPED = Path(__file__).parent.parent / "models" / "fashion-mnist-classifier.onnx"
_PIXELS = 1 << 20  # of one batch
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Extracted:
    """features: (N, D) float32; logits: (N, classes) float32, or None where the graph has none."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32] | None


class _Input(NamedTuple):
    name: str
    type: str
    shape: list[Any]


class Extractor:
    """An ONNX graph from one image input, uint8 or float32, (N,H,W,C) or (N,C,H,W), to features and perhaps logits.

    path: None is the shipped Fashion-MNIST classifier. value_range: what black and white are to a float32 input, for
    files that do not say; output_name: the output that holds the features, for files with several of which none is
    called ``features``. device: auto, cpu or cuda:N; threads: 0 is one per core. Raises ArtifactError for a graph
    that is no extractor, RequestError for an option that is missing or that the file answers itself.
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
        inputs, names, said = _inspected(self._session, self.path)
        if len(inputs) != 1:
            raise ArtifactError(f"{self.path} has {len(inputs)} inputs; an extractor has one, the images")
        self._input = inputs[0]
        if self._input.type not in ("tensor(uint8)", "tensor(float)") or len(self._input.shape) != 4:
            kind = f"{self._input.type} {self._input.shape}"
            raise ArtifactError(f"{self.path} takes {kind}; an extractor takes uint8 or float32 images, 4 dims")
        if any(isinstance(side, int) and side < 1 for side in self._input.shape):
            raise ArtifactError(f"{self.path} takes {self._input.shape}, which is no image")
        self._dtype = np.dtype(np.uint8 if self._input.type == "tensor(uint8)" else np.float32)
        shape = self._input.shape
        if said is None:
            is_uint8 = self._dtype == np.uint8
            self.preparation = foreign(self.path, is_uint8, shape, names, value_range, output_name)
        elif value_range is not None or output_name is not None:
            raise RequestError(f"{self.path} says itself what it takes and gives; leave --range and --output-name out")
        else:
            self.preparation = own(self.path, said, shape, names)
        batch, *sides = shape
        self.channels, *size = sides[-1:] + sides[:2] if self.preparation.layout == "NHWC" else sides
        self._size = None if any(not isinstance(side, int) for side in size) else (size[0], size[1])
        self._fixed = batch if isinstance(batch, int) else None

    @property
    def is_shipped(self) -> bool:
        """Whether this is the file that comes with cm-runtime."""
        return self.path == SHIPPED

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises RequestError unless images (H, W, C) can be made into what the graph takes."""
        height, width, channels = shape
        if channels != self.channels and not (channels == 1 and self.channels == 3):
            raise RequestError(f"{self._wants()}, not {quantity(channels, 'channel')}; give another --extractor")
        if self.preparation.resize == "none" and self._size not in (None, (height, width)):
            raise RequestError(f"{self._wants()}, not {height}x{width}; give another --extractor")

    def __call__(self, images: NDArray[np.uint8]) -> Extracted:
        """(N,H,W,C) uint8 -> features (N, D) and logits. Raises RequestError, EngineError."""
        self.check(images.shape[1:])
        height, width = self._size or images.shape[1:3]
        size = self._fixed or max(1, min(_BATCH, _PIXELS // (height * width)))
        parts = [self._run(self._prepared(images[first : first + size])) for first in range(0, len(images), size)]
        features, logits = zip(*parts, strict=True)
        return Extracted(np.concatenate(features), None if self.preparation.logits is None else np.concatenate(logits))

    def describe(self, shape: tuple[int, int, int]) -> dict[str, Any]:
        """What was done to images (H, W, C), for a report."""
        height, width, channels = shape
        resize = "none"
        if self._size not in (None, (height, width)):
            rounded = ", rounded" if self._dtype == np.uint8 else ""
            resize = f"bicubic, antialiased, float channels{rounded} (Pillow)"
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

    def _wants(self) -> str:
        side = "" if self._size is None else f"{self._size[0]}x{self._size[1]} "
        return f"the extractor {self.path.name} takes {side}images of {quantity(self.channels, 'channel')}"

    def _prepared(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """(n,H,W,C) uint8 -> what the graph takes."""
        pixels: NDArray[Any] = images
        if self._size not in (None, images.shape[1:3]):
            assert self._size is not None
            pixels = resized(images, self._size)
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
        if self._fixed is not None and count < self._fixed:  # filled up with the first image
            pixels = np.concatenate([pixels, np.repeat(pixels[:1], self._fixed - count, axis=0)])
        try:
            made = self._session.run(names, {self._input.name: pixels})
        except Exception as error:  # its exceptions share no base of their own
            raise EngineError(f"{self.path}: ONNX Runtime: {first_line(error)}") from error
        rows = [_rows(name, array, len(pixels), self.path)[:count] for name, array in zip(names, made, strict=True)]
        return rows[0], rows[1] if len(rows) > 1 else None


def _inspected(session: Any, path: Path) -> tuple[list[_Input], list[str], str | None]:
    """Inputs, the names of outputs, and what the file says of itself. Raises ArtifactError."""
    try:
        inputs = [_Input(one.name, one.type, list(one.shape)) for one in session.get_inputs()]
        names = [output.name for output in session.get_outputs()]
        return inputs, names, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} has names that are no text; it is damaged") from error


def _rows(name: str, array: Any, count: int, path: Path) -> NDArray[np.float32]:
    """One row of numbers an image: (N, D), or (N, D, 1, 1) and the like. Raises ArtifactError."""
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
