"""Things that draw the same images, each in a process of its own, taking turns."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

PAUSE = 0.2  # seconds: ONNX Runtime's threads look for work until then, and would slow the next one down


@dataclass(frozen=True)
class Runner:
    """path: a sampler file of ours, run by ``backend`` in ``precision``; or a checkpoint for the tool ``peer``."""

    path: Path
    backend: str = ""
    precision: str = "auto"
    peer: str = ""


@dataclass(frozen=True)
class Times:
    """What a runner took, in seconds, one number a round, and its images, (N,H,W,C) in [-1, 1]."""

    seconds: list[float]
    images: np.ndarray[Any, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """The median over rounds, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def ratio(slow: Times, fast: Times) -> Ratio:
    """How many times as long ``slow`` took, round by round."""
    each = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(middle, low, high)


def race(
    runners: Mapping[str, Runner],
    z: np.ndarray[Any, Any],
    sigmas: Sequence[float],
    label: np.ndarray[Any, Any] | None,
    work: Path,
    *,
    seconds: float,
    least: int = 5,
) -> dict[str, Times]:
    """z: (K,N,C,H,W) float32, the noise that all of them are given.

    Rounds go on until ``seconds`` have passed, but at least ``least`` of them; before each timed turn stands an untimed
    one, short of batches that take seconds themselves.
    """
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    images = {}
    try:
        for name, runner in runners.items():
            lines[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, runner, z, tuple(sigmas), label, work), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            images[name] = lines[name].recv()
        taken: dict[str, list[float]] = {name: [] for name in runners}
        end = time.monotonic() + seconds
        while time.monotonic() < end or min(map(len, taken.values())) < least:
            for name, line in lines.items():
                time.sleep(PAUSE)
                line.send("draw")
                taken[name].append(line.recv())
    finally:
        for process in processes:
            process.kill()
    return {name: Times(taken[name], images[name]) for name in runners}


def _serve(line: Connection, runner: Runner, z: Any, sigmas: tuple[float, ...], label: Any, work: Path) -> None:
    draw = _drawer(runner, work)
    began = time.perf_counter()
    images = np.asarray(draw(z, sigmas, label))
    is_short = time.perf_counter() - began < 2
    line.send(images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else images)
    while line.recv():
        if is_short:
            draw(z, sigmas, label)
        began = time.perf_counter()
        draw(z, sigmas, label)
        line.send(time.perf_counter() - began)


def _drawer(runner: Runner, work: Path) -> Any:
    if runner.peer:
        from cm_runtime.bench import peers

        return peers.peer(runner.peer, runner.path, work)  # type: ignore[arg-type]
    import cm_runtime as cm

    model = cm.load(runner.path, backend=runner.backend, precision=runner.precision)  # type: ignore[arg-type]
    return lambda z, sigmas, label: model.draw(z, label)
