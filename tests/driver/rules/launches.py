"""Modules and launches. Manual: Module Management, Execution Control; guide: Technical Specifications."""

import ctypes
import json
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cu
from driver.api import NON_BLOCKING, call, misuse, option, refuses, report
from driver.build import KERNELS
from driver.rules.memory import read

from cm_runtime import kernels
from cm_runtime.kernels import launches
from cm_runtime.kernels.group_norm import group_norm_silu, plan_norm
from cm_runtime.kernels.launches import LEVEL, REQUEST, Arrays, Images, Launch
from cm_runtime.kernels.limits import Limits

REPORT = json.loads((KERNELS / "kernels.json").read_text())
SHARED = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
REGISTERS = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
THREADS = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK


def function(name: str) -> Any:
    return call("cuModuleGetFunction", call("cuModuleLoadData", kernels.fatbin()), name.encode())


def send(array: Any) -> int:
    address = int(call("cuMemAlloc", array.nbytes))
    call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
    return address


def put(work: Launch, stream: Any = 0, kernel: Any = None, **changes: Any) -> None:
    """Launch by cuda-bindings, with changes of block, grid or shared."""
    work = work._replace(**changes)
    values = tuple(each.item() for each in work.arguments)
    types = tuple(np.ctypeslib.as_ctypes_type(each.dtype) for each in work.arguments)
    kernel = kernel or function(work.kernel)
    call("cuLaunchKernel", kernel, *work.grid, *work.block, work.shared, stream, (values, types), 0)


def first_noise(x: int, type: Any = "fp32") -> Launch:
    request, level = send(np.array([(3, 17)], REQUEST)), send(np.array([(0, 1, 1, 1)], LEVEL))
    return launches.first_noise(Images(2, 3, 8, 8, type), Arrays(request, level, x=x))


