"""Configuration of a training run: a TOML file, checked whole before anything starts. Unknown keys are refused.

A run is a list of phases, each a method with its own budget. A phase starts from the averaged weights of the one
before, the first from ``init`` if there is one (any checkpoint, see `checkpoints`); cd takes that same model for its
teacher.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from cm_runtime.choices import Form
from cm_runtime.errors import ConfigError
from cm_runtime.files import streams, toml
from cm_runtime.files.records import Record, first_fault
from cm_runtime.networks.unet import NetworkShape
from cm_runtime.schedule import GRID_LIMIT

PRESETS = Path(__file__).parent / "presets"
MOST_STEPS = 10**9
MOST_IMAGES = 1 << 16  # a step
MOST_PIXELS = 4096  # a side


class DataConfig(Record):
    """The images, and their form as the network's input."""

    source: str = Field(description="a data set's name, or a path; see training.data.open_data")
    image_size: int | None = Field(
        None, gt=0, le=MOST_PIXELS, description="resize a folder of pictures to this; None: as they are"
    )
    classes: bool = Field(True, description="condition on the labels where there are labels")
    flip: bool = Field(False, description="mirror half of the images")


Rate = Annotated[float, Field(ge=0, lt=1)]
LogMean = Annotated[float, Field(ge=-20, le=20)]
LogDeviation = Annotated[float, Field(gt=0, le=20)]


class _Phase(Record):
    """Keys of every method. Rates are per step."""

    steps: int = Field(gt=0, le=MOST_STEPS)
    batch: int = Field(gt=0, le=MOST_IMAGES, description="images a step, of all workers together")
    micro_batch: int | None = Field(
        None, gt=0, le=MOST_IMAGES, description="images the network sees at once; the rest of a batch is accumulated"
    )
    optimizer: Literal["radam", "adam"] = "radam"
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    learning_rate: float = Field(gt=0, le=1e38)
    warmup: int = Field(0, ge=0, le=MOST_STEPS, description="steps over which the learning rate rises from 0")
    decay: float = Field(0.0, ge=0, le=1, description="share of the steps, at the end, over which it falls to 0")
    clip: float | None = Field(None, gt=0, le=1e30, description="largest gradient norm; None: any")
    ema: tuple[Rate, ...] = Field((0.999,), min_length=1, max_length=32, description="first: default")
    precision: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="of the network; bf16: under autocast, weights in fp32; fp64: everything, to verify"
    )

    @model_validator(mode="after")
    def _rates_have_names(self) -> _Phase:
        if len({f"{rate:g}" for rate in self.ema}) < len(self.ema):
            raise ValueError("ema rates must differ within six digits: a checkpoint names them so")
        return self


class EdmPhase(_Phase):
    """Denoising score matching (arXiv 2206.00364, table 1): makes a teacher, or the start of ECT."""

    method: Literal["edm"]
    P_mean: LogMean = -1.2
    P_std: LogDeviation = 1.2


class _ConsistencyPhase(_Phase):
    """Parts of every consistency loss lambda(t, r) d(f(x_t, t), f(x_r, r))."""

    distance: Literal["l1", "l2", "huber", "lpips"] = "l2"
    huber_c: float | None = Field(
        None, gt=0, le=1e6, description="pseudo-Huber constant; None: 0.00054 sqrt(C H W) (arXiv 2310.14189)"
    )
    lpips: tuple[str, ...] = Field((), max_length=16, description="files of LPIPS weights; see training.lpips")
    weighting: Literal["one", "gap"] = Field("one", description="lambda: 1, or 1/(t - r)")

    @model_validator(mode="after")
    def _distance_has_its_parts(self) -> _ConsistencyPhase:
        if self.huber_c is not None and self.distance != "huber":
            raise ValueError(f"huber_c belongs to distance huber, not {self.distance}")
        if bool(self.lpips) != (self.distance == "lpips"):
            raise ValueError("distance lpips needs the key lpips, the files of its weights, and no other takes it")
        return self


Growing = TypeVar("Growing", "CtPhase", "IctPhase")


