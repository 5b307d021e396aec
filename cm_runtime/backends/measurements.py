"""Remembered times of engines, one small file in the cache for each question.

A question's key covers the file's content, the machine, threads, precision, batch and the versions of all engines:
whatever of it changes, engines are measured anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from cm_runtime.errors import ArtifactError, OutputError
from cm_runtime.errors.reasons import system_reason
from cm_runtime.extras import distribution_version
from cm_runtime.files import atomic, streams
from cm_runtime.manifest import Manifest, data_path
from cm_runtime.subprocesses import cores, processor

LOG = logging.getLogger("cm_runtime")
FORMAT = 3  # bump to invalidate remembered measurements
MOST_TRIES = 3
DISTRIBUTIONS = {"ort": ("onnxruntime", "onnxruntime-gpu"), "openvino": ("openvino",)}


@dataclass(frozen=True)
class Question:
    """The choice of the fastest among the engines ``names`` for a file, with all that it depends on."""

    path: Path
    manifest: Manifest
    names: tuple[str, ...]
    device: str
    threads: int
    precision: str
    batch: int

    @property
    def key(self) -> str:
        """A hash of it. A data file is called by its content's hash, so that only its size is read."""
        data = data_path(self.path, self.manifest)
        file = atomic.sha256(self.path), data.stat().st_size if data else 0
        engines = [(name, version(name)) for name in self.names]
        options = self.device, self.threads, self.precision, self.batch
        content = json.dumps([FORMAT, file, engines, processor(), cores(), options])
        return hashlib.sha256(content.encode()).hexdigest()


class Measurement(BaseModel):
    """Seconds of one run by engine, the fastest first.

    tries: measurements so far. is_noisy: the machine was too busy for the ranking to be sure.
    """

    model_config = ConfigDict(frozen=True)

    seconds: dict[str, Annotated[FiniteFloat, Field(gt=0)]] = Field(min_length=1)
    tries: int = 1
    is_noisy: bool = False

    @field_validator("seconds")
    @classmethod
    def _rank(cls, seconds: dict[str, float]) -> dict[str, float]:
        return dict(sorted(seconds.items(), key=lambda item: item[1]))

    @property
    def is_final(self) -> bool:
        """False where it is worth measuring again."""
        return not self.is_noisy or self.tries >= MOST_TRIES

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in self.seconds.items())


def version(name: str) -> str:
    """The distributions that an engine is installed by, with their versions."""
    return ", ".join(f"{each} {number}" for each in DISTRIBUTIONS[name] if (number := distribution_version(each)))


def load(question: Question) -> Measurement | None:
    """Read what was measured before; None where nothing was, or where the file is not to be believed."""
    try:
        text = streams.read_text(folder() / f"{question.key}.json", ArtifactError, 1 << 16)
        measurement = Measurement.model_validate_json(text)
    except (ArtifactError, OSError, ValidationError, RuntimeError):  # the last where there is no home folder
        return None
    return measurement if measurement.seconds.keys() <= set(question.names) else None


def save(question: Question, measurement: Measurement) -> None:
    """Write a measurement; a cache that cannot be written is none."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with atomic.write(folder() / f"{question.key}.json") as temporary:
            temporary.write_text(measurement.model_dump_json(), encoding="utf-8")
    except (OSError, OutputError, RuntimeError) as error:
        LOG.debug("the choice of an engine cannot be kept: %s", error)


def forget() -> int:
    """Delete all measurements and return how many there were. Raises OutputError where one cannot be deleted."""
    try:
        paths = sorted(folder().glob("*.json"))
        for path in paths:
            path.unlink(missing_ok=True)
    except RuntimeError:
        return 0
    except OSError as error:
        raise OutputError(f"{folder()}: its files cannot be deleted: {system_reason(error)}") from error
    return len(paths)


def folder() -> Path:
    """The folder of the cache that measurements are in. Raises RuntimeError where there is no home folder."""
    return atomic.cache_folder() / "engines"
