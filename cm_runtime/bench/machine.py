"""Where a run took place, and what the machine did meanwhile, as Linux and nvidia-smi tell; nothing is set.

What a machine does not tell is None or empty. ``root`` is where /proc and /sys are found.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from cm_runtime.bench.results import Conditions, Gpu, Machine, Processor

ROOT = Path("/")
FLAGS = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
PACKAGES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "triton", "diffusers", "openvino"),
    *("tensorrt", "tensorrt-rtx", "pycuda", "cuda-python", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
)
# The bits of NVML's nvmlClocksEventReason, lowest first. To idle, or to keep to a clock as asked, is not throttling.
REASONS = (
    *("gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost"),
    *("sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "display_clock_setting"),
)
HARMLESS = {"gpu_idle", "applications_clocks_setting"}
PATIENCE = 10.0  # seconds that nvidia-smi is given
BETWEEN_LOOKS = 1.0
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
_MIB = 1 << 20


def machine(root: Path = ROOT) -> Machine:
    """This machine, with all the GPUs that nvidia-smi lists, whatever CUDA may use of them. 0 is an unknown memory."""
    cores = _cpuinfo(root)
    flags = set((cores[0].get("flags") or cores[0].get("Features", "")).split())
    return Machine(
        processor=Processor(
            model=_model(cores),
            cores=len(os.sched_getaffinity(0)),
            sockets=len(_of_cores(root, "topology/physical_package_id") - {"-1"}) or None,
            flags=tuple(flag for flag in FLAGS if flag in flags),
            governor=", ".join(sorted(_of_cores(root, "cpufreq/scaling_governor"))) or None,
            asked_mhz=max(_mhz(root, "scaling_max_freq"), default=None),
            limit_cores=min(_core_limits(root), default=None),
            memory_bytes=_memory(root, "MemTotal"),
        ),
        gpus=_gpus(),
        kernel=platform.release(),
        architecture=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip() or "musl" * ("musl" in str(sysconfig.get_config_var("SOABI"))),
        is_virtual="hypervisor" in flags or _is_guest(root),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
    )


def differences(a: Machine, b: Machine) -> list[str]:
    """A line for each difference that makes timings hard to compare: "onnxruntime: 1.31.0 and 1.32.0".

    All of a fingerprint counts, but for the serial numbers of GPUs, and for 2% of memory, of which firmware and kernel
    take more or less.
    """
    first, second = _told(a), _told(b)
    lines = []
    for name in first | second:
        one, other = first.get(name), second.get(name)
        if name.endswith("memory") and one and other:
            if abs(one - other) > 0.02 * max(one, other):
                lines.append(f"{name}: {one / 2**30:.1f} GiB and {other / 2**30:.1f} GiB")
        elif one != other:
            lines.append(f"{name}: {_word(one)} and {_word(other)}")
    return lines


def _told(a: Machine) -> dict[str, Any]:
    """All that counts, under the names that a reader is shown."""
    cpu, gpus = a.processor, ", ".join(gpu.name for gpu in a.gpus)
    told = {"processor": cpu.model, "cores": cpu.cores, "sockets": cpu.sockets, "processor flags": " ".join(cpu.flags)}
    told |= {"clock governor": cpu.governor, "clock limit in MHz": cpu.asked_mhz, "limit in cores": cpu.limit_cores}
    told |= {"memory": cpu.memory_bytes, "GPUs": gpus, "kernel": a.kernel, "architecture": a.architecture}
    told |= {"C library": a.libc, "virtual machine": a.is_virtual, "Python": a.python}
    for i, gpu in enumerate(a.gpus):
        told |= {f"GPU {i} driver": gpu.driver, f"GPU {i} memory": gpu.memory_bytes}
        told |= {f"GPU {i} power limit in W": gpu.power_limit_w, f"GPU {i} clock in MHz": gpu.asked_mhz}
        told[f"GPU {i} largest clock in MHz"] = gpu.max_mhz
    return told | a.packages


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


class Watch:
    """What the machine does during a run: ``with Watch() as watch:``, and ``watch.conditions`` afterwards.

    The run calls `look` where nothing is timed; there is no thread. Clocks and temperatures are those seen then, of
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
        """Begins, or begins again."""
        self._clocks: list[float] = []
        self._gpu: list[list[str]] = []
        self._fields = [f"clocks_{word}_reasons.active" for word in ("event", "throttle")]  # the newer name first
        self._looked = float("-inf")
        self._began = time.monotonic()
        self._before = _ticks(self._root, self._pid), _throttles(self._root)

    def look(self) -> None:
        """Notes the clocks, and what nvidia-smi tells, which takes part of a second; once a second at most."""
        if time.monotonic() - self._looked < BETWEEN_LOOKS:
            return
        shown = [float(core["cpu MHz"]) for core in _cpuinfo(self._root) if "cpu MHz" in core]
        self._clocks += _mhz(self._root, "scaling_cur_freq") or shown
        while self._fields and not (rows := _nvidia_smi("gpu", "clocks.gr", "temperature.gpu", self._fields[0])):
            del self._fields[0]  # a name that this driver does not know, or no driver: not asked again
        if self._fields:
            self._gpu += rows
        self._looked = time.monotonic()

    def stop(self) -> Conditions:
        """What was seen since the start."""
        (before, counts), after = self._before, _ticks(self._root, self._pid)
        spent = {name: after[name] - before[name] for name in after.keys() & before.keys()}
        total, busy, own = spent.get("total", 0), spent.get("busy", 0), spent.get("own")
        events = [count - counts[key] for key, count in _throttles(self._root).items() if key in counts]
        reasons = {reason for _, _, mask in self._gpu for reason in _reasons(mask)}
        self.conditions = Conditions(
            seconds=time.monotonic() - self._began,
            mhz=_range(self._clocks),
            throttled=sum(events) if events else None,
            stolen=spent["stolen"] / total if total > 0 else None,
            others=max(busy - own, 0) / total if total > 0 and own is not None else None,
            gpu_mhz=_range(_number(clock) for clock, _, _ in self._gpu),
            gpu_celsius=_range(_number(celsius) for _, celsius, _ in self._gpu),
            gpu_throttled=tuple(sorted(reasons - HARMLESS)),
        )
        return self.conditions


