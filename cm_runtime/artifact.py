"""The manifest inside every exported file: all that a sampler must know, without the weights.

An ``.onnx`` carries it as JSON under the metadata key ``cm_runtime``. It is read here straight from the
protobuf's outermost fields, so that asking a 2 GB file what it is takes no memory and no package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cm_runtime.errors import ArtifactError
from cm_runtime.precond import Form, precond
from cm_runtime.schedule import RHO, SIGMA_MAX, SIGMA_MIN, checked_sigmas

METADATA_KEY = "cm_runtime"
FORMAT_VERSION = 1
_MANIFEST_LIMIT = 1 << 20
_METADATA_PROPS = 14  # field of onnx.ModelProto
_GRAPH = 7


Size = Annotated[int, Field(gt=0, le=4096)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainingSummary(_Frozen):
    """How a model came to be; ``method`` edm means a teacher, which few steps cannot sample."""

    method: str
    data: str
    steps: int = Field(ge=0)
    images: int = Field(ge=0, description="seen in training, repeats counted")
    seconds: float = Field(ge=0)
    config: dict[str, Any] = Field(default_factory=dict, description="the run's whole configuration")


class Parity(_Frozen):
    """How far an export was from its float32 torch model when it was made, and on what that was measured."""

    engine: str
    max_abs: float = Field(ge=0, description="largest difference of denoised pixels in [-1, 1] units")
    sigmas: tuple[float, ...]
    batches: tuple[int, ...]


class Manifest(_Frozen):
    """What an exported file is; unknown keys are refused."""

    format_version: Literal[1] = 1
    graph: Literal["denoiser"]
    image_shape: tuple[Size, Size, Size] = Field(description="(C, H, W)")
    num_classes: int = Field(ge=0, le=1_000_000)
    precond: Form
    sigma_min: float = Field(SIGMA_MIN, gt=0)
    sigma_max: float = Field(SIGMA_MAX, gt=0)
    sigma_data: float = Field(0.5, gt=0)
    sigma_boundary: float = Field(ge=0)
    rho: float = Field(RHO, ge=0.1, le=100)
    sigmas: dict[int, tuple[float, ...]] = Field(default_factory=dict, description="tuned levels per step count")
    precision: Literal["fp32"] = "fp32"
    parity: Parity | None = None
    source_sha256: str = Field("", description="of the checkpoint")
    training: TrainingSummary | None = None

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        precond(self.precond, self.sigma_data, self.sigma_boundary)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must lie below sigma_max {self.sigma_max:g}")
        for steps, levels in self.sigmas.items():
            if len(levels) != steps:
                raise ValueError(f"sigmas for {steps} steps are {len(levels)}")
            checked_sigmas(levels, self.sigma_min, self.sigma_max)
        return self

    @property
    def is_teacher(self) -> bool:
        """True for a denoiser that was never made consistent: it needs an ODE solver, not a few steps."""
        return self.training is not None and self.training.method == "edm"


def parse_manifest(text: str | bytes, where: str | os.PathLike[str]) -> Manifest:
    """The manifest in ``text``; raises ArtifactError naming the file and the first field that does not fit."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ArtifactError(f"{where}: its cm_runtime manifest is not valid: {field}: {first['msg']}") from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an ``.onnx`` file that cm-runtime exported.

    Raises ArtifactError when the file is missing, truncated, not ONNX, or without our manifest.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            found = _metadata(file, where.stat().st_size)
    except FileNotFoundError as error:
        raise ArtifactError(f"{where}: no such file") from error
    except OSError as error:
        raise ArtifactError(f"{where} cannot be read: {error.strerror or error}") from error
    except _MalformedError as error:
        raise ArtifactError(f"{where} is not an ONNX file, or is truncated ({error})") from error
    if METADATA_KEY not in found:
        raise ArtifactError(f"{where} was not exported by cm-runtime; make one with: cm-runtime export CHECKPOINT")
    return parse_manifest(found[METADATA_KEY], where)


class _MalformedError(Exception):
    """The bytes are not a protobuf message that could be an onnx.ModelProto."""


def _metadata(file: BinaryIO, size: int) -> dict[str, bytes]:
    props: dict[str, bytes] = {}
    graph = False
    for field, length in _fields(file, size):
        if field == _METADATA_PROPS and length <= _MANIFEST_LIMIT:
            entry = file.read(length)
            key, value = _string_entry(entry)
            props[key] = value
        else:
            graph = graph or field == _GRAPH
            file.seek(length, os.SEEK_CUR)
    if not graph:
        raise _MalformedError("it holds no graph")
    return props


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int]]:
    """(field number, bytes of payload) of each field; the caller moves past the payload."""
    while file.tell() < end:
        tag = _varint(file)
        field, wire = tag >> 3, tag & 7
        if wire not in (0, 1, 2, 5) or field == 0:
            raise _MalformedError(f"byte {file.tell()} starts no field")
        if wire == 0:
            _varint(file)
            yield field, 0
            continue
        length = {1: 8, 5: 4}.get(wire) or _varint(file)
        if file.tell() + length > end:
            raise _MalformedError(f"a field of {length} bytes runs past its end")
        yield field, length


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _MalformedError("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _MalformedError("a number has too many bytes")


def _string_entry(entry: bytes) -> tuple[str, bytes]:
    """An onnx.StringStringEntryProto: key is field 1, value is field 2."""
    import io

    found = {1: b"", 2: b""}
    file = io.BytesIO(entry)
    for field, length in _fields(file, len(entry)):
        found[field] = file.read(length)
    return found[1].decode(errors="replace"), found[2]
