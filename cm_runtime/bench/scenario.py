"""Scenarios to measure, and the suites that list them.

A suite is a TOML file of groups; a group is a model and lists of choices, every combination of which is a scenario:

    [[group]]
    model = "cifar32"              # a standing network, "default", or a path
    kinds = ["single-stream"]
    steps = [1, 2, 4]
    batches = [1, 8, 64]
    peers = ["diffusers", "torch"]
    quick = { steps = [2], batches = [1] }     # the part that `--quick` measures; without it, nothing
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cm_runtime.choices import ComputePrecision, Precision
from cm_runtime.errors import ConfigError
from cm_runtime.errors.wording import quantity
from cm_runtime.files import streams, toml
from cm_runtime.files.records import Record, explain, first_fault

Kind = Literal["single-stream", "offline", "server"]
Backend = Literal["auto", "ort", "openvino", "torch", "torch.compile"]
Peer = Literal["diffusers", "torch", "torch.compile", "onnx", "openvino"]
PEERS: tuple[Peer, ...] = ("diffusers", "torch", "torch.compile", "onnx", "openvino")
SUITES = Path(__file__).parent / "suites"
MOST_SCENARIOS = 1000  # of a suite, and of a result
BUNDLED = "default"  # the bundled model, where a model is asked for
_NAME = re.compile(
    r"(?s)(?P<model>.*) (?P<kind>single-stream|offline|server) (?P<steps>\d+)x(?P<batch>\d+)(?P<rest>.*)"
)


def model_name(model: str) -> str:
    """The model's name as reports have it: of a path, its last part; of the bundled model, its own."""
    return "fashion-mnist" if model == BUNDLED else Path(model).name or model


def title(name: str) -> str:
    """A scenario's name for people: "default single-stream 2x8" is "fashion-mnist single-stream, 2 steps, batch 8"."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        return name
    most = "up to " if parts["kind"] == "server" else "batch "
    steps = f"{parts['steps']} step" + "s" * (parts["steps"] != "1")  # digits of any length
    words = [f"{model_name(parts['model'])} {parts['kind']}", steps, most + parts["batch"]]
    return ", ".join([*words, *[parts["rest"].strip()] * bool(parts["rest"].strip())])


class Scenario(Record):
    """One thing to measure, in the sense of MLPerf Inference (arXiv 1911.02549).

    single-stream: one request of ``batch`` images after another; its latency counts. offline: ``batch`` images at once,
    in micro-batches of the engine's choice; images a second count. server: requests of one image arrive at random
    (a Poisson process of ``rate`` a second) and are drawn together, at most ``batch`` at once; a request's latency
    counts from its arrival, and its 99th percentile must stay within ``bound_ms``.
    """

    model: str = "default"
    kind: Kind = "single-stream"
    steps: int = Field(2, ge=1, le=1000)
    batch: int = Field(1, ge=1, le=1 << 16)
    backend: Backend = "auto"
    device: str = "auto"
    precision: ComputePrecision = Field("auto", description="of every contender; auto: as the file, and peers in fp32")
    threads: int = Field(0, ge=0, le=1024, description="0: one per core")
    rate: float | None = Field(None, gt=0, le=1e6, description="requests a second, server only")
    bound_ms: float | None = Field(None, gt=0, le=1e9, description="of the 99th percentile of latency, server only")
    peers: tuple[Peer, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Scenario:
        if (self.kind == "server") != (self.rate is not None) or (self.kind == "server") != (self.bound_ms is not None):
            raise ValueError("a server scenario has rate and bound_ms, and no other has")
        if self.kind == "server" and self.peers:
            raise ValueError("peers take whole batches, and have no server scenario")
        if len(set(self.peers)) != len(self.peers):
            raise ValueError("a peer is named twice")
        return self

    @property
    def is_for_torch(self) -> bool:
        """True if a checkpoint is to be run as it is, not exported."""
        return self.backend in ("torch", "torch.compile")

    @property
    def file_precision(self) -> Precision:
        """Types of the file that a checkpoint is exported to, which are what ONNX Runtime computes in."""
        return self.precision if self.precision in ("fp16", "bf16") and self.backend in ("auto", "ort") else "fp32"

    @property
    def name(self) -> str:
        """The key that two runs are matched by: "default single-stream 2x8" is 2 steps, batch 8; see `title`."""
        words = [Path(self.model).name, self.kind, f"{self.steps}x{self.batch}"]
        if self.rate is not None:
            words.append(f"{self.rate:g}/s")
        words += [self.backend] * (self.backend != "auto")
        words += [self.device] * (self.device != "auto")
        words += [self.precision] * (self.precision != "auto")
        words += [f"{self.threads} threads"] * (self.threads > 0)
        return " ".join(words)


class Subset(Record):
    """The part of a group that `--quick` measures; a list left out is the group's own."""

    kinds: tuple[Kind, ...] | None = None
    steps: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    peers: tuple[Peer, ...] | None = None


