"""Meaning of an extractor's input and outputs: from its metadata, its graph or the options; never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from cm_runtime.errors import ArtifactError, RequestError
from cm_runtime.files.records import Record, explain

METADATA_KEY = "cm_runtime_extractor"

Layout = Literal["NHWC", "NCHW"]
Range = Literal["-1:1", "0:1", "0:255"]
RANGES: dict[Range, tuple[float, float]] = {"-1:1": (-1, 1), "0:1": (0, 1), "0:255": (0, 255)}


class Preparation(Record):
    """Conversion of images to an extractor's input, and its outputs; JSON under the key cm_runtime_extractor.

    value_range: black and white; resize: the treatment of images of another size than a fixed input's.
    """

    format_version: Literal[1] = 1
    layout: Layout
    value_range: Range
    resize: Literal["none", "bicubic"]
    features: str
    logits: str | None = None


def from_metadata(path: Path, metadata: str, shape: Sequence[Any], outputs: Sequence[str]) -> Preparation:
    """Parse the preparation in a file's metadata. Raises ArtifactError if it does not fit input and outputs."""
    try:
        preparation = Preparation.model_validate_json(metadata)
    except ValidationError as error:
        raise ArtifactError(f"{path}: its extractor metadata is not valid: {explain(error, METADATA_KEY)}") from error
    names = {preparation.features, preparation.logits or preparation.features}
    if not names <= set(outputs) or preparation.layout not in _layouts(shape):
        raise ArtifactError(f"{path}: its extractor metadata does not fit its graph")
    return preparation


def from_graph(
    path: Path, is_uint8: bool, shape: Sequence[Any], outputs: Sequence[str], value_range: str | None, name: str | None
) -> Preparation:
    """Derive the preparation of a file without metadata from its graph and the options --range and --output-name.

    Raises ArtifactError for a graph that cannot be an extractor, RequestError for an option that is missing or wrong.
    """
    layouts = _layouts(shape)
    if len(layouts) != 1:
        raise ArtifactError(
            f"{path} takes {list(shape)}; an extractor's images have 1 or 3 channels, in the second or the last place"
        )
    if name is None:
        choices = ["features"] if "features" in outputs else list(outputs)
        if len(choices) != 1:
            raise RequestError(f"{path} has several outputs; name the features with --output-name {'|'.join(choices)}")
        name = choices[0]
    elif name not in outputs:
        raise RequestError(f"{path} has no output {name!r}; it has {', '.join(outputs)}")
    return Preparation(
        layout=layouts[0],
        value_range=_range(path, is_uint8, value_range),
        resize="bicubic",
        features=name,
        logits="logits" if "logits" in outputs and name != "logits" else None,
    )


def _range(path: Path, is_uint8: bool, value_range: str | None) -> Range:
    if is_uint8:
        if value_range not in (None, "0:255"):
            raise RequestError(f"{path} takes uint8, which is 0:255; leave --range out")
        return "0:255"
    for each in RANGES:
        if value_range == each:
            return each
    if value_range is None:
        raise RequestError(f"{path} does not say what its pixels range over; give --range {'|'.join(RANGES)}")
    raise RequestError(f"--range is one of {', '.join(RANGES)}, not {value_range!r}")


def _layouts(shape: Sequence[Any]) -> list[Layout]:
    """Layouts that an input's shape allows."""
    axes: dict[Layout, int] = {"NCHW": 1, "NHWC": 3}
    return [layout for layout, axis in axes.items() if shape[axis] in (1, 3)]
