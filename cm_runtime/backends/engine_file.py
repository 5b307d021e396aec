"""A TensorRT engine's file and the ``.engine.json`` beside it, without TensorRT.

An engine is native code, so it is opened only if its bytes are those that its manifest was written for, on the version
of TensorRT and the kind of GPU that it was built for. The hash guards against damage and mix-ups; whoever can write
both files can run code, as with any program, so engines are taken only from whom programs are.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from cm_runtime.backends.batch_profiles import MOST_PROFILES, Profile, format_profiles
from cm_runtime.errors import ArtifactError
from cm_runtime.files import streams
from cm_runtime.files.records import Record, explain
from cm_runtime.manifest import Manifest, Parity

SUFFIX = ".engine"
_MANIFEST_LIMIT = 1 << 20

Package = Literal["tensorrt", "tensorrt_rtx"]
Capability = Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
DATA_CENTRE = {"9.0": "H100, H200", "10.0": "B200", "10.3": "B300"}  # GPUs that TensorRT for RTX has no code for
# as --format and --backend say
FORMATS: dict[Package, Literal["tensorrt", "tensorrt-rtx"]] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


class EngineManifest(Record):
    """Kind, origin and machines of an engine; unknown keys are refused."""

    format_version: Literal[2] = 2
    sha256: Sha256 = Field(description="of the engine")
    bytes: int = Field(gt=0)
    package: Package
    version: str = Field(min_length=1, max_length=64, description="of the package")
    gpus: tuple[Capability, ...] = Field(min_length=1, description="compute capabilities that it runs on")
    gpu_name: str = Field("", max_length=256, description="of the GPU that it was built on, if there was one")
    profiles: tuple[Profile, ...] = Field(min_length=1, max_length=MOST_PROFILES)
    model: Manifest = Field(description="of the ONNX file that it was built from")
    onnx_sha256: Sha256
    data_sha256: Sha256 | None = Field(None, description="of the ONNX file's data file, if it has one")
    parity: Parity | None = Field(None, description="against ONNX Runtime; None: built where no GPU could open it")
    plugin: bool = Field(description="whether cm::SkipScale is our kernel, or standard ops")
    log: str = Field("", max_length=255, description="what TensorRT said while building, beside the engine")

    @field_validator("log")
    @classmethod
    def _is_beside(cls, name: str) -> str:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError("it must be the name of a file in the same folder")
        return name


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """``NAME.engine.json`` of ``NAME.engine``."""
    return _beside(path, ".json")


def log_path(path: str | os.PathLike[str]) -> Path:
    """``NAME.engine.log`` of ``NAME.engine``: what TensorRT said while building it."""
    return _beside(path, ".log")


def layers_path(path: str | os.PathLike[str]) -> Path:
    """``NAME.engine.layers.json`` of ``NAME.engine``: what its layers became, where a GPU could open it."""
    return _beside(path, ".layers.json")


def _beside(path: str | os.PathLike[str], ending: str) -> Path:
    return Path(path).with_name(Path(path).name + ending)


def read_engine_manifest(path: str | os.PathLike[str]) -> EngineManifest:
    """The manifest of the engine ``path``, which is not opened. Raises ArtifactError."""
    engine, where = Path(path), manifest_path(path)
    streams.regular(engine, ArtifactError)
    if not streams.exists(where):
        raise ArtifactError(
            f"{engine}: its manifest {where.name} is not beside it; {rebuild('tensorrt-rtx|tensorrt', engine)}"
        )
    try:
        text = streams.read_bytes(where, ArtifactError, _MANIFEST_LIMIT)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {rebuild('tensorrt-rtx', engine)}") from error
    try:
        return EngineManifest.model_validate_json(text)
    except ValidationError as error:
        wrong = f"is not a valid engine manifest: {explain(error, 'manifest')}"
        raise ArtifactError(f"{where} {wrong}; {rebuild('tensorrt-rtx', engine)}") from error


def check_target(
    manifest: EngineManifest, path: str | os.PathLike[str], package: Package, version: str, capability: str
) -> None:
    """Raises ArtifactError if the engine is for another package, version or kind of GPU than this machine has."""
    again = rebuild(FORMATS[package], path, manifest.profiles, capability)
    if manifest.package != package:
        raise ArtifactError(f"{path} is an engine of {manifest.package}, not of {package}; {again}")
    if manifest.version != version:
        raise ArtifactError(f"{path} was built by {package} {manifest.version}, and here is {version}; {again}")
    if capability not in manifest.gpus:
        built = ", ".join(manifest.gpus)
        if package == "tensorrt_rtx" and capability in DATA_CENTRE:
            raise ArtifactError(
                f"{path} was built for GPUs of compute capability {built}, and TensorRT for RTX has no code for"
                f" {capability} ({DATA_CENTRE[capability]}); {rebuild('tensorrt', path, manifest.profiles)}"
            )
        raise ArtifactError(
            f"{path} was built for GPUs of compute capability {built}, and this one has {capability}; {again}"
        )


def read_engine(
    path: str | os.PathLike[str], manifest: EngineManifest, package: Package, version: str, capability: str
) -> bytes:
    """Read an engine's bytes, which are those that ``manifest`` describes, for a machine that can run them.

    They are read once: what was hashed is what may be opened. Raises ArtifactError, whose line names the command that
    builds the engine again.
    """
    check_target(manifest, path, package, version, capability)
    again = rebuild(FORMATS[package], path, manifest.profiles, *manifest.gpus)
    size = streams.regular(path, ArtifactError).st_size
    if size != manifest.bytes:  # before memory is taken
        raise ArtifactError(
            f"{path} has {size} bytes, not the {manifest.bytes} of its manifest: it is cut short,"
            f" or the manifest is another engine's; {again}"
        )
    content = streams.read_bytes(path, ArtifactError, manifest.bytes)
    check_hash(content, manifest, path)
    return content


def check_hash(content: bytes, manifest: EngineManifest, path: str | os.PathLike[str]) -> None:
    """Raises ArtifactError if ``content`` is not the engine that ``manifest`` was written for."""
    if hashlib.sha256(content).hexdigest() != manifest.sha256:
        again = rebuild(FORMATS[manifest.package], path, manifest.profiles, *manifest.gpus)
        raise ArtifactError(
            f"{path} is not the engine that its manifest was written for (SHA-256): it is damaged,"
            f" or the manifest is another engine's; {again}"
        )


def rebuild(form: str, path: str | os.PathLike[str], profiles: Sequence[Profile] = (), *gpus: str) -> str:
    """Word the command that builds an engine again, for the end of an error's line."""
    words = ["cm-runtime export CKPT --format", form]
    words += ["--batch", format_profiles(profiles)] if profiles else []
    words += ["--gpu", ",".join(gpus)] if gpus and form == FORMATS["tensorrt_rtx"] else []
    return f"build it again with: {' '.join(words)} -o {shlex.quote(str(path))} --force"
