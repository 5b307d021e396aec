"""The result of a run: one JSON file, and every single sample in a file beside it.

The JSON holds all that `compare` and `report` need, block medians included, and grows by one scenario at a time: a run
that is killed leaves what it finished, marked incomplete, unless a finished result was there, which stays. The samples'
file is only ever appended to; the JSON says which file that is, how many of its bytes belong to it, and their SHA-256.
The format is versioned, and `schema.json` beside this file is its JSON Schema: later versions read it for good.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import FailFast, Field, ValidationError, model_validator

from cm_runtime.bench.scenario import MOST_SCENARIOS, Backend, Kind
from cm_runtime.errors import ArtifactError
from cm_runtime.files import atomic, streams
from cm_runtime.files.records import Record, explain

FORMAT_VERSION = 1
MOST_BYTES = 16 << 20  # a hundred times what forty scenarios with their peers take
MOST_BLOCKS = 10_000  # of a contender, which measures for at most as many rounds
MOST_CONTENDERS = 32
SUBJECT = "cm-runtime"
BASE = "base"
SCHEMA = Path(__file__).parent / "schema.json"


Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], FailFast()]  # names its first fault only, however many there are
Whole = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Quantity = Annotated[float, Field(ge=0, le=1e100)]
Milliseconds = Annotated[float, Field(ge=1e-6, le=1e9)]  # a nanosecond to eleven days


class Estimate(Record):
    """A value and its 95% interval; no interval where there were too few samples for one."""

    value: Quantity
    low: Quantity | None = None
    high: Quantity | None = None


class Latency(Record):
    """Milliseconds a request; a percentile is null where there were too few samples to bound it from above."""

    samples: Whole = Field(ge=1)
    blocks: Whole = Field(ge=1)
    p50: Estimate
    p90: Estimate | None = None
    p95: Estimate | None = None
    p99: Estimate | None = None


class Agreement(Record):
    """Difference of the first request's images from those of ``against``, before quantisation, in [-1, 1] units."""

    against: str
    max_abs: float = Field(ge=0)
    grey_levels: Whole = Field(ge=0, description="largest difference after quantisation to 8 bits")
    is_allowed: bool = Field(False, description="whether it is more than rounding, and was allowed: another model's")

    @property
    def text(self) -> str:
        """The difference in a sentence."""
        levels = f"{self.grey_levels} of 255 grey levels"
        return f"images differ by {self.max_abs:.2g} ({levels}) from those of {self.against}"


class ServerResult(Record):
    """The outcome of a server scenario."""

    rate: float = Field(description="requests a second that arrived")
    bound_ms: float
    met: bool = Field(description="whether the upper end of p99's interval is within the bound")
    mean_batch: float = Field(description="images drawn together")


class Contender(Record):
    """One side of a scenario: cm-runtime itself, the base it is compared with, or a peer.

    Peers have no cold start, loading and memory: they first convert the model.
    """

    name: str
    role: Literal["subject", "base", "peer"]
    status: Literal["measured", "absent", "failed"]
    reason: str = Field("", description="why it is absent, or what failed")
    version: str = ""
    commit: str = ""
    model_sha256: str = ""
    agreement: Agreement | None = None
    latency: Latency | None = None
    device_latency: Latency | None = Field(None, description="the same between two events on the device's stream")
    images_per_s: Estimate | None = None
    time_ratio: Estimate | None = Field(None, description="its time over cm-runtime's, by round; above 1: slower")
    cold_start_s: Many[float] = Field(
        (), max_length=1000, description="from starting Python to the first images, each launch"
    )
    load_s: float | None = Field(None, description="from the file to an engine that is ready, its import included")
    first_s: float | None = Field(None, description="the first request; engines that compile late do so there")
    peak_host_bytes: Whole | None = Field(None, ge=0, description="resident pages, mapped files included")
    peak_device_bytes: Whole | None = Field(None, ge=0)
    outside_network: float | None = Field(None, description="share of the time not spent in network evaluations")
    gflop_per_s: float | None = None
    peak_fraction: float | None = Field(None, description="of the matrix product measured in the same run")
    warmup: Whole = Field(0, description="requests before the first that counts")
    stable: bool = Field(True, description="whether two blocks in a row agreed when the warm-up ended")
    micro_batch: Whole | None = None
    block_ms: Many[Milliseconds] = Field(
        (), max_length=MOST_BLOCKS, description="median of each block, in the order of the rounds"
    )
    served: ServerResult | None = None


class ModelFacts(Record):
    """The model of a scenario."""

    path: str = Field(description="as it was asked for: a path, default, or the name of a standing network")
    sha256: str
    source_sha256: str = ""
    image_shape: tuple[Whole, Whole, Whole]
    num_classes: Whole = Field(ge=0)
    precision: str
    export_parity: float | None = Field(None, description="largest difference from torch that its export recorded")
    export_s: float | None = Field(None, description="making it from its checkpoint, where this run did")
    bytes: Whole = Field(ge=0)
    gflop: float | None = Field(
        None, gt=0, description="of one evaluation of one image; a product and a sum count as two"
    )


