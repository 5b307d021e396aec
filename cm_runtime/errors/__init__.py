"""Every error a user can meet is one of these, and prints as one line that says what, where and what to do.

    CmRuntimeError
    ├── RequestError        steps, sigmas, labels, shapes or counts that no model could serve
    ├── ConfigError         a preset or configuration with an unknown key or a value out of range
    ├── MissingExtraError   a package that this work needs is not installed; names the pip command
    ├── FileError           a path that cannot be read
    │   ├── DataError         data set files: IDX, CIFAR-10, images, npz, downloads
    │   ├── CheckpointError   .pt files
    │   └── ArtifactError     exported files: .onnx and what else we write for an engine
    ├── OutputError         a path that cannot be written, or that must not be replaced
    ├── EngineError         ONNX Runtime, torch or another engine refused or failed
    │   └── OutOfMemoryError  a GPU has no memory left; a smaller micro-batch may fit
    ├── ParityError         an export that does not compute what its checkpoint computes
    ├── UnmeasuredError     a benchmark some of whose scenarios failed; the result is written and says which
    ├── TrainingError       a run that cannot go on: loss not finite, state of another run
    └── Interrupted         a run that was asked to stop and has saved its state

Foreign exceptions are wrapped in the most telling of these with ``raise ... from error``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

LONGEST = 1000  # characters of an error's line


def one_line(text: str) -> str:
    """``text`` with every character that a terminal would not print as a space, its middle cut out of what is long."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} [...] {text[-LONGEST // 3 :]}"
    return "".join(letter if letter.isprintable() else " " for letter in text)


class CmRuntimeError(Exception):
    """Base of all errors that cm-runtime raises on purpose.

    ``str(error)`` is one line of moderate length, whatever names and values a file holds.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class RequestError(CmRuntimeError, ValueError):
    """No model can serve the request: steps, sigmas, labels, shapes or counts."""


class ConfigError(CmRuntimeError, ValueError):
    """A configuration has an unknown key or a value out of range."""


class MissingExtraError(CmRuntimeError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'cm-runtime[{extra}]'")
        self.package = package
        self.extra = extra


class FileError(CmRuntimeError):
    """A file or folder is missing, truncated, foreign or unreadable."""


class DataError(FileError):
    """A data set's files do not hold what their format promises."""


class CheckpointError(FileError):
    """A checkpoint is not one of ours, or its tensors do not fit its config."""


class ArtifactError(FileError):
    """An exported file is not one of ours, or is damaged."""


class OutputError(CmRuntimeError):
    """A result cannot be written where it should go."""


class EngineError(CmRuntimeError):
    """An inference engine could not load or run a model."""


class OutOfMemoryError(EngineError):
    """A GPU has no memory left."""


class ParityError(CmRuntimeError):
    """An export differs from its checkpoint by more than its precision allows; nothing was written."""


class UnmeasuredError(CmRuntimeError):
    """Some scenarios of a benchmark could not be measured."""


class TrainingError(CmRuntimeError):
    """Training cannot go on."""


class Interrupted(CmRuntimeError):
    """Training was asked to stop and has saved its state; the command line ends with status 130."""


def data_error(where: Path | str, wrong: str, cure: str) -> DataError:
    """``where: wrong; cure`` on one line, whatever newlines or escape codes a file's name brings along."""
    line = " ".join(f"{where}: {wrong}; {cure}".split())
    return DataError("".join(char if char.isprintable() else "?" for char in line))
