"""Streams and events. Manual: Stream Management, Event Management, Stream synchronization behavior."""

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import driver as cu
from driver.api import NON_BLOCKING, call, in_thread, misuse, refuses

LEGACY, PER_THREAD = 1, 2
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
KEPT: list[Any] = []


def note(stream: Any, into: list[Any], word: Any) -> None:
    """Put a host function in ``stream`` that appends ``word``."""
    function = HOST_FUNCTION(lambda _: into.append(word() if callable(word) else word))
    KEPT.append(function)
    call("cuLaunchHostFunc", stream, cu.CUhostFn(ctypes.cast(function, ctypes.c_void_p).value), 0)


def test_work_runs_when_somebody_waits_and_in_its_order() -> None:
    stream, order = call("cuStreamCreate", 0), []
    for word in "abc":
        note(stream, order, word)
    assert order == []
    call("cuStreamSynchronize", stream)
    assert order == ["a", "b", "c"]


def test_streams_have_no_order_of_their_own() -> None:
    first, second = (call("cuStreamCreate", NON_BLOCKING) for _ in range(2))
    order: list[str] = []
    note(first, order, "first"), note(second, order, "second")
    call("cuCtxSynchronize")
    assert order == ["second", "first"]


def test_an_event_orders_them() -> None:
    first, second, event = (
        call("cuStreamCreate", NON_BLOCKING),
        call("cuStreamCreate", NON_BLOCKING),
        call("cuEventCreate", 2),
    )
    order: list[str] = []
    note(first, order, "before")
    call("cuEventRecord", event, first)
    note(first, order, "beside")
    call("cuStreamWaitEvent", second, event, 0)
    note(second, order, "after")
    call("cuStreamSynchronize", second)
    assert order == ["before", "after"]


def test_waiting_is_for_what_an_event_holds_at_the_call() -> None:
    """ "use the most recently captured state at the time of the API call" """
    first, second, event = (
        call("cuStreamCreate", NON_BLOCKING),
        call("cuStreamCreate", NON_BLOCKING),
        call("cuEventCreate", 2),
    )
    order: list[str] = []
    call("cuStreamWaitEvent", second, event, 0)  # never recorded: "an empty set of work"
    call("cuEventSynchronize", event)
    call("cuEventRecord", event, first)
    call("cuStreamWaitEvent", second, event, 0)
    note(first, order, "first")
    call("cuEventRecord", event, first)
    note(second, order, "second")
    call("cuStreamSynchronize", second)
    assert order == ["second"]
    call("cuEventSynchronize", event)
    assert order == ["second", "first"]


def test_the_legacy_stream_waits_for_blocking_ones_and_they_for_it() -> None:
    blocking, other, order = call("cuStreamCreate", 0), call("cuStreamCreate", NON_BLOCKING), []
    note(blocking, order, "blocking")
    note(other, order, "other")
    note(LEGACY, order, "legacy")
    note(blocking, order, "blocking again")
    call("cuStreamSynchronize", blocking)
    assert order == ["blocking", "legacy", "blocking again"]
    call("cuStreamSynchronize", other)
    assert order[-1] == "other"


def test_a_threads_own_default_stream_is_a_blocking_one() -> None:
    order: list[str] = []
    note(PER_THREAD, order, "mine")
    context = call("cuCtxGetCurrent")

    def other() -> None:
        call("cuCtxSetCurrent", context)
        note(PER_THREAD, order, "another's")
        call("cuStreamSynchronize", PER_THREAD)

    in_thread(other)
    assert order == ["another's"]
    call("cuStreamSynchronize", 0)
    assert order == ["another's", "mine"]


def test_a_destroyed_stream_does_its_work_all_the_same() -> None:
    stream, event, order = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 0), []
    note(stream, order, "done")
    call("cuEventRecord", event, stream)
    call("cuStreamDestroy", stream)
    assert order == []
    call("cuEventSynchronize", event)
    assert order == ["done"]


def test_queries_come_to_an_end() -> None:
    stream, event = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 0)
    for _ in range(3):
        note(stream, [], "")
    call("cuEventRecord", event, stream)
    with refuses("NOT_READY"):
        call("cuStreamQuery", stream)
    with refuses("NOT_READY"):
        call("cuEventQuery", event)
    for _ in range(2):
        with refuses("NOT_READY"):
            call("cuEventQuery", event)
    call("cuEventQuery", event)
    call("cuStreamQuery", stream)


def test_times_need_two_recorded_events_that_keep_time() -> None:
    start, end, silent = call("cuEventCreate", 0), call("cuEventCreate", 0), call("cuEventCreate", 2)
    with refuses("INVALID_HANDLE"):
        call("cuEventElapsedTime", start, end)
    for event in (start, silent, end):
        call("cuEventRecord", event, 0)
    with refuses("NOT_READY"):
        call("cuEventElapsedTime", start, end)
    call("cuEventSynchronize", end)
    assert call("cuEventElapsedTime", start, end) >= 0
    with refuses("INVALID_HANDLE"):
        call("cuEventElapsedTime", start, silent)


def test_a_host_function_calls_nothing_of_the_driver() -> None:
    answers: list[Any] = []
    note(0, answers, lambda: cu.cuMemAlloc(4)[0].name)
    call("cuStreamSynchronize", 0)
    assert answers == ["CUDA_ERROR_NOT_PERMITTED"]


def test_other_threads_go_on_while_a_host_function_runs() -> None:
    context, sizes = call("cuCtxGetCurrent"), []

    def other() -> int:
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc", 1024)
        return int(call("cuMemGetInfo")[1])

    note(0, sizes, lambda: in_thread(other))
    call("cuStreamSynchronize", 0)
    assert sizes[0] > 0


def test_failed_work_is_seen_by_all_that_follows() -> None:
    stream, order, address = call("cuStreamCreate", 0), [], call("cuMemAlloc", 4)
    call("cuMemsetD32Async", address, 0, 1, stream)
    note(stream, order, "after")
    call("cuMemFree", address)
    for attempt in (("cuStreamSynchronize", stream), ("cuEventCreate", 0), ("cuCtxSynchronize",)):
        with refuses("ILLEGAL_ADDRESS"):
            call(*attempt)
    assert order == []  # "the function will not be called in the event of an error in the CUDA context"
    call("cuCtxGetDevice")
    assert len(misuse()) == 1


def test_priorities_are_clamped() -> None:
    assert call("cuCtxGetStreamPriorityRange") == (0, -5)
    assert call("cuStreamGetPriority", call("cuStreamCreateWithPriority", 1, -100)) == -5
    assert np.array(call("cuStreamGetFlags", call("cuStreamCreate", 1))) == 1
