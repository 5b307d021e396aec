"""What a training run is: a TOML file, checked whole before anything starts. Unknown keys are refused.

A run is a list of phases, each a method with its own budget; every phase starts from the averaged weights of the
one before. ECT, for one, is an ``edm`` phase followed by an ``ect`` phase.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cm_runtime.errors import ConfigError
from cm_runtime.precond import Form
from cm_runtime.unet import NetworkShape

PRESETS = Path(__file__).parent / "presets"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Strict):
    """Which images, and how they are shown to the network."""

    source: str = Field(description="a data set's name, or a path; see training.data.open_data")
    image_size: int | None = Field(None, gt=0, description="resize a folder of pictures to this; None: as they are")
    classes: bool = Field(True, description="condition on the labels where there are labels")
    flip: bool = Field(False, description="mirror half of the images")


class Phase(_Strict):
    """What every method needs. Rates are per step."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    decay: float = Field(0.0, ge=0, le=1, description="share of the steps, at the end, over which it falls to 0")
    clip: float = Field(10.0, gt=0, description="largest gradient norm")
    ema: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = Field((0.999,), min_length=1, description="first: default")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the network under autocast; weights are fp32")

    @model_validator(mode="after")
    def _rates_have_names(self) -> Phase:
        if len({f"{rate:g}" for rate in self.ema}) < len(self.ema):
            raise ValueError("ema rates must differ within six digits: a checkpoint names them so")
        return self


class EdmPhase(Phase):
    """Denoising score matching (arXiv 2206.00364, table 1): makes a teacher, or the start of ECT."""

    method: Literal["edm"]
    P_mean: float = -1.2
    P_std: float = Field(1.2, gt=0)


class EctPhase(Phase):
    """Easy consistency tuning (arXiv 2406.14548): from a trained denoiser to a consistency function."""

    method: Literal["ect"]
    P_mean: float = -1.1
    P_std: float = Field(2.0, gt=0)
    q: float = Field(2.0, gt=1, description="how fast r approaches t from stage to stage")
    k: float = 8.0
    b: float = 1.0
    stages: int = Field(8, gt=0, description="equal parts of the phase")
    huber_c: float = Field(0.0, ge=0, description="pseudo-Huber constant; 0: the plain norm")

    @model_validator(mode="after")
    def _r_stays_below_t(self) -> EctPhase:
        if self.stages * math.log2(self.q) > 22:
            raise ValueError("q^stages is above 2^22, where r rounds to t in float32: take fewer stages")
        return self


class TrainConfig(_Strict):
    """A whole run."""

    data: DataConfig
    network: NetworkShape
    phase: tuple[Annotated[EdmPhase | EctPhase, Field(discriminator="method")], ...] = Field(min_length=1)
    precond: Form = "edm"
    sigma_data: float = Field(0.5, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    save_every: int = Field(200, gt=0, description="steps between checkpoints")
    sample_every: int = Field(400, gt=0, description="steps between sample grids")
    weights: Literal["float32", "float16"] = Field("float32", description="how the checkpoint stores them")

    @model_validator(mode="after")
    def _starts_sound(self) -> TrainConfig:
        if self.phase[0].method == "ect":
            raise ValueError("an ect phase starts from a trained denoiser: put an edm phase before it")
        return self


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(preset_or_path: str | os.PathLike[str], settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a preset or a TOML file, with ``key=value`` settings laid over it ("phase.0.steps=10").

    Values are read as TOML, and as plain text where they are not. Raises ConfigError naming the key.
    """
    name = str(preset_or_path)
    path = PRESETS / f"{name}.toml" if name in preset_names() else Path(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no preset or file {name}; the presets are {', '.join(preset_names())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid TOML: {error}") from error
    for setting in settings:
        _lay_over(tree, setting)
    return parse_config(tree, name)


def parse_config(tree: Mapping[str, Any], where: str) -> TrainConfig:
    """The config in a tree of tables; raises ConfigError naming the first key that does not fit."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if part not in ("edm", "ect")) or "the whole"
        reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {key}: {reason}") from error


def _lay_over(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, not {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    node: Any = tree
    *folders, last = key.split(".")
    try:
        for folder in folders:
            node = node[int(folder)] if isinstance(node, list) else node.setdefault(folder, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {key}: there is no such key") from error
