"""A contender of a scenario while it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cm_runtime.bench import nvidia
from cm_runtime.bench.results import Agreement
from cm_runtime.bench.worker import Block, Facts, Spec
from cm_runtime.bench.worker_process import HERE, Process, WorkerError

Role = Literal["subject", "base", "peer"]


@dataclass
class Side:
    """A contender, its worker, and its samples so far.

    root: the build that the worker imports; error: why it is out of the contest; blocks: milliseconds a request.
    """

    name: str
    role: Role
    spec: Spec
    root: Path = HERE
    commit: str = ""
    model_sha256: str = ""
    error: WorkerError | None = None
    process: Process | None = None
    facts: Facts | None = None
    images: Any = None
    agreement: Agreement | None = None
    reason: str = ""
    cold_start_s: tuple[float, ...] = ()
    first_s: float | None = None
    warmup: int = 0
    is_stable: bool = True
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    blocks: list[NDArray[np.float64]] = field(default_factory=list)
    device_blocks: list[NDArray[np.float64]] = field(default_factory=list)
    network_ns: int | None = 0
    batches: list[int] = field(default_factory=list)

    @property
    def is_quantised(self) -> bool:
        """True where it draws bytes, as a sampler file does."""
        return self.facts is not None and self.facts.is_quantised

    @property
    def medians(self) -> tuple[float, ...]:
        """Medians of the blocks, in milliseconds."""
        return tuple(float(np.median(block)) for block in self.blocks)

    def ask(self, do: str, **options: Any) -> dict[str, Any] | None:
        """The worker's answer; None where there is none, which is the end of this side."""
        assert self.process is not None
        try:
            return self.process.ask(do, **options)
        except WorkerError as error:
            self.error = error
            return None

    def measure(self, do: str, **options: Any) -> Block | None:
        """The samples of one block, by the worker's ``do``."""
        answer = self.ask(do, **options)
        return None if answer is None else Block(**answer)

    def add(self, block: Block) -> None:
        """Count a block among the samples."""
        self.blocks.append(np.array(block.ns) / 1e6)
        if block.device_ms:
            self.device_blocks.append(np.array(block.device_ms))
        is_timed = self.network_ns is not None and block.network_ns is not None
        self.network_ns = self.network_ns + block.network_ns if is_timed else None  # type: ignore[operator]
        self.batches += block.batches or []

    def read_memory(self) -> None:
        """Note the worker's peak memory."""
        answer = self.ask("usage")
        if answer is not None and self.process is not None and self.facts is not None:
            self.peak_host_bytes = answer["peak_host_bytes"]
            self.peak_device_bytes = None if self.facts.device == "cpu" else nvidia.device_memory([self.process.pid])