class ScenarioResult(Record):
    """A scenario's contenders, or why there are none."""

    name: str
    model: str
    kind: Kind
    steps: Whole = Field(ge=1)
    sigmas: Many[float] = Field(max_length=1000)
    batch: Whole = Field(ge=1)
    rate: float | None = Field(None, description="requests a second, of a server scenario")
    bound_ms: float | None = Field(None, description="of p99, of a server scenario")
    backend: Backend = Field(description="as asked for")
    engine: str = Field("", description="what that was: onnxruntime 1.32.0")
    device: str
    precision: str = Field("auto", max_length=8, description="as asked for, of every contender")
    threads: Whole = Field(ge=1, description="given to the engine")
    status: Literal["measured", "failed"]
    reason: str = ""
    facts: ModelFacts | None = None
    contenders: Many[Contender] = Field((), max_length=MOST_CONTENDERS)

    def contender(self, name: str) -> Contender | None:
        """The one called ``name``."""
        return next((each for each in self.contenders if each.name == name), None)


class Processor(Record):
    """The CPU."""

    model: str
    cores: Whole = Field(description="that this process may run on")
    sockets: Whole | None = None
    flags: Many[str] = Field(
        (), max_length=1000, description="of those that matter here: avx2, avx512f, amx_bf16, asimd, ..."
    )
    governor: str | None = None
    asked_mhz: float | None = Field(None, description="the clock's upper limit as set, where the kernel tells")
    limit_cores: float | None = Field(None, description="a container's limit")
    memory_bytes: Whole


class Gpu(Record):
    """One NVIDIA GPU, as nvidia-smi tells."""

    name: str
    uuid: str = ""
    driver: str
    memory_bytes: Whole
    power_limit_w: float | None = None
    asked_mhz: float | None = Field(None, description="application clock of the processors")
    max_mhz: float | None = None


class Machine(Record):
    """The machine of a result; two results compare where it is the same."""

    processor: Processor
    gpus: Many[Gpu] = Field((), max_length=1024)
    kernel: str
    architecture: str
    libc: str
    is_virtual: bool
    python: str
    packages: dict[str, str]


class Conditions(Record):
    """Conditions of the machine during the run."""

    seconds: float
    mhz: tuple[float, float] | None = Field(None, description="lowest and highest clock seen on any core")
    throttled: Whole | None = Field(None, description="thermal throttling events")
    stolen: float | None = Field(None, description="share of processor time that the hypervisor gave to others")
    others: float | None = Field(None, description="share of processor time that other processes used")
    gpu_mhz: tuple[float, float] | None = None
    gpu_celsius: tuple[float, float] | None = None
    gpu_throttled: Many[str] = Field((), max_length=1000, description="reasons that nvidia-smi gave")


class Peaks(Record):
    """Peak rates of the machine, measured before the first scenario and after the last."""

    threads: Whole
    device: str
    matrix_gflop_per_s: Estimate = Field(description="float32 product of two square matrices")
    copy_gb_per_s: Estimate = Field(description="bytes read and written, of arrays beyond the caches")
    library: str
    drift: float | None = Field(
        None, ge=-1, le=1e12, description="of the matrix product over the run: largest change, as a share"
    )

    @model_validator(mode="after")
    def _multiplies(self) -> Peaks:
        if not 1e-6 <= self.matrix_gflop_per_s.value <= 1e12:
            raise ValueError(f"no machine multiplies matrices at {self.matrix_gflop_per_s.value:g} GFLOP/s")
        return self


class Samples(Record):
    """The file of every sample."""

    file: str
    bytes: Whole
    sha256: str


class Settings(Record):
    """Settings of the run."""

    budget_s: float = Field(description="for each contender of a scenario")
    interval: float = Field(description="half the width of a median's interval, as a share, at which it stops")
    quick: bool
    seed: Whole
    allow_different_images: bool = Field(False, description="whether a base that draws other images is timed too")


class Result(Record):
    """A whole run."""

    format_version: Literal[1] = 1
    tool: str
    commit: str = ""
    created: str = Field(description="UTC, ISO 8601")
    command: str
    complete: bool
    settings: Settings
    machine: Machine
    conditions: Conditions | None = None
    peaks: Many[Peaks] = Field((), max_length=MOST_SCENARIOS)
    samples: Samples | None = None
    planned: Whole = Field(0, ge=0, description="scenarios, finished or not")
    left_out: Many[str] = Field(
        (), max_length=MOST_SCENARIOS, description="scenarios of the suite that the quick setting leaves out"
    )
    scenarios: Many[ScenarioResult] = Field((), max_length=MOST_SCENARIOS)

    @model_validator(mode="after")
    def _names_differ(self) -> Result:
        names = Counter(each.name for each in self.scenarios)
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"two scenarios are called {twice!r}")
        return self


def schema() -> str:
    """The JSON Schema of `Result`, as `schema.json` holds it."""
    return json.dumps(Result.model_json_schema(mode="serialization"), indent=1, sort_keys=True) + "\n"


def write(result: Result, path: str | os.PathLike[str]) -> None:
    """Replace ``path`` in one step. Raises OutputError."""
    with atomic.write(path) as temporary:
        temporary.write_text(result.model_dump_json(indent=1, exclude_defaults=False) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Result:
    """A result file of this version or an older one. Raises ArtifactError."""
    content = streams.read_bytes(path, ArtifactError, MOST_BYTES)
    try:
        return Result.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{path}{_fault(content, error)}") from error


def _fault(content: bytes, error: ValidationError) -> str:
    """The reason why ``content`` is no result, as it follows the file's name."""
    try:
        raw: Any = json.loads(content)
    except (ValueError, RecursionError):
        return " is not JSON, or is truncated"
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or "scenarios" not in raw:
        return " is no result of cm-runtime bench run"
    if version > FORMAT_VERSION:
        return f" has format {version}; this cm-runtime reads up to {FORMAT_VERSION}: update it"
    return f": {explain(error, 'the whole')}"
