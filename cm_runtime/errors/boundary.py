"""The boundary of the program: whatever is raised inside becomes one line on standard error and an exit status.

It imports nothing but the standard library and `errors`, so that it stands before anything slow is imported.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from cm_runtime.errors import CmRuntimeError, Interrupted, one_line
from cm_runtime.errors.reasons import system_reason

INTERRUPTED = 130
_ctrl_c = {"arrived": False}


def guard(run: Callable[[], object], debug: bool) -> None:
    """Run a program's body, and end the program by one line where it raises.

    Warnings of Python and of packages are shown with ``debug`` only. Blocks may be nested.

    Args:
        run: The body. It may raise SystemExit.
        debug: True to let exceptions through, for Python's traceback.

    Raises:
        SystemExit: 1 for an error, 130 for Ctrl-C, or what ``run`` raised.
    """
    with _interrupts(), _warnings(debug):
        try:
            try:
                run()
            except SystemExit:
                _flush()
                raise
            _flush()
        except SystemExit:
            raise
        except KeyboardInterrupt:
            _leave("interrupted", INTERRUPTED)
        except Interrupted as stopped:
            # all workers of a training stop at the same step, and rank 0 reports it
            _leave(str(stopped) if os.environ.get("RANK", "0") == "0" else "", INTERRUPTED)
        except Exception as error:
            if _ctrl_c["arrived"]:  # a package that was being imported made another exception of it
                _leave("interrupted", INTERRUPTED)
            _let_output_go()
            if isinstance(error, BrokenPipeError):
                _leave("", 1)
            if debug:
                raise
            _leave(f"error: {_explain(error)}", 1)


def _flush() -> None:
    """Write out what is printed while a full disk can still be reported."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _explain(error: Exception) -> str:
    """The error in one line."""
    text = one_line(str(error))
    if isinstance(error, CmRuntimeError):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory for this; lower the micro-batch or the batch"
    if isinstance(error, OSError):
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else system_reason(error)
        where = "standard output" if _is_of_printing(error) else error.filename
        return one_line(reason if where is None else f"{_name(where)}: {reason}")
    if isinstance(error, RecursionError):
        return f"something is nested too deeply ({text}); --debug shows where"
    if isinstance(error, ImportError):
        return f"a package cannot be imported: {text}; --debug shows where"
    return f"unexpected error: {type(error).__name__}: {text}; this is a fault of cm-runtime: --debug shows where"


def _is_of_printing(error: OSError) -> bool:
    """True if a line that prints raised it; the error itself does not know its stream."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    return (error.filename is None and place.partition(".")[0] in ("typer", "click", "rich")) or place == __name__


def _name(path: Any) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


def _leave(line: str, status: int) -> NoReturn:
    if line and sys.stderr is not None:
        with suppress(OSError, ValueError):  # it is closed, or its disk is full as well
            print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def _let_output_go() -> None:
    """Discard what standard output cannot take, which Python would try again at its end."""
    try:
        _flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _interrupt(number: int, frame: object) -> None:
    _ctrl_c["arrived"] = True
    raise KeyboardInterrupt


@contextmanager
def _interrupts() -> Iterator[None]:
    """Remember that Ctrl-C came: what it raises within an import may arrive as another exception."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # an outer block's, or a shell ignores it
        yield
        return
    _ctrl_c["arrived"] = False
    try:
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _warnings(debug: bool) -> Iterator[None]:
    """Keep warnings away from the user's terminal, by whatever filters packages set meanwhile."""
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = lambda *_, **__: None
        yield
