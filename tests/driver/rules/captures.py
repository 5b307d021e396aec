"""Stream capture. Manual: Stream Management; programming guide: Prohibited and Unhandled Operations, Invalidation."""

from collections.abc import Callable
from typing import Any

import pytest
from cuda.bindings import driver as cu
from driver.api import GLOBAL, NON_BLOCKING, RELAXED, THREAD_LOCAL, call, in_thread, refuses
from driver.rules.streams import note

MODES = {"global": GLOBAL, "thread-local": THREAD_LOCAL, "relaxed": RELAXED}
UNSAFE: dict[str, Callable[[], Any]] = {
    "alloc": lambda: call("cuMemAlloc", 4),
    "pin": lambda: call("cuMemHostAlloc", 4, 0),
    "query": lambda: call("cuEventQuery", call("cuEventCreate", 0)),
    "synchronize": lambda: call("cuStreamSynchronize", call("cuStreamCreate", NON_BLOCKING)),
}


def status(stream: Any) -> int:
    return int(call("cuStreamIsCapturing", stream))


def begin(mode: Any = THREAD_LOCAL, flags: int = NON_BLOCKING) -> Any:
    stream = call("cuStreamCreate", flags)
    call("cuStreamBeginCapture", stream, mode)
    return stream


def ends_invalidated(stream: Any) -> None:
    assert status(stream) == 2
    with refuses("STREAM_CAPTURE_INVALIDATED"):  # "further use of any streams being captured [...] is invalid"
        note(stream, [], "")
    with refuses("STREAM_CAPTURE_INVALIDATED"):
        call("cuStreamEndCapture", stream)
    assert status(stream) == 0
    note(stream, [], "")  # "This call will take the associated streams out of capture mode"
    call("cuStreamSynchronize", stream)


def test_what_is_captured_runs_when_the_graph_is_launched() -> None:
    stream, order = begin(), []
    note(stream, order, "a"), note(stream, order, "b")
    assert status(stream) == 1
    graph = call("cuStreamEndCapture", stream)
    call("cuStreamSynchronize", stream)
    assert (order, status(stream)) == ([], 0)
    executable = call("cuGraphInstantiate", graph, 0)
    call("cuGraphDestroy", graph)
    for _ in range(2):
        call("cuGraphLaunch", executable, stream)
    call("cuStreamSynchronize", stream)
    assert order == ["a", "b", "a", "b"]


@pytest.mark.parametrize("place", ["same thread", "another thread"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_calls(name: str, mode: str, place: str) -> None:
    """cuThreadExchangeStreamCaptureMode says which threads "are prohibited from potentially unsafe API calls"."""
    stream, context = begin(MODES[mode]), call("cuCtxGetCurrent")
    is_refused = mode == "global" or (mode == "thread-local" and place == "same thread")

    def attempt() -> None:
        call("cuCtxSetCurrent", context)
        if is_refused:
            with refuses("STREAM_CAPTURE_UNSUPPORTED"):
                UNSAFE[name]()
        else:
            UNSAFE[name]()

    attempt() if place == "same thread" else in_thread(attempt)
    if is_refused:
        ends_invalidated(stream)
    else:
        assert int(call("cuStreamEndCapture", stream))


def test_a_thread_may_allow_itself_what_is_unsafe() -> None:
    stream = begin(GLOBAL)
    assert call("cuThreadExchangeStreamCaptureMode", RELAXED) == GLOBAL
    call("cuMemAlloc", 4)
    assert call("cuThreadExchangeStreamCaptureMode", GLOBAL) == RELAXED
    call("cuStreamEndCapture", stream)


@pytest.mark.parametrize("flags", [0, NON_BLOCKING])
def test_the_legacy_stream_beside_a_capture(flags: int) -> None:
    """ "When any stream in the same context is being captured, and it was not created with cudaStreamNonBlocking, any
    attempted use of the legacy stream is invalid." """
    address, context = call("cuMemAlloc", 4), call("cuCtxGetCurrent")
    stream = begin(THREAD_LOCAL, flags)

    def another() -> None:
        call("cuCtxSetCurrent", context)
        call("cuMemsetD32Async", address, 0, 1, 0)

    if flags:
        in_thread(another)
        call("cuStreamEndCapture", stream)
        return
    with refuses("STREAM_CAPTURE_IMPLICIT"):
        call("cuStreamIsCapturing", 0)  # "The blocking stream capture is not invalidated."
    assert status(stream) == 1
    with refuses("STREAM_CAPTURE_IMPLICIT"):
        in_thread(another)
    ends_invalidated(stream)


def test_the_legacy_stream_is_not_captured() -> None:
    with refuses("STREAM_CAPTURE_UNSUPPORTED"):
        call("cuStreamBeginCapture", 0, RELAXED)


@pytest.mark.parametrize("name", ["cuStreamSynchronize", "cuStreamQuery", "cuCtxSynchronize"])
def test_a_capture_cannot_be_waited_for(name: str) -> None:
    """Relaxed as it may be: "invalid to synchronize or query" the stream, or what encompasses it."""
    stream = begin(RELAXED)
    with refuses("STREAM_CAPTURE_UNSUPPORTED"):
        call(name, *([] if name == "cuCtxSynchronize" else [stream]))
    ends_invalidated(stream)


def test_nor_an_event_of_it() -> None:
    stream, event = begin(RELAXED), call("cuEventCreate", 2)
    call("cuEventRecord", event, stream)
    with refuses("CAPTURED_EVENT"):
        call("cuEventQuery", event)
    ends_invalidated(stream)


def test_a_capture_waits_for_nothing_outside_of_it() -> None:
    other, event = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 2)
    call("cuEventRecord", event, other)
    stream = begin()
    with refuses("STREAM_CAPTURE_ISOLATION"):
        call("cuStreamWaitEvent", stream, event, 0)
    ends_invalidated(stream)


def test_but_for_an_external_event() -> None:
    other, event, order = call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 2), []
    stream = begin()
    call("cuStreamWaitEvent", stream, event, 1)
    note(stream, order, "graph")
    executable = call("cuGraphInstantiate", call("cuStreamEndCapture", stream), 0)
    note(other, order, "other")
    call("cuEventRecord", event, other)
    call("cuGraphLaunch", executable, stream)
    call("cuStreamSynchronize", stream)
    assert order == ["other", "graph"]


