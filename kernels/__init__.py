"""The CUDA kernels: their sources, and what is made of them ahead of time."""

from __future__ import annotations

from pathlib import Path


def ptx(name: str) -> str:
    """The compiled form of ``kernels/NAME.cu`` that a driver finishes for its own GPU."""
    return Path(__file__).with_name(f"{name}.ptx").read_text()
