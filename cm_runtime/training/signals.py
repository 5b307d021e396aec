"""Ctrl-C and kill as a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once a signal came; a second signal ends the process as usual."""
    stop = False
    handlers: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True
        restore()

    with suppress(ValueError):  # not the main thread: signals are somebody else's
        for kind in (signal.SIGINT, signal.SIGTERM):
            handlers[kind] = signal.signal(kind, request_stop)
    try:
        yield lambda: stop
    finally:
        restore()
