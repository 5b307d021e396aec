"""A progress bar for what takes over a second, silent when standard error is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cm_runtime.sampling import Batch

PATIENCE = 1.0  # seconds before a bar appears


T = TypeVar("T")


def tracked(parts: Iterator[Batch], total: int, unit: str) -> Iterator[Batch]:
    """``parts`` as they come, counted in images."""
    return counted(parts, total, unit, lambda part: len(part.index))


def counted(parts: Iterator[T], total: int, unit: str, size: Callable[[T], int]) -> Iterator[T]:
    """``parts`` as they come, each counted by its size."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(unit, total=total)
    began = time.perf_counter()
    try:
        for part in parts:
            yield part
            bar.update(task, advance=size(part))
            if not bar.live.is_started and time.perf_counter() - began > PATIENCE:
                bar.start()
    finally:
        bar.stop()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life while ``what`` is computed in one go."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
