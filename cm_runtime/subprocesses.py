"""Processes: the cores that this one may use, and Python child processes."""

from __future__ import annotations

import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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


def processor(proc: Path = PROC) -> str:
    """The processor's name as the kernel has it, or its architecture."""
    with suppress(OSError):
        for line in (proc / "cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


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


class PythonChild:
    """A Python child process, in which this package is importable, that reads and writes lines."""

    def __init__(self, words: Sequence[str], root: Path, environment: Mapping[str, str], **options: Any) -> None:
        """words: after `python -P`; root: of the package; environment: beside this process's; options: of Popen."""
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environment, "PYTHONPATH": path},
            **options,
        )

    @property
    def lines(self) -> IO[bytes]:
        """The child's standard output."""
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, line: str) -> None:
        """Write one line to the child. A child that has ended is reported by the end of its `lines`."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def end_input(self) -> None:
        """Close the child's standard input, which tells it to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def explain_exit(self) -> str:
        """Wait for the end; "was ended by SIGKILL; ...", or "ended with status 1: ..." with its last error line."""
        status = self.process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if status < 0:
            reason = "; was there too little memory?" if status == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-status).name}{reason}"
        return f"ended with status {status}" + (f": {last}" if last else "")

    def close(self) -> None:
        """Kill the child, whatever it is doing, and let its streams go."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
