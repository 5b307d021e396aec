"""Memory, copies and fills. Manual: Memory Management, API synchronization behavior."""

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as cu
from driver.api import NON_BLOCKING, call, misuse, option, refuses


def pinned(count: int) -> Any:
    address = call("cuMemHostAlloc", 4 * count, 0)
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def read(address: Any, count: int, stream: Any = 0) -> Any:
    array = np.empty(count, np.float32)
    call("cuMemcpyDtoHAsync", array.ctypes.data, address, 4 * count, stream)
    return array


def test_fresh_memory_is_no_number() -> None:
    assert np.isnan(read(call("cuMemAlloc", 4 * 255), 255)).all()
    assert np.isnan(pinned(7)).all()


def test_addresses_are_multiples_of_256() -> None:
    assert all(int(call("cuMemAlloc", size)) % 256 == 0 for size in (1, 3, 7, 255, 4096, 10000))


def test_use_after_free_is_told_by_name() -> None:
    address = call("cuMemAlloc", 64)
    call("cuMemFree", address)
    for attempt in (lambda: read(address, 1), lambda: call("cuMemsetD32Async", address, 0, 1, 0)):
        with refuses("INVALID_VALUE"):
            attempt()
        assert "use after free of a block of 64 bytes" in misuse()[0]
    with refuses("INVALID_VALUE"):
        call("cuMemFree", address)
    assert "is freed twice" in misuse()[0]


@pytest.mark.parametrize(("offset", "count"), [(0, 17), (60, 2), (64, 1)])
def test_a_range_ends_with_its_block(offset: int, count: int) -> None:
    address = int(call("cuMemAlloc", 64))
    with refuses("INVALID_VALUE"):
        call("cuMemsetD32Async", address + offset, 0, count, 0)
    assert misuse()


def test_writing_beside_pinned_memory_is_seen_when_it_is_freed() -> None:
    address = call("cuMemHostAlloc", 100, 0)
    ctypes.memset(address + 100, 0, 3)
    call("cuMemFreeHost", address)
    assert "3 bytes beside a block of 100" in misuse()[0]


def test_freeing_does_not_wait() -> None:
    """ "may perform implicit synchronization": nothing may rely on it."""
    stream = call("cuStreamCreate", NON_BLOCKING)
    address = call("cuMemAlloc", 64)
    call("cuMemsetD32Async", address, 0, 16, stream)
    call("cuMemFree", address)
    with refuses("ILLEGAL_ADDRESS"):
        call("cuStreamSynchronize", stream)
    assert "use after free" in misuse()[0]
    with refuses("ILLEGAL_ADDRESS"):  # which stays: "any further CUDA work will return the same error"
        call("cuMemAlloc", 64)


def test_pinned_memory_is_read_when_its_turn_comes_and_pageable_before_the_call_returns() -> None:
    stream = call("cuStreamCreate", NON_BLOCKING)
    for array, expected in ((pinned(3), 2), (np.empty(3, np.float32), 1)):
        array[:] = 1
        address = call("cuMemAlloc", 12)
        call("cuMemcpyHtoDAsync", address, array.ctypes.data, 12, stream)
        array[:] = 2
        assert (read(address, 3, stream) == expected).all()


def test_pinned_memory_is_written_late_and_pageable_before_the_call_returns() -> None:
    stream = call("cuStreamCreate", NON_BLOCKING)
    address = call("cuMemAlloc", 12)
    call("cuMemsetD32Async", address, 0, 3, stream)
    array = pinned(3)
    call("cuMemcpyDtoHAsync", array.ctypes.data, address, 12, stream)
    assert np.isnan(array).all()
    call("cuStreamSynchronize", stream)
    assert (array == 0).all()
    assert (read(address, 3, stream) == 0).all()


def test_synchronous_copies_wait_where_the_host_is_concerned() -> None:
    address, array = call("cuMemAlloc", 12), pinned(3)
    array[:] = 1
    call("cuMemcpyHtoD", address, array.ctypes.data, 12)
    array[:] = 2
    call("cuMemcpyDtoH", array.ctypes.data, address, 12)
    assert (array == 1).all()


def test_synchronous_copies_on_the_device_and_fills_do_not_wait() -> None:
    """ "no host-side synchronization is performed": a non-blocking stream may see the time before."""
    stream = call("cuStreamCreate", NON_BLOCKING)
    source, target = call("cuMemAlloc", 12), call("cuMemAlloc", 12)
    call("cuMemsetD32", source, 0, 3)
    call("cuMemcpyDtoD", target, source, 12)
    assert np.isnan(read(source, 3, stream)).all() and np.isnan(read(target, 3, stream)).all()
    call("cuStreamSynchronize", 0)
    assert (read(target, 3, stream) == 0).all()


def test_a_pageable_copy_may_still_be_on_its_way_when_the_call_returns() -> None:
    """ "the DMA to final destination may not have completed" """
    stream = call("cuStreamCreate", NON_BLOCKING)
    address = call("cuMemAlloc", 12)
    call("cuMemcpyHtoD", address, np.ones(3, np.float32).ctypes.data, 12)
    assert np.isnan(read(address, 3, stream)).all()


def test_host_memory_that_is_not_there_is_an_error_and_no_crash() -> None:
    hole = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hole))
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), 4096, 0)
    with refuses("INVALID_VALUE"):
        call("cuMemcpyHtoDAsync", call("cuMemAlloc", 12), address, 12, 0)
    assert "not there" in misuse()[0]


def test_memory_ends() -> None:
    with option("room", 1000):
        before = call("cuMemGetInfo")
        address = call("cuMemAlloc", 600)
        assert (before, call("cuMemGetInfo")) == ((1000, 1000), (400, 1000))
        with refuses("OUT_OF_MEMORY"):
            call("cuMemAlloc", 401)
        call("cuMemAlloc", 400)
        call("cuMemFree", address)
        call("cuMemAlloc", 600)


def test_registered_memory_is_pinned() -> None:
    array = np.ones(16, np.float32)
    call("cuMemHostRegister", array.ctypes.data, 64, 0)
    with refuses("HOST_MEMORY_ALREADY_REGISTERED"):
        call("cuMemHostRegister", array.ctypes.data, 64, 0)
    stream, address = call("cuStreamCreate", NON_BLOCKING), call("cuMemAlloc", 64)
    call("cuMemcpyHtoDAsync", address, array.ctypes.data, 64, stream)
    array[:] = 2
    assert (read(address, 16, stream) == 2).all()
    call("cuMemHostUnregister", array.ctypes.data)
    with refuses("HOST_MEMORY_NOT_REGISTERED"):
        call("cuMemHostUnregister", array.ctypes.data)


def test_a_pointer_tells_where_it_points() -> None:
    attribute = cu.CUpointer_attribute
    kind, place = attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, attribute.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR
    device, host = int(call("cuMemAlloc", 64)), call("cuMemHostAlloc", 64, 0)
    assert [int(call("cuPointerGetAttribute", kind, each)) for each in (device, host)] == [2, 1]
    assert int(call("cuPointerGetAttribute", place, device + 5)) == device
    with refuses("INVALID_VALUE"):
        call("cuPointerGetAttribute", kind, np.empty(4).ctypes.data)
    assert list(map(int, call("cuMemGetAddressRange", device + 5))) == [device, 64]
