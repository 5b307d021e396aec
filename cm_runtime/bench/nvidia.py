"""Answers of nvidia-smi; empty where it is missing, fails or hangs."""

from __future__ import annotations

import csv
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress

from cm_runtime.bench.results import Gpu

# The bits of NVML's nvmlClocksEventReason, lowest first. To idle, or to keep to a clock as asked, is not throttling.
REASONS = (
    *("gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost"),
    *("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting"),
)
HARMLESS = {"gpu_idle", "applications_clocks_setting"}
PATIENCE = 10.0  # seconds that nvidia-smi is given
_MIB = 1 << 20


def gpus() -> tuple[Gpu, ...]:
    """All GPUs that it lists, whatever CUDA may use of them."""
    names = ["name", "uuid", "driver_version", "memory.total"]
    limits = ["power.limit", "clocks.applications.graphics", "clocks.max.graphics"]
    rows = nvidia_smi("gpu", *names, *limits) or [[*row, "", "", ""] for row in nvidia_smi("gpu", *names)]
    devices = []
    for name, uuid, driver, *numbers in rows:
        memory, power, clock, largest = map(number, numbers)
        limit = {"power_limit_w": power, "asked_mhz": clock, "max_mhz": largest}
        devices.append(Gpu(name=name, uuid=uuid, driver=driver, memory_bytes=int((memory or 0) * _MIB), **limit))
    return tuple(devices)


def device_memory(pids: Iterable[int]) -> int | None:
    """Bytes of GPU memory that these processes hold; None without a GPU, or where nvidia-smi lists none of them.

    In a container it may list no process, or under the numbers that the host gave them.
    """
    rows, processes = nvidia_smi("compute-apps", "pid", "used_memory"), set(map(str, pids))
    sizes = [mib for pid, memory in rows if pid in processes and (mib := number(memory)) is not None]
    return int(sum(sizes) * _MIB) if sizes else None


def nvidia_smi(what: str, *fields: str) -> list[list[str]]:
    """The answer to --query-WHAT, a row for each GPU or process; none where it is missing, fails or hangs."""
    call = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        with tempfile.TemporaryFile("w+", errors="replace") as answer:  # a pipe may be held open by its children
            child = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.DEVNULL)
            try:
                status = child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                with suppress(subprocess.TimeoutExpired):  # it may be stuck in the driver
                    child.wait(1)
                return []
            answer.seek(0)
            rows = [[cell.strip() for cell in row] for row in csv.reader(answer)]
    except (OSError, csv.Error):
        return []
    return [row for row in rows if len(row) == len(fields)] if status == 0 else []


def number(text: str) -> float | None:
    """None for [N/A], [Not Supported] and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def reasons(mask: str) -> set[str]:
    """The words of a mask such as 0x0000000000000024; a bit that has none stays a number."""
    bits = int(mask, 16) if mask.startswith("0x") else 0
    return {REASONS[i] if i < len(REASONS) else f"0x{1 << i:x}" for i in range(bits.bit_length()) if bits >> i & 1}