def group_norm(elements: int = 128, shared: int = 0) -> Launch:
    images = Images(1, 8, 4, elements // 32, "fp32", "nhwc")
    x, weights = send(np.zeros(elements, np.float32)), send(np.ones(8, np.float32))
    at = Arrays(x=x, gamma=weights, beta=weights, y=x)
    (work,) = group_norm_silu(images, at, 2, 1e-3, False, plan_norm(images, 2, Limits()))
    return work._replace(shared=shared or work.shared)


def test_a_kernel_computes_what_its_reference_does() -> None:
    from cm_runtime import noise

    x = int(call("cuMemAlloc", 2 * 3 * 64 * 4))
    put(first_noise(x))
    expected = noise.normal(3, [17, 18], 0, (3, 8, 8))
    assert np.abs(read(x, 2 * 3 * 64).reshape(expected.shape) - expected).max() < 1e-6


def test_only_the_projects_own_binary_is_loaded() -> None:
    content = bytearray(kernels.fatbin())
    content[-1] ^= 1
    with refuses("INVALID_IMAGE"):
        call("cuModuleLoadData", bytes(content))
    assert report()[0] == "unsupported a module that is not kernels.fatbin"
    with refuses("NOT_FOUND"):
        function("cm_no_such")


def test_blocks_fit_the_registers() -> None:
    """Warps get registers 256 at a time, from four files of 16384: by the occupancy calculator."""
    module = call("cuModuleLoadData", kernels.fatbin())
    for name, gpus in REPORT["kernels"].items():
        registers = -(-gpus["sm_90"]["registers"] // 8) * 8
        most = min(1024, 16384 // (registers * 32) * 4 * 32)
        assert call("cuFuncGetAttribute", THREADS, call("cuModuleGetFunction", module, name.encode())) == most


def test_a_block_of_too_many_registers_is_refused() -> None:
    name = max(REPORT["kernels"], key=lambda name: REPORT["kernels"][name]["sm_90"]["registers"])
    kernel, sizes = function(name), REPORT["parameters"][name]
    types = tuple({8: ctypes.c_uint64, 4: ctypes.c_uint32}[size] for size in sizes)
    with refuses("LAUNCH_OUT_OF_RESOURCES"):
        call("cuLaunchKernel", kernel, 1, 1, 1, 1024, 1, 1, 0, 0, ((0,) * len(sizes), types), 0)
    call("cuCtxSynchronize")  # which is no failure of the context


@pytest.mark.parametrize(
    "changes",
    [
        {"block": (0, 1, 1)},
        {"block": (1025, 1, 1)},
        {"block": (1, 1, 65)},
        {"block": (32, 32, 2)},
        {"grid": (0, 1, 1)},
        {"grid": (1, 65536, 1)},
        {"grid": (1 << 31, 1, 1)},
        {"shared": (48 << 10) + 1},
    ],
    ids=str,
)
def test_shapes_that_no_device_takes(changes: dict[str, Any]) -> None:
    x = int(call("cuMemAlloc", 2 * 3 * 64 * 4))
    with refuses("INVALID_VALUE"):
        put(first_noise(x), **changes)


def test_more_than_48_kb_of_shared_memory_has_to_be_asked_for() -> None:
    work = group_norm(shared=100 << 10)
    kernel = function(work.kernel)
    with refuses("INVALID_VALUE"):
        put(work, kernel=kernel)
    call("cuFuncSetAttribute", kernel, SHARED, 100 << 10)
    put(work, kernel=kernel)
    call("cuCtxSynchronize")
    with refuses("INVALID_VALUE"):
        call("cuFuncSetAttribute", kernel, SHARED, (227 << 10) + 1)
    call("cuFuncSetAttribute", kernel, SHARED, 227 << 10)


def test_a_kernel_that_leaves_its_memory_fails_and_the_context_with_it() -> None:
    x = int(call("cuMemAlloc", 4))
    put(first_noise(x))
    with refuses("ILLEGAL_ADDRESS"):
        call("cuCtxSynchronize")
    with refuses("ILLEGAL_ADDRESS"):
        call("cuMemFree", x)
    first, second = misuse()
    assert "touches memory that is not there" in first and "bytes beside a block of 4 were written" in second


@pytest.mark.parametrize("why", ["freed", "pageable"])
def test_addresses_that_are_no_devices(why: str) -> None:
    stream, array = call("cuStreamCreate", NON_BLOCKING), np.zeros(400, np.float32)
    x = int(call("cuMemAlloc", 2 * 3 * 64 * 4))
    work = first_noise(x if why == "freed" else array.ctypes.data // 16 * 16)
    put(work, stream)
    call("cuMemFree", x)
    with refuses("ILLEGAL_ADDRESS"):
        call("cuStreamSynchronize", stream)
    said = {"freed": "use after free of a block of 1536 bytes", "pageable": "is in no block of memory"}
    assert f"of {work.kernel}: " in (line := misuse()[0]) and said[why] in line


def test_arguments_in_a_buffer_have_the_compilers_size() -> None:
    """CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE, as pycuda passes them."""
    work = first_noise(int(call("cuMemAlloc", 2 * 3 * 64 * 4)))
    parts, offset = [], 0
    for argument in work.arguments:
        padding = -offset % argument.nbytes
        parts.append(bytes(padding) + argument.tobytes())
        offset += padding + argument.nbytes
    for content, is_whole in (
        (b"".join(parts), True),
        (b"".join(parts)[:-4], False),
        (b"".join(parts) + bytes(4), False),
    ):
        buffer, size = ctypes.create_string_buffer(content, len(content)), ctypes.c_size_t(len(content))
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        words = (function(work.kernel), *work.grid, *work.block, work.shared, 0, 0, ctypes.addressof(extra))
        if is_whole:
            call("cuLaunchKernel", *words)
        else:
            with refuses("INVALID_VALUE"):
                call("cuLaunchKernel", *words)
            assert "bytes of arguments" in misuse()[0]


@pytest.mark.parametrize(
    ("gpu", "error"), [("sm_75", "NO_BINARY_FOR_GPU"), ("sm_80", None), ("sm_100", None), ("sm_120", None)]
)
def test_devices_that_the_binary_is_for(gpu: str, error: str | None) -> None:
    with option("gpu", gpu):
        if error:
            with refuses(error):
                call("cuModuleLoadData", kernels.fatbin())
            return
        name = "cm_step_half_nhwc"
        registers = REPORT["kernels"][name]["sm_90" if gpu == "sm_100" else gpu]["registers"]
        assert call("cuFuncGetAttribute", REGISTERS, function(name)) == registers


def test_an_old_driver_does_not_know_the_binary() -> None:
    with option("version", 12080), refuses("INVALID_IMAGE"):
        call("cuModuleLoadData", kernels.fatbin())


def test_a_function_is_of_its_context() -> None:
    work = first_noise(int(call("cuMemAlloc", 2 * 3 * 64 * 4)))
    kernel = function(work.kernel)
    other = call("cuCtxCreate", None, 0, 0)
    with refuses("INVALID_HANDLE"):
        put(work, kernel=kernel)
    call("cuCtxDestroy", other)
