"""torch in a stream and on memory that are not torch's, and the graph of both."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cm_runtime.cuda.device import Device
from cm_runtime.kernels.launches import Images, Type

TORCH_TYPES: dict[Type, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchGraph:
    """A graph of what ``body`` puts in a stream, ours and torch's alike, with the memory that torch takes meanwhile.

    A torch.cuda.CUDAGraph would stop random numbers of every thread, and leave torch's allocator so where it fails.
    """

    def __init__(self, device: Device, kind: torch.device, body: Callable[[], Any]) -> None:
        with on_stream(device.stream, kind):  # its GPU is torch's current one, to which the pool belongs
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                self._graph = device.capture(body)
        self._pool = pool  # assigned behind the graph, and so freed after it

    def launch(self) -> None:
        """Puts the whole graph in the stream."""
        self._graph.launch()


def on_stream(stream: int, device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, torch's work goes to a CUDA stream that is not torch's."""
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(_external(stream, device))


def _external(stream: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]


class _At:
    """An address as the __cuda_array_interface__ (version 3) has it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype, "version": 3}


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of memory that is not torch's, which must outlive it."""
    if device.type == "cuda":  # bfloat16 has no name there
        integers = _At(address, shape, f"<i{dtype.itemsize}")
        return torch.as_tensor(integers, device=device).view(dtype)
    memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)


def array_at(name: str, address: int, images: Images, device: torch.device) -> torch.Tensor:
    """The array ``name`` of a batch as F takes it: images (N, C, H, W), channels_last."""
    if name in ("x_in", "F"):
        dtype = TORCH_TYPES[images.type if name == "x_in" else images.F_type]
        shape = images.n, images.height, images.width, images.channels
        return tensor_at(address, shape, dtype, device).permute(0, 3, 1, 2)
    return tensor_at(address, (images.n,), torch.int64 if name == "label" else torch.float32, device)