class CdPhase(_ConsistencyPhase):
    """Consistency distillation (arXiv 2303.01469, algorithm 2): the second point is the teacher's ODE step."""

    method: Literal["cd"]
    N: int = Field(18, ge=2, le=GRID_LIMIT, description="points of the Karras grid")
    solver: Literal["euler", "heun"] = "heun"
    teacher: Literal["before", "gaussian"] = Field(
        "before", description="the model before this phase; or the exact denoiser of a Gaussian fitted to the data"
    )
    mu: Rate = Field(0.95, description="decay of the EMA target; 0: the student itself")


def _check_growth(phase: Growing) -> Growing:
    if phase.s1 < phase.s0:
        raise ValueError(f"s1 {phase.s1} must be at least s0 {phase.s0}")
    return phase


class CtPhase(_ConsistencyPhase):
    """Consistency training (arXiv 2303.01469, algorithm 3): the second point is the data with less of the noise."""

    method: Literal["ct"]
    s0: int = Field(2, ge=2, le=GRID_LIMIT, description="N at the start")
    s1: int = Field(150, ge=2, le=GRID_LIMIT, description="N - 1 at the end")
    mu0: Rate = Field(0.9, description="decay of the EMA target at the start; 0: the student itself")

    _N_grows = model_validator(mode="after")(_check_growth)


class IctPhase(_ConsistencyPhase):
    """Improved consistency training (arXiv 2310.14189): N doubles, lognormal bins, no EMA target."""

    method: Literal["ict"]
    distance: Literal["l1", "l2", "huber", "lpips"] = "huber"
    weighting: Literal["one", "gap"] = "gap"
    s0: int = Field(10, ge=1, le=GRID_LIMIT, description="N - 1 at the start")
    s1: int = Field(1280, ge=1, le=GRID_LIMIT, description="N - 1 at the end")
    P_mean: LogMean = -1.1
    P_std: LogDeviation = 2.0

    _N_grows = model_validator(mode="after")(_check_growth)


class EctPhase(_ConsistencyPhase):
    """Easy consistency tuning (arXiv 2406.14548): from a trained denoiser to a consistency function."""

    method: Literal["ect"]
    distance: Literal["l1", "l2", "huber", "lpips"] = "huber"
    weighting: Literal["one", "gap"] = "gap"
    P_mean: LogMean = -1.1
    P_std: LogDeviation = 2.0
    q: float = Field(2.0, gt=1, le=1 << 22, description="how fast r approaches t from stage to stage")
    k: float = Field(8.0, ge=-1e6, le=1e6)
    b: float = Field(1.0, ge=-1e6, le=1e6)
    first_stage: int = Field(0, ge=0, le=10_000, description="above 0 to go on from a model that is consistent already")
    stages: int = Field(8, gt=0, le=10_000, description="equal parts of the phase")

    @model_validator(mode="after")
    def _r_stays_below_t(self) -> EctPhase:
        if (self.first_stage + self.stages) * math.log2(self.q) > 22:
            raise ValueError("q^stages is above 2^22, where r rounds to t in float32: take fewer stages")
        return self


ConsistencyPhase = CdPhase | CtPhase | IctPhase | EctPhase
Phase = EdmPhase | ConsistencyPhase


