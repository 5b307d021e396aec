"""Clocks, throttling and other load of the machine during a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from cm_runtime.bench.machine import ROOT, clocks, content
from cm_runtime.bench.nvidia import HARMLESS, number, nvidia_smi, reasons
from cm_runtime.bench.results import Conditions
from cm_runtime.subprocesses import cpuinfo

BETWEEN_LOOKS = 1.0


class Watch:
    """Conditions of the machine during a run: ``with Watch() as watch:``, and ``watch.conditions`` afterwards.

    The run calls `look` where nothing is timed; there is no thread. Clocks and temperatures are those at the looks, of
    all cores and GPUs, idle ones too. The shares are of all processors' time between start and stop. ``others`` is the
    busy time that neither ``pid`` nor its descendants used, those that run and those that were waited for; a daemon
    that left its parent counts as another.
    """

    conditions: Conditions

    def __init__(self, root: Path = ROOT, pid: int | None = None) -> None:
        self._root, self._pid = root, os.getpid() if pid is None else pid
        self.start()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin, or begin again."""
        self._clocks: list[float] = []
        self._gpu: list[list[str]] = []
        self._fields = [f"clocks_{word}_reasons.active" for word in ("event", "throttle")]  # the newer name first
        self._looked = float("-inf")
        self._began = time.monotonic()
        self._before = _ticks(self._root, self._pid), _throttles(self._root)

    def look(self) -> None:
        """Note the clocks, and nvidia-smi's answer, which takes part of a second; once a second at most."""
        if time.monotonic() - self._looked < BETWEEN_LOOKS:
            return
        mhz = [float(core["cpu MHz"]) for core in cpuinfo(self._root / "proc") if "cpu MHz" in core]
        self._clocks += clocks(self._root, "scaling_cur_freq") or mhz
        while self._fields and not (rows := nvidia_smi("gpu", "clocks.gr", "temperature.gpu", self._fields[0])):
            del self._fields[0]  # a name that this driver does not know, or no driver: not asked again
        if self._fields:
            self._gpu += rows
        self._looked = time.monotonic()

    def stop(self) -> Conditions:
        """The conditions since the start."""
        (before, counts), after = self._before, _ticks(self._root, self._pid)
        spent = {name: after[name] - before[name] for name in after.keys() & before.keys()}
        total, busy, family = spent.get("total", 0), spent.get("busy", 0), spent.get("own")
        events = [count - counts[key] for key, count in _throttles(self._root).items() if key in counts]
        slowdowns = {reason for _, _, mask in self._gpu for reason in reasons(mask)}
        self.conditions = Conditions(
            seconds=time.monotonic() - self._began,
            mhz=_range(self._clocks),
            throttled=sum(events) if events else None,
            stolen=spent["stolen"] / total if total > 0 else None,
            others=max(busy - family, 0) / total if total > 0 and family is not None else None,
            gpu_mhz=_range(number(clock) for clock, _, _ in self._gpu),
            gpu_celsius=_range(number(celsius) for _, celsius, _ in self._gpu),
            gpu_throttled=tuple(sorted(slowdowns - HARMLESS)),
        )
        return self.conditions


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    numbers = [value for value in values if value is not None]
    return (min(numbers), max(numbers)) if numbers else None


def _ticks(root: Path, pid: int) -> dict[str, int]:
    """Clock ticks: total, busy and stolen of all processors; own of ``pid`` and its descendants."""
    head = content(root / "proc/stat").partition("\n")[0].split()[1:9]
    if len(head) < 8:
        return {}
    user, nice, system, idle, iowait, irq, softirq, stolen = map(int, head)
    busy = user + nice + system + irq + softirq
    ticks = {"busy": busy, "stolen": stolen, "total": busy + stolen + idle + iowait}
    parents, times = {}, {}
    for path in (root / "proc").glob("[0-9]*/stat"):
        if fields := content(path).rpartition(")")[2].split():
            parents[int(path.parent.name)] = int(fields[1])
            times[int(path.parent.name)] = sum(map(int, fields[11:15]))  # its own, and of children it waited for
    if pid in times:
        family = {pid}
        while children := {child for child, parent in parents.items() if parent in family} - family:
            family |= children
        ticks["own"] = sum(times[each] for each in family)
    return ticks


def _throttles(root: Path) -> dict[tuple[str, ...], int]:
    """Thermal throttling events so far, of each core and each package, which all of its threads report."""
    counts = {}
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
        topology, text = path.parents[1] / "topology", content(path)
        whose = [content(topology / "physical_package_id")]
        whose += [content(topology / "core_id") or path.parents[1].name] * path.name.startswith("core")
        if text.isdigit():
            counts[path.name, *whose] = int(text)
    return counts
