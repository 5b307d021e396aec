"""Processes and their machine: cores, the processor, git, and Python child processes."""

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
GIT_PATIENCE = 60.0  # seconds


def cores(proc: Path = PROC, system: Path = SYS) -> int:
    """Processors that this process may use: those of its affinity, or fewer where a container's quota allows fewer.

    Args:
        proc: The /proc to read.
        system: The /sys to read.

    Returns:
        At least 1; a quota of 1.5 processors is 2.
    """
    limits = (math.ceil(quota) for quota in quotas(proc, system))
    return max(1, min([len(os.sched_getaffinity(0)), *limits]))


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


def quotas(proc: Path = PROC, system: Path = SYS) -> Iterator[float]:
    """The quota of each control group that this process is in, in processors; of version 2, and of version 1."""
    for is_first, folder in control_groups("cpu", proc, system):
        with suppress(OSError, ValueError):
            if is_first:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0 and int(period) > 0:  # "max", and -1, are none
                yield int(quota) / int(period)


def control_groups(controller: str, proc: Path = PROC, system: Path = SYS) -> Iterator[tuple[bool, Path]]:
    """The folders of this process's control groups and of the groups around them, each with True for version 1."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        groups = ["0::/"]
    for group in groups:
        _, kinds, name = group.split(":", 2)
        if kinds and controller not in kinds.split(","):
            continue
        tops = [system / "fs/cgroup" / kind for kind in ((controller, kinds) if kinds else ("", "unified"))]
        inner = Path(name.lstrip("/"))
        for folder in (top / each for top in tops for each in (inner, *inner.parents)):  # a parent's limit binds, too
            yield bool(kinds), folder


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


def processor(proc: Path = PROC) -> str:
    """Name of the processor; Arm's have numbers instead: "implementer 0x41, part 0xd0c"."""
    records = cpuinfo(proc)
    names = [core.get("model name", "") for core in records]
    arm = [(core.get("CPU implementer"), core.get("CPU part")) for core in records if "CPU part" in core]
    names += [f"implementer {implementer}, part {part}" for implementer, part in arm]
    return "; ".join(dict.fromkeys(filter(None, names))) or platform.processor() or "unknown"


def cpuinfo(proc: Path = PROC) -> list[dict[str, str]]:
    """A record of /proc/cpuinfo for each core; at least one, if empty."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        text = ""
    pairs = [[line.partition(":") for line in block.splitlines()] for block in text.split("\n\n")]
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs]


def git(folder: Path, *words: str) -> str | None:
    """The output of a git command in ``folder``; None where it fails, or there is no git."""
    try:
        child = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=GIT_PATIENCE)
    except (OSError, subprocess.SubprocessError, ValueError):  # no git; it hangs; a name with a NUL
        return None
    return child.stdout.strip() if child.returncode == 0 else None


def commit(root: Path, *parts: str) -> str:
    """The commit of a checkout whose top is ``root``, with "+" behind it where ``parts`` of it differ; else ""."""
    top = git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return ""
    changes = git(root, "status", "--porcelain", "--", *parts)
    return f"{git(root, 'rev-parse', 'HEAD')}{'+' if changes else ''}"