class Group(Record):
    """A model and lists of choices."""

    model: str = "default"
    kinds: tuple[Kind, ...] = ("single-stream",)
    steps: tuple[int, ...] = (2,)
    batches: tuple[int, ...] = (1,)
    backends: tuple[Backend, ...] = ("auto",)
    devices: tuple[str, ...] = ("auto",)
    precisions: tuple[ComputePrecision, ...] = ("auto",)
    threads: tuple[int, ...] = (0,)
    rate: float | None = None
    bound_ms: float | None = None
    peers: tuple[Peer, ...] = ()
    quick: Subset | None = None

    @model_validator(mode="after")
    def _makes_scenarios(self) -> Group:
        for quick in (False, True) if self.quick else (False,):
            choices = self._part(quick)._choices
            if not all(choices):
                raise ValueError("a list is empty")
            if any(len(set(each)) < len(each) for each in choices):
                raise ValueError("a list names a choice twice")
            if (count := math.prod(map(len, choices))) > MOST_SCENARIOS:
                raise ValueError(
                    f"its lists make {quantity(count, 'scenario')}, and a suite has at most {MOST_SCENARIOS}"
                )
            try:
                self.scenarios(quick)
            except ValidationError as error:
                raise ValueError(" ".join(first_fault(error)).strip()) from error
        return self

    def _part(self, quick: bool) -> Group:
        """The group, or what `--quick` measures of it."""
        return self.model_copy(update=self.quick.model_dump(exclude_none=True)) if quick and self.quick else self

    @property
    def _choices(self) -> tuple[tuple[Any, ...], ...]:
        return self.kinds, self.backends, self.devices, self.precisions, self.threads, self.steps, self.batches

    def scenarios(self, quick: bool = False) -> list[Scenario]:
        """Every combination, in the order in which they are written."""
        if quick and self.quick is None:
            return []
        part, scenarios = self._part(quick), []
        for kind, backend, device, precision, threads, steps, batch in itertools.product(*part._choices):
            server = {"rate": self.rate, "bound_ms": self.bound_ms} if kind == "server" else {"peers": part.peers}
            place = {"device": device, "precision": precision, "threads": threads}
            request = {"kind": kind, "steps": steps, "batch": batch}
            scenarios.append(Scenario(model=self.model, backend=backend, **request, **place, **server))
        return scenarios


class Suite(Record):
    """A suite file."""

    description: str = ""
    group: tuple[Group, ...] = Field(min_length=1, max_length=MOST_SCENARIOS)

    def scenarios(self, quick: bool = False) -> list[Scenario]:
        """All scenarios, or those of the quick setting. Raises ConfigError where two have one name, or are too many."""
        scenarios: list[Scenario] = []
        for group in self.group:
            scenarios += group.scenarios(quick)
            if len(scenarios) > MOST_SCENARIOS:
                raise ConfigError(f"the suite has over {MOST_SCENARIOS} scenarios; split it")
        names = Counter(scenario.name for scenario in scenarios)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ConfigError(f"the suite has two scenarios called {twice[0]!r}")
        return scenarios


def named_suites() -> list[str]:
    """The suites that ship with cm-runtime."""
    return sorted(path.stem for path in SUITES.glob("*.toml"))


def read_suite(name: str) -> Suite:
    """The suite called ``name``, or in the TOML file of that path. Raises ConfigError."""
    path = SUITES / f"{name}.toml" if name in named_suites() else Path(name)
    if not streams.exists(path):
        raise ConfigError(f"there is no suite {name}: give a .toml file, or one of {', '.join(named_suites())}")
    try:
        return Suite.model_validate(toml.read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, 'the whole')}") from error
