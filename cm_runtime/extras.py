"""Packages that only some work needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from cm_runtime.errors import MissingExtraError

# The extra of pyproject.toml that brings each optional package.
EXTRAS = {
    "onnxruntime": "cpu",
    "torch": "train",
    "onnx": "train",
    "onnxscript": "train",
    "pooch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "tomli_w": "train",
    "diffusers": "bench",
    "jinja2": "report",
    "matplotlib": "report",
}


def require(package: str, what: str) -> ModuleType:
    """Imports ``package``; where it is not installed, MissingExtraError names the pip command ``what`` needs."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(package, EXTRAS[package], what) from error
