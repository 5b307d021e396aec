"""``cm-runtime --untrusted``: a command in a child process with bounds, for files that nobody vouches for."""

from __future__ import annotations

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
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        status = child.wait(seconds)
    except subprocess.TimeoutExpired:
        raise EngineError(f"the command was ended after {seconds:g} s, its --time-limit") from None
    finally:
        _signal(child, signal.SIGKILL)  # what it started, too
        child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if status == -signal.SIGINT:
        return 130
    if status < 0:
        raise EngineError(
            f"the command was ended by {_name(-status)}; a damaged or hostile file does that to an engine"
        )
    return status


def _restrict(limit: int) -> None:
    """Bounds of the process that is about to become the command."""
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
