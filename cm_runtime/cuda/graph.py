"""CUDA graphs: what a stream is given, captured once, launched again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cm_runtime.cuda.context import Context, Owned, wrap_errors
from cm_runtime.cuda.driver import DriverError


class Graph:
    """All that ``body`` puts in ``stream``, captured without being run. Raises EngineError where it cannot be captured.

    Every address that body used must stay as it is while the graph lives. The context must be this thread's.
    """

    def __init__(self, context: Context, stream: int, body: Callable[[], Any]) -> None:
        self._context, self._stream = context, stream
        driver = context.driver
        with COLLECTOR.pause():
            driver.begin_capture(stream)
            try:
                body()
            except BaseException:
                with suppress(DriverError):  # an invalid capture; the stream is usable again
                    driver.destroy_graph(driver.end_capture(stream))
                raise
            graph = driver.end_capture(stream)
        try:
            self._executable = Owned(context, driver.instantiate(graph), driver.destroy_executable)
        finally:
            driver.destroy_graph(graph)

    def launch(self) -> None:
        """Puts the whole graph in the stream."""
        with self._context.current(), wrap_errors("launching a graph"):
            self._context.driver.launch_graph(self._executable.handle, self._stream)


class Collector:
    """Python's garbage collector, which must free no memory of a GPU while a stream is captured: CUDA forbids it."""

    def __init__(self) -> None:
        self._lock, self._pauses, self._was_on = threading.Lock(), 0, True

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Collect nothing until the last block of this kind, of any thread, ends."""
        with self._lock:
            if not self._pauses:
                self._was_on = gc.isenabled()
                gc.disable()
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1
                if not self._pauses and self._was_on:
                    gc.enable()


COLLECTOR = Collector()