class TrainConfig(Record):
    """Configuration of a whole run."""

    data: DataConfig
    network: NetworkShape | None = Field(None, description="None: that of init")
    phase: tuple[Annotated[Phase, Field(discriminator="method")], ...] = Field(min_length=1, max_length=100)
    init: str | None = Field(
        None,
        description="a checkpoint to start from, cm-runtime's, OpenAI's or a diffusers folder; None: fresh weights",
    )
    init_precond: Form | None = Field(None, description="the form of an init that does not say its own")
    init_head_channels: int | None = Field(
        None, gt=0, le=1 << 18, description="of an OpenAI init's attention; None: 64"
    )
    init_image_size: int | None = Field(
        None, gt=0, le=MOST_PIXELS, description="of an OpenAI init; None: innermost feature map 8x8"
    )
    precond: Form = Field("edm", description="of the consistency function; an edm phase always trains the edm form")
    sigma_data: float = Field(0.5, ge=1e-6, le=1e6)
    seed: int = Field(0, ge=0, lt=1 << 63)
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; under torchrun each worker has its own cuda:N")
    channels_last: bool = Field(False, description="lay images and weights out so; mostly faster on GPUs")
    compile: bool = Field(False, description="torch.compile the network: minutes at the start, then faster steps")
    save_every: int = Field(200, gt=0, le=MOST_STEPS, description="steps between checkpoints")
    sample_every: int = Field(400, gt=0, le=MOST_STEPS, description="steps between sample grids")
    tensorboard: bool = Field(True, description="write curves and sample grids for TensorBoard")
    weights: Literal["float32", "float16"] = Field("float32", description="how the checkpoint stores them")

    @model_validator(mode="after")
    def _starts_sound(self) -> TrainConfig:
        first = self.phase[0]
        if self.init is None:
            for key in ("init_precond", "init_head_channels", "init_image_size"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} tells of an init, and there is none")
            if self.network is None:
                raise ValueError("give a network, or an init whose network it is")
        if self.init is None and (first.method == "ect" or (first.method == "cd" and first.teacher == "before")):
            raise ValueError(
                f"a {first.method} phase starts from a trained denoiser: give init, or put an edm phase before it"
            )
        return self


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_config(preset_or_path: str | os.PathLike[str], settings: Sequence[str] = ()) -> TrainConfig:
    """Load a preset or a TOML file, with ``key=value`` settings laid over it ("phase.0.steps=10").

    Values are read as TOML, and as plain text where they are not. Raises ConfigError naming the key.
    """
    name = str(preset_or_path)
    path = PRESETS / f"{name}.toml" if name in preset_names() else Path(name)
    if not streams.exists(path):
        raise ConfigError(f"no preset or file {name}; the presets are {', '.join(preset_names())}")
    tree = toml.read(path)
    for setting in settings:
        _lay_over(tree, setting, name)
    return parse_config(tree, name)


def parse_config(tree: Mapping[str, Any], where: str) -> TrainConfig:
    """Check a tree of tables; raises ConfigError naming the first key that does not fit."""
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = first["loc"]
        if len(loc) > 2 and loc[0] == "phase":  # pydantic names the method between the phase's number and its key
            loc = (*loc[:2], *loc[3:])
        key = ".".join(map(str, loc)) or "the whole"
        is_unknown = first["type"] == "extra_forbidden"
        reason = _unknown(first["loc"]) if is_unknown else first_fault(error)[1]
        raise ConfigError(f"{where}: {key}: {reason}") from error


def _unknown(loc: tuple[int | str, ...]) -> str:
    """Suggest names for an unknown key: those near it, or all there are in its place."""
    models: list[type[BaseModel]] = [TrainConfig]
    for part in loc[:-1]:
        within = [each for model in models if part in model.model_fields for each in _models(model, str(part))]
        models = within or [each for each in models if part in _tags(each)] or models
    names = sorted({name for model in models for name in model.model_fields})
    near = difflib.get_close_matches(str(loc[-1])[:100], names)
    return f"unknown key; did you mean {' or '.join(near)}?" if near else f"unknown key; there are {', '.join(names)}"


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """Methods that the model is a phase of."""
    return get_args(model.model_fields["method"].annotation) if "method" in model.model_fields else ()


def _models(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """Models that a field may hold, inside lists and unions too."""
    annotations: list[Any] = [model.model_fields[field].annotation]
    for each in annotations:  # which grows meanwhile
        annotations += get_args(each)
    return [each for each in annotations if isinstance(each, type) and issubclass(each, BaseModel)]


def _lay_over(tree: dict[str, Any], setting: str, where: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, not {setting!r}")
    *folders, last = key.split(".")
    if len(folders) >= toml.MOST_PARTS:
        raise ConfigError(f"--set {key[:40]}...: a key has at most {toml.MOST_PARTS} parts")
    value = toml.parse_value(text, f"{where}: {key}")
    node: Any = tree
    try:
        for folder in folders:
            node = node[int(folder)] if isinstance(node, list) else node.setdefault(folder, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {key}: there is no such key") from error
