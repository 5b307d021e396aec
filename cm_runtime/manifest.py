"""The manifest inside every exported file: all that a sampler must know, without the weights.

An ``.onnx`` carries it as JSON under the metadata key ``cm_runtime``. Large weights are in a data file beside the
``.onnx``, which the manifest names. `onnx_graph.export_writer` writes both.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from cm_runtime.choices import Form, GraphKind, Precision, Target
from cm_runtime.errors import ArtifactError
from cm_runtime.errors.wording import quantity
from cm_runtime.files import onnx_metadata, streams
from cm_runtime.files.protobuf import MalformedError
from cm_runtime.files.records import Record, explain
from cm_runtime.precond import precond
from cm_runtime.schedule import LARGEST, SMALLEST, NoiseRange

METADATA_KEY = "cm_runtime"
FORMAT_VERSION = 1
_PLAIN_VALUES, _PLAIN_LETTERS, _PLAIN_LEVELS = 10_000, 1 << 18, 20  # of a run's configuration
MOST_PIXELS = 1 << 26  # of an image, its channels counted
DATA_FILE = re.compile(r"[\w .+-]+-[0-9a-f]{12}\.data")  # only such files are ever overwritten or removed

Size = Annotated[int, Field(gt=0, le=4096)]
OUTPUTS: dict[GraphKind, tuple[str, ...]] = {
    "denoiser": ("denoised",),
    "sampler": ("images", "finite"),
    "network": ("F",),
}


def check_plain(value: Any) -> None:
    """Check that ``value`` can be written as JSON of moderate size, before anything walks through all of it.

    Raises:
        ValueError: It holds what JSON cannot, over 20 levels, over 10,000 values, or texts of over 2^18 letters in all.
    """
    values, letters, level = 0, 0, [value]
    for _ in range(_PLAIN_LEVELS):
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one.keys(), *one.values()]
                if not all(isinstance(key, str) for key in one):
                    raise ValueError("it has a name that is no text")
            elif isinstance(one, list | tuple):
                below += one
            elif isinstance(one, str):
                letters += len(one)
                if any("\ud800" <= letter <= "\udfff" for letter in one[:_PLAIN_LETTERS]):
                    raise ValueError("it has a text that is no Unicode")
            elif isinstance(one, int | float):
                if not abs(one) < 2**63:
                    raise ValueError("it has a number that is not finite, or of over 64 bits")
            elif one is not None:
                raise ValueError(f"it has a {type(one).__name__}, which JSON has not")
            if values + len(below) > _PLAIN_VALUES or letters > _PLAIN_LETTERS:
                raise ValueError(f"it has over {_PLAIN_VALUES} values, or {_PLAIN_LETTERS} letters")
        if not below:
            return
        values += len(below)
        level = below
    raise ValueError(f"it nests over {_PLAIN_LEVELS} levels")


class TrainingSummary(Record):
    """Origin of a model; ``method`` edm means a teacher, which few steps cannot sample. None: not known."""

    method: str
    data: str
    steps: int | None = Field(None, ge=0)
    images: int | None = Field(None, ge=0, description="seen in training, repeats counted")
    seconds: float | None = Field(None, ge=0)
    config: dict[str, Any] = Field(default_factory=dict, description="the run's whole configuration", repr=False)

    @field_validator("config", mode="before")
    @classmethod
    def _is_plain(cls, config: Any) -> Any:
        check_plain(config)
        return config


class Parity(Record):
    """Distance of an export from its float32 torch model when it was made, and the inputs it was measured on.

    Of a sampler graph it is the images that are compared, and ``sigmas`` are its own.
    """

    engine: str
    max_abs: float = Field(ge=0, description="largest difference of denoised pixels in [-1, 1] units")
    sigmas: tuple[float, ...]
    batches: tuple[int, ...]
    psnr: tuple[float, ...] = Field((), description="dB on [-1, 1] data, at each of the sigmas; at most 200")


class Manifest(Record):
    """Contents and origin of an exported file; unknown keys are refused.

    Attributes:
        format_version: of the manifest.
        graph: denoiser (f), network (F) or sampler (the whole loop).
        image_shape: (C, H, W).
        num_classes: 0 for a model without labels.
        precond: boundary (consistency models) or edm (teachers).
        sigma_min: noise level that images are taken to hold.
        sigma_max: noise level of the first step.
        sigma_data: standard deviation of the data.
        sigma_boundary: level at which f is the identity.
        rho: of the noise levels' grid.
        sigmas: tuned levels by the number of steps; of a sampler graph, its own.
        precision: of the graph's types.
        parity: distance from the checkpoint, measured at export.
        source_sha256: of the checkpoint.
        training: origin of the weights, if known.
        data_file: name of the file of the weights; empty where they are inside.
        target: cpu for standard operators, which every engine runs, tensorrt for those in the forms that it fuses; cuda
            for operators of ONNX Runtime on a GPU.

    Raises:
        ValidationError: A field is unknown, missing or out of range.
    """

    format_version: Literal[1] = 1
    graph: GraphKind
    image_shape: tuple[Size, Size, Size] = Field(description="(C, H, W)")
    num_classes: int = Field(ge=0, le=1_000_000)
    precond: Form
    sigma_min: float = Field(NoiseRange.sigma_min, ge=SMALLEST)
    sigma_max: float = Field(NoiseRange.sigma_max, le=LARGEST)
    sigma_data: float = Field(0.5, gt=0)
    sigma_boundary: float = Field(ge=0)
    rho: float = Field(NoiseRange.rho, ge=0.1, le=100)
    sigmas: dict[int, tuple[float, ...]] = Field(
        default_factory=dict, description="tuned levels per step count; of a sampler graph, its own"
    )
    precision: Precision = "fp32"
    parity: Parity | None = None
    source_sha256: str = Field("", description="of the checkpoint")
    training: TrainingSummary | None = None
    data_file: str = Field(
        "", max_length=255, description="beside this file, holds the weights; empty: they are inside"
    )
    target: Target = Field("cpu", description="the engines whose operators the graph has")

    @field_validator("data_file")
    @classmethod
    def _is_ours(cls, name: str) -> str:
        if name and (not DATA_FILE.fullmatch(name) or ".." in name):
            raise ValueError("it must be the name of a data file in the same folder, as cm-runtime export gives them")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        precond(self.precond, self.sigma_data, self.sigma_boundary)
        if math.prod(self.image_shape) > MOST_PIXELS:
            raise ValueError(f"images of {self.image_shape} have over {MOST_PIXELS} numbers")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must lie below sigma_max {self.sigma_max:g}")
        for steps, levels in self.sigmas.items():
            if len(levels) != steps:
                raise ValueError(f"sigmas for {quantity(steps, 'step')} are {len(levels)}")
            self.noise_range.check(levels)
        if self.graph == "sampler" and len(self.sigmas) != 1:
            raise ValueError("a sampler graph has the noise levels of one number of steps")
        return self

    def __repr__(self) -> str:
        """The graph and its images, on one line; `model_dump` has everything."""
        training = f", {self.training.method} of {self.training.data}" if self.training else ""
        return f"<Manifest of a {self.graph}: {self.images}, {self.precond} form, {self.precision}{training}>"

    __str__ = __repr__

    @property
    def noise_range(self) -> NoiseRange:
        """sigma_min, sigma_max and rho as one value."""
        return NoiseRange(self.sigma_min, self.sigma_max, self.rho)

    @property
    def images(self) -> str:
        """The images' shape and classes, in words."""
        shape = "x".join(map(str, self.image_shape))
        return f"{shape}, {quantity(self.num_classes, 'class')}" if self.num_classes else shape

    @property
    def steps(self) -> int:
        """Number of evaluations that a sampler graph unrolls."""
        (steps,) = self.sigmas
        return steps

    @property
    def is_teacher(self) -> bool:
        """True for a denoiser that was never made consistent: it needs an ODE solver, not a few steps."""
        return self.training is not None and self.training.method == "edm"

    @model_serializer(mode="wrap")
    def _dump(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the data file's name where there is none, and the common target, as before there were any."""
        common = {"data_file": "", "target": "cpu"}
        return {name: value for name, value in whole(self).items() if common.get(name) != value}


def parse_manifest(text: str | bytes, where: str | os.PathLike[str]) -> Manifest:
    """The manifest in ``text``; raises ArtifactError naming the file and the first field that does not fit."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = explain(error, "manifest")
        raise ArtifactError(f"{where}: its cm_runtime manifest is not valid: {fault}") from error


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an ``.onnx`` that cm-runtime exported.

    Args:
        path: the file; its weights are not read.

    Returns:
        The checked manifest.

    Raises:
        ArtifactError: The file is missing, truncated, not ONNX, or without a manifest.
    """
    where = Path(path)
    try:
        with streams.open_file(where, ArtifactError) as file:
            text = onnx_metadata.read(file, os.fstat(file.fileno()).st_size, METADATA_KEY)
    except MalformedError as error:
        raise ArtifactError(f"{where} is not an ONNX file, or is truncated ({error})") from error
    if text is None:
        raise ArtifactError(f"{where} was not exported by cm-runtime; make one with: cm-runtime export CHECKPOINT")
    return parse_manifest(text, where)


def data_path(path: str | os.PathLike[str], manifest: Manifest) -> Path | None:
    """The file that holds the weights of the exported file ``path``, or None where they are inside.

    Raises ArtifactError when it is missing, or no regular file.
    """
    if not manifest.data_file:
        return None
    data = Path(path).with_name(manifest.data_file)
    if streams.exists(data):
        streams.regular(data, ArtifactError)
    else:
        raise ArtifactError(f"{path}: its weights are not there: put {data.name} beside it, or export it again")
    return data
