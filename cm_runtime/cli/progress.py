"""Progress on standard error: a bar on a terminal, one line that updates in a notebook, plain lines elsewhere.

Off a terminal a command is silent for ten seconds, unless it will take longer: then it says so, and prints a line every
half minute and at each phase. ``--quiet`` silences all of it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from cm_runtime.sampling import Batch

PATIENCE = 1.0  # seconds before a bar appears, or an estimate is made
LONG = 10.0  # seconds that a command may be silent off a terminal
EVERY = 30.0  # seconds between two lines there
REDRAWN = 0.5  # seconds between two states of a notebook's line

T = TypeVar("T")
Place = Literal["terminal", "notebook", "lines", "nowhere"]


@dataclass
class Command:
    """The command that runs. last: when it printed a line; clock: seconds."""

    quiet: bool = False
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    last: float | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()

    def is_due(self, every: float = EVERY) -> bool:
        """True when standard error has been silent for ``every`` seconds, or for LONG from the beginning."""
        return self.clock() >= (self.began + LONG if self.last is None else self.last + every)


_command = Command()


def begin(*, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
    """Start the time of a command."""
    global _command
    _command = Command(quiet, clock)
    logging.getLogger("cm_runtime.progress").setLevel(logging.ERROR if quiet else logging.NOTSET)  # auto's measuring


def now() -> float:
    """Seconds on the command's clock."""
    return _command.clock()


def is_quiet() -> bool:
    """True under ``--quiet``."""
    return _command.quiet


def is_due(every: float = EVERY) -> bool:
    """True when standard error has been silent for ``every`` seconds, or for LONG from the command's beginning."""
    return _command.is_due(every)


def place() -> Place:
    """The place that standard error goes to; a setting that forces colours makes no terminal of a file."""
    if _command.quiet or sys.stderr is None:
        return "nowhere"
    is_kernel = type(sys.stderr).__module__.partition(".")[0] == "ipykernel"
    if is_kernel or (sys.stderr.isatty() and "JPY_PARENT_PID" in os.environ):  # a notebook's own, or its ! and %%bash
        return "notebook"
    return "terminal" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "lines"


def say(line: str) -> None:
    """Print one line, unless ``--quiet`` was given."""
    if place() != "nowhere":
        _command.last = _command.clock()
        with suppress(OSError, ValueError):  # closed, or its disk is full
            print(line, file=sys.stderr, flush=True)


def phase(line: str) -> None:
    """Print what begins now, off a terminal, in a command that takes long."""
    if place() == "lines" and (_command.last is not None or _command.is_due()):
        say(line)


def tick(line: str) -> None:
    """Print where the work is, off a terminal, if that is due."""
    if place() == "lines" and _command.is_due():
        say(line)


def track(parts: Iterator[Batch], total: int, unit: str, jobs: int = 1) -> Iterator[Batch]:
    """``parts`` as they come, counted in images. jobs: how many such jobs are still to be done, this one included."""
    return count(parts, total, unit, lambda part: len(part.index), jobs)


def count(parts: Iterator[T], total: int, unit: str, size: Callable[[T], int], jobs: int = 1) -> Iterator[T]:
    """``parts`` as they come, each counted by its size."""
    where = place()
    if where == "terminal":
        yield from _on_terminal(parts, total, unit, size)
        return
    clock, began, images, first, since = _command.clock, _command.clock(), 0, 0, 0.0
    line = Line() if where == "notebook" else None
    if jobs == 1:
        phase(f"{total} {unit}")
    try:
        for part in parts:
            yield part
            images += size(part)
            seconds = clock() - began
            if not first:  # which may have waited for an engine or a cluster to start
                first, since = images, clock()
            rate = (images - first) / max(clock() - since, 1e-9) if images > first else images / max(seconds, 1e-9)
            whole = total / rate * jobs
            is_known = images > first or seconds > LONG
            if where == "lines" and _command.last is None and is_known and seconds > PATIENCE and whole > LONG:
                say(f"{f'{jobs} x ' if jobs > 1 else ''}{total} {unit}, about {duration(whole)}")
                continue
            text = f"{unit} {images}/{total}, {rate:.3g}/s, {duration((total - images) / rate)} left"
            if line is None:
                tick(text)
            elif seconds > PATIENCE:
                line.show(text)
    finally:
        if line is not None:
            line.clear()


def _on_terminal(parts: Iterator[T], total: int, unit: str, size: Callable[[T], int]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
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
def spinner(what: str, *, has_bar: bool = False, over: Any = None) -> Iterator[None]:
    """A sign of life while ``what`` is computed in one go.

    has_bar: on a terminal the work draws its own. over: a threading.Event; tests have one whose time is not real.
    """
    where = place()
    if where == "terminal" and has_bar:
        yield
        return
    if where in ("terminal", "notebook"):
        from rich.console import Console

        if where == "notebook":
            line = Line()
            line.show(what)
            try:
                yield
            finally:
                line.clear()
        else:
            with Console(stderr=True).status(what):
                yield
        return
    phase(what)
    over = threading.Event() if over is None else over
    thread = threading.Thread(target=_wait, args=(what, over), daemon=True)
    if where == "lines":
        with suppress(RuntimeError):  # no thread can be started here, so there is no sign
            thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()


def _wait(what: str, over: Any) -> None:
    began = _command.clock()
    while not over.wait(1.0):
        seconds = _command.clock() - began
        tick(what if _command.last is None else f"{what}: {duration(seconds)} so far")


class Line:
    """The one line of a notebook's cell that updates."""

    def __init__(self) -> None:
        self._width, self._shown = 0, -REDRAWN

    def show(self, text: str) -> None:
        """Replace what the line shows; not more often than an eye can follow."""
        now = _command.clock()
        if now - self._shown < REDRAWN:
            return
        self._shown = now
        self._write(f"\r{text:{self._width}}")
        self._width = len(text)

    def clear(self) -> None:
        """Leave the line empty, and the cursor at its beginning."""
        if self._width:
            self._write(f"\r{'':{self._width}}\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 11 min, 2.5 h, 3 days."""
    for size, unit, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 48)):
        if seconds < most * size:
            number = seconds / size
            return f"{number:.0f} {unit}" if number >= 10 or unit != "h" else f"{number:.1f} {unit}"
    return f"{seconds / 86400:.0f} days"
