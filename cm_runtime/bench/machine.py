"""The machine of a run, by what Linux and nvidia-smi report; nothing is set.

Unknown facts are None or empty. ``root`` is the folder of /proc and /sys.
"""

from __future__ import annotations

import platform
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

from cm_runtime import subprocesses
from cm_runtime.bench.nvidia import gpus
from cm_runtime.bench.results import Machine, Processor

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
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")


def machine(root: Path = ROOT) -> Machine:
    """This machine, with all the GPUs that nvidia-smi lists, whatever CUDA may use of them. 0 is an unknown memory."""
    first, *_ = subprocesses.cpuinfo(root / "proc")
    flags = set((first.get("flags") or first.get("Features", "")).split())
    return Machine(
        processor=Processor(
            model=subprocesses.processor(root / "proc"),
            cores=subprocesses.cores(),
            sockets=len(_of_cores(root, "topology/physical_package_id") - {"-1"}) or None,
            flags=tuple(flag for flag in FLAGS if flag in flags),
            governor=", ".join(sorted(_of_cores(root, "cpufreq/scaling_governor"))) or None,
            asked_mhz=max(clocks(root, "scaling_max_freq"), default=None),
            limit_cores=min(subprocesses.quotas(root / "proc", root / "sys"), default=None),
            memory_bytes=_memory(root, "MemTotal"),
        ),
        gpus=gpus(),
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
    first, second = _facts(a), _facts(b)
    lines = []
    for name in first | second:
        one, other = first.get(name), second.get(name)
        if name.endswith("memory") and one and other:
            if abs(one - other) > 0.02 * max(one, other):
                lines.append(f"{name}: {one / 2**30:.1f} GiB and {other / 2**30:.1f} GiB")
        elif one != other:
            lines.append(f"{name}: {_word(one)} and {_word(other)}")
    return lines


def _facts(a: Machine) -> dict[str, Any]:
    """The facts that must agree, under the names of reports."""
    cpu, gpus = a.processor, ", ".join(gpu.name for gpu in a.gpus)
    facts = {"processor": cpu.model, "cores": cpu.cores, "sockets": cpu.sockets, "processor flags": " ".join(cpu.flags)}
    facts |= {"clock governor": cpu.governor, "clock limit in MHz": cpu.asked_mhz, "limit in cores": cpu.limit_cores}
    facts |= {"memory": cpu.memory_bytes, "GPUs": gpus, "kernel": a.kernel, "architecture": a.architecture}
    facts |= {"C library": a.libc, "virtual machine": a.is_virtual, "Python": a.python}
    for i, gpu in enumerate(a.gpus):
        facts |= {f"GPU {i} driver": gpu.driver, f"GPU {i} memory": gpu.memory_bytes}
        facts |= {f"GPU {i} power limit in W": gpu.power_limit_w, f"GPU {i} clock in MHz": gpu.asked_mhz}
        facts[f"GPU {i} largest clock in MHz"] = gpu.max_mhz
    return facts | a.packages


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value or "none")


def free_bytes(root: Path = ROOT) -> int:
    """Memory that can be had without swapping, within this process's own control group; 0 where it is not told."""
    groups = subprocesses.control_groups("memory", root / "proc", root / "sys")
    limits = [content(folder / name) for _, folder in groups for name in _MEMORY_LIMITS]
    return min([_memory(root, "MemAvailable"), *(int(limit) for limit in limits if limit.isdigit())])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def content(path: Path) -> str:
    """A file's text, stripped; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _of_cores(root: Path, name: str) -> set[str]:
    """The values of a file of every core's folder."""
    return {text for path in (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{name}") if (text := content(path))}


def clocks(root: Path, name: str) -> list[float]:
    """MHz by the cpufreq value ``name`` of each core that has one."""
    return [int(khz) / 1000 for khz in _of_cores(root, f"cpufreq/{name}") if khz.isdigit()]


def _memory(root: Path, name: str) -> int:
    """Bytes, by a line of /proc/meminfo; 0 where there is none."""
    lines = [line.split() for line in content(root / "proc/meminfo").splitlines() if line.startswith(f"{name}:")]
    return int(lines[0][1]) * 1024 if lines else 0


def _is_guest(root: Path) -> bool:
    """True where firmware or kernel names a hypervisor, for processors without a flag for it."""
    board = " ".join(content(root / "sys/class/dmi/id" / name) for name in ("sys_vendor", "product_name"))
    is_virtual = any(word in board for word in ("QEMU", "KVM", "Virtual", "VMware"))
    return is_virtual or (root / "proc/device-tree/hypervisor").exists() or bool(content(root / "sys/hypervisor/type"))
