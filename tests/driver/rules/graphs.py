"""Graphs. Manual: Graph Management."""

from typing import Any

import numpy as np
import pytest
from driver.api import NON_BLOCKING, THREAD_LOCAL, call, misuse, refuses
from driver.rules.memory import pinned, read
from driver.rules.streams import note


def capture(stream: Any, *calls: tuple[Any, ...]) -> Any:
    call("cuStreamBeginCapture", stream, THREAD_LOCAL)
    for each in calls:
        call(*each)
    return call("cuStreamEndCapture", stream)


def test_launches_of_one_graph_are_in_order_whatever_their_streams() -> None:
    first, second, order = call("cuStreamCreate", NON_BLOCKING), call("cuStreamCreate", NON_BLOCKING), []
    call("cuStreamBeginCapture", first, THREAD_LOCAL)
    note(first, order, lambda: len(order))
    executable = call("cuGraphInstantiate", call("cuStreamEndCapture", first), 0)
    note(first, order, "first")
    call("cuGraphLaunch", executable, first)
    call("cuGraphLaunch", executable, second)
    call("cuStreamSynchronize", second)
    assert order == ["first", 1, 2]


def test_a_graph_is_one_operation_of_its_stream() -> None:
    stream, address = call("cuStreamCreate", NON_BLOCKING), call("cuMemAlloc", 16)
    fill = ("cuMemsetD32Async", address, 0, 4, stream)
    graph = capture(stream, fill)
    executable = call("cuGraphInstantiate", graph, 0)
    assert call("cuGraphGetNodes", graph, 0)[1] == 1
    call("cuGraphDestroy", graph)
    call("cuGraphUpload", executable, stream)
    call("cuGraphLaunch", executable, stream)
    call("cuGraphExecDestroy", executable)  # after it is launched
    assert (read(address, 4, stream) == 0).all()
    for name in ("cuGraphDestroy", "cuGraphExecDestroy"):
        with refuses("INVALID_HANDLE"):
            call(name, graph if name == "cuGraphDestroy" else executable)
    assert ["is destroyed" in line for line in misuse()] == [True, True]


def test_memory_is_read_when_the_graph_runs() -> None:
    stream, address, source = call("cuStreamCreate", NON_BLOCKING), call("cuMemAlloc", 12), pinned(3)
    graph = capture(stream, ("cuMemcpyHtoDAsync", address, source.ctypes.data, 12, stream))
    executable = call("cuGraphInstantiate", graph, 0)
    for value in (1, 2):
        source[:] = value
        call("cuGraphLaunch", executable, stream)
        assert (read(address, 3, stream) == value).all()


def test_memory_that_a_graph_uses_has_to_stay() -> None:
    stream, address = call("cuStreamCreate", NON_BLOCKING), call("cuMemAlloc", 12)
    executable = call("cuGraphInstantiate", capture(stream, ("cuMemsetD32Async", address, 0, 3, stream)), 0)
    call("cuMemFree", address)
    call("cuGraphLaunch", executable, stream)
    with refuses("ILLEGAL_ADDRESS"):
        call("cuStreamSynchronize", stream)
    assert "use after free" in misuse()[0]


@pytest.mark.parametrize("count", [1, 2])
def test_an_update_needs_the_same_nodes(count: int) -> None:
    stream = call("cuStreamCreate", NON_BLOCKING)
    old, new = call("cuMemAlloc", 4), call("cuMemAlloc", 4)
    executable = call("cuGraphInstantiate", capture(stream, ("cuMemsetD32Async", old, 0, 1, stream)), 0)
    graph = capture(stream, *[("cuMemsetD32Async", new, 0, 1, stream)] * count)
    if count > 1:
        with refuses("GRAPH_EXEC_UPDATE_FAILURE"):
            call("cuGraphExecUpdate", executable, graph)
        return
    call("cuGraphExecUpdate", executable, graph)
    call("cuGraphLaunch", executable, stream)
    assert read(new, 1, stream) == 0 and np.isnan(read(old, 1, stream))


def test_a_graph_can_be_captured_into_another() -> None:
    stream, address = call("cuStreamCreate", NON_BLOCKING), call("cuMemAlloc", 4)
    inner = call("cuGraphInstantiate", capture(stream, ("cuMemsetD32Async", address, 0, 1, stream)), 0)
    outer = call("cuGraphInstantiate", capture(stream, ("cuGraphLaunch", inner, stream)), 0)
    call("cuGraphLaunch", outer, stream)
    assert read(address, 1, stream) == 0