def device_memory(pids: Iterable[int]) -> int | None:
    """Bytes of GPU memory that these processes hold; None without a GPU, or where nvidia-smi tells of none of them.

    In a container it may list no process, or under the numbers that the host gave them.
    """
    rows, wanted = _nvidia_smi("compute-apps", "pid", "used_memory"), set(map(str, pids))
    held = [mib for pid, used in rows if pid in wanted and (mib := _number(used)) is not None]
    return int(sum(held) * _MIB) if held else None


def free_bytes(root: Path = ROOT) -> int:
    """Memory that can be had without swapping, within this process's own control group; 0 where it is not told."""
    limits = [_text(folder / name) for folder in _groups(root, "memory") for name in _MEMORY_LIMITS]
    return min([_memory(root, "MemAvailable"), *(int(limit) for limit in limits if limit.isdigit())])


def _nvidia_smi(what: str, *fields: str) -> list[list[str]]:
    """Its answer to --query-WHAT, a row for each GPU or process; none where it is missing, fails or hangs."""
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


def _gpus() -> tuple[Gpu, ...]:
    names = ["name", "uuid", "driver_version", "memory.total"]
    limits = ["power.limit", "clocks.applications.graphics", "clocks.max.graphics"]
    rows = _nvidia_smi("gpu", *names, *limits) or [[*row, "", "", ""] for row in _nvidia_smi("gpu", *names)]
    gpus = []
    for name, uuid, driver, *numbers in rows:
        memory, power, asked, largest = map(_number, numbers)
        limit = {"power_limit_w": power, "asked_mhz": asked, "max_mhz": largest}
        gpus.append(Gpu(name=name, uuid=uuid, driver=driver, memory_bytes=int((memory or 0) * _MIB), **limit))
    return tuple(gpus)


