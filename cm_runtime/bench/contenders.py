"""A contender of a scenario while it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cm_runtime.bench.worker_process import HERE, Process, WorkerError

Role = Literal["subject", "base", "peer"]


@dataclass
class Side:
    """A contender and its worker. spec: what the worker loads; root: the build that it imports."""

    name: str
    role: Role
    spec: dict[str, Any]
    root: Path = HERE
    commit: str = ""
    model_sha256: str = ""
    process: Process | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    blocks: list[NDArray[np.float64]] = field(default_factory=list)
    device_blocks: list[NDArray[np.float64]] = field(default_factory=list)
    network_ns: int | None = 0
    batches: list[int] = field(default_factory=list)
    images: Any = None
    out: WorkerError | None = None

    @property
    def is_quantised(self) -> bool:
        """True where it draws bytes, as a sampler file does."""
        return bool(self.facts.get("is_quantised"))

    @property
    def medians(self) -> tuple[float, ...]:
        """Of the blocks, in milliseconds."""
        return tuple(float(np.median(block)) for block in self.blocks)
