"""Packages that only some work needs."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from cm_runtime.errors import MissingExtraError

# The extra of pyproject.toml that brings each optional package.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "pycuda": "gpu",
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


def require(package: str, what: str) -> ModuleType:
    """Imports ``package``; where it is not installed, MissingExtraError names the pip command ``what`` needs."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name not in (package, package.partition(".")[0]):
            raise
        raise MissingExtraError(package, EXTRAS[package], what) from error


def has(package: str) -> bool:
    """Whether ``package`` is installed; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
