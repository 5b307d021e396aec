"""Noise that a caller has in a GPU's memory, and images that stay there, by `__cuda_array_interface__` version 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cm_runtime.cuda.context import Owned
from cm_runtime.cuda.device import Device
from cm_runtime.cuda.driver import LEGACY_STREAM, DriverError
from cm_runtime.errors import RequestError

FLOAT = np.dtype(np.float32)


@dataclass(frozen=True)
class DeviceNoise:
    """Images ``first`` to ``first + count - 1`` of a caller's standard normals: shape (K,N,C,H,W), float32, no gaps.

    source: the caller's array, which keeps the memory.
    """

    shape: tuple[int, ...]
    address: int
    source: Any
    first: int = 0
    count: int = 0

    @classmethod
    def of(cls, source: Any, device: Device) -> DeviceNoise:
        """Read an array's interface, and put the device's stream behind the array's. Raises RequestError."""
        interface = source.__cuda_array_interface__
        shape, kind = tuple(interface["shape"]), np.dtype(interface["typestr"])
        if kind != FLOAT:
            raise RequestError(f"noise in a GPU's memory must be float32, not {kind}")
        strides = [math.prod(shape[axis + 1 :]) * FLOAT.itemsize for axis in range(len(shape))]
        if interface.get("strides") and list(interface["strides"]) != strides:
            raise RequestError("noise in a GPU's memory must be contiguous, in the order (K, N, C, H, W)")
        address = interface["data"][0]
        index, context = _owner(address, device)
        if index != device.context.index:
            raise RequestError(f"noise is on cuda:{index}, and the model on cuda:{device.context.index}")
        device.follow(interface.get("stream") or LEGACY_STREAM, context)
        return cls(shape, address, source)

    def part(self, first: int, count: int) -> DeviceNoise:
        """The same memory for other images."""
        return replace(self, first=first, count=count)

    def copy(self, device: Device, to: int, room: int) -> None:
        """Copy the images to a batch of ``room``, over and over until it is full, in the device's stream."""
        steps, images = self.shape[:2]
        size = math.prod(self.shape[2:]) * FLOAT.itemsize
        for k in range(steps):
            source = self.address + (k * images + self.first) * size
            for begin in range(0, room, self.count):
                device.move(to + (k * room + begin) * size, source, min(self.count, room - begin) * size)


def _owner(address: int, device: Device) -> tuple[int, int]:
    """The number of the GPU and the context that memory is of."""
    with device.context.current():
        try:
            return device.context.driver.owner(address)
        except DriverError as error:
            raise RequestError(f"noise is in no memory that CUDA knows: {error}") from error


@dataclass(frozen=True, eq=False)
class DeviceImages:
    """Images (N,H,W,C) uint8 in a GPU's memory, which is freed when nothing refers to them any more.

    They are complete: no stream need be waited for. Whatever knows `__cuda_array_interface__` reads them in place.

    Attributes:
        shape: (N,H,W,C).
        dtype: uint8.
        address: of the first byte.

    Example:
        >>> torch.as_tensor(images)
        >>> GPUArray(images.shape, images.dtype, base=images, gpudata=images.address)  # of pycuda
    """

    shape: tuple[int, ...]
    address: int
    _device: Device = field(repr=False)
    _memory: Owned = field(repr=False)
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.uint8)

    @classmethod
    def take(cls, device: Device, shape: tuple[int, ...]) -> DeviceImages:
        """Memory for images of that shape. Raises OutOfMemoryError."""
        memory = device.take(math.prod(shape), " for images")
        return cls(shape, int(memory), device, memory)

    def part(self, first: int, count: int) -> DeviceImages:
        """Images ``first`` to ``first + count - 1``, in the same memory."""
        shape = count, *self.shape[1:]
        return replace(self, shape=shape, address=self.address + first * math.prod(shape[1:]))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data = self.address, False
        return {"shape": self.shape, "typestr": "|u1", "data": data, "strides": None, "stream": None, "version": 3}

    def __len__(self) -> int:
        return self.shape[0]

    def copy_to_host(self) -> NDArray[np.uint8]:
        """Copy the images to the host, (N,H,W,C) uint8, behind what is in the legacy stream. Raises EngineError."""
        self._device.follow()
        return self._device.read(self.address, self.shape, self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images in a GPU's memory become an array of the host by a copy alone")
        return self.copy_to_host().astype(self.dtype if dtype is None else dtype, copy=False)
