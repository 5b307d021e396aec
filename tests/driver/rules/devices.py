"""Devices, and the stand-in's own orders: failures, and what it does not know."""

from typing import Any

import pytest
from cuda.bindings import driver as cu
from driver.api import call, option, refuses, report

ATTRIBUTE = cu.CUdevice_attribute
PREFIX = "CU_DEVICE_ATTRIBUTE_"


@pytest.mark.parametrize(
    ("gpu", "capability", "shared"), [("sm_80", (8, 0), 163), ("sm_90", (9, 0), 227), ("sm_120", (12, 0), 99)]
)
def test_models(gpu: str, capability: tuple[int, int], shared: int) -> None:
    """Programming guide, "Technical Specifications per Compute Capability": KB of shared memory of a block."""
    with option("gpu", gpu):
        assert call("cuDeviceComputeCapability", 0) == capability
        numbers = [getattr(ATTRIBUTE, f"{PREFIX}COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR")]
        assert tuple(call("cuDeviceGetAttribute", number, 0) for number in numbers) == capability
        optional = getattr(ATTRIBUTE, f"{PREFIX}MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        assert call("cuDeviceGetAttribute", optional, 0) == shared << 10


def test_devices_are_apart(context: Any) -> None:
    with option("gpus", 2), option("room", 1000):
        assert call("cuDeviceGetCount") == 2
        other = call("cuCtxCreate", None, 0, 1)
        assert int(call("cuCtxGetDevice")) == 1
        call("cuMemAlloc", 1000)
        call("cuCtxPushCurrent", context)
        assert int(call("cuCtxGetDevice")) == 0
        call("cuMemAlloc", 1000)
        call("cuCtxDestroy", other)
        with refuses("INVALID_DEVICE"):
            call("cuDeviceGet", 2)


def test_calls_fail_as_ordered() -> None:
    with option("fail", "cuMemAlloc_v2:2:2,cuStreamCreate:2+:999"):
        answers = [cu.cuMemAlloc(4)[0].value for _ in range(4)] + [cu.cuStreamCreate(0)[0].value for _ in range(4)]
    assert answers == [0, 2, 0, 0, 0, 999, 999, 999]
    call("cuStreamCreate", 0)


def test_an_ordered_failure_of_a_kernel_stays() -> None:
    with option("fail", "cuCtxSynchronize:1:719"), refuses("LAUNCH_FAILED"):
        call("cuCtxSynchronize")
    with refuses("LAUNCH_FAILED"):
        call("cuMemAlloc", 4)


def test_what_is_not_supported_says_so_by_name() -> None:
    with refuses("NOT_SUPPORTED"):
        call("cuCtxGetLimit", cu.CUlimit.CU_LIMIT_STACK_SIZE)
    with refuses("NOT_SUPPORTED"):
        call("cuMemAllocManaged", 4, 1)
    assert report()[:2] == ["unsupported cuCtxGetLimit", "unsupported cuMemAllocManaged"]


def test_errors_have_the_drivers_words() -> None:
    assert call("cuGetErrorString", cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == b"out of memory"
    assert call("cuGetErrorName", cu.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS) == b"CUDA_ERROR_ILLEGAL_ADDRESS"
