"""``cm-runtime --untrusted``: a command in a child process with bounds, for files that nobody vouches for."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

from cm_runtime.errors import EngineError

GIB = 1 << 30
MOST_MEMORY = 8.0  # GiB by default, or half of the machine's
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PATIENCE = 5.0  # seconds in which a command whose time is over may clean up
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Spoken(int):
    """Exit status of a child that has said why itself."""


def run(words: list[str], memory: float | None, seconds: float) -> int:
    """Run ``cm-runtime`` with ``words`` in a child process, on the CPU, whose output is its own.

    Args:
        words: The command line without ``--untrusted``.
        memory: GiB of address space that each of its processes may have; None is 8, or half of the machine's memory.
        seconds: Time after which it is ended, with all that it started.

    Returns:
        Its exit status.

    Raises:
        EngineError: It was ended by a signal, or by its time.
    """
    limit = int((memory or _default_memory()) * GIB)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "MALLOC_ARENA_MAX": "2"}
    child = subprocess.Popen(
        [sys.executable, "-m", "cm_runtime", *words],
        env=environment,
        process_group=0,
        preexec_fn=lambda: _restrict(limit),  # there are no threads here
    )

    def forward(number: int, _: FrameType | None) -> None:
        _signal(child, number)

    def stop(number: int, _: FrameType | None) -> None:
        _signal(child, signal.SIGSTOP)  # Ctrl-Z: its time goes on
        os.kill(os.getpid(), signal.SIGSTOP)
        _signal(child, signal.SIGCONT)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, stop)
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE)
        raise EngineError(f"the command was ended after {seconds:g} s, its --time-limit") from None
    finally:
        _signal(child, signal.SIGKILL)  # what it started, too
        child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if status in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGQUIT):
        return 128 - status
    if status < 0:
        raise EngineError(
            f"the command was ended by {_name(-status)}; a damaged or hostile file does that to an engine"
        )
    return Spoken(status)


def _restrict(limit: int) -> None:
    """Bounds of the process that is about to become the command. It ends with its parent, whatever ends that."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _default_memory() -> float:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return min(MOST_MEMORY, whole / 2)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    """To the child and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
