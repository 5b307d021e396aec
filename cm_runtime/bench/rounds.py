"""One scenario: its contenders draw the same images, then take turns.

Nothing is timed before the first request's images have been compared. Then rounds: in each, every contender times one
block of requests, in an order that turns round every time, so that whatever the machine does is done to all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cm_runtime.bench import nvidia, stats
from cm_runtime.bench.contenders import Side
from cm_runtime.bench.results import MOST_BLOCKS, Agreement, Estimate
from cm_runtime.bench.scenario import Scenario
from cm_runtime.bench.worker_process import Process, WorkerError
from cm_runtime.sampling import to_uint8

AGREEMENT = 1e-3  # largest difference of a pixel in [-1, 1] before quantisation
GREY = 1.001 * 2 / 255  # and after it
BLOCK_S = 0.25
SETTLE_S = 0.02  # before a block, for the threads of the contender before it to stop spinning
STABLE = 0.05
FEWEST_ROUNDS = 3
MOST_REQUESTS = 500  # in a block
WINDOW = 40  # requests in a block of a server scenario
P99_REQUESTS = 800  # that an interval of the 99th percentile takes at least, in blocks of that size
LONGEST = 4  # times the budget, in a server scenario whose 99th percentile takes more of them
QUICK_START = 3.0  # seconds; what starts faster is started three times


@dataclass(frozen=True)
class Limits:
    """When a scenario has been measured enough: seconds for each contender, relative half-width of the intervals."""

    budget_s: float
    interval: float
    seed: int
    allow_different_images: bool = False


@dataclass(frozen=True)
class Observer:
    """look: called between blocks; tell: (share done, what is being done); keep: (side, block, samples)."""

    look: Callable[[], None]
    tell: Callable[[float, str], None]
    keep: Callable[[str, int, dict[str, Any]], None]


def contest(
    scenario: Scenario,
    sides: Sequence[Side],
    threads: int,
    reference: Any | str,
    limits: Limits,
    work: Path,
    observer: Observer,
) -> None:
    """Measures the sides, the first of which is the subject, and leaves in each what was found.

    reference: images (n,H,W,C) float32 of eager torch for the first indices, or why there are none. Raises WorkerError
    where the subject cannot run or draws other images than the reference.
    """
    with ExitStack() as stack:
        subject = sides[0]
        for side in sides:
            observer.tell(0.0, f"starting {side.name}")
            _start(side, threads, work, stack)
            if side.out:
                pass
            elif side is not subject:
                is_allowed = limits.allow_different_images and side.role == "base"
                _compare(side, subject.images, subject.name, subject.is_quantised, is_allowed)
            elif isinstance(reference, str):
                side.found["reason"] = f"not compared with torch: {reference}"
            else:
                _compare(side, reference, "torch")
            if subject.out:
                raise subject.out
        running = [side for side in sides if not side.out]
        (_serve if scenario.kind == "server" else _rounds)(scenario, running, limits, observer)
        if subject.out:
            raise subject.out
        for side in running:
            if not side.out:
                _usage(side)


def _start(side: Side, threads: int, work: Path, stack: ExitStack) -> None:
    """Starts, loads and draws once; three times where that is quick, for the sake of the cold start's spread."""
    starts: list[float] = []
    images = work / "first.npy"
    try:
        if side.spec.get("backend") == "auto":  # measures on first use, and remembers
            with Process(threads, side.root) as process:
                process.ask("load", spec=side.spec)
        while not starts or (side.role == "subject" and len(starts) < 3 and starts[0] < QUICK_START):
            if side.process:
                side.process.close()
            began = time.perf_counter()
            side.process = Process(threads, side.root)
            stack.callback(side.process.close)
            side.facts = side.process.ask("load", spec=side.spec)
            side.found |= side.process.ask("first", path=str(images))
            starts.append(time.perf_counter() - began)
    except WorkerError as error:
        side.out = error
        return
    side.images = np.load(images)
    side.found["cold_start_s"] = tuple(starts)


def _compare(side: Side, expected: Any, against: str, is_quantised: bool = False, is_allowed: bool = False) -> None:
    """Leave out a side whose images differ from those expected by more than rounding does, unless that is allowed.

    Where either draws bytes they are held to one grey level.
    """
    n = min(len(expected), len(side.images))
    if side.images.shape[1:] != expected.shape[1:]:
        side.out = WorkerError(f"its images are {side.images.shape[1:]}, those of {against} {expected.shape[1:]}")
        return
    apart = float(np.abs(side.images[:n] - expected[:n]).max())
    levels = np.abs(_levels(side.images[:n]) - _levels(expected[:n])).max()
    differs = not apart <= (GREY if side.is_quantised or is_quantised else AGREEMENT)
    side.found["agreement"] = Agreement(
        against=against, max_abs=apart, grey_levels=int(levels), is_allowed=differs and is_allowed
    )
    if differs and not is_allowed:
        side.out = WorkerError(f"its images differ from those of {against} by {apart:.2g}; it was not timed")


def _levels(images: Any) -> Any:
    return to_uint8(np.moveaxis(images, -1, 1)).astype(int)