def _number(text: str) -> float | None:
    """None for [N/A], [Not Supported] and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def _reasons(mask: str) -> set[str]:
    """The words of a mask such as 0x0000000000000024; a bit that has none stays a number."""
    bits = int(mask, 16) if mask.startswith("0x") else 0
    return {REASONS[i] if i < len(REASONS) else f"0x{1 << i:x}" for i in range(bits.bit_length()) if bits >> i & 1}


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    """A record for each core; at least one, if empty."""
    blocks = _text(root / "proc/cpuinfo").split("\n\n")
    pairs = [[line.partition(":") for line in block.splitlines()] for block in blocks]
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs]


def _model(cores: list[dict[str, str]]) -> str:
    """The processor's name; Arm's have numbers instead: "implementer 0x41, part 0xd0c"."""
    names = [core.get("model name", "") for core in cores]
    arm = [(core.get("CPU implementer"), core.get("CPU part")) for core in cores if "CPU part" in core]
    names += [f"implementer {implementer}, part {part}" for implementer, part in arm]
    return "; ".join(dict.fromkeys(filter(None, names))) or platform.processor() or "unknown"


def _of_cores(root: Path, name: str) -> set[str]:
    """The values of a file of every core's folder."""
    return {text for path in (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{name}") if (text := _text(path))}


def _mhz(root: Path, name: str) -> list[float]:
    return [int(khz) / 1000 for khz in _of_cores(root, f"cpufreq/{name}") if khz.isdigit()]


def _memory(root: Path, name: str) -> int:
    """Bytes, by a line of /proc/meminfo; 0 where there is none."""
    found = [line.split() for line in _text(root / "proc/meminfo").splitlines() if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else 0


def _is_guest(root: Path) -> bool:
    """For processors without a flag for it: whether firmware or kernel names a hypervisor."""
    board = " ".join(_text(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name"))
    named = any(word in board for word in ("QEMU", "KVM", "Virtual", "VMware"))
    return named or (root / "proc/device-tree/hypervisor").exists() or bool(_text(root / "sys/hypervisor/type"))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control group of this process and those around it, of version 2 and of version 1."""
    mount = root / "sys/fs/cgroup"
    lines = [line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines()]
    for _, controllers, group in [line for line in lines if len(line) == 3] or [["0", "", "/"]]:
        if not controllers or controller in controllers.split(","):
            for folder in (Path(group), *Path(group).parents):
                yield mount / (controller if controllers else "") / str(folder).lstrip("/")


def _core_limits(root: Path) -> Iterator[float]:
    """What the control groups allow, in cores: cpu.max of version 2, the CFS quota of version 1."""
    for group in _groups(root, "cpu"):
        older = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
        quota, _, period = (_text(group / "cpu.max") or older).partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _ticks(root: Path, pid: int) -> dict[str, int]:
    """Clock ticks: total, busy and stolen of all processors; own of ``pid`` and its descendants."""
    head = _text(root / "proc/stat").partition("\n")[0].split()[1:9]
    if len(head) < 8:
        return {}
    user, nice, system, idle, waiting, irq, softirq, stolen = map(int, head)
    busy = user + nice + system + irq + softirq
    ticks = {"busy": busy, "stolen": stolen, "total": busy + stolen + idle + waiting}
    parents, used = {}, {}
    for path in (root / "proc").glob("[0-9]*/stat"):
        if fields := _text(path).rpartition(")")[2].split():
            parents[int(path.parent.name)] = int(fields[1])
            used[int(path.parent.name)] = sum(map(int, fields[11:15]))  # its own, and of children it waited for
    if pid in used:
        family = {pid}
        while grown := {child for child, parent in parents.items() if parent in family} - family:
            family |= grown
        ticks["own"] = sum(used[each] for each in family)
    return ticks


def _throttles(root: Path) -> dict[tuple[str, ...], int]:
    """Thermal throttling events so far, of each core and each package, which all of its threads report."""
    counts = {}
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
        topology, text = path.parents[1] / "topology", _text(path)
        whose = [_text(topology / "physical_package_id")]
        whose += [_text(topology / "core_id") or path.parents[1].name] * path.name.startswith("core")
        if text.isdigit():
            counts[path.name, *whose] = int(text)
    return counts
