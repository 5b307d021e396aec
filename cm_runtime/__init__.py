"""cm-runtime: train a consistency model, compile it, and draw images from it in one or two network evaluations.

    import cm_runtime as cm

    model = cm.load()                                  # the bundled model; or cm.load("model.onnx")
    images = cm.sample(model, count=256, steps=2)      # uint8 (256, H, W, C)
    for batch in cm.stream(model): ...                 # endless; batch.images, batch.labels, batch.index

Names are imported when they are first used: importing the package costs nothing, and sampling needs no torch. What
needs it, `export` and `load_checkpoint`, says so when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm_runtime import editing as editing
    from cm_runtime import errors as errors
    from cm_runtime import export as export
    from cm_runtime import noise as noise
    from cm_runtime.backends import load as load
    from cm_runtime.checkpoints.load import load_checkpoint as load_checkpoint
    from cm_runtime.generation.stream import sample as sample
    from cm_runtime.generation.stream import stream as stream
    from cm_runtime.request import Draw as Draw

__version__ = "0.1.0"

_HOME = {
    "Draw": "cm_runtime.request",
    "load": "cm_runtime.backends",
    "load_checkpoint": "cm_runtime.checkpoints.load",
    "sample": "cm_runtime.generation.stream",
    "stream": "cm_runtime.generation.stream",
}
_MODULES = ("editing", "errors", "export", "noise")

__all__ = ["Draw", "editing", "errors", "export", "load", "load_checkpoint", "noise", "sample", "stream"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"cm_runtime.{name}")
    raise AttributeError(f"module 'cm_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