def _rounds(
    scenario: Scenario,
    sides: list[Side],
    limits: Limits,
    observer: Observer,
) -> None:
    plans = {}
    for side in sides:
        observer.tell(0.0, f"warming {side.name} up")
        plans[side.name] = _warm(side, limits)
    budget = limits.budget_s * len(sides)
    began = time.perf_counter()
    for number in range(MOST_BLOCKS):
        spent = time.perf_counter() - began
        if number >= FEWEST_ROUNDS and (spent >= budget or _is_narrow(sides, limits)):
            return
        observer.tell(min(spent / budget, 1.0), f"round {number + 1}")
        for side in sides if number % 2 == 0 else reversed(sides):
            if side.out:
                continue
            if len(sides) > 1:
                time.sleep(SETTLE_S)
            requests, lead = plans[side.name]
            answer = _ask(side, "block", requests=requests, lead=lead)
            if answer is None:
                continue
            side.blocks.append(np.array(answer["ns"]) / 1e6)
            if answer["device_ms"]:
                side.device_blocks.append(np.array(answer["device_ms"]))
            if side.network_ns is not None:
                inside = answer["network_ns"]
                side.network_ns = None if inside is None else side.network_ns + inside
            observer.keep(side.name, number, answer)
            observer.look()
        if sides[0].out:
            return


def _warm(side: Side, limits: Limits) -> tuple[int, int]:
    """Requests until two blocks in a row take the same time, or a fifth of the budget is gone -> (requests, lead)."""
    before, requests, total = side.found["first_s"] * 1e3, 1, 0
    began = time.perf_counter()
    is_stable = False
    while not side.out:
        answer = _ask(side, "block", requests=requests, lead=0)
        if answer is None:
            break
        total += requests
        now = float(np.median(answer["ns"])) / 1e6
        is_stable = abs(now / before - 1) <= STABLE
        before = now
        length = min(BLOCK_S, limits.budget_s / 16) * 1e3
        wanted = max(1, min(MOST_REQUESTS, math.ceil(length / now)))
        if (is_stable and requests >= wanted) or time.perf_counter() - began > limits.budget_s / 5:
            requests = wanted
            break
        requests = wanted
    side.found |= {"warmup": total, "stable": is_stable}
    return requests, int(requests > 1)


def _is_narrow(sides: Sequence[Side], limits: Limits) -> bool:
    """Whether every median, and every ratio to the subject, is known as well as was asked for."""
    if min(len(side.blocks) for side in sides if not side.out) < 2 * stats.FEWEST_BLOCKS:
        return False
    subject = sides[0]
    found = [stats.quantile(side.blocks, 0.5) for side in sides if not side.out]
    found += [stats.ratio(side.medians, subject.medians) for side in sides if side.role == "base" and not side.out]
    return all(_half_width(each) <= limits.interval for each in found)


def _half_width(found: Estimate) -> float:
    if found.low is None or found.high is None:
        return math.inf
    return (found.high - found.low) / 2 / found.value


def _serve(
    scenario: Scenario,
    sides: list[Side],
    limits: Limits,
    observer: Observer,
) -> None:
    """Windows of Poisson arrivals, the same ones for every side."""
    assert scenario.rate is not None
    rng = np.random.default_rng(limits.seed)
    for side in sides:
        observer.tell(0.0, f"warming {side.name} up")
        _ask(side, "serve", arrivals=_arrivals(rng, scenario.rate), most=scenario.batch)
        side.found["warmup"] = WINDOW
    budget = max(limits.budget_s, P99_REQUESTS / scenario.rate) * len(sides)
    began = time.perf_counter()
    for number in range(MOST_BLOCKS):
        spent = time.perf_counter() - began
        is_known = all(stats.latency(side.blocks).p99 for side in sides if not side.out and spent >= budget)
        if number >= stats.FEWEST_BLOCKS and spent >= budget and (is_known or spent >= LONGEST * budget):
            return
        observer.tell(min(spent / budget, 1.0), f"window {number + 1}")
        arrivals = _arrivals(rng, scenario.rate)
        for side in sides if number % 2 == 0 else reversed(sides):
            answer = None if side.out else _ask(side, "serve", arrivals=arrivals, most=scenario.batch)
            if answer is not None:
                side.blocks.append(np.array(answer["ns"]) / 1e6)
                side.batches += answer["batches"]
                observer.keep(side.name, number, answer)
            observer.look()
        if sides[0].out:
            return


def _arrivals(rng: np.random.Generator, rate: float) -> list[float]:
    return [float(second) for second in np.cumsum(rng.exponential(1 / rate, WINDOW))]


def _ask(side: Side, do: str, **what: Any) -> dict[str, Any] | None:
    assert side.process is not None
    try:
        return side.process.ask(do, **what)
    except WorkerError as error:
        side.out = error
        return None


def _usage(side: Side) -> None:
    answer = _ask(side, "usage")
    if answer is not None and side.process is not None:
        device = nvidia.device_memory([side.process.pid]) if side.facts["device"] != "cpu" else None
        side.found |= {**answer, "peak_device_bytes": device}
