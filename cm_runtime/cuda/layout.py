"""The arrays of a batch in a GPU's memory: which there are, how large, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cm_runtime.cuda.engine import Engine
from cm_runtime.kernels.launches import LEVEL, REQUEST, SIZES, Images
from cm_runtime.projections import Edit, Projection, map_arrays
from cm_runtime.request import Request
from cm_runtime.sampling import Array

ALIGNMENT = 256  # bytes: every array begins at a multiple, as TensorRT demands of an engine's inputs and outputs


@dataclass(frozen=True)
class Block:
    """Arrays side by side in one allocation, each at a multiple of 256 bytes: name -> offset, size."""

    places: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, **sizes: int) -> Block:
        """Place arrays of so many bytes; those of none have no place."""
        places, end = {}, 0
        for name, size in sizes.items():
            if size:
                places[name] = end, size
                end = _align(end + size)
        return cls(places, end)

    def at(self, base: int) -> dict[str, int]:
        """The address of each array that has a place."""
        return {name: base + offset for name, (offset, _) in self.places.items()}


@dataclass(frozen=True)
class Layout:
    """The memory of batches of ``images`` in ``steps`` steps.

    flags: images with a byte each that says whether it is finite. front: bytes before the images, for those flags, or
    for the kernels' one. row: bytes from one step's noise levels to the next's. parameters: the part of ``block`` that
    every batch has anew.
    """

    images: Images
    steps: int
    flags: int
    front: int
    row: int
    result_type: np.dtype[Any]
    has_noise: bool
    parameters: Block
    block: Block

    @classmethod
    def plan(cls, engine: Engine, request: Request, count: int, has_noise: bool) -> Layout:
        """Lay out batches like ``request``'s of ``count`` images. has_noise: the caller brings the noise."""
        images, steps, graph = engine.images(count), len(request.sigmas), engine.graph
        n, elements, is_sampler = images.n, images.elements, graph == "sampler"
        result_type = np.dtype(np.uint8 if request.output == "uint8" else np.float32)
        flags = n if "finite" in engine.outputs else 0
        front, row = _align(flags or 1), _align(n * 4)
        parameters = Block.of(
            request=REQUEST.itemsize,
            levels=(steps + 1) * LEVEL.itemsize,
            sigma=0 if is_sampler else steps * row,
            label=n * 8 if engine.manifest.num_classes else 0,
        )
        block = Block.of(
            parameters=parameters.size,
            noise=steps * elements * 4 if has_noise or is_sampler else 0,
            **{name: array.nbytes for name, array in edit_arrays(request.edit, images).items()},
            x=0 if is_sampler else elements * 4,
            x_in=elements * SIZES[images.type] if graph == "network" else 0,
            F=0 if is_sampler else elements * SIZES[images.F_type],
            result=front + elements * result_type.itemsize,
        )
        return cls(images, steps, flags, front, row, result_type, has_noise, parameters, block)

    def at(self, base: int) -> dict[str, int]:
        """Addresses of all arrays, the parameters' too."""
        addresses = self.block.at(base)
        return addresses | self.parameters.at(addresses["parameters"])


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def edit_arrays(edit: Edit | None, images: Images) -> dict[str, Array]:
    """The arrays of an edit as the kernels read them, for a batch of ``images``."""
    if edit is None:
        return {}
    start = pad_batch(edit.start, images.n)
    arrays = {"start": start if images.layout == "nchw" else np.moveaxis(start, 1, -1)}
    if edit.project is not None:
        padded = pad_projection(edit.project, images.n)
        arrays |= {name: value for name, value in vars(padded).items() if isinstance(value, np.ndarray)}
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def pad_projection(project: Projection, count: int) -> Projection:
    """A projection of ``count`` images, its last one repeated; arrays of one image serve all."""
    return map_arrays(project, lambda array: array if len(array) == 1 else pad_batch(array, count))


def pad_batch(array: NDArray[Any], count: int, axis: int = 0) -> NDArray[Any]:
    """Repeat the last entry of ``array`` along ``axis`` up to ``count``, where an engine takes no fewer."""
    missing = count - array.shape[axis]
    return np.concatenate([array, np.repeat(array.take([-1], axis), missing, axis)], axis) if missing else array
