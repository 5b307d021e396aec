"""Prefetching: an iterator that a thread runs ahead of its reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")
END: Final = object()


def prefetch(parts: Iterator[T], most: int) -> Generator[T, None, None]:
    """Yield the same parts in the same order, up to ``most`` of them made ahead of the reader.

    An error of ``parts`` is raised in its place. A reader that stops early, by Ctrl-C too, waits for the part
    that is being made, and no other is begun.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        futures = deque(thread.submit(next, parts, END) for _ in range(most))
        while (part := futures.popleft().result()) is not END:
            futures.append(thread.submit(next, parts, END))
            yield part  # type: ignore[misc]
    finally:
        thread.shutdown(cancel_futures=True)
