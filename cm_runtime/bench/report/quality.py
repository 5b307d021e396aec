"""Reports of `cm-runtime eval -o` on the images of the models that were timed."""

from __future__ import annotations

import os
from pathlib import PurePath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cm_runtime.bench.report.formatting import clean
from cm_runtime.bench.results import Result
from cm_runtime.bench.scenario import model_name
from cm_runtime.errors import ArtifactError
from cm_runtime.files import streams

MOST_BYTES = 1 << 20


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Images(_Read):
    """The source of images; ``sigmas`` and ``sampler`` are of a model's."""

    kind: str
    path: str
    sha256: str = ""
    sampler: str = ""
    sigmas: tuple[float, ...] = Field((), max_length=10_000)
    seed: int | None = None


class Source(_Read):
    """The reference, or the extractor: what distances must share to be compared."""

    path: str = ""
    sha256: str = ""
    count: int | None = None


class Figures(_Read):
    """As `cm_runtime.evaluate.metrics.Figures`."""

    count: int = Field(ge=0)
    frechet_distance: float | None = Field(ge=0)
    precision: float | None = None
    recall: float | None = None
    class_agreement: float | None = None


class Quality(_Read):
    """An eval report, as far as it is shown."""

    cm_runtime: str
    images: Images
    reference: Source | None
    extractor: Source
    figures: Figures

    @property
    def steps(self) -> int | None:
        """Network evaluations an image; None of images that no consistency model drew."""
        return len(self.images.sigmas) if self.images.sampler == "multistep" and self.images.sigmas else None

    @property
    def yardstick(self) -> tuple[str, str]:
        """Distances may stand side by side where this is the same."""
        reference = self.reference or Source()
        return self.extractor.sha256 or self.extractor.path, reference.sha256 or reference.path

    def name(self, result: Result) -> str:
        """The model's name in ``result``, or the name of the file."""
        for scenario in result.scenarios:
            if scenario.facts is not None and self.images.sha256 and scenario.facts.sha256 == self.images.sha256:
                return clean(model_name(scenario.model), 40)
        return clean(PurePath(self.images.path).name or self.images.path, 40)


def read(path: str | os.PathLike[str]) -> Quality:
    """The report of `cm-runtime eval -o`. Raises ArtifactError."""
    content = streams.read_bytes(path, ArtifactError, MOST_BYTES)
    try:
        return Quality.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{path} is no report of cm-runtime eval -o") from error
