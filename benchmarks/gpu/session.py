"""Parts in their order within a budget: each in a child process that ends at its limit, and what it found stays."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gpu.findings import Findings

Clock = Callable[[], float]
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Part:
    """A child process's work.

    limit: seconds of one call; least: seconds below which no finding is begun; needs: names of `survey`; findings:
    functions of the seconds left.
    """

    name: str
    limit: float
    least: float
    needs: tuple[str, ...]
    findings: Mapping[str, Callable[[float], dict[str, Any]]]


def conduct(
    parts: Sequence[Part], findings: Findings, budget: float, start: Callable[[Part, float], int | None], clock: Clock
) -> None:
    """Try what is pending of every part, in order, for ``budget`` seconds, and again while that finds something.

    start: runs `work` in a child process for so many seconds; returns its status, or None where it was stopped. A
    child ends at its first failure, since an error of CUDA stays in its process; another goes on behind it.
    """
    end = clock() + budget
    remaining: list[list[str]] = []
    while remaining != (remaining := [findings.pending(part.findings) for part in parts]):
        for part in parts:
            _conduct_part(part, findings, min(end, clock() + part.limit), start, clock)
    for part in parts:
        if todo := findings.pending(part.findings):
            findings.skip(part.name, f"{len(todo)} of {len(part.findings)} findings are left for the next call")


def _conduct_part(
    part: Part, findings: Findings, end: float, start: Callable[[Part, float], int | None], clock: Clock
) -> None:
    while (todo := findings.pending(part.findings)) and (left := end - clock()) >= part.least:
        status = start(part, left)
        findings.read()
        is_idle = findings.pending(part.findings) == todo
        if status and is_idle:
            findings.start(todo[0])  # the process ended before it did that
        if status:
            findings.explain(part.findings, f"the process ended with status {status}")
        elif is_idle:
            return


def work(part: Part, findings: Findings, seconds: float, clock: Clock = time.monotonic) -> int:
    """Try what is pending of a part; 1 at the first failure."""
    end = clock() + seconds
    for name in findings.pending(part.findings):
        began = clock()
        if end - began < part.least:
            break
        findings.start(name)
        try:
            result = part.findings[name](end - began)
        except subprocess.TimeoutExpired:
            break  # it stays as one that was cut short
        except Exception as error:
            findings.fail(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            return 1
        findings.finish(name, result, clock() - began)
    return 0


def follow_parent() -> None:
    """End this process when its parent does: nothing goes on alone, on a GPU that the next call measures on."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_child(part: Part, seconds: float, words: Sequence[str]) -> int | None:
    """Run this program again for one part, for ``seconds`` at most; nothing that it started stays."""
    command = [sys.executable, *words, "--child", part.name, str(seconds)]
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=follow_parent)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a compiler's workers too
        child.wait()