def test_fork_and_join_by_events() -> None:
    stream, side, order = begin(), call("cuStreamCreate", NON_BLOCKING), []
    fork, join = call("cuEventCreate", 2), call("cuEventCreate", 2)
    note(stream, order, "before")
    call("cuEventRecord", fork, stream)
    call("cuStreamWaitEvent", side, fork, 0)
    assert status(side) == 1
    note(stream, order, "main"), note(side, order, "side")
    call("cuEventRecord", join, side)
    call("cuStreamWaitEvent", stream, join, 0)
    note(stream, order, "after")
    executable = call("cuGraphInstantiate", call("cuStreamEndCapture", stream), 0)
    assert status(side) == 0
    call("cuGraphLaunch", executable, stream)
    call("cuStreamSynchronize", stream)
    assert order == ["before", "side", "main", "after"]  # of branches the newest first


def test_a_fork_has_to_be_joined() -> None:
    stream, side, event = begin(), call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 2)
    call("cuEventRecord", event, stream)
    call("cuStreamWaitEvent", side, event, 0)
    note(side, [], "")
    with refuses("STREAM_CAPTURE_UNJOINED"):
        call("cuStreamEndCapture", stream)
    assert (status(stream), status(side)) == (0, 0)


def test_captures_do_not_merge() -> None:
    first, second, event = begin(), begin(), call("cuEventCreate", 2)
    call("cuEventRecord", event, first)
    with refuses("STREAM_CAPTURE_MERGE"):
        call("cuStreamWaitEvent", second, event, 0)
    for stream in (first, second):
        with refuses("STREAM_CAPTURE_INVALIDATED"):
            call("cuStreamEndCapture", stream)


def test_a_capture_ends_in_its_stream_and_thread() -> None:
    stream, side, event = begin(), call("cuStreamCreate", NON_BLOCKING), call("cuEventCreate", 2)
    context = call("cuCtxGetCurrent")

    def elsewhere() -> None:
        call("cuCtxSetCurrent", context)
        with refuses("STREAM_CAPTURE_WRONG_THREAD"):
            call("cuStreamEndCapture", stream)

    in_thread(elsewhere)
    assert int(call("cuStreamEndCapture", stream))
    call("cuStreamBeginCapture", stream, THREAD_LOCAL)
    with refuses("ILLEGAL_STATE"):
        call("cuStreamBeginCapture", stream, THREAD_LOCAL)
    call("cuEventRecord", event, stream)
    call("cuStreamWaitEvent", side, event, 0)
    with refuses("STREAM_CAPTURE_UNMATCHED"):
        call("cuStreamEndCapture", side)
    ends_invalidated(stream)
    with refuses("ILLEGAL_STATE"):
        call("cuStreamEndCapture", stream)


def test_a_relaxed_capture_ends_in_any_thread() -> None:
    stream, context = begin(RELAXED), call("cuCtxGetCurrent")

    def elsewhere() -> int:
        call("cuCtxSetCurrent", context)
        return int(call("cuStreamEndCapture", stream))

    assert in_thread(elsewhere)


def test_an_event_of_a_capture_that_has_ended_orders_nothing() -> None:
    stream, event = begin(), call("cuEventCreate", 2)
    call("cuEventRecord", event, stream)
    call("cuStreamEndCapture", stream)
    with refuses("CAPTURED_EVENT"):
        call("cuStreamWaitEvent", call("cuStreamCreate", NON_BLOCKING), event, 0)
    call("cuEventRecord", event, stream)
    call("cuEventSynchronize", event)


def test_what_is_safe_in_any_capture() -> None:
    stream = begin(GLOBAL)
    call("cuStreamDestroy", call("cuStreamCreate", 0))
    call("cuEventDestroy", call("cuEventCreate", 0))
    call("cuMemGetInfo"), call("cuCtxSetCurrent", call("cuCtxGetCurrent"))
    assert cu.cuStreamIsCapturing(stream)[1] == 1
    call("cuStreamEndCapture", stream)
