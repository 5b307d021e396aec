"""Signals that ask a command to end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

ENDING = signal.SIGTERM, signal.SIGHUP
WORDS: dict[object, str] = {128 + signal.SIGTERM: "terminated", 128 + signal.SIGHUP: "the terminal has gone"}


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, with all that is to be cleaned up; exit status 128 + signal.

    A second one ends the process at once. Signals that are ignored, as under nohup, stay so.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    handled = []
    try:
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                handled.append(number)
    except ValueError:  # not the main thread: signals are somebody else's
        pass
    try:
        yield
    except SystemExit as leaving:
        if leaving.code in WORDS and type(leaving.code) is int:  # of a child that has said so, it is another
            typer.echo(WORDS[leaving.code], err=True)
        raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
