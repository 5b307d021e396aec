"""Processes: the cores that this one may use, and why one of ours ended."""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PROC, SYS = Path("/proc"), Path("/sys")


def cores(proc: Path = PROC, system: Path = SYS) -> int:
    """Processors that this process may use: those of its affinity, or fewer where a container's quota allows fewer.

    Args:
        proc: The /proc to read.
        system: The /sys to read.

    Returns:
        At least 1; a quota of 1.5 processors is 2.
    """
    quotas = (math.ceil(quota) for quota in _quotas(proc, system))
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def engine_threads(threads: int) -> int:
    """Threads to ask an engine for: ``threads``, or for 0 as many as this process may use.

    Args:
        threads: As the user gave them; 0 is one per core.

    Returns:
        0, an engine's own default, where the process may use the whole machine. Engines take a thread for each physical
        core then, and know of neither affinities nor quotas.
    """
    allowed = cores()
    if threads or allowed >= (os.cpu_count() or 1):
        return threads
    return min(allowed, _physical_cores())


def _physical_cores(system: Path = SYS) -> int:
    """Physical cores under this process's affinity; processors where the system does not say."""
    mine = os.sched_getaffinity(0)
    with suppress(OSError):
        topology = [system / f"devices/system/cpu/cpu{number}/topology/thread_siblings_list" for number in mine]
        return len({path.read_text() for path in topology})
    return len(mine)


def _quotas(proc: Path, system: Path) -> Iterator[float]:
    """The quota of each control group that this process is in, in processors; of version 2, and of version 1."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, kinds, name = group.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        tops = [system / "fs/cgroup" / kind for kind in (("cpu", kinds) if kinds else ("", "unified"))]
        inner = Path(name.lstrip("/"))
        for folder in (top / each for top in tops for each in (inner, *inner.parents)):  # a parent's quota binds, too
            with suppress(OSError, ValueError):
                if kinds:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if int(quota) > 0 and int(period) > 0:  # "max", and -1, are none
                    yield int(quota) / int(period)


def epitaph(process: subprocess.Popen[Any], said: IO[bytes]) -> str:
    """How it ended, "was ended by SIGKILL; ..." or "ended with status 1: ...", with the last line it ``said``."""
    status = process.wait()
    said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status < 0:
        reason = "; was there too little memory?" if status == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-status).name}{reason}"
    return f"ended with status {status}" + (f": {last}" if last else "")
