"""Contenders that draw the same images, each in a process of its own, taking turns."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from cm_runtime.bench.turns import ratio, take_turns, until

PAUSE = 0.2  # seconds: ONNX Runtime's threads look for work until then, and would slow the next one down


@dataclass(frozen=True)
class Runner:
    """path: a sampler file of cm-runtime for ``backend`` in ``precision``; or a checkpoint for the tool ``peer``."""

    path: Path
    backend: str = ""
    precision: str = "auto"
    peer: str = ""


@dataclass(frozen=True)
class Times:
    """The seconds of a runner, one number a round, and its images, (N,H,W,C) in [-1, 1]."""

    seconds: list[float]
    images: np.ndarray[Any, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def ratio_text(slow: Times, fast: Times) -> str:
    """The time of ``slow`` over that of ``fast``, round by round: 1.30x [1.28, 1.33], the median and the quartiles."""
    return "{:.2f}x [{:.2f}, {:.2f}]".format(*ratio(slow.seconds, fast.seconds))


def race(
    runners: Mapping[str, Runner],
    z: np.ndarray[Any, Any],
    sigmas: Sequence[float],
    label: np.ndarray[Any, Any] | None,
    work: Path,
    *,
    seconds: float,
) -> dict[str, Times]:
    """Time all runners for ``seconds`` on the same noise, z: (K,N,C,H,W) float32, in five rounds at least.

    Before each timed turn stands an untimed one, short of batches that take seconds themselves.
    """
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    images = {}
    try:
        for name, runner in runners.items():
            lines[name], other_end = context.Pipe()
            arguments = other_end, runner, z, tuple(sigmas), label, work
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other_end.close()
            processes.append(process)
            images[name] = lines[name].recv()

        def draw(line: Connection) -> float:
            time.sleep(PAUSE)
            line.send("draw")
            return float(line.recv())

        turns = {name: partial(draw, line) for name, line in lines.items()}
        times = take_turns(turns, until(seconds))
    finally:
        for process in processes:
            process.kill()
    return {name: Times(times[name], images[name]) for name in runners}


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
