"""Contexts. Manual: Primary Context Management, Context Management."""

import os
from typing import Any

from driver.api import call, in_thread, misuse, refuses, report


def test_a_thread_has_no_context_until_it_gets_one(context: Any) -> None:
    def without() -> None:
        with refuses("INVALID_CONTEXT"):
            call("cuMemAlloc", 4)
        call("cuCtxSetCurrent", context)
        call("cuMemFree", call("cuMemAlloc", 4))

    in_thread(without)


def test_push_and_pop_are_a_stack(context: Any) -> None:
    other = call("cuCtxCreate", None, 0, 0)
    call("cuCtxPushCurrent", context)
    assert int(call("cuCtxPopCurrent")) == int(context)
    assert int(call("cuCtxGetCurrent")) == int(other)
    call("cuCtxDestroy", other)  # which pops it
    assert int(call("cuCtxPopCurrent")) == int(context)
    with refuses("INVALID_CONTEXT"):
        call("cuCtxPopCurrent")


def test_set_current_replaces_the_top_and_none_pops_it(context: Any) -> None:
    primary = call("cuDevicePrimaryCtxRetain", 0)
    call("cuCtxPushCurrent", context)
    call("cuCtxSetCurrent", primary)
    assert int(call("cuCtxGetCurrent")) == int(primary)
    call("cuCtxSetCurrent", None)
    assert int(call("cuCtxGetCurrent")) == int(context)
    call("cuDevicePrimaryCtxRelease", 0)


def test_a_primary_context_lives_from_the_first_retain_to_the_last_release() -> None:
    assert call("cuDevicePrimaryCtxGetState", 0)[1] == 0
    primary = call("cuDevicePrimaryCtxRetain", 0)
    assert int(call("cuDevicePrimaryCtxRetain", 0)) == int(primary)
    assert int(call("cuCtxGetCurrent")) != int(primary)  # "is not pushed onto the stack"
    call("cuCtxPushCurrent", primary)
    call("cuDevicePrimaryCtxRelease", 0)
    call("cuMemAlloc", 4)
    call("cuDevicePrimaryCtxRelease", 0)
    assert int(call("cuCtxGetCurrent")) == int(primary)  # it is on the stack, and of no use
    with refuses("CONTEXT_IS_DESTROYED"):
        call("cuMemAlloc", 4)
    with refuses("INVALID_CONTEXT"):
        call("cuDevicePrimaryCtxRelease", 0)


def test_another_thread_sees_that_its_context_was_destroyed() -> None:
    other = call("cuCtxCreate", None, 0, 0)
    call("cuCtxPopCurrent")

    def in_it() -> None:
        call("cuCtxSetCurrent", other)
        in_thread(lambda: call("cuCtxDestroy", other))
        with refuses("CONTEXT_IS_DESTROYED"):
            call("cuStreamCreate", 0)

    in_thread(in_it)


def test_its_objects_go_with_a_context() -> None:
    other = call("cuCtxCreate", None, 0, 0)
    stream = call("cuStreamCreate", 0)
    call("cuMemAlloc", 4), call("cuEventCreate", 0), call("cuMemHostAlloc", 4, 0)
    call("cuCtxDestroy", other)
    assert report() == ["left 1 contexts on device 0"]  # the fixture's
    with refuses("INVALID_HANDLE"):
        call("cuStreamDestroy", stream)
    assert "the stream is destroyed" in misuse()[0]


def test_an_event_and_a_stream_are_of_one_context() -> None:
    event = call("cuEventCreate", 0)
    other = call("cuCtxCreate", None, 0, 0)
    with refuses("INVALID_HANDLE"):
        call("cuEventRecord", event, call("cuStreamCreate", 0))
    call("cuCtxDestroy", other)


def test_a_forked_child_cannot_use_it() -> None:
    child = os.fork()
    if not child:
        try:
            with refuses("NOT_INITIALIZED"):
                call("cuMemAlloc", 4)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
