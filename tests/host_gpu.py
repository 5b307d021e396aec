"""The kernels on the host: the sources that nvcc compiles, compiled by g++, launched with grids and blocks.

Arrays are in host memory, and their addresses are what a GPU's would be. With CM_RUNTIME_KERNELS=gpu, as `make
gpu-check` has it, they are launched on the GPU itself, which reads the same arrays, in memory that is mapped for it.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import numpy as np
from driver.build import library as built

from cm_runtime.cuda.device import Device
from cm_runtime.kernels.launches import Launch
from cm_runtime.kernels.limits import BUILDS, CLUSTER, Limits, check_launch

ON_GPU = os.environ.get("CM_RUNTIME_KERNELS") == "gpu"
MOST_SHARED = 227 << 10  # bytes of a block, on the GPUs that have most
WRONG = {
    1: "no kernel has this name",
    2: "no GPU takes this shape",
    3: "not all threads reach a barrier",
    4: "it writes beyond its shared memory",
    5: "not all blocks reach a cluster's barrier",
    6: "a block reads the shared memory of one that has ended",
}


@cache
def library() -> ctypes.CDLL:
    """The kernels' host build; a test without g++ and make is skipped."""
    loaded = ctypes.CDLL(str(built() / "host.so"))
    loaded.cm_kernels.restype = ctypes.c_char_p
    return loaded


def names() -> set[str]:
    """Of the kernels that were built."""
    return set(library().cm_kernels().decode().split())


@cache
def gpu() -> Any:
    """The GPU, where kernels run on one."""
    return Device()


def limits() -> Limits:
    """Limits of the GPU; of the host build those of the largest ones."""
    return gpu().context.limits if ON_GPU else Limits(MOST_SHARED, CLUSTER)  # type: ignore[no-any-return]


def launch(work: Launch) -> None:
    """Runs a launch to its end. Raises ValueError or EngineError where a GPU would refuse it."""
    if ON_GPU:
        gpu().launch(work)
        gpu().finish()
        return
    for build in BUILDS.values():
        check_launch(work, Limits(MOST_SHARED, CLUSTER, build))
    values = [np.array(argument) for argument in work.arguments]  # of no dimensions, in memory of their own
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    grid, block = ((ctypes.c_uint * 3)(*size) for size in (work.grid, work.block))
    shape = grid, block, *map(ctypes.c_uint, (work.cluster, work.shared))
    code = library().cm_launch_cluster(work.kernel.encode(), *shape, pointers)
    if code:
        raise ValueError(f"{work.kernel}: {WRONG[code]}")


def empty(shape: tuple[int, ...], dtype: Any, fill: float = np.nan) -> Any:
    """An array whose address is a multiple of 16, full of ``fill``."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = gpu().pin(size + 64) if ON_GPU else np.empty(size + 64, np.uint8)  # one address for both, on 64 bits
    begin = -memory.ctypes.data % 64
    made = memory[begin : begin + size].view(dtype).reshape(shape)
    made[...] = 0 if dtype.kind in "iu" or dtype.names else fill
    return made


def placed(array: Any) -> Any:
    """A copy of ``array`` at such an address."""
    made = empty(np.shape(array), np.asarray(array).dtype)
    made[...] = array
    return made


def address(array: Any) -> int:
    """Where ``array`` is."""
    return int(array.ctypes.data)
