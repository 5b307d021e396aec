"""Reasons of foreign exceptions, the system's and other packages', as one line of an error of this package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cm_runtime.errors import OutputError

OPENVINO_PREAMBLE = (
    "Exception from",
    "Check '",
    "FrontEnd API failed",
    "Loading input model",
    "Model wasn't fully",
    "Summary:",
)
CAPTION = "with a message:"


def system_reason(error: OSError) -> str:
    """The system's reason without the error's number and path: "No space left on device"."""
    return error.strerror or str(error)


@contextmanager
def output_errors(path: str | os.PathLike[str], action: str = "written") -> Iterator[None]:
    """Turn an OSError of the block into an OutputError: PATH cannot be ACTION: REASON."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{os.fspath(path)} cannot be {action}: {system_reason(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception that is not blank, or the name of its class where there is none."""
    return _lines(error)[0]


def compiler_reason(error: BaseException) -> str:
    """The `first_line`, with the next one where it ends in a colon."""
    lines = _lines(error)
    return " ".join(lines[: 1 + lines[0].endswith(":")])


def openvino_reason(error: BaseException) -> str:
    """The first line of an OpenVINO exception that does not merely say where it was thrown."""
    lines = _lines(error)
    telling = [line for line in lines if not line.startswith(OPENVINO_PREAMBLE) and not line.endswith(CAPTION)]
    return (telling or lines)[0]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
