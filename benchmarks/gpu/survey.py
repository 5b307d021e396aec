"""What a check needs and what of it is there, told before anything is built. Needs the standard library alone."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = ("numpy", "pillow", "pydantic", "rich", "typer")  # which cm_runtime itself imports
PROGRAMS = ("g++", "make", "compute-sanitizer")
GB_OF_DISK = 8  # for checkpoints and exports of the largest network
LEAST_CUDA = 13000
PURPOSES = {
    "GPU": "all but the kernels' host build",
    "disk": f"checkpoints and exports, {GB_OF_DISK} GB",
    **dict.fromkeys(BASE, "cm_runtime"),
    "cuda-bindings": "launches, copies and graphs",
    "pytest": "kernels, ops",
    "pytest-timeout": "(optional) a time limit for each test",
    "torch": "ops, the fast path, torch.compile",
    "triton": "torch.compile",
    "onnx": "exports",
    "onnxscript": "exports",
    "onnxruntime": "the rehearsal on a CPU",
    "onnxruntime-gpu": "ONNX Runtime on the GPU",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "g++": "the kernels' host build",
    "make": "the kernels' host build",
    "compute-sanitizer": "the sanitizer",
}


def survey() -> dict[str, str]:
    """What there is, by the names of PURPOSES; those that are missing are absent."""
    there = {name: version for name in PURPOSES if (version := _version(name))}
    there |= {name: path for name in PROGRAMS if (path := shutil.which(name))}
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    return there | ({"disk": f"{free:.0f} GB"} if free >= GB_OF_DISK else {})


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def find_gpu() -> dict[str, Any] | str:
    """The first GPU by cuda-bindings, or by torch; or the reason why there is none."""
    try:
        try:
            return _by_driver(importlib.import_module("cuda.bindings.driver"))
        except ImportError:
            return _by_torch()
    except Exception as error:  # of no driver, no GPU or no package
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _by_torch() -> dict[str, Any]:
    import torch

    each = torch.cuda.get_device_properties(0)
    return _describe(each.name, (each.major, each.minor), torch.version.cuda, each.total_memory)


def _by_driver(driver: Any) -> dict[str, Any]:
    def call(name: str, *arguments: Any) -> Any:
        error, *results = getattr(driver, name)(*arguments)
        if int(error):
            raise RuntimeError(f"CUDA failed in {name}: {error.name}")
        return results[0] if results else None

    call("cuInit", 0)
    version, device, kinds = call("cuDriverGetVersion"), call("cuDeviceGet", 0), driver.CUdevice_attribute
    if version < LEAST_CUDA:
        raise RuntimeError(f"the driver is of CUDA {version // 1000}, the kernels need {LEAST_CUDA // 1000}")
    sides = (kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    major, minor = (call("cuDeviceGetAttribute", side, device) for side in sides)
    name = call("cuDeviceGetName", 100, device).split(b"\0")[0].decode()
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return _describe(name, (major, minor), cuda, call("cuDeviceTotalMem", device))


def _describe(name: str, capability: tuple[int, int], cuda: str | None, size: int) -> dict[str, Any]:
    return {"name": name, "capability": ".".join(map(str, capability)), "cuda": cuda, "GB": round(size / 1e9)}


def facts() -> dict[str, Any]:
    """What a result is of: the GPU, versions, and the commit where git knows it."""
    gpu = find_gpu()
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    git = subprocess.run(words, capture_output=True, text=True) if shutil.which("git") else None
    return {
        "gpu": None if isinstance(gpu, str) else gpu,
        "no_gpu": gpu if isinstance(gpu, str) else "",
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "commit": git.stdout.strip() if git and not git.returncode else "",
        "there": survey(),
    }


def table(facts: dict[str, Any]) -> str:
    """One line for each thing of PURPOSES: its version or "missing", and what needs it."""
    gpu, there = facts["gpu"], facts["there"]
    lines = [f"{'GPU':18} {' '.join(map(str, gpu.values())) if gpu else facts['no_gpu']:40} {PURPOSES['GPU']}"]
    lines += [f"{name:18} {there.get(name, 'missing'):40} {why}" for name, why in PURPOSES.items() if name != "GPU"]
    return "\n".join(lines)


def missing(needs: tuple[str, ...], facts: dict[str, Any]) -> list[str]:
    """Those of ``needs`` that are not there; alternatives are written a|b."""
    there = {*facts["there"], *(["GPU"] if facts["gpu"] else [])}
    return [name for name in needs if not there & set(name.split("|"))]
