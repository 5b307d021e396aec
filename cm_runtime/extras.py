"""Packages that only some work needs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

from cm_runtime.errors import MissingExtraError
from cm_runtime.files import atomic

# The extra of pyproject.toml that brings each optional package.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "pycuda": "pycuda",
    "cuda.bindings": "gpu",
    "torch": "train",
    "onnx": "train",
    "onnxscript": "train",
    "pooch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "tomli_w": "train",
    "diffusers": "bench",
    "pyarrow": "parquet",
    "jinja2": "report",
    "matplotlib": "report",
}

# Environment variables that keep a package from sending events and from writing into the home folder as it is
# imported. Those that the user has set stay.
PRIVACY: dict[str, Callable[[], dict[str, str]]] = {
    "onnxruntime": lambda: {"ORT_DISABLE_TELEMETRY": "1"},
    "diffusers": lambda: {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_CACHE": str(atomic.cache_folder() / "huggingface"),  # a version number is written there on import
    },
    "matplotlib": lambda: {"MPLCONFIGDIR": str(atomic.cache_folder() / "matplotlib")},  # the list of fonts
}


def privacy(*packages: str) -> dict[str, str]:
    """The variables of those packages that the environment does not have yet, for a child process or for this one."""
    variables = {name: value for package in packages for name, value in PRIVACY[package]().items()}
    return {name: value for name, value in variables.items() if name not in os.environ}


# What shows that there is an NVIDIA driver, any of it: on Linux, in a sandbox that shows devices alone, inside Windows.
DRIVER_SIGNS = tuple(map(Path, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")))
NO_DRIVER = "there is no NVIDIA driver here"
TWO_RUNTIMES = "two ONNX Runtimes: pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"


def has_driver() -> bool:
    """True if the machine has an NVIDIA driver; nothing is loaded."""
    return any(path.exists() for path in DRIVER_SIGNS)


def has_cpu_runtime() -> bool:
    """True if ONNX Runtime's build for the CPU is installed."""
    return bool(distribution_version("onnxruntime"))


def has_two_runtimes() -> bool:
    """True if both of ONNX Runtime's distributions are installed: they share one module, that of the later one."""
    return has_cpu_runtime() and bool(distribution_version("onnxruntime-gpu"))


def distribution_version(name: str) -> str:
    """The version of an installed distribution; empty where there is none of that name."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def require(package: str, what: str) -> ModuleType:
    """Import ``package``; where it is not installed, MissingExtraError names the pip command ``what`` needs."""
    if package in PRIVACY:
        os.environ.update(privacy(package))
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name not in (package, package.partition(".")[0]):
            raise
        raise MissingExtraError(package, EXTRAS[package], what) from error


def has(package: str) -> bool:
    """Return True if ``package`` is installed; it is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
