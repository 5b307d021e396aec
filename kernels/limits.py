"""Limits that a GPU sets to a launch, and the check that a launch keeps them."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any, NamedTuple

from cm_runtime.errors import EngineError
from cm_runtime.errors.wording import quantity
from cm_runtime.kernels import build_report
from cm_runtime.kernels.launches import NORM_THREADS, Launch

REGISTERS = 65536  # of a multiprocessor, and of a block
THREADS = 1024  # of a block
WARP = 32
CLUSTER = 8  # blocks of a cluster, on every GPU that has clusters
BUILDS = {8: "sm_80", 9: "sm_90", 12: "sm_120"}  # by the major compute capability; others compile the PTX


class Limits(NamedTuple):
    """Limits of a GPU. By default those of every one.

    shared: bytes of shared memory that a block may opt in to; cluster: blocks of a cluster, 1 for none; build: the
    machine code that runs there, as kernels.json names it, or "" for the PTX.
    """

    shared: int = 48 << 10
    cluster: int = 1
    build: str = ""

    @classmethod
    def from_device(cls, capability: tuple[int, int], shared: int, *, launches_clusters: bool) -> Limits:
        """Limits by compute capability and shared memory; clusters if the GPU has them and its caller launches them."""
        return cls(shared, CLUSTER if launches_clusters and capability >= (9, 0) else 1, BUILDS.get(capability[0], ""))


def check_launch(work: Launch, limits: Limits) -> None:
    """Raises EngineError for a launch that the GPU would refuse: too many threads, registers or bytes, or a cluster."""
    threads = prod(work.block)
    most = NORM_THREADS if work.kernel.startswith("cm_group_norm") else THREADS
    registers = _registers(work.kernel, limits.build) * -(-threads // WARP) * WARP
    if threads > most:
        raise EngineError(f"{work.kernel} takes blocks of at most {quantity(most, 'thread')}, not {threads}")
    if registers > REGISTERS:
        count = quantity(threads, "thread")
        raise EngineError(f"{count} of {work.kernel} need {quantity(registers, 'register')}; a block has {REGISTERS}")
    if work.shared > limits.shared:
        count = quantity(work.shared, "byte")
        raise EngineError(f"{work.kernel} needs {count} of shared memory; a block has {limits.shared}")
    if work.cluster > limits.cluster or work.grid[0] % work.cluster:
        blocks = quantity(work.grid[0], "block")
        raise EngineError(
            f"{work.kernel} cannot be launched as clusters of {work.cluster} of {blocks}; this GPU or its caller takes"
            f" {limits.cluster}"
        )


@cache
def _registers(kernel: str, build: str) -> int:
    """Registers that a thread of the kernel is allocated, in eights; 0 if the driver compiles it."""
    builds: dict[str, Any] = build_report()["kernels"].get(kernel, {})
    return -(-int(builds.get(build, {}).get("registers", 0)) // 8) * 8
