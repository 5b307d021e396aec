"""The CUDA kernels: their sources, what is made of them ahead of time, and the launches that call them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cm_runtime.errors import EngineError
from cm_runtime.errors.reasons import system_reason

FOLDER = Path(__file__).parent


def fatbin() -> bytes:
    """All kernels for sm_80, sm_90 and sm_120, and as PTX. Raises EngineError unless it is what was built."""
    content = _read_file("kernels.fatbin")
    if hashlib.sha256(content).hexdigest() != build_report()["fatbin_sha256"]:
        raise EngineError(f"{FOLDER / 'kernels.fatbin'} is damaged; install cm-runtime again")
    return content


def build_report() -> dict[str, Any]:
    """The report of `make -C kernels`: compiler, hashes, and the registers of each kernel on each GPU."""
    report: dict[str, Any] = json.loads(_read_file("kernels.json"))
    return report


def ptx(name: str) -> str:
    """The compiled form of ``kernels/NAME.cu`` that a driver finishes for its own GPU."""
    return _read_file(f"{name}.ptx").decode()


def _read_file(name: str) -> bytes:
    try:
        return (FOLDER / name).read_bytes()
    except OSError as error:
        raise EngineError(f"{FOLDER / name} cannot be read: {system_reason(error)}") from error
